# SPDX-License-Identifier: Apache-2.0
"""NOLALinear, VeRALinear and RandLoRALinear: their formulas in float64, state, seeds, and what they do not keep in memory."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import lrkern.ops
from lrkern.functional import nola_factors, randlora_way
from lrkern.nn import NOLALinear, RandLoRALinear, VeRALinear
from lrkern.ops.basis import DISTRIBUTIONS, STREAM_VERSION

NOLA, VERA, RANDLORA = (NOLALinear, {"r": 4, "k": 6, "l": 7}), (VeRALinear, {"r": 8}), (RandLoRALinear, {"r": 6})
LAYERS = pytest.mark.parametrize(("cls", "settings"), [NOLA, VERA, RANDLORA], ids=["nola", "vera", "randlora"])


def trainable(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


@torch.no_grad()
def train(layer):
    """Coefficients that act, by a generator of their own."""
    g = torch.Generator().manual_seed(5)
    for name, p in trainable(layer).items():
        # U of RandLoRA is a product of two, and its scaling is 20
        p.copy_(torch.randn(p.shape, generator=g) * (0.05 if "randlora" in name else 0.5))
    return layer


def made(cls, settings, in_features=24, out_features=20, **more):
    return train(cls(in_features, out_features, **settings | more))


def delta64(layer, p):
    """ΔW of the explicit formula in float64, out of the generated bases one by one."""
    like, I, O, r = torch.empty(0), layer.in_features, layer.out_features, layer.r
    U = lambda tensor, k, rows, cols, method: lrkern.ops.basis_fill(
        like, None, None, layer.seed, method, DISTRIBUTIONS[layer.distribution], tensor, k, rows, 0, 0, rows, cols
    ).to(next(iter(p.values())))
    if isinstance(layer, NOLALinear):
        alpha, beta = p["nola_alpha"], p["nola_beta"]
        c, d = (len(v) ** -0.5 if layer.normalize else 1 for v in (alpha, beta))
        A = sum(c * alpha[i] * U(0, i, r, I, 2) for i in range(len(alpha)))
        B = sum(d * beta[j] * U(1, j, r, O, 2).T for j in range(len(beta)))
        if layer.frozen_a:
            A = A + U(0, len(alpha), r, I, 2) / math.sqrt(I)
        return layer.lora_alpha / r * B @ A
    variance = {"sign": 1, "ternary4": 1 / 2}.get(layer.distribution, 1 / 3)
    if isinstance(layer, VeRALinear):
        a, b = (math.sqrt(6 / n / 3 / variance) for n in (layer.max_in, r))
        A, B = a * U(0, 0, r, I, 3), b * U(1, 0, r, O, 3).T
        return p["vera_lambda_b"][:, None] * B @ (p["vera_lambda_d"][:, None] * A)
    low, high, lam, gam = min(I, O), max(I, O), p["randlora_lambda"], p["randlora_gamma"]
    n = math.ceil(low / r)
    assert lam.shape == (r, n) and gam.shape == (n, low)
    A = U(0, 0, r, low, 4) / variance**0.5
    B = [U(1, j, r, high, 4).T / variance**0.5 for j in range(n)]  # [high, r]
    if layer.paper_pairing:
        delta = sum(B[j] @ (lam[:, j, None] * A * gam[j]) for j in range(n))
    else:  # the reference flattens Λ A Γ as k n + j and B as j r + k
        rows = torch.cat([lam[k, j] * A[k] * gam[j] for k in range(r) for j in range(n)]).view(r * n, low)
        delta = torch.cat(B, 1) @ rows
    return layer.randlora_alpha / r * (delta if I <= O else delta.T)


def explicit(layer, x):
    """x [..., I] -> y, and what to differentiate, in float64."""
    p = {name: p.detach().double().requires_grad_() for name, p in trainable(layer).items()}
    x = x.detach().double().requires_grad_()
    w, bias = layer.base_layer.weight.double(), layer.base_layer.bias
    return x @ (w + delta64(layer, p)).T + (0 if bias is None else bias.double()), [x, *p.values()]


def assert_close(got, want, tol):
    assert got.shape == want.shape
    if want.numel():
        scale = want.abs().max().item()
        assert (got.double() - want).abs().max().item() <= tol * max(scale, 1e-6), scale


def check(layer, x, tol=1e-5, context=None):
    x = x.detach().requires_grad_()
    with context or torch.enable_grad():
        y = layer(x)
    want, wanted = explicit(layer, x)
    dy = torch.randn(y.shape)
    assert_close(y, want, tol)
    grads = torch.autograd.grad(y, [x, *trainable(layer).values()], dy.to(y.dtype))
    for got, truth in zip(grads, torch.autograd.grad(want, wanted, dy.double()), strict=True):
        assert_close(got, truth, tol * 2)
    return y, grads


# ---------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("sizes", [(24, 20), (20, 24), (16, 16), (33, 7)], ids=str)
@pytest.mark.parametrize("T", [0, 1, 40])
@LAYERS
def test_forward_and_gradients_are_the_formulas(cls, settings, sizes, T):
    layer = made(cls, settings, *sizes, bias=T != 1)
    check(layer, torch.randn(T, sizes[0]))
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("cls, settings", [
    (NOLALinear, {"r": 3, "k": 5, "l": 2, "normalize": False}), (NOLALinear, {"r": 3, "k": 5, "l": 4, "frozen_a": False}),
    (NOLALinear, {"r": 1, "k": 1, "l": 70, "lora_alpha": 7}), (VeRALinear, {"r": 50, "save_output": True}),
    (VeRALinear, {"r": 5, "max_in": 99, "max_out": 177}), (RandLoRALinear, {"r": 7, "paper_pairing": True}),
    (RandLoRALinear, {"r": 6, "save_output": False}),
    (RandLoRALinear, {"r": 50}), (RandLoRALinear, {"r": 1, "randlora_alpha": 2}),
])  # fmt: skip
def test_options_are_the_formulas(cls, settings):
    for T in (3, 30):
        check(made(cls, settings, 64, 96), torch.randn(T, 64), 2e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@LAYERS
def test_distributions(cls, settings, distribution):
    layer = made(cls, settings, 64, 48, distribution=distribution)
    check(layer, torch.randn(2, 5, 64))
    assert_close(layer.delta_weight(), delta64(layer, {n: p.double() for n, p in trainable(layer).items()}), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@LAYERS
def test_16_bit_base_keeps_fp32_coefficients(cls, settings, dtype):
    layer = made(cls, settings, dtype=dtype)
    assert {p.dtype for p in trainable(layer).values()} == {torch.float32}
    for T in (3, 40):
        y, grads = check(layer, torch.randn(T, 24).to(dtype), 2e-2)
        assert y.dtype == dtype and [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    narrow = made(cls, settings, dtype=dtype, adapter_dtype=dtype)
    check(narrow, torch.randn(5, 24).to(dtype), 4e-2)
    check(made(cls, settings).to(dtype), torch.randn(5, 24).to(dtype), 4e-2)
    check(layer.to(torch.float32), torch.randn(5, 24))
    assert made(cls, settings).half().seed >= 0


@LAYERS
def test_autocast(cls, settings):
    for T in (3, 40):
        y, grads = check(made(cls, settings), torch.randn(T, 24), 3e-2, torch.autocast("cpu", torch.bfloat16))
        assert y.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}


@LAYERS
def test_starts_as_the_base_layer_and_learns(cls, settings):
    base, x = nn.Linear(24, 20), torch.randn(5, 24)
    layer = cls.from_linear(base, **settings)
    assert layer.base_layer is base and torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert max(p.grad.abs().max() for p in trainable(layer).values()) > 0
    if cls is NOLALinear:
        assert torch.equal(layer.nola_alpha, torch.zeros(6)) and layer.scaling == 1.0
        unfrozen = cls.from_linear(base, **settings, frozen_a=False)
        assert torch.equal(unfrozen(x), base(x))
        unfrozen(x).square().sum().backward()
        assert unfrozen.nola_beta.grad.abs().max() > 0
    if cls is VeRALinear:
        assert torch.equal(layer.vera_lambda_d, torch.full((8,), 0.1))
    if cls is RandLoRALinear:
        assert torch.equal(layer.randlora_gamma, torch.full((4, 20), 1 / 20)) and layer.scaling == pytest.approx(
            640 / 6
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_nola_without_a0_starts_with_its_variance(normalize):
    layer = NOLALinear(300, 20, r=16, k=50, frozen_a=False, normalize=normalize)
    a = layer.factors()[0]
    assert a.var().item() == pytest.approx(1 / 3 / 300, rel=0.1)


# ---------------------------------------------------------------------------------------------------- use


@LAYERS
@pytest.mark.parametrize("sizes", [(24, 20), (20, 24)])
def test_merge_unmerge_enable(cls, settings, sizes):
    layer, x = made(cls, settings, *sizes).eval(), torch.randn(5, sizes[0])
    y, base, w = layer(x), layer.base_layer(x), layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    assert_close(layer(x), y.double(), 1e-5)
    layer.unmerge()
    layer.unmerge()  # twice is once
    assert_close(layer.base_layer.weight, w.double(), 1e-5)
    layer.disable_adapter()
    assert_close(layer(x), base.double(), 1e-5)
    assert "disabled" in repr(layer)
    layer.enable_adapter()
    assert_close(layer(x), y.double(), 1e-5)
    with torch.no_grad():
        next(iter(trainable(layer).values()))[0] = float("inf")
    w = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=f"{cls.__name__}.merge: .*must be finite.* W is unchanged"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, w) and not layer.merged


@LAYERS
def test_dropout_only_in_training(cls, settings):
    layer, x = made(cls, settings, dropout=0.5), torch.randn(6, 24)
    assert not torch.equal(layer(x), layer(x))
    eye = torch.eye(24)
    torch.manual_seed(3)
    y = layer(eye) - layer.base_layer(eye)
    kept, delta = y.T.abs() > 1e-6 * y.abs().max(), layer.delta_weight()  # of eye, dropout keeps columns of ΔW, doubled
    assert 0 < kept.any(0).sum() < 24
    for column in range(24):
        want = 2 * delta[:, column] if kept[:, column].any() else torch.zeros(20)
        torch.testing.assert_close(y[column], want, atol=1e-4, rtol=1e-4)
    check(layer.eval(), x)


@LAYERS
def test_refusals(cls, settings):
    name = cls.__name__
    for bad, text in [({"r": 0}, "r must be a whole number in 1.*, got 0"), ({"r": True}, "r must be .* got True"),
                      ({"dropout": 1.1}, r"dropout must lie in \[0, 1\], got 1.1"),
                      ({"seed": -1}, "seed must be a whole number in .*, got -1"), ({"seed": 2**63}, "seed must be"),
                      ({"distribution": "normal"}, "distribution must be one of .*, got 'normal'")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: {text}"):
            cls(8, 8, **settings | bad)
    with pytest.raises(TypeError, match=f"{name}.from_linear: linear must be an nn.Linear with a plain weight"):
        cls.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(TypeError, match="rank"):
        cls(8, 8, rank=3)


def test_refusals_of_one():
    for cls, bad, text in [
        (NOLALinear, {"r": 513}, "r must be a whole number in 1..512, got 513"), (NOLALinear, {"k": 4097}, "k must be"),
        (NOLALinear, {"l": 0}, "l must be"), (NOLALinear, {"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        (VeRALinear, {"max_in": 7}, "max_in must be a whole number in 8.*, got 7"), (VeRALinear, {"max_out": 7}, "max_out"),
        (VeRALinear, {"d_initial": "x"}, "d_initial must be a finite number"),
        (RandLoRALinear, {"randlora_alpha": math.inf}, "randlora_alpha must be a finite number, got inf"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{cls.__name__}: {text}"):
            cls(8, 8, **bad)
    with pytest.raises(ValueError, match=r"RandLoRALinear: r must be at least min\(in, out\) / 65536"):
        RandLoRALinear(70000, 70000, r=1, device="meta")
    assert NOLALinear(8, 8, r=512, k=4096, l=4096, device="meta").nola_beta.shape == (4096,)


# ---------------------------------------------------------------------------------------------------- seeds and state


@LAYERS
def test_seeds(cls, settings):
    base = nn.Linear(24, 20)
    first, second = (cls.from_linear(base, **settings) for _ in range(2))
    assert first.seed != second.seed and 0 <= first.seed < 2**63
    twins = [train(cls.from_linear(base, **settings, seed=2**63 - 1)) for _ in range(2)]
    assert torch.equal(twins[0].delta_weight(), twins[1].delta_weight())
    assert not torch.equal(train(first).delta_weight(), train(second).delta_weight())


def test_layers_of_a_seed_share_a_pair():
    """Of other shapes too, as slices of one another's, with bounds as PEFT's."""
    settings = {"r": 8, "seed": 3, "max_in": 40, "max_out": 50}
    small, large = VeRALinear(24, 20, **settings), VeRALinear(40, 50, **settings)
    like = torch.empty(0)
    for p, q, bound in zip(
        small.projections(), large.projections(), (math.sqrt(6 / 40), math.sqrt(6 / 8)), strict=True
    ):
        p, q = p.fill(like), q.fill(like)
        assert torch.equal(p, q[:, : p.shape[1]]) and 0.95 * bound < q.abs().max() < bound
    small, large = RandLoRALinear(24, 20, r=6, seed=3), RandLoRALinear(40, 50, r=6, seed=3)
    for p, q in zip(small.projections(), large.projections(), strict=True):
        p, q = p.fill(like), q.fill(like)
        assert torch.equal(p, q[: len(p), : p.shape[1]]) and q.var().item() == pytest.approx(1, rel=0.1)


@LAYERS
def test_torchs_generator_is_not_touched(cls, settings):
    torch.manual_seed(1)
    base, x = nn.Linear(24, 20), torch.randn(5, 24, requires_grad=True)
    w, before = base.weight.clone(), torch.get_rng_state()
    layer = cls.from_linear(base, **settings)
    layer(x).sum().backward()
    layer.merge()
    layer.unmerge()
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(cls(24, 20, **settings).base_layer.weight, w), "W is drawn as nn.Linear does, nothing more"
    torch.randn(5, 24)
    assert torch.equal(torch.get_rng_state(), before)


@LAYERS
def test_state_dict(cls, settings):
    layer, x = made(cls, settings).eval(), torch.randn(3, 24)
    state = layer.state_dict()
    assert {*state} == {*trainable(layer), "seed", "stream_version", "base_layer.weight", "base_layer.bias"}
    assert state["seed"].dtype == state["stream_version"].dtype == torch.int64 and int(state["seed"]) == layer.seed
    assert sum(state[name].numel() for name in trainable(layer)) < 200, "nothing random is stored"
    other = nn.Sequential(cls(24, 20, **settings))
    assert other[0].seed != layer.seed
    other.load_state_dict({f"0.{k}": v for k, v in state.items()})
    assert other[0].seed == layer.seed and torch.equal(other(x), layer(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.seed == layer.seed and torch.equal(twin(x), layer(x))
    for lacking in ("seed", "stream_version"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{lacking}"'):
            layer.load_state_dict({k: v for k, v in state.items() if k != lacking})
    layer.load_state_dict({"base_layer.weight": torch.zeros(20, 24)}, strict=False)
    assert layer.seed == int(state["seed"]) and not layer.base_layer.weight.any()


@LAYERS
def test_a_state_that_does_not_fit_changes_nothing(cls, settings):
    layer = made(cls, settings)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    changed = {k: v + 1 for k, v in state.items() if k != "stream_version"}
    for bad, text in [
        ({"stream_version": torch.tensor(STREAM_VERSION + 1)}, rf"{cls.__name__}: stream_version must be {STREAM_VERSION}, "
         rf".* got {STREAM_VERSION + 1}, another lrkern's; the layer is unchanged"),
        ({"seed": torch.tensor(-5)}, "seed must not be negative, got -5"),
        ({"seed": torch.tensor([1, 2])}, "seed must be one whole number"),
        ({"seed": torch.tensor(1.5)}, "seed must be one whole number"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict({"stream_version": state["stream_version"]} | changed | bad)
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    name = next(iter(trainable(layer)))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        layer.load_state_dict(state | {"seed": torch.tensor(7), name: torch.zeros(1)})
    assert layer.seed == int(state["seed"]), "no seed without its coefficients"


# ---------------------------------------------------------------------------------------------------- in a training loop


def step(layer, x, call=None):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    y.float().cos().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in trainable(layer).values())]


@LAYERS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_runs_and_a_checkpointed_one_are_bit_equal(cls, settings, dropout):
    layer, x = made(cls, settings, dropout=dropout), torch.randn(40, 24)
    runs = []
    for call in (None, None, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        runs.append(step(layer, x, call))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.slow
@LAYERS
def test_compiles_to_one_graph(cls, settings):
    """Without a break; one for few tokens and one for many where their kernels differ, none for a number of its own."""
    layer = made(cls, settings)
    for dynamic in (None, True):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=dynamic)
        counts = []
        for T in (3, 40, 20, 5, 600, 9, 30):
            x = torch.randn(T, 24)
            for got, want in zip(step(layer, x, compiled), step(layer, x), strict=True):
                assert_close(got, want.double(), 1e-5)
            counts.append(graphs.frame_count)
        assert counts[3] == counts[-1] <= 4, (dynamic, counts)
    layer.seed ^= 1  # the graph has the seed in it: it must notice
    assert_close(compiled(x), layer(x).double(), 1e-5)
    layer.disable_adapter()
    assert_close(compiled(x), layer.base_layer(x).double(), 1e-5)


@pytest.mark.slow
@LAYERS
def test_inductor(cls, settings):
    torch._dynamo.reset()
    layer, x = made(cls, settings), torch.randn(7, 24)
    compiled = torch.compile(layer, fullgraph=True)
    for got, want in zip(step(layer, x, compiled), step(layer, x), strict=True):
        assert_close(got, want.double(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawn", "nola", "vera", "randlora"])
def test_ddp(in_two_processes, name):
    results = in_two_processes("basis_workers.py")
    assert results[name] is None, results[name]


# ---------------------------------------------------------------------------------------------------- memory


def kept(layer, x):
    """Shapes that autograd keeps for backward of one forward, but for parameters."""
    own, shapes = {p.data_ptr() for p in layer.parameters()}, []
    pack = lambda t: t.data_ptr() in own or shapes.append(tuple(t.shape)) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    return sorted(s for s in shapes if math.prod(s) > 0), y


def largest_allocation(run):
    """Bytes, by torch's allocator: what kernels ask for is in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    return max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")


def test_nola_never_holds_a_basis():
    layer, x = made(NOLALinear, {"r": 8, "k": 64, "l": 64}, 512, 512), torch.randn(4, 512)
    matrix = 4 * 8 * 512
    step(layer, x)  # warm
    largest = largest_allocation(lambda: step(layer, x))
    assert matrix <= largest <= 3 * matrix, largest  # A and B in one
    stored = torch.randn(64, 8, 512)  # the measure sees what it should
    assert largest_allocation(lambda: stored * 2) == 64 * matrix
    shapes, _ = kept(layer, x)
    assert max(math.prod(s) for s in shapes) <= 2 * 8 * 512, shapes


def test_vera_saves_no_output():
    T, I, O, r = 40, 24, 100, 8
    layer, x = made(VeRALinear, {"r": r}, I, O), torch.randn(T, I, requires_grad=True)
    layer.save_output = False
    assert not any(math.prod(s) >= T * O for s in kept(layer, x)[0])
    layer.save_output = True
    assert (T, O) in kept(layer, x)[0]
    layer.save_output = False
    step(layer, x)
    assert largest_allocation(lambda: layer(x)) == 4 * T * O, "y, and nothing larger"


@pytest.mark.parametrize(("T", "way"), [(9, "vector"), (30, "factors"), (400, "merged")])
@pytest.mark.parametrize(("I", "O"), [(60, 100), (100, 60)])
@pytest.mark.parametrize("paper", [False, True])
def test_what_randlora_saves_changes_no_bit(T, way, I, O, paper):
    assert randlora_way(T, I, O) == way
    layer, x = made(RandLoRALinear, {"r": 7, "paper_pairing": paper}, I, O), torch.randn(T, I, requires_grad=True)
    product = (T, 63)  # x Bᵀ [T, n r]
    assert (product in kept(layer, x)[0]) == (I > O and way == "factors")
    check(layer, x.detach())
    got = step(layer, x)
    layer.save_output = False
    assert product not in kept(layer, x)[0]
    for a, b in zip(got, step(layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [4, 20, 400])
@pytest.mark.parametrize("sizes", [(48, 64), (64, 48)], ids=str)
def test_randlora_saves_neither_u_nor_what_it_gives(T, sizes):
    layer = made(RandLoRALinear, {"r": 8, "save_output": False}, *sizes)
    x = torch.randn(T, sizes[0], requires_grad=True)
    shapes, y = kept(layer, x)
    assert shapes == [(T, sizes[0])], shapes  # U is [48, 48], x Uᵀ [T, 48]
    assert y.grad_fn is not None


def test_nola_factors_are_those_of_the_layer():
    layer = made(*NOLA)
    a, b = nola_factors(layer.nola_alpha, layer.nola_beta, layer.seed, 4, 24, 20)
    got = layer.factors()
    assert torch.equal(got[0], a) and torch.equal(got[1], layer.scaling * b)
