# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model are compressed, what the report says, and that a refused model is as it was."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lrkern import compress
from lrkern.nn import FactorizedLinear, FusedLoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net(seed=0, **how):
    torch.manual_seed(seed)
    return Net(**how)


def factorized(model):
    return sorted(name for name, m in model.named_modules() if isinstance(m, FactorizedLinear))


LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM  # not for the other process of a test below

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


# ---------------------------------------------------------------------------------------------- which linears

TARGETS = {
    "all": ("all-linear", {}, ["head", "layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]),
    "ends": (["up", "head"], {}, ["head", "layers.0.up", "layers.1.up"]),
    "regex": (r"layers\.1\..*", {}, ["layers.1.down", "layers.1.up"]),
    "excluded": ("all-linear", {"exclude_modules": ["down", "head"]}, ["layers.0.up", "layers.1.up"]),
    "layer": (["up", "down"], {"layers_to_transform": 1, "layers_pattern": "layers"}, ["layers.1.down", "layers.1.up"]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_are_peft_s_rules(kind):
    target, rules, want = TARGETS[kind]
    model = net()
    report = compress.pela(model, 1.5, target_modules=target, **rules)
    assert factorized(model) == sorted(report.layers) == want


def test_all_linear_leaves_out_the_output_embeddings():
    model, ids = llama(), torch.arange(12)[None]
    report = compress.pela(model, 2)
    assert len(factorized(model)) == 14 and type(model.lm_head) is nn.Linear and "lm_head" not in report.layers
    assert model(ids).logits.shape == (1, 12, 50)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.down_proj.A.grad.any()


def test_the_report_counts_what_is_there():
    model = net().requires_grad_(False)
    before = sum(p.numel() for p in model.parameters())
    report = compress.pela(model, 2, target_modules=["up", "down"], layers_to_transform=[0], layers_pattern=["layers"])
    r = 12 * 24 // (2 * 36)
    assert report.layers == {"layers.0.up": (r, 12, 36 * r + 24, 312), "layers.0.down": (r, 12, 36 * r, 288)}
    assert report.before == before and report.parameters == sum(p.numel() for p in model.parameters())
    assert report.trainable == 2 * 36 * r + 24 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.reduction == (12 - r) / 12
    assert str(report).splitlines() == [
        f"{report.parameters} of {before} parameters are left, {report.trainable} train",
        f"layers.0.up: rank {r} of 12, {36 * r + 24} of 312 parameters",
        f"layers.0.down: rank {r} of 12, {36 * r} of 288 parameters",
    ]


# ---------------------------------------------------------------------------------------------- what is refused


def tied():
    model = net()
    model.layers[1].down.weight = model.layers[0].down.weight
    return model


def shared():
    model = net()
    model.layers[1] = model.layers[0]
    return model


def hooked():
    model = net()
    model.layers[1].up.register_forward_hook(lambda m, args, y: y)
    return model


def infinite():
    model = net()
    model.layers[1].up.weight.data[0, 0] = torch.inf
    return model


def adapted():
    model = net()
    model.layers[1].up = FusedLoRALinear.from_linear(model.layers[1].up, r=2)
    return model


def peft_model():
    import peft

    return peft.get_peft_model(net(), peft.LoraConfig(target_modules=["up"]))


MODELS = {
    "tied": (tied, "layers.0.down must be a plain nn.Linear of its own, got one whose weight is used in another place"),
    "shared": (shared, "got one whose weight is used in another place too"),
    "hooked": (
        hooked,
        "layers.1.up must be a plain nn.Linear of its own, got Linear with more to it; see exclude_modules",
    ),
    "infinite": (infinite, "layers.1.up must be a plain nn.Linear of its own, got a weight with inf or nan"),
    "adapted": (adapted, "model must have no adapters yet, got FusedLoRALinear 'layers.1.up'"),
    "peft": (peft_model, "model must have no adapters yet, got Linear 'base_model.model.layers.0.up'"),
    "meta": (lambda: net().to("meta"), "got one on the meta device"),
    "encoder": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "inside nn.MultiheadAttention"),
    "none": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1)),
        "target_modules must name linears of the model, got 'all-linear'",
    ),
    "itself": (lambda: nn.Linear(4, 4), "target_modules must name linears of the model"),
}
CALLS = {
    "welore": lambda model, **how: compress.welore(model, 0.3, **how),
    "lord": lambda model, **how: compress.lord(model, [torch.randn(40, 12)], 2, **how),
    "pela": lambda model, **how: compress.pela(model, 2, **how),
    "trp": lambda model, **how: compress.TRP(model, torch.optim.SGD(model.parameters(), lr=1), **how),
    "maestro": lambda model, **how: compress.maestro(model, **how),
}
NAMES = {name: name if name != "trp" else "TRP" for name in CALLS}


def same(model, modules, flags):
    now = dict(model.named_modules(remove_duplicate=False))
    return now == modules and [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_does_not_fit_is_left_as_it_is(kind, call):
    make, text = MODELS[kind]
    model = make()
    modules, flags = dict(model.named_modules(remove_duplicate=False)), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"^lrkern.compress.{NAMES[call]}: ") as error:
        CALLS[call](model)
    assert text in str(error.value) and same(model, modules, flags)


@pytest.mark.parametrize("call", CALLS)
def test_rules_that_do_not_fit_are_refused(call):
    model = net()
    with pytest.raises(
        ValueError, match="target_modules must name linears of the model, got 'q_proj', which names none"
    ):
        CALLS[call](model, target_modules="q_proj")
    with pytest.raises(ValueError, match="target_modules must be a string or a list of strings"):
        CALLS[call](model, target_modules=3)
    with pytest.raises(TypeError, match=rf"compress\.{NAMES[call]}\(\) got an unexpected keyword argument 'targets'"):
        CALLS[call](model, targets="up")
    assert not factorized(model)


def test_what_is_excluded_may_be_anything():
    for make in (tied, hooked, infinite):
        model = make()
        compress.pela(model, 2, target_modules=["up"], exclude_modules=["layers.1.up"])
        assert factorized(model) == ["layers.0.up"]


def test_encoder_layers_of_torch_read_the_weights_of_their_linears():
    """Why these are refused: evaluation takes a path of its own."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="linear1 must be .* got one whose weight TransformerEncoderLayer reads"):
        compress.pela(model, 1, target_modules=["linear1"])
    model.linear1 = FactorizedLinear.from_linear(model.linear1, 4)
    with pytest.raises(AttributeError, match="weight"):
        model.eval()(torch.randn(1, 3, 8))


# ---------------------------------------------------------------------------------------------- restored


def test_compressed_models_are_restored_in_another_process(tmp_path):
    x, kept = torch.randn(5, 12), {}
    for call in ("welore", "lord", "pela"):
        model = net()
        CALLS[call](model)
        kept[call] = {"state": model.state_dict(), "y": model(x).detach()}
    torch.save({"x": x, "kept": kept}, tmp_path / "m.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from test_models import net\n"
        "from lrkern import compress; file = torch.load(sys.argv[1])\n"
        "for call, kept in file['kept'].items():\n"
        "    model = net(seed=9); compress.restore(model, kept['state'])\n"
        "    assert torch.equal(model(file['x']), kept['y']); print(call)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.pt"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["welore", "lord", "pela"], done.stderr


def test_what_fits_no_model_is_not_restored():
    model = net()
    compress.pela(model, 2)
    state = model.state_dict()
    wrong = {
        r"state must be of this model, compressed; layers.0.up.A and 1 more are not": {
            k: t for k, t in state.items() if k != "layers.0.up.B"
        },
        r"other must be a plain nn.Linear of this model": state
        | {"other.A": torch.zeros(2, 3), "other.B": torch.zeros(4, 2)},
        r"factors of layers.0.up must be \[r, 12\] and \[24, r\], got \[4, 11\] and \[24, 4\]": state
        | {"layers.0.up.A": torch.zeros(4, 11)},
        r"state must be of this model, compressed; head.bias": {k: t for k, t in state.items() if k != "head.bias"},
    }
    for text, bad in wrong.items():
        dense = net(seed=5)
        before, modules = copy.deepcopy(dense.state_dict()), dict(dense.named_modules())
        with pytest.raises(ValueError, match=text):
            compress.restore(dense, bad)
        assert dict(dense.named_modules()) == modules
        assert all(torch.equal(t, before[k]) for k, t in dense.state_dict().items())


def test_models_of_transformers_train_after_it():
    """A BERT of two layers, whose linears have biases: one step of each method's factors, in bfloat16 autocast."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=60)
    ids = torch.randint(60, (4, 9))
    ways = {
        "welore": lambda m: compress.welore(m, 0.4),
        "lord": lambda m: compress.lord(
            m, [{"input_ids": ids}] * 2, 8, target_modules=["query", "dense"], exclude_modules=r".*pooler.*"
        ),
        "pela": lambda m: compress.pela(m, 2),
    }
    for name, way in ways.items():
        model = BertModel(config).eval()
        report = way(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert factorized(model) and report.trainable == sum(p.numel() for p in trained)
        before = [p.detach().clone() for p in trained]
        with torch.autocast("cpu", torch.bfloat16):
            model(ids).last_hidden_state.square().mean().backward()
        torch.optim.SGD(trained, lr=1.0).step()
        layer = model.get_submodule(factorized(model)[0])
        assert layer.A.grad.any() and layer.B.grad.any() and layer.bias is not None, name
        assert any(not torch.equal(p, q) for p, q in zip(trained, before, strict=True))
