# SPDX-License-Identifier: Apache-2.0
"""Variants with a middle matrix or a diagonal of W's own: how they start, and identities of their formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from variant_kinds import EACH, change, make

from lrkern import nn as lnn
from lrkern.nn.variants import (
    IntTuneLinear,
    LoLDULinear,
    LoRA2Linear,
    LoRAMiniLinear,
    LoRASBLinear,
    NLoRALinear,
    SLoRALinear,
    lora_sb_init,
    spectrum,
)

I, O, R = 24, 16, 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight):
    base = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        base.weight.copy_(weight)
    return base


def best(w, r):
    """The best approximation of rank r, in float64."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def close(got, want, within=1e-5):
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= within, f"{error:.1e}"


def grads(layer, seed=7):
    """x, dy and what .grad then holds by name."""
    x, dy = random(9, layer.in_features, seed=seed), random(9, layer.out_features, seed=seed + 1)
    layer(x).backward(dy)
    return x, dy, {n: p.grad for n, p in layer.coefficients().items()}


# The largest singular values


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)], ids=str)
def test_top_is_the_best_approximation_with_turned_signs(shape):
    w = random(*shape)
    u, s, vh = spectrum.top(w, 5, "test:")
    close((u * s) @ vh, best(w, 5))
    close(u.mT @ u, torch.eye(5))
    close(vh @ vh.mT, torch.eye(5))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    turned = spectrum.top(-w, 5, "test:")  # the same u, whatever sign an SVD gives
    close(turned[0], u)
    close(turned[2], -vh)


@pytest.mark.parametrize("shape", [(150, 210), (210, 150)], ids=str)
def test_the_randomised_svd_finds_the_same(monkeypatch, shape):
    """A spectrum like a weight's: a few large values over a flat rest, which ten passes push down."""
    w = random(*shape) + 4 * random(shape[0], 6, seed=1) @ random(6, shape[1], seed=2)
    exact = spectrum.top(w, 6, "test:")
    monkeypatch.setattr(spectrum, "EXACT", 100)
    calls = []
    svd = spectrum._randomised
    monkeypatch.setattr(spectrum, "_randomised", lambda *args: (calls.append(args), svd(*args))[1])
    state = torch.get_rng_state()
    got, again = spectrum.top(w, 6, "test:"), spectrum.top(w, 6, "test:")
    assert len(calls) == 2 and torch.equal(torch.get_rng_state(), state)
    for t, same, want in zip(got, again, exact, strict=True):
        assert torch.equal(t, same)
        close(t, want, 1e-4)


def test_top_refuses_what_has_no_such_values():
    with pytest.raises(ValueError, match=r"^test: r <= min\(in, out\) = 3, got r=4"):
        spectrum.top(random(3, 9), 4, "test:")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^test: a W of finite numbers, got inf or nan"):
            spectrum.top(torch.full((8, 9), value), 4, "test:")
    assert [t.shape for t in spectrum.top(torch.empty(8, 9, device="meta"), 4, "test:")] == [(8, 4), (4,), (4, 9)]


OF_W = {name: v for name, v in EACH.items() if not getattr(lnn.variants, v.cls).PACKED}


@pytest.mark.parametrize("v", OF_W.values(), ids=OF_W)
def test_methods_of_w_refuse_a_rank_that_it_has_not_and_leave_it(v):
    base = nn.Linear(I, O)
    cls = getattr(lnn.variants, v.cls)
    with pytest.raises(ValueError, match=rf"^{v.cls}: it needs r <= min\(in, out\) = 16, got r=17"):
        cls.from_linear(base, **{**v.settings, "r": 17})
    assert base.weight.requires_grad
    base.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"^{v.cls}: it needs a W of finite numbers"):
        cls.from_linear(base, **v.settings)


# LoRA-XS


def test_lora_xs_factors_are_the_weights_and_the_gradient_is_the_closed_form():
    layer = make(EACH["lora_xs"])
    close(layer.lora_B @ layer.lora_A, best(layer.base_layer.weight, R))
    close(layer.lora_B.mT @ layer.lora_B, torch.eye(R))
    x, dy, got = grads(layer)
    close(got["lora_R"], layer.scaling * (dy @ layer.lora_B).mT @ (x @ layer.lora_A.mT))
    nn.init.zeros_(layer.lora_R)
    assert torch.equal(layer(x), layer.base_layer(x))


# LoRA-SB


def test_lora_sb_starts_from_one_step_and_its_gradient_is_the_nearest():
    """Facts' identities: B R A is the best approximation of -lr sign(G), and B dR A that of G among all B M A."""
    layer, gradient = make(EACH["lora_sb"]), random(O, I)
    w = layer.base_layer.weight.clone()
    kept = layer.coefficients()
    layer.init_from(gradient, 1e-3)
    assert all(layer.get_parameter(n) is p for n, p in kept.items())
    assert torch.equal(layer.base_layer.weight, w)
    close(layer.delta_weight(), best(-1e-3 * gradient.sign(), R))
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    close(a @ a.mT, torch.eye(R))
    x, dy, got = grads(layer)
    g = dy.double().mT @ x.double()
    close(got["lora_R"], b.mT @ g @ a.mT)
    basis = torch.kron(b, a.mT.contiguous())  # row by row, (B M A).flatten() = (B ⊗ Aᵀ) M.flatten()
    nearest = torch.linalg.lstsq(basis, g.flatten()[:, None]).solution.reshape(R, R)
    close(got["lora_R"], nearest)


def test_lora_sb_takes_any_positive_scale_of_the_gradient():
    a, b = make(EACH["lora_sb"]), make(EACH["lora_sb"])
    gradient = random(O, I)
    a.init_from(gradient, 1e-3)
    b.init_from(100 * gradient.double(), 1e-3)
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.coefficients().items())


def test_lora_sb_init_from_refuses_and_changes_nothing():
    layer = make(EACH["lora_sb"])
    before = copy.deepcopy(layer.state_dict())
    broken = random(O, I)
    broken[1, 2] = float("nan")
    for gradient, lr, must in (
        (random(I, O), 1e-3, r"gradient must be \[16, 24\], got \[24, 16\]"),
        (broken, 1e-3, "gradient must be finite"),
        (torch.zeros(O, I), 1e-3, "gradient must not be zero everywhere"),
        (random(O, I), 0.0, "lr must be a positive number, got 0.0"),
        (random(O, I), float("nan"), "lr must be a positive number, got nan"),
        (random(O, I), True, "lr must be a positive number, got True"),
    ):
        with pytest.raises(ValueError, match=f"^LoRASBLinear.init_from: {must}"):
            layer.init_from(gradient, lr)
    layer.merge()
    with pytest.raises(RuntimeError, match="^LoRASBLinear.init_from: the layer must not be merged"):
        layer.init_from(random(O, I), 1e-3)
    layer.unmerge()
    for name, t in layer.state_dict().items():
        torch.testing.assert_close(t, before[name])


class Tied(nn.Module):
    """One W in two layers, another layer called twice, activations in place, and a head that trains."""

    def __init__(self, kind, checkpointed):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.c, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.b = nn.Linear(12, 12, bias=False)
        self.b.weight = self.a.weight
        if kind is not None:
            for name in "abc":
                setattr(self, name, kind.from_linear(getattr(self, name), r=3))
        self.checkpointed = checkpointed

    def block(self, x):
        x = nn.functional.relu(self.a(x), inplace=True)
        x = nn.functional.relu(self.b(x), inplace=True) + x
        return self.c(self.c(x).tanh())

    def forward(self, x):
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x)


def loss(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


BATCHES = [(random(2, 5, 12, seed=s), random(2, 5, 3, seed=s + 10)) for s in range(3)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora_sb_init_is_init_from_the_sum_of_gradients_of_each_use(checkpointed):
    model = Tied(LoRASBLinear, checkpointed)
    plain = Tied(None, False)
    plain.b.weight = nn.Parameter(plain.a.weight.detach().clone())  # apart: what each use of W gives
    for batch in BATCHES:
        loss(plain, batch).backward()
    want = {name: getattr(plain, name).weight.grad for name in "abc"}

    change(model.c, EACH["lora_sb"])  # adapters are off meanwhile
    model.a.disable_adapter()
    model.head.weight.grad = ones = torch.ones_like(model.head.weight)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    lora_sb_init(model, iter(BATCHES), loss, 2e-3)

    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert model.head.weight.grad is ones and torch.equal(ones, torch.ones_like(ones))
    assert [getattr(model, name).enabled for name in "abc"] == [False, True, True]
    for name in "abc":
        layer = getattr(model, name)
        assert not layer._forward_hooks
        alone = LoRASBLinear.from_linear(nn.Linear(12, 12), r=3)
        alone.init_from(want[name], 2e-3)
        close(layer.delta_weight(), alone.delta_weight())


@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_lora_sb_init_lowers_the_loss(how):
    model, batches = Tied(LoRASBLinear, False), BATCHES
    if how == "bfloat16":
        model, batches = model.bfloat16(), [(x.bfloat16(), y.bfloat16()) for x, y in BATCHES]
    before = sum(loss(model, batch).item() for batch in batches)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        lora_sb_init(model, batches, loss, 1e-2)
    assert sum(loss(model, batch).item() for batch in batches) < 0.99 * before


def test_lora_sb_init_refuses_and_changes_nothing():
    model = Tied(LoRASBLinear, False)
    model.unused = LoRASBLinear.from_linear(nn.Linear(5, 4), r=2)
    before = copy.deepcopy(model.state_dict())
    in_place = lambda m, batch: (x := batch[0].clone(), m(x), x.add_(1))[1].sum()
    for given, of_loss, kind, must in (
        (BATCHES, loss, ValueError, "layer 'unused': gradient must not be zero everywhere"),
        ([], loss, ValueError, "layer 'a': gradient must not be zero everywhere"),
        (BATCHES, lambda m, batch: m(batch[0]), ValueError, r"loss must give one number .*, got \[2, 5, 3\]"),
        (BATCHES, lambda m, batch: 1.0, ValueError, "loss must give one number .*, got float"),
        (BATCHES, in_place, RuntimeError, "a layer's x was changed in place"),
    ):
        with pytest.raises(kind, match=f"^lora_sb_init: {must}"):
            lora_sb_init(model, given, of_loss, 1e-3)
    with pytest.raises(ValueError, match="^lora_sb_init: lr must be a positive number, got -1"):
        lora_sb_init(model, BATCHES, loss, -1)
    with pytest.raises(ValueError, match="^lora_sb_init: model must have LoRASBLinear layers, got Linear without"):
        lora_sb_init(nn.Linear(3, 3), BATCHES, loss, 1e-3)
    model.c.merge()
    with pytest.raises(RuntimeError, match="^LoRASBLinear.init_from: the layer must not be merged"):
        lora_sb_init(model, BATCHES, loss, 1e-3)
    model.c.unmerge()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], msg=name)
    assert all(layer.enabled and not layer._forward_hooks for layer in (model.a, model.b, model.c, model.unused))


# NLoRA, IntTune


@pytest.mark.parametrize("cls", [NLoRALinear, IntTuneLinear])
def test_a_nystrom_start_is_w_where_w_has_that_rank(cls):
    w = random(O, R) @ random(R, I, seed=1)
    layer = cls.from_linear(linear(w), r=R, lora_alpha=float(R))
    close(layer.delta_weight(), w, 1e-4)
    assert torch.equal(layer.lora_A, w[:R]) and torch.equal(layer.lora_B, w[:, :R])
    sliced = cls.from_linear(linear(w), r=R, lora_alpha=float(R), init="slice")
    assert torch.equal(sliced.lora_N, w[:R, :R])
    close(sliced.delta_weight(), w[:, :R].double() @ w[:R, :R].double() @ w[:R].double())


@pytest.mark.parametrize("cls", [NLoRALinear, IntTuneLinear])
def test_a_block_without_full_rank_has_a_pseudo_inverse(cls):
    w = random(O, I)
    w[1] = w[0]
    layer = cls.from_linear(linear(w), r=R)
    close(layer.lora_N, torch.linalg.pinv(w[:R, :R].double(), rtol=1e-6))
    assert layer.lora_N.abs().max() < 100


@pytest.mark.parametrize("cls", [NLoRALinear, IntTuneLinear])
@pytest.mark.parametrize("init", ["pinv", "slice"])
def test_subtract_takes_out_the_start_and_nothing_else(cls, init):
    torch.manual_seed(3)
    base = nn.Linear(I, O)
    settings = {"r": R, "lora_alpha": 6.0, "init": init}
    added, taken = (cls.from_linear(copy.deepcopy(base), subtract=s, **settings) for s in (False, True))
    start = added.delta_weight()
    x = random(7, I)
    assert torch.equal(taken(x), base(x)) and not taken.delta_weight().any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(taken(x), base(x))
    _, _, of_added = grads(added)
    _, _, of_taken = grads(taken)
    for name, g in of_added.items():
        assert (g is None) == (of_taken[name] is None)
        if g is not None:
            close(of_taken[name], g)
    for layer in (added, taken):
        with torch.no_grad():
            for name, p in layer.coefficients().items():
                if p.requires_grad:
                    p.add_(0.1 * random(*p.shape, seed=len(name)))
    close(taken.delta_weight(), added.delta_weight() - start)


def test_nlora_of_a_fixed_identity_is_lora():
    """Facts' check of row 48: N = I is LoRA, and dN = s (dY B)ᵀ (x Aᵀ)."""
    layer = SLoRALinear(I, O, r=R, lora_alpha=6.0)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_N.copy_(torch.eye(R))
    lora = lnn.FusedLoRALinear.from_linear(layer.base_layer, r=R, lora_alpha=6.0)
    lora.lora_A.weight.data, lora.lora_B.weight.data = layer.lora_A.data, layer.lora_B.data
    x, dy, got = grads(layer)
    close(layer(x), lora(x))
    close(got["lora_N"], layer.scaling * (dy @ layer.lora_B).mT @ (x @ layer.lora_A.mT))


def test_nlora_with_subtract_has_half_the_rank():
    layer = NLoRALinear(300, 300, r=256, subtract=True)
    assert layer.lora_rank == 512 and layer.factors()[0].shape == (512, 300)
    with pytest.raises(ValueError, match=r"^NLoRALinear: r with subtract must be a whole number in 1..256, got 257"):
        NLoRALinear(300, 300, r=257, subtract=True)
    assert NLoRALinear(300, 300, r=257).lora_rank == 257


def test_inttune_is_lora_xs_forward_over_other_factors():
    layer = change(make(EACH["inttune"]), EACH["inttune"])
    xs = make(EACH["lora_xs"], lora_alpha=layer.lora_alpha)
    for mine, its in (("lora_A", "lora_A"), ("lora_B", "lora_B"), ("lora_N", "lora_R")):
        xs.get_parameter(its).data = layer.get_parameter(mine).data
    assert [n for n, p in layer.coefficients().items() if p.requires_grad] == ["lora_N"]
    x, dy, got = grads(layer)
    assert torch.equal(layer(x), xs(x))
    close(got["lora_N"], layer.scaling * (dy @ layer.lora_B).mT @ (x @ layer.lora_A.mT))


@pytest.mark.parametrize("name", ["nlora", "inttune"])
def test_nystrom_settings_are_refused_by_name(name):
    v = EACH[name]
    with pytest.raises(ValueError, match=f"^{v.cls}: init must be one of .*, got 'svd'"):
        make(v, init="svd")
    with pytest.raises(ValueError, match=f"^{v.cls}: subtract must be True or False, got 1"):
        make(v, subtract=1)


# LoRA-Mini, LoRA²


def test_lora_mini_is_a_lora_of_rank_r_and_a_middle_matrix():
    layer = LoRAMiniLinear(I, O, r=2, a=7, b=5, lora_alpha=3.0)
    nn.init.normal_(layer.lora_B_train)
    a, b, scale = layer.factors()
    assert a.shape == (2, I) and b.shape == (O, 2) and layer.lora_rank == 2
    close(layer.delta_weight(), 1.5 * layer.lora_B @ layer.middle() @ layer.lora_A)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 2
    trained = {n: tuple(p.shape) for n, p in layer.coefficients().items() if p.requires_grad}
    assert trained == {"lora_A_train": (2, 7), "lora_B_train": (5, 2)}
    x, dy, got = grads(layer)
    dm = scale * (dy @ layer.lora_B).mT @ (x @ layer.lora_A.mT)
    close(got["lora_B_train"], dm @ layer.lora_A_train.mT)
    close(got["lora_A_train"], layer.lora_B_train.mT @ dm)


def test_lora_mini_refuses_widths_below_its_rank():
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=rf"^LoRAMiniLinear: {name} must be a whole number in 4..512, got 3"):
            LoRAMiniLinear(I, O, **{"r": 4, "a": 8, "b": 8, name: 3})


@pytest.mark.parametrize("r,k", [(6, 4), (3, 5)])
def test_lora2_is_two_loras_around_singular_values(r, k):
    layer = LoRA2Linear(I, O, r=r, k=k, lora_alpha=6.0)
    for p in layer.coefficients().values():
        nn.init.normal_(p)
    p = {n: t.detach().double() for n, t in layer.coefficients().items()}
    first, second = p["lora_B"] @ p["lora_A"], p["lora_bb"] @ p["lora_aa"]
    close(layer.delta_weight(), 6 / (r + 1e-5) * second @ (p["lora_E"] * first))
    assert layer.lora_rank == k and torch.linalg.matrix_rank(layer.delta_weight()) == min(r, k)
    with torch.no_grad():
        layer.lora_E[0] = 0  # a pruned rank
        close(layer.delta_weight(), 6 / (r + 1e-5) * second[:, 1:] @ (p["lora_E"] * first)[1:])
    assert LoRA2Linear(I, O, r=r, k=k, lora_alpha=0).scaling == r / (r + 1e-5)


def test_lora2_orthogonality_is_zero_of_orthonormal_factors():
    layer = LoRA2Linear(I, O, r=6, k=4)
    assert 1.9 < layer.orthogonality() < 2.0  # ‖I_4‖ = 2 of factors near zero
    layer.orthogonality().backward()
    assert layer.lora_E.grad is None
    assert all(layer.get_parameter(n).grad.any() for n in ("lora_A", "lora_B", "lora_aa", "lora_bb"))
    for name in ("lora_A", "lora_B", "lora_aa", "lora_bb"):
        nn.init.orthogonal_(layer.get_parameter(name))
    assert layer.orthogonality() < 1e-5
    with torch.no_grad():
        layer.lora_bb.mul_(2)  # ‖4 I - I‖ / 4 = 3 · 2 / 4
    close(layer.orthogonality(), torch.tensor(1.5))


# SVFit, LoLDU


def test_svfit_trains_the_singular_values_of_w():
    layer = make(EACH["svfit"])
    w = layer.base_layer.weight.detach().double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    close(layer.sigma, s[:R])
    x, dy, got = grads(layer)
    of_w = dy.mT @ x
    close(got["sigma"], (layer.lora_B.mT @ of_w @ layer.lora_A.mT).diagonal())
    with torch.no_grad():
        layer.sigma.copy_(torch.tensor([9.0, 7.0, 6.0, 5.0]))
    close(torch.linalg.svdvals(w + layer.delta_weight())[:R], layer.sigma)
    layer.sigma.data.zero_()
    close(w + layer.delta_weight(), (u[:, R:] * s[R:]) @ vh[R:])


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)], ids=str)
def test_loldu_is_the_decomposition_of_w(shape):
    w = random(*shape)
    full = min(shape)
    p, l, u = torch.linalg.lu(w.double())
    d = u.diagonal()
    for r in (4, full):
        layer = LoLDULinear.from_linear(linear(w), r=r)
        close(layer.lora_B, (p @ l)[:, :r])
        close(layer.vector_z, d[:r])
        close(layer.lora_A, (u / d[:, None])[:r])
    close((layer.lora_B * layer.vector_z) @ layer.lora_A, w)


@pytest.mark.parametrize("train_scale", [False, True])
def test_loldu_trains_pivots(train_scale):
    layer = LoLDULinear(I, O, r=R, lora_alpha=6.0, train_scale=train_scale)
    x, dy, got = grads(layer)
    of_d = (layer.lora_B.mT @ (dy.mT @ x) @ layer.lora_A.mT).diagonal()
    close(got["vector_z"], 1.5 * of_d)
    trained = [n for n, p in layer.coefficients().items() if p.requires_grad]
    assert trained == ["vector_z", "scaling_factor"][: 1 + train_scale]
    if train_scale:
        assert layer.scaling_factor == 1.5
        close(got["scaling_factor"], (of_d * layer.vector_z).sum())
        with torch.no_grad():  # s · P L diag(z) U is out of W
            layer.scaling_factor.zero_()
        out = 1.5 * (layer.lora_B * layer.vector_z) @ layer.lora_A
        close(layer.delta_weight(), -out)


def test_loldu_refuses_a_zero_pivot():
    w = random(O, I)
    w[:, 2] = w[:, 1] = 0
    base = linear(w)
    with pytest.raises(ValueError, match="^LoLDULinear: it needs a W whose first r pivots are not zero, got zero at 1"):
        LoLDULinear.from_linear(base, r=4)
    assert base.weight.requires_grad
    LoLDULinear.from_linear(base, r=1)


@pytest.mark.parametrize("name", ["svfit", "loldu", "loldu-scale", "nlora-subtract", "inttune-subtract"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_takes_something_out_of_w_starts_as_w_in_its_dtype_too(name, dtype):
    layer = make(EACH[name], dtype, adapter_dtype=dtype)
    x = random(7, I).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    w = layer.base_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, w)
