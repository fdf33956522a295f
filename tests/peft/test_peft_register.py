# SPDX-License-Identifier: Apache-2.0
"""register of the methods whose configs PEFT does not ask who makes the layers: the model waits, and is its own again. Of LoRA see
test_peft_model.py."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lrkern.peft

peft = pytest.importorskip("peft")
CONFIGS = {
    "adalora": lambda **more: peft.AdaLoraConfig(init_r=4, total_step=9, **{"target_modules": ["up", "down"]} | more),
    "miss": lambda **more: peft.MissConfig(r=4, **{"target_modules": ["up", "down"]} | more),
    "bat": lambda **more: peft.MissConfig(r=4, init_weights="bat", **{"target_modules": ["up", "down"]} | more),
    "vera": lambda **more: peft.VeraConfig(r=4, **{"target_modules": ["up", "down"]} | more),
    "randlora": lambda **more: peft.RandLoraConfig(r=4, **{"target_modules": ["up", "down"]} | more),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def shake(model):
    g = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    return model


def pair(kind, **more):
    ours, stock, config = Net(), Net(), CONFIGS[kind](**more)
    lrkern.peft.register(config, ours)
    for m in ((ours, config), (stock, CONFIGS[kind](**more))):
        torch.manual_seed(3)  # AdaLoRA's factors start from torch's generator
        yield shake(peft.get_peft_model(*m))


@kinds
def test_every_layer_is_fused_from_the_start(kind):
    ours, stock = pair(kind)
    assert (lrkern.peft.report(ours).fused, lrkern.peft.report(stock).fused) == (2, 0)
    assert type(ours.base_model.model) is Net and repr(ours) == repr(stock)
    assert vars(ours.base_model.model).keys() == vars(stock.base_model.model).keys()
    assert [*ours.state_dict()] == [*stock.state_dict()]
    torch.testing.assert_close(ours(X), stock(X), atol=1e-5, rtol=1e-5)
    lrkern.peft.unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


@kinds
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_stock_file(kind, low_cpu_mem_usage, tmp_path):
    _, stock = pair(kind)
    stock.save_pretrained(tmp_path)
    base, config = Net(), peft.PeftConfig.from_pretrained(tmp_path)
    lrkern.peft.register(config, base)
    more = {"low_cpu_mem_usage": True} if low_cpu_mem_usage else {}
    ours = peft.PeftModel.from_pretrained(base, tmp_path, config=config, **more)
    assert lrkern.peft.report(ours).fused == 2 and type(base) is Net
    torch.testing.assert_close(ours(X), stock.eval()(X), atol=1e-5, rtol=1e-5)


def test_injected():
    base, config = Net(), CONFIGS["miss"]()
    lrkern.peft.register(config, base)
    assert lrkern.peft.report(peft.inject_adapter_in_model(config, base)).fused == 2


def test_a_model_of_transformers():
    """get_peft_model, and transformers' own add_adapter."""
    minilm = pytest.importorskip("minilm")
    for add in (
        lambda model, config: peft.get_peft_model(model, config),
        lambda model, config: model.add_adapter(config, "a"),
    ):
        model, config = minilm.bert(1), CONFIGS["miss"](target_modules=["query", "dense"])
        lrkern.peft.register(config, model)
        add(model, config)
        assert type(model) is type(minilm.bert(1)) and lrkern.peft.report(model).fused == 5


@kinds
def test_nothing_else_is_changed(kind):
    config, waiting = CONFIGS[kind](), Net()
    before = config.to_dict()
    lrkern.peft.register(config, waiting)
    assert config.to_dict() == before
    assert lrkern.peft.report(peft.get_peft_model(Net(), config)).fused == 0, "the model is registered, nothing global"
    assert type(waiting).__name__ == "Net" and isinstance(waiting, Net) and repr(waiting) == repr(Net())
    assert torch.equal(waiting(X), Net()(X))
    twin, read = copy.deepcopy(waiting), pickle.loads(pickle.dumps(waiting))
    for m in (twin, read, waiting):
        assert lrkern.peft.report(peft.get_peft_model(m, CONFIGS[kind]())).fused == 2
    other = Net()
    lrkern.peft.register(config, other)
    lrkern.peft.unpatch(other)
    assert type(other) is Net and vars(other).keys() == vars(Net()).keys()
    assert lrkern.peft.report(peft.get_peft_model(other, config)).fused == 0


def test_another_method_than_it_waits_for():
    model = Net()
    lrkern.peft.register(CONFIGS["miss"](), model)
    made = peft.get_peft_model(model, CONFIGS["vera"]())
    assert type(model) is Net and lrkern.peft.report(made).fused == 0
    both = Net()
    for kind in ("miss", "vera", "miss"):
        lrkern.peft.register(CONFIGS[kind](), both)
    assert lrkern.peft.report(peft.get_peft_model(both, CONFIGS["vera"]())).fused == 2


def test_what_peft_refuses_waits_on():
    model, config = Net(), peft.MissConfig(r=5, init_weights="bat", target_modules=["up"])
    lrkern.peft.register(config, model)
    with pytest.raises(ValueError, match="fully divisible"):
        peft.get_peft_model(model, config)
    assert lrkern.peft.report(peft.get_peft_model(model, CONFIGS["bat"]())).fused == 2


@pytest.mark.parametrize(
    "config", [peft.IA3Config(target_modules=["up"]), {}, None, "MISS"], ids=lambda c: type(c).__name__
)
def test_what_is_no_config_of_these(config):
    model = Net()
    must = "config must be a peft.LoraConfig, VeraConfig, RandLoraConfig, MissConfig or AdaLoraConfig, got "
    with pytest.raises(TypeError, match=f"lrkern.peft.register: {must}{type(config).__name__}"):
        lrkern.peft.register(config, model)
    assert type(model) is Net


@kinds
def test_a_model_with_such_layers_or_none_to_adapt(kind):
    ours, _ = pair(kind)
    for model in (ours, nn.Sequential(nn.ReLU())):
        cls = type(model)
        with pytest.raises(
            ValueError, match="must be a model without .* layers yet .patch is for those., with layers to adapt"
        ):
            lrkern.peft.register(CONFIGS[kind](), model)
        assert type(model) is cls
