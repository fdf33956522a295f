# SPDX-License-Identifier: Apache-2.0
"""ALLoRA, Hydra, COLA and LoRTA: what they promise beyond their formulas (test_methods.py). ResLoRA is in test_reslora.py."""

import copy

import pytest
import torch
from branch_models import KINDS, D, N, Stack, adapted, data, of_kind, shaken
from recorder import Recorder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from variant_kinds import EACH, change, make

from lrkern import functional as F
from lrkern.nn.variants import ALLoRALinear, COLALinear, HydraLinear, LoRTALinear
from lrkern.ops.dispatch import library, use_library


def calls_of(call):
    """How often each op runs."""
    recorder = Recorder(library(), "cpu")
    with use_library(recorder):
        call()
    return dict(recorder.calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_two_processes(kind, in_two_processes):
    assert not (error := in_two_processes("branch_models.py")[kind]), error


# ---------------------------------------------------------------------------------------------------- ALLoRA


def test_allora_rates_are_those_of_the_rows_of_the_product():
    a, b = torch.randn(5, 40), torch.randn(30, 5)
    norms = (b.double() @ a.double()).norm(dim=1)
    for eta2 in (1.0, 2.0, 4.0):
        torch.testing.assert_close(F.allora_rates(a, b, eta2).double(), (norms + 1 / eta2) ** -0.5, rtol=1e-6, atol=0)
        torch.testing.assert_close(F.allora_rates(a, 0 * b, eta2), torch.full((30,), eta2**0.5))


def test_allora_begins_as_lora_of_a_larger_rate_and_gives_x_the_plain_gradient():
    layer = ALLoRALinear.from_linear(nn.Linear(24, 16), r=4, eta2=4.0)
    x, dy = torch.randn(9, 24, requires_grad=True), torch.randn(9, 16)
    got = torch.autograd.grad(layer(x), [layer.lora_A, layer.lora_B], dy)
    lora = lambda: F.lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B)
    want = torch.autograd.grad(lora(), [layer.lora_A, layer.lora_B], dy)
    torch.testing.assert_close(got, tuple(2 * g for g in want))
    change(layer, EACH["allora"])
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (layer(x), lora())))
    assert torch.equal(layer(x), lora())


def test_allora_passes_over_dy_twice_and_once_where_x_has_no_gradient():
    layer = change(make(EACH["allora"]), EACH["allora"])
    for x, more in (
        (torch.randn(9, 24), {}),
        (torch.randn(9, 24).requires_grad_(), {"lora_shrink": 1, "lora_expand_": 1}),
    ):
        y = layer(x)
        assert calls_of(y.sum().backward) == {"linear_expand_bwd": 1, "lora_shrink_bwd": 1} | more


# ---------------------------------------------------------------------------------------------------- Hydra


def hydra(bias=True, **more):
    torch.manual_seed(3)
    return shaken(HydraLinear.from_linear(nn.Linear(24, 16, bias), r=4, scaling=0.75, **more))


def test_hydra_merges_into_w_and_bias():
    layer, x = hydra().eval(), torch.randn(7, 24)
    base, y = copy.deepcopy(layer.base_layer), layer(x)
    behind, w = layer.sequential_B @ layer.sequential_A, base.weight
    layer.merge()
    torch.testing.assert_close(layer.base_layer.bias, base.bias + 0.75 * behind @ base.bias)
    by_formula = w + 0.75 * (layer.parallel_B @ layer.parallel_A + behind @ w)
    torch.testing.assert_close(layer.base_layer.weight, by_formula)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), by_formula - w, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # what is written while merged acts from unmerge on
        layer.sequential_A.add_(1.0)
    copied = copy.deepcopy(layer)
    for m in (layer, copied):
        m.unmerge()
        torch.testing.assert_close(m.base_layer.weight, w)
        torch.testing.assert_close(m.base_layer.bias, base.bias)
        m.unmerge()
        torch.testing.assert_close(m.base_layer.bias, base.bias)


def test_hydra_whose_merge_overflows_is_as_it_was():
    for what in ("weight", "bias"):
        layer = hydra().to(torch.float16)
        before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
        with torch.no_grad():
            layer.sequential_B.fill_(1.0)
            layer.sequential_A.fill_(1.0)
            getattr(layer.base_layer, what).fill_(6e4)
            before[what].fill_(6e4)
        with pytest.raises(ValueError, match="HydraLinear.merge: .*finite"):
            layer.merge()
        assert not layer.merged and all(torch.equal(before[k], v) for k, v in layer.base_layer.state_dict().items())


def test_hydra_without_a_bias_is_a_lora_and_with_one_is_not():
    with_bias, layer, x = hydra(), hydra(bias=False), torch.randn(7, 24)
    assert layer.low_rank and not with_bias.low_rank
    a, b, scale = layer.factors()
    assert a.shape == (8, 24) and b.shape == (16, 8) and layer.lora_rank == 8
    torch.testing.assert_close(layer.base_layer(x) + scale * x @ a.mT @ b.mT, layer(x), rtol=1e-5, atol=1e-5)
    layer.eval().merge()
    torch.testing.assert_close(layer.factors()[0], a)  # of the W before
    layer.unmerge()
    layer.base_layer.register_forward_hook(lambda m, args, y: 2 * y)  # y0 is not x Wᵀ
    assert not layer.low_rank
    assert not HydraLinear.from_linear(nn.Linear(24, 16, bias=False, device="meta")).low_rank
    with pytest.raises(ValueError, match="HydraLinear: r must be a whole number in 1..255, got 256"):
        HydraLinear(8, 8, r=256)


def test_biases_of_branches_are_of_the_bias():
    layer, x = hydra(branch_bias=True).eval(), torch.randn(7, 24)
    y, before = layer(x), layer.base_layer.bias.clone()
    assert not layer.low_rank
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.bias, before)
    none = hydra(bias=False, branch_bias=True)
    assert not none.low_rank
    with pytest.raises(RuntimeError, match="HydraLinear.merge: the layer must have a bias, to which its branches' add"):
        none.merge()
    assert torch.equal(none.base_layer.weight, hydra(bias=False).base_layer.weight)
    with pytest.raises(RuntimeError, match="lrkern::hydra_add: inner and outer must come together, got inner"):
        F.hydra_add(y, x, *layer._operands()[:7], inner=torch.zeros(8))


def test_hydra_drops_rank_activations():
    layer, x = hydra(dropout=0.5), torch.randn(50, 24)
    added = layer(x) - layer.base_layer(x)
    pieces = torch.cat([x @ layer.parallel_A.mT, layer.base_layer(x) @ layer.sequential_A.mT], 1)
    b = torch.cat([layer.parallel_B, layer.sequential_B], 1)
    kept = torch.linalg.lstsq(b.double(), (added / 0.75).double().mT).solution.mT / pieces  # 8 unknowns in 16 equations
    assert torch.allclose(kept.round(), kept, atol=1e-3) and set(kept.round().unique().tolist()) == {0.0, 2.0}
    assert torch.equal(hydra(dropout=1.0)(x), layer.base_layer(x))


def test_hydra_writes_y_in_one_pass_and_reads_dy_in_one():
    layer, x = hydra(), torch.randn(9, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = layer(x)
    assert sorted(s for s in kept if s[0] == 9) == [(9, 8), (9, 16), (9, 24)]
    assert calls_of(lambda: layer(x)) == {"lora_shrink": 2, "lora_expand_": 1}
    assert calls_of(y.sum().backward) == {"linear_expand_bwd": 1, "lora_shrink_bwd": 2, "lora_expand_": 2}


# ---------------------------------------------------------------------------------------------------- COLA


def trained(layer, steps=3):
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.05)
    g = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(32, 24, generator=g)).square().mean().backward()
        optimizer.step()
    return layer


def test_cola_is_lora_added_to_w_at_each_restart():
    """The paper's procedure, in which a plain LoRA is merged and begun again, beside the chain over a W that stays."""
    torch.manual_seed(0)
    layer, x = COLALinear.from_linear(nn.Linear(24, 20), r=2), torch.randn(9, 24)
    paper, w = copy.deepcopy(layer), layer.base_layer.weight.clone()
    for link in range(4):
        shaken(layer, seed=link)
        trained(layer)
        shaken(paper, seed=link)
        trained(paper)
        y = layer(x)
        torch.testing.assert_close(y, paper(x), rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(layer.delta_weight()) == 2 * (link + 1)
        pair = layer.lora_A, layer.lora_B
        torch.manual_seed(link)
        layer.restart()
        assert (layer.lora_A, layer.lora_B) == pair and layer.links == link + 1 and not layer.lora_B.any()
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            paper.base_layer.weight.add_(paper.delta_weight())
            paper.lora_A.copy_(layer.lora_A)
            paper.lora_B.zero_()
    assert torch.equal(layer.base_layer.weight, w) and layer.lora_rank == 10
    a, b, scale = layer.factors()
    torch.testing.assert_close(layer.base_layer(x) + scale * x @ a.mT @ b.mT, layer(x), rtol=1e-5, atol=1e-5)


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "t.default" not in str(func) and "transpose" not in str(func):
            self.seen |= {
                tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t)
            }
        return out


def chained(**more):
    torch.manual_seed(0)
    layer = COLALinear.from_linear(nn.Linear(24, 20), r=2, **more)
    for link in range(2):
        shaken(layer, seed=link).restart()
    return shaken(layer)


def test_the_chain_of_cola_forms_no_gradient_and_is_not_dropped():
    layer, x = chained(), torch.randn(9, 24, requires_grad=True)
    y = layer(x)
    with Shapes() as formed:
        y.sum().backward()
    assert {(2, 24), (20, 2)} <= formed.seen and not {(4, 24), (20, 4), (4, 20), (6, 24), (20, 6)} & formed.seen, (
        formed.seen
    )
    torch.testing.assert_close(x.grad.sum(0), 9 * (layer.base_layer.weight + layer.delta_weight()).sum(0))
    chain = lambda m: m.base_layer(x) + m.scaling * x @ m.chain_A.mT @ m.chain_B.mT
    none = chained(dropout=1.0)
    torch.testing.assert_close(none(x), chain(none))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_cola_refuses_a_restart_that_would_lose_something():
    layer = chained().eval()
    layer.merge()
    with pytest.raises(RuntimeError, match="COLALinear.restart: the layer must not be merged"):
        layer.restart()
    layer = COLALinear.from_linear(nn.Linear(600, 600), r=256, links=1)
    with pytest.raises(RuntimeError, match="COLALinear.restart: .* ranks of at most 512 together, got 768"):
        layer.restart()
    assert layer.links == 1 and layer.chain_A.shape == (256, 600)
    with pytest.raises(ValueError, match=r"COLALinear: links must give \(links \+ 1\) \* r <= 512 .*, got 2"):
        COLALinear.from_linear(nn.Linear(600, 600), r=256, links=2)


# ---------------------------------------------------------------------------------------------------- LoRTA


class Attention(nn.Module):
    def __init__(self, kv=D):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, kv), nn.Linear(D, D)

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x).tanh() + self.v_proj(x)


class Model(nn.Module):
    def __init__(self, kv=D):
        super().__init__()
        self.layers = nn.Sequential(*(Attention(kv) for _ in range(3)))
        self.config = type("Config", (), {"num_attention_heads": 3})()
        self.requires_grad_(False)

    def forward(self, x):
        return self.layers(x)


def lorta(seed=0, **settings):
    torch.manual_seed(seed)
    return shaken(adapted(Model(), LoRTALinear, **{"r": 4} | settings), seed=seed)


def lorta_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRTALinear)}


def test_all_layers_of_lorta_are_slices_of_one_tensor():
    model = lorta()
    layers = lorta_layers(model)
    first = layers["layers.0.q_proj"]
    a, b, h, m, l = (getattr(first, f"lora_{key}").double() for key in "ABHML")
    assert [*map(len, (a, b, h, m, l))] == [4, D // 3, 3, 3, 3]
    tensor = torch.einsum("ai,ja,ha,ma,la->lmihj", a, b, h, m, l)
    for i in range(3):
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            want = first.scaling * tensor[i, j].reshape(D, D).mT
            torch.testing.assert_close(layers[f"layers.{i}.{name}"].delta_weight().double(), want, rtol=1e-5, atol=1e-6)
    turned = lorta(heads_on="input")
    for n, layer in lorta_layers(turned).items():
        torch.testing.assert_close(layer.delta_weight(), layers[n].delta_weight().mT)


def test_lorta_trains_one_set_of_parameters():
    model, x = lorta(), data()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * (D + D // 3 + 3 + 3 + 3) and len(trained) == 5
    model(x).square().sum().backward()
    together = {key: p.grad.clone() for key, p in model.layers[0].q_proj.coefficients().items()}
    apart = lorta()
    for layer in lorta_layers(apart).values():  # a set each: their gradients add up to the shared one's
        for key, p in layer.coefficients().items():
            setattr(layer, key, nn.Parameter(p.detach().clone()))
    apart(x).square().sum().backward()
    for key, g in together.items():
        torch.testing.assert_close(
            sum(m.get_parameter(key).grad for m in lorta_layers(apart).values()), g, rtol=1e-4, atol=1e-4
        )
    copied = copy.deepcopy(model)
    assert len({id(p) for p in copied.parameters() if p.requires_grad}) == 5


def test_lorta_refuses_layers_that_do_not_fit_one_tensor():
    model = Model(kv=D // 3)
    with pytest.raises(
        ValueError,
        match=r"LoRTALinear: layers.0.k_proj must have layers.0.q_proj's sizes \[12, 12\].*grouped heads.*got \[12, 4\]",
    ):
        adapted(model, LoRTALinear)
    assert not lorta_layers(model)
    with pytest.raises(ValueError, match="heads must be given where model.config has no num_attention_heads"):
        adapted(Stack(), LoRTALinear)
    with pytest.raises(ValueError, match="LoRTALinear: heads must divide output features, 12, got 5"):
        adapted(Stack(), LoRTALinear, heads=5)
    with pytest.raises(ValueError, match="LoRTALinear: layer must be a whole number in 0..1, got 2"):
        LoRTALinear.from_linear(nn.Linear(8, 8), layers=2, layer=2)
    with pytest.raises(ValueError, match="LoRTALinear: layer must be left out, it follows from a layer's place, got 1"):
        adapted(Model(), LoRTALinear, layer=1)
    narrow, wide = (LoRTALinear.from_linear(nn.Linear(8, 8), r=r) for r in (2, 3))
    with pytest.raises(ValueError, match="LoRTALinear: b must have coefficients like those of a"):
        LoRTALinear.connect({"a": narrow, "b": wide})
    assert wide.lora_A.shape == (3, 8)


def test_each_kind_starts_as_the_base_model():
    for kind, (cls, settings) in KINDS.items():
        assert torch.equal(adapted(Stack(), cls, **settings)(data()), Stack()(data())), kind
        assert not torch.equal(of_kind(kind)(data()), Stack()(data())), kind
    assert N > 2
