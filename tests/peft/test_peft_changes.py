# SPDX-License-Identifier: Apache-2.0
"""What happens to one layer of a PEFT model around and after lrkern.peft.patch: it acts as PEFT's own layer does."""

import copy

import pytest
import torch

from minilm import (  # isort: skip
    INNER, adapted, assert_as_exact, assert_equal, assert_patch_changes_nothing, assert_same, bert, first,
    forward, fused_calls, lora_config, lora_layers, outcome, pair, patched, peft, step,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from torch import nn
from torch.nn.utils import parametrize, prune

import lrkern.peft

I = 384


# ---- a module inside is replaced, wrapped, frozen or cast ------------------------------------------------------------


class Halved(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) / 2


class Noise(nn.Module):
    def forward(self, x):
        return x * 1.25


def replaced_base(layer):
    halved = Halved(layer.base_layer.in_features, layer.base_layer.out_features)
    halved.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = halved.requires_grad_(False)


def masked(name):
    def change(layer):
        module = INNER[name](layer)
        module.register_buffer("mask", torch.arange(module.weight.numel()).reshape(module.weight.shape) % 3 != 0)
        prune.custom_from_mask(module, "weight", module.mask)

    return change


def normed(name):
    return lambda layer: nn.utils.weight_norm(INNER[name](layer))


def parametrized(name):
    return lambda layer: parametrize.register_parametrization(INNER[name](layer), "weight", nn.Tanh())


def wide_rank(layer):
    torch.manual_seed(7)
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(I, 600, bias=False), nn.Linear(600, I, bias=False)


class Doubled(peft.tuners.lora.dora.DoraLinearLayer):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * 2


def other_magnitude(layer):
    doubled = Doubled(fan_in_fan_out=False)
    doubled.weight = layer.lora_magnitude_vector["default"].weight
    layer.lora_magnitude_vector["default"] = doubled


UNFUSED = {
    "magnitude": other_magnitude,
    "dropout": lambda layer: layer.lora_dropout.update({"default": Noise()}),
    "A masked": masked("lora_A"),
    "B masked": masked("lora_B"),
    "A parametrized": parametrized("lora_A"),
    "A normed": normed("lora_A"),
    "rank 600": wide_rank,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("change", "dora"), [(c, d) for c in UNFUSED for d in (False, True) if d or c != "magnitude"])
def test_a_change_that_ends_fusion_runs_as_peft_bit_for_bit(change, dora):
    stock, ours = pair(target_modules=["query"], use_dora=dora)
    for model in (stock, ours):
        UNFUSED[change](first(model))
    with fused_calls() as calls:
        assert_equal(step(ours), step(stock))
    assert not calls and lrkern.peft.report(ours).fused == 0


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [replaced_base, masked("base_layer"), parametrized("base_layer"), normed("base_layer")],
                         ids=["replaced", "masked", "parametrized", "normed"])  # fmt: skip
def test_a_base_that_is_no_plain_linear_any_more_runs_itself(change):
    stock, ours = pair(target_modules=["query"])
    for model in (stock, ours):
        change(first(model))
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls["lora_linear"] == 0
    lrkern.peft.unpatch(ours)
    assert_equal(step(ours), step(stock))


TRAINED = {
    "A frozen": lambda layer: layer.lora_A["default"].requires_grad_(False),
    "B frozen": lambda layer: layer.lora_B["default"].requires_grad_(False),
    "base trains": lambda layer: layer.base_layer.requires_grad_(),
    "nothing trains": lambda layer: layer.requires_grad_(False),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("change", TRAINED)
def test_what_trains_is_what_trains_in_peft(change, dora):
    stock, ours = (m.train() for m in pair(use_dora=dora))
    for model in (stock, ours):
        for layer in lora_layers(model).values():
            TRAINED[change](layer)
    with fused_calls() as calls:
        assert_same(step(ours), step(stock), y_tol=2e-5)
    assert calls.total() == 7


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "B in bfloat16": lambda model: [layer.lora_B.to(torch.bfloat16) for layer in lora_layers(model).values()],
    "A and B in bfloat16": lambda model: [
        (layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)) for layer in lora_layers(model).values()
    ],
    "A and B in float64": lambda model: [
        (layer.lora_A.double(), layer.lora_B.double()) for layer in lora_layers(model).values()
    ],
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_after_patch(cast, dora):
    """16-bit outputs differ by roundings; what PEFT refuses stays refused; what is not fused keeps its bits."""
    stock, ours = pair(use_dora=dora)
    for model in (stock, ours):
        CASTS[cast](model)
    want = outcome(step, stock)
    with fused_calls() as calls:
        got = outcome(step, ours)
    if isinstance(want, type) or isinstance(got, type):
        assert got is want
    elif calls:
        assert calls.total() == 7
        coarse = cast != "float16"
        assert_same(got, want, y_tol=0.1 if coarse else 0.01, grad_tol=0.05 if coarse else 0.01)
    else:
        assert cast not in ("bfloat16", "float16")
        assert_equal(got, want)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_16_bit_base(autocast_adapter_dtype, dora):
    """PEFT's default keeps A and B in float32 over a bfloat16 base."""

    def model():
        torch.manual_seed(1)
        config = lora_config(use_dora=dora)
        return peft.get_peft_model(
            bert(2).to(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype
        ).eval()

    stock, ours, exact = model(), model(), model().double()
    assert first(ours).lora_A["default"].weight.dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    assert lrkern.peft.patch(ours).fused == 13
    with fused_calls() as calls:
        got = step(ours)
    want, truth = step(stock), step(exact)
    assert calls.total() == 13
    assert_as_exact(got, want, truth)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_float32_factors_over_a_16_bit_base_stay_float32(dora):
    """One layer, the same bfloat16 x and dy: PEFT computes the gradients of A and B in float32, and so do we."""
    torch.manual_seed(1)
    config = lora_config(target_modules=["query"], use_dora=dora)
    layer = first(peft.get_peft_model(bert(1).to(torch.bfloat16), config))
    lrkern.peft.patch(layer)
    exact = copy.deepcopy(layer).double()
    lrkern.peft.unpatch(exact)
    x, g = torch.randn(20, I).to(torch.bfloat16), torch.randn(20, I).to(torch.bfloat16)
    for run in (layer, exact):
        with fused_calls() as calls:
            run(x.to(run.base_layer.weight.dtype)).backward(g.to(run.base_layer.weight.dtype))
        assert calls.total() == (run is layer)
    for name in ("lora_A", "lora_B"):
        got, want = (getattr(run, name)["default"].weight.grad for run in (layer, exact))
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-5 * want.norm(), name


def test_train_and_eval_are_per_layer():
    stock, ours = pair(lora_dropout=1.0, target_modules=["query", "value"])
    for model in (stock, ours):
        model.train()
        first(model).eval()
    with fused_calls() as calls:
        assert_same(step(ours), step(stock))
    assert calls == {"lora_linear": 2}


def test_dropout_masks_the_input_of_the_adapter():
    """With A and B orthogonal the mask can be read off y; then PEFT's formula gives output and gradients."""
    p, config = 0.25, {"r": I, "lora_alpha": 2 * I, "target_modules": ["query"]}
    layer = first(patched(1, lora_dropout=p, **config).train())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.orthogonal_(a), nn.init.orthogonal_(b)
    x, g = torch.randn(40, I).sign() * (torch.rand(40, I) + 0.5), torch.randn(40, I)
    x.requires_grad_()
    y = layer(x)
    with torch.no_grad():
        scaled = (y - layer.base_layer(x)) @ b @ a / 2 / x
    mask = scaled.round().clamp(0, 1)
    torch.testing.assert_close(scaled, mask / (1 - p), atol=1e-3, rtol=0)
    assert abs(mask.mean() - (1 - p)) < 0.02  # 5 sigma of 15360 draws
    want = layer.base_layer(x) + 2 * (x * mask / (1 - p) @ a.T @ b.T)
    for got, grad in zip(torch.autograd.grad(y, [x, a, b], g), torch.autograd.grad(want, [x, a, b], g), strict=True):
        assert (got - grad).norm() < 1e-5 * grad.norm()
    torch.manual_seed(5)
    first_draw, second_draw = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first_draw), "torch.manual_seed decides"
    assert not torch.equal(first_draw, second_draw)
    assert torch.equal(layer.eval()(x), layer(x)), "no mask in eval"


def test_a_dropout_probability_is_read_when_the_layer_runs():
    stock, ours = pair(lora_dropout=0.1)
    for model in (stock, ours):
        for layer in lora_layers(model.train()).values():
            layer.lora_dropout["default"].p = 0.0
    assert_same(step(ours), step(stock))


# ---- inputs and ways of calling ---------------------------------------------------------------------------------------

INPUTS = {
    "1-D": lambda: torch.randn(I),
    "no rows": lambda: torch.randn(0, I),
    "4-D": lambda: torch.randn(2, 1, 3, I),
    "columns of a wider tensor": lambda: torch.randn(5, 2 * I)[:, I:],
    "transposed": lambda: torch.randn(I, 5).T,
    "expanded": lambda: torch.randn(1, I).expand(4, I),
    "every second column": lambda: torch.randn(3, 2 * I)[:, ::2],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", INPUTS)
def test_inputs_of_any_layout(shape, config, training):
    stock, ours = (first(m.train(training)) for m in pair(target_modules=["query"], **config))
    x, results = INPUTS[shape](), []
    for layer in (stock, ours):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y.cos().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append((y.detach(), grads | {"x": leaf.grad}))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
    assert_same(results[1], results[0], grad_tol=2e-5)


@pytest.mark.parametrize("args", [(torch.randn(2, I, dtype=torch.float64),), (torch.randn(2, I + 1),),
                                  (torch.randint(9, (2, I)),), (torch.randn(2, I), 3)], ids=["float64", "wide", "int", "two"])  # fmt: skip
def test_what_peft_refuses_stays_refused(args):
    stock, ours = (first(m) for m in pair(target_modules=["query"]))
    want, got = outcome(stock, *args), outcome(ours, *args)
    assert want is got if isinstance(want, type) else torch.equal(want, got)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_inference_mode_then_training(dora):
    stock, ours = pair(use_dora=dora)
    with torch.inference_mode():
        torch.testing.assert_close(forward(ours), forward(stock), atol=2e-5, rtol=0)
    assert_same(step(ours.train()), step(stock.train()), y_tol=2e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_functional_call_uses_the_tensors_it_is_given(dora):
    stock, ours = pair(use_dora=dora)
    forward(ours)
    doubled = {name: p * 2 for name, p in stock.named_parameters() if "lora_" in name}
    x = torch.randn(2, 5, I)
    want, got = (
        torch.func.functional_call(m, doubled, (), {"inputs_embeds": x}).last_hidden_state for m in (stock, ours)
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def forward_derivative(f, x):
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).cos().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).cos().sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "forward-mode derivative": lambda f, x: forward_derivative(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x)[0, :3])(x),
}


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform, config):
    x = torch.randn(3, I)
    want, got = (TRANSFORMS[transform](first(m), x) for m in pair(target_modules=["query"], **config))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_double_backward_is_refused_by_name():
    layer, x = first(patched(1, target_modules=["query"])), torch.randn(2, I, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_backward_twice_and_offloaded_activations(dora):
    stock, ours = (first(m.train()) for m in pair(target_modules=["query"], use_dora=dora))
    x, grads = torch.randn(3, I), []
    for layer in (stock, ours):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            y = layer(x).cos().sum()
        y.backward(retain_graph=True)
        y.backward()
        grads.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    assert_same((torch.zeros(1), grads[1]), (torch.zeros(1), grads[0]))


def test_what_is_written_into_the_output_does_not_reach_back():
    stock, ours = (first(m.train()) for m in pair(target_modules=["query"]))
    x, results = torch.randn(3, I), []
    for layer in (stock, ours):
        y = layer(x)
        y.mul_(3).add_(1)
        y.cos().sum().backward()
        results.append((y.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}))
    assert_same(*results)


def test_meta_tensors():
    layer = first(patched(1, target_modules=["query"]).to("meta"))
    y = layer(torch.empty(2, 5, I, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 5, I) and layer.lora_A["default"].weight.grad.shape == (8, I)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    model, x = patched(1), torch.randn(2, 5, I)
    layer = first(model)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(x[:1]), layer(x[:1]))


# ---- other layers of PEFT --------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A base layer that hands out a tensor of its own, or its input."""

    in_features = out_features = I

    def __init__(self, own):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("table", torch.randn(4, I))
        self.own = own

    def forward(self, x):
        return self.table if self.own else x


def lora_over(base, **config):
    torch.manual_seed(1)
    return peft.tuners.lora.layer.Linear(base, "default", lora_config(**config), r=4, lora_alpha=8).eval()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["its input", "its own"])
def test_what_the_base_returns_is_never_written_to(own, grad):
    base, x = Table(own), torch.randn(4, I)
    stock, ours = lora_over(base), lora_over(base)
    assert lrkern.peft.patch(ours).fused == 1
    before = x.clone(), base.table.clone()
    with torch.set_grad_enabled(grad), fused_calls() as calls:
        for _ in range(2):
            torch.testing.assert_close(ours(x), stock(x), atol=1e-5, rtol=0)
    assert calls == {"lora_add": 2}
    assert torch.equal(x, before[0]) and torch.equal(base.table, before[1])


class Narrow(Table):
    """A base layer that answers in another dtype."""

    def forward(self, x):
        return x.to(torch.bfloat16) * 2


def test_a_base_that_answers_in_another_dtype():
    base, x = Narrow(False), torch.randn(4, I)
    stock, ours = lora_over(base), lora_over(base)
    lrkern.peft.patch(ours)
    want, got = stock(x), ours(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_of_transformers(dora):
    from transformers.pytorch_utils import Conv1D

    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(8, 24))
        config = lora_config(target_modules=["0", "2"], fan_in_fan_out=True, use_dora=dora)
        model = peft.get_peft_model(net, config).eval()
        if ours:
            lrkern.peft.patch(model)
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        y = model(x)
        y.cos().sum().backward()
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("name", ["word_embeddings", "position_embeddings"])
def test_embeddings_run_as_peft(name):
    model = adapted(1, target_modules=[name])
    assert_patch_changes_nothing(model, "Embedding")


def test_attention_and_convolution_run_as_peft():
    torch.manual_seed(1)
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "conv": nn.Conv1d(4, 4, 1)})
    model = peft.inject_adapter_in_model(lora_config(target_modules=["mha", "conv"]), net).eval()
    x, c = torch.randn(3, 2, 16), torch.randn(1, 4, 5)
    want = model["mha"](x, x, x)[0], model["conv"](c)
    report = lrkern.peft.patch(model)
    assert "Conv1d" in report.layers["conv"] and "MultiheadAttention" in report.layers["mha"]
    assert torch.equal(model["mha"](x, x, x)[0], want[0]) and torch.equal(model["conv"](c), want[1])


def test_target_parameters_run_as_peft():
    model = adapted(1, target_modules=[], target_parameters=["query.weight"])
    assert_patch_changes_nothing(model, "ParamWrapper")


def test_another_tuner_below_lora():
    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            bert(1), peft.LoHaConfig(target_modules=["query"], init_weights=False), "loha", mixed=True
        )
        model.add_adapter("lora", lora_config(target_modules=["query", "key"]))
        model.set_adapter(["loha", "lora"])
        model.eval()
        if ours:
            lrkern.peft.patch(model)
        results.append(step(model))
    assert_same(results[1], results[0])
