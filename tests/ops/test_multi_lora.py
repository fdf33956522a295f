# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA beyond the registry's samples: a grid of shapes, ranks, batches and assignments; invariances; isolation."""

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from grid import all_pairs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import lrkern.ops as ops
from lrkern import reference, testing
from lrkern.ops.dispatch import library
from lrkern.reference import Draw, pages_of
from tests.conftest import FULL, enter_device

# The values of facts and competitors' test matrices (vLLM's punica tests, Punica, SGLang, LoRAFusion), small ones added so
# that each pair of values has a case of bearable size. Pairs too large for any case are left out; CONTRIBUTING.md says how many.
AXES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "fp32": [False, True],
    "shape": [(48, 40), (768, 2048), (2049, 2049), (2560, 6144), (4096, 4096), (4096, 14336), (14336, 4096), (5120, 5120),
              (8192, 8192), (8192, 28672), (64, 128256)],
    "rank": [0, 1, 4, 8, 16, 24, 32, 64, 96, 128, 256, 320, 512, (8, 16, 32, 64, 0)],
    "T": [1, 2, 3, 4, 7, 10, 16, 32, 33, 64, 127, 128, 129, 133, 256, 1000, 2048, 4096, 8192],
    "A": [1, 2, 4, 8, 32, 64, 128],
    "assignment": ["identical", "distinct", "uniform", "zipf", "skewed", "none", "some none"],
    "order": ["sorted", "unsorted"],
    "K": [1, 2, 3],
    "L": [1, 2, 3],
    "scale": ["none", "adapter", "row", "zero", "negative"],
    "dropout": [False, True],
    "pitch": [0, 8, 13],
}  # fmt: skip
SMALL = {
    "shape": [(48, 40), (136, 264), (300, 72), (67, 35)],
    "rank": [0, 1, 4, 16, 24, 64, (8, 16, 32, 64, 0)],
    "T": [1, 2, 7, 33, 64, 65, 133],
    "A": [1, 2, 8, 64],
}  # for the emulator


def largest(rank):
    return max(rank) if isinstance(rank, tuple) else rank


def feasible(case, elements):
    """As far as the case is given: no tensor has more elements than that, and there are at most 64 multiply-adds for each."""
    I, O = case.get("shape", (48, 40))
    T, A, K, L = (case.get(n, 1) for n in ("T", "A", "K", "L"))
    rank = largest(case.get("rank", 1))
    sizes = [T * K * L * max(rank, 1) * (I + O) // 64, A * L * (rank + 15) // 16 * 16 * (I + O), T * (I + O)]
    if case.get("dropout"):
        sizes.append(64 * T * K * I)  # the reference draws the mask in Python
    return max(sizes) <= elements


LIMIT = 2**26 if FULL else 2**23
DRAWINGS = {"cpu": 8, "emulated": 8, "cuda": 2}  # on CUDA the reference is some thousand launches a case


def cases(device):
    axes, limit = (AXES | SMALL, 2**20) if device == "emulated" else (AXES, LIMIT)
    seeds = range(DRAWINGS[device] if FULL else 1)
    return [case for seed in seeds for case in all_pairs(axes, lambda c: feasible(c, limit), seed)]


def name_of(case):
    return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in case.items()).replace(", ", "x")


def assigned(how, T, A, K, order, generator):
    """index int32 [T, K]"""
    if how == "identical":
        index = torch.zeros(T, K)
    elif how == "distinct":
        index = torch.arange(T * K).reshape(T, K) % A
    elif how == "zipf":  # adapter i with a weight of 1 / (i + 1)^1.5, as Punica's benchmark
        weights = torch.arange(1, A + 1).double() ** -1.5
        index = torch.multinomial(weights, T * K, True, generator=generator).reshape(T, K)
    elif how == "skewed":
        index = torch.full((T, K), A - 1)
        index[:1] = 0
    elif how == "none":
        index = torch.full((T, K), -1)
    else:
        index = torch.randint(-1 if how == "some none" else 0, A, (T, K), generator=generator)
    index = index.int()
    return index.sort(0).values if order == "sorted" else index[torch.randperm(T, generator=generator)]


class Batch:
    """Tensors of a case, and the adapter part of its forward and backward."""

    def __init__(self, case, device="cpu", seed=0):
        self.case = case
        I, O = case["shape"]
        T, A, K, L = case["T"], case["A"], case["K"], case["L"]
        draw = Draw(device, case["dtype"], seed)
        g = draw.generator
        f = torch.float32 if case["fp32"] else case["dtype"]
        rank = case["rank"] if isinstance(case["rank"], tuple) else (case["rank"],)
        self.ranks = torch.tensor(rank, dtype=torch.int32)[torch.arange(A * L) % len(rank)].reshape(A, L)
        self.pages, P = pages_of(self.ranks, g)
        if not self.pages.shape[2]:
            self.pages = torch.zeros(A, L, 1, dtype=torch.int32)
        self.x, self.y = draw(T, I, pitch=I + case["pitch"] if case["pitch"] else 0), draw(T, O)
        self.a, self.b = draw(P, I, dtype=f, std=I**-0.5), draw(P, O, dtype=f)
        self.index = assigned(case["assignment"], T, A, K, case["order"], g)
        adapter = torch.randn(A, generator=g)[self.index.clamp(0).long()]
        self.scales = {"none": None, "adapter": adapter, "row": torch.randn(T, K, generator=g),
                       "zero": torch.zeros(T, K), "negative": -torch.ones(T, K)}[case["scale"]]  # fmt: skip
        self.p, self.seed = (torch.full((A,), 0.1), draw.seed()) if case["dropout"] else (None, None)
        self.slice = L - 1
        for name in ("pages", "ranks", "index", "scales", "p"):
            setattr(self, name, t if (t := getattr(self, name)) is None else t.to(device))

    def table(self, home=ops):
        return self.pages, self.ranks, home.multi_lora_plan(self.index, self.case["A"])

    def run(self, home=ops, convert=lambda t: t, grads=False):
        """[S, y] and the gradients of x, y, a and b. home: ops, or the reference."""
        x, y, a, b = (convert(t).detach().requires_grad_(grads) for t in (self.x, self.y, self.a, self.b))
        table = self.table(home)
        s = home.multi_lora_shrink(x, a, *table, self.scales, self.p, self.seed)
        out = home.multi_lora_expand(y, s, b, *table, self.slice)
        results = [s, out]
        if grads:
            dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(self.y.dtype).to(out.dtype)
            results += torch.autograd.grad(out, (x, y, a, b), dy, materialize_grads=True)
        return results


GRID = {kind: cases(kind) for kind in DRAWINGS}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, c, id=f"{kind} {name_of(c)}", marks=[pytest.mark.slow] if i % 6 else [])
        for kind, grid in GRID.items()
        for i, c in enumerate(grid)
    ],
)
def test_grid(kind, case, stack):
    device = enter_device(kind, stack)
    batch = Batch(case, device)
    got = batch.run(grads=True)
    truth, yardstick = (batch.run(reference, convert, grads=True) for convert in (testing.to64, lambda t: t))
    fp32 = case["fp32"] and case["dtype"] != torch.float32
    for name, *values in zip(("S", "y", "dx", "dy", "da", "db"), got, truth, yardstick, strict=True):
        # Seen beyond 2 x: 2.82 ulps of a float32 S of float16 factors.
        testing.check(*values, f"{name} of {name_of(case)}", fp32, ulps=4)


def test_what_is_said_of_the_grid():
    """In CONTRIBUTING.md: how much of it runs."""
    said = " ".join((Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().split())
    pairs = [{a: x, b: y} for a, b in combinations(AXES, 2) for x, y in product(AXES[a], AXES[b])]
    dropped = sum(not feasible(pair, LIMIT) for pair in pairs)
    whole = math.prod(map(len, AXES.values()))
    assert f"{whole:,} cases" in said
    assert f"{len(GRID['cpu']):,} of them" in said and f"but {dropped} of {len(pairs):,}" in said
    assert FULL or f"{len(GRID['emulated'])} small ones" in said


BASE = {"dtype": torch.float32, "fp32": False, "shape": (300, 264), "rank": (8, 16, 20, 3, 0), "T": 97, "A": 5, "K": 1, "L": 1,
        "assignment": "some none", "order": "unsorted", "scale": "row", "dropout": False, "pitch": 0}  # fmt: skip


def batch_of(device, dtype, **changes):
    return Batch(BASE | {"dtype": dtype} | changes, device)


def part(batch, rows):
    """The same batch with these rows alone."""
    some = object.__new__(Batch)
    some.__dict__ = dict(batch.__dict__)
    some.case = batch.case | {"T": len(rows)}
    some.x, some.y, some.index = batch.x[rows], batch.y[rows], batch.index[rows].contiguous()
    some.scales = None if batch.scales is None else batch.scales[rows].contiguous()
    return some


@pytest.mark.parametrize("K", [1, 3])
def test_a_row_has_the_same_bits_in_any_batch(device, dtype, K):
    batch = batch_of(device, dtype, K=K)
    s, y = batch.run()
    for rows in ([0], [41], [96, 3], list(range(20, 85)), torch.randperm(97).tolist()):
        got_s, got_y = part(batch, rows).run()
        assert torch.equal(got_s, s[rows]) and torch.equal(got_y, y[rows]), rows


def test_a_row_has_the_same_bits_in_a_batch_of_thousands(device):
    """On CUDA a large batch walks the chunks of I in one block, a small one gives each chunk a block of its own."""
    T = 528 * 64 + 1
    batch = batch_of(device, torch.bfloat16, T=T, shape=(300, 40))
    s, y = batch.run()
    for rows in ([0], [T - 1, 77], list(range(4000, 4070))):
        got_s, got_y = part(batch, rows).run()
        assert torch.equal(got_s, s[rows]) and torch.equal(got_y, y[rows]), rows


def test_two_runs_and_any_number_of_threads_give_the_same_bits(device, dtype):
    batch = batch_of(device, dtype, T=300, K=2, L=2, dropout=True)
    first = batch.run(grads=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(p, q) for p, q in zip(first, batch.run(grads=True), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_full_of_nan_stays_alone(device, dtype, value):
    """Rows and gradients of all others keep every bit."""
    batch = batch_of(device, dtype, K=2, T=150)
    clean = batch.run(grads=True)
    bad = 1
    theirs = (batch.index == bad).any(1)
    rows = 16 * batch.pages[bad, 0, : (int(batch.ranks[bad, 0]) + 15) // 16].long()
    pool_rows = (rows[:, None] + torch.arange(16, device=rows.device)).flatten()
    batch.a[pool_rows] = batch.b[pool_rows] = value
    s, y, dx, dy, da, db = batch.run(grads=True)
    assert theirs.any() and not theirs.all() and not y[theirs].isfinite().any()
    for got, want in zip((s, y, dx, dy), clean, strict=False):
        assert torch.equal(got[~theirs], want[~theirs])
    others = torch.ones(len(batch.a), dtype=torch.bool, device=rows.device)
    others[pool_rows] = False
    # db of an adapter sums dY S over its own rows; one that shares a row with the bad one has the same S and dY there.
    assert torch.equal(db[others], clean[5][others])
    assert torch.equal(da[others], clean[4][others])


def test_ranks_and_pages_past_an_adapter_are_never_read(device, dtype):
    batch = batch_of(device, dtype, K=2, rank=(5, 17, 0))
    want = batch.run(grads=True)
    used = torch.zeros(len(batch.a), dtype=torch.bool)
    for a, rank in enumerate(batch.ranks[:, 0].tolist()):
        for r in range(rank):
            used[16 * batch.pages[a, 0, r // 16] + r % 16] = True
    batch.a[~used] = batch.b[~used] = float("nan")
    for got, expected in zip(batch.run(grads=True), want, strict=True):
        assert torch.equal(got, expected)
    assert not want[4][~used].any() and not want[5][~used].any(), "their gradients are zeros"


def test_gradients_over_thousands_of_rows(device):
    """Rows of an adapter are summed in segments; 8201 is a multiple of nothing."""
    batch = batch_of(device, torch.float32, T=8201, A=2, K=2, shape=(40, 24), rank=(3, 16), assignment="skewed")
    got, truth = batch.run(grads=True), batch.run(reference, testing.to64, grads=True)
    for p, q in zip(got, truth, strict=True):
        assert (p.double() - q).norm() <= 1e-6 * q.norm()


@pytest.mark.parametrize("K", [1, 2])
def test_gradients_of_adapters_whose_parts_begin_in_one_window(device, K):
    """On CUDA an adapter of over 512 rows has its partial sums where its parts begin in the sorted rows: here the last part of
    one and the first of the next are 1, 187 and 511 rows apart, others have a row or exactly 512, and slots differ."""
    sizes = torch.tensor([513, 700, 1, 512, 1025, 0, 1024, 2])
    batch = batch_of(
        device, torch.float32, T=int(sizes.sum()), A=8, K=K, shape=(24, 40), rank=(3, 20), assignment="uniform"
    )
    slots = [torch.arange(8).repeat_interleave(sizes), torch.arange(8).flip(0).repeat_interleave(sizes)][:K]
    batch.index = torch.stack(slots, 1).int().to(device)
    got, truth = batch.run(grads=True), batch.run(reference, testing.to64, grads=True)
    for p, q in zip(got, truth, strict=True):
        assert (p.double() - q).norm() <= 1e-6 * q.norm()
    for rows in batch.pages[:, 0, 0]:  # each adapter alone, a lost part of a small one is small in the whole
        for p, q in zip(got[4:], truth[4:], strict=True):
            mine, want = p[16 * rows : 16 * rows + 16].double(), q[16 * rows : 16 * rows + 16]
            assert (mine - want).norm() <= 1e-5 * want.norm()


def test_no_scratch_of_gradients_is_as_large_as_the_pool(device):
    """Partial sums of 1,100 rows, in three parts: none for the 300 adapters that have no row."""
    batch = batch_of(device, torch.float32, T=1100, A=300, shape=(64, 24), rank=16, assignment="skewed")
    batch.run(grads=True)
    if device == "cuda":  # all that lives at once; planes of the whole pool would be three times its size alone
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        batch.run(grads=True)
        assert torch.cuda.max_memory_allocated() - before < 3 * batch.a.nbytes
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        batch.run(grads=True)
    largest = max(e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest == batch.a.nbytes, "a gradient of the pool itself"


def test_rows_in_another_order_give_the_rows_in_that_order(device, dtype):
    batch = batch_of(device, dtype, K=3, L=2)
    order = torch.randperm(97)
    for got, want in zip(part(batch, order).run(), batch.run(), strict=True):
        assert torch.equal(got, want[order])


def test_memory_grows_with_the_adapters_in_use_alone():
    """No copy of B for each token, and none of adapters that no row has: the peak of what torch's allocator hands out."""
    peaks = {}
    for A, used in ((1, 1), (64, 1), (64, 64)):
        batch = batch_of("cpu", torch.float32, T=64, A=A, rank=16, shape=(512, 512), assignment="distinct")
        batch.index %= used
        x, table = batch.x, batch.table()

        def call(batch=batch, x=x, table=table):
            s = ops.multi_lora_shrink(x, batch.a, *table, batch.scales)
            ops.multi_lora_expand_(batch.y, s, batch.b, *table)

        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
        events = sorted(
            (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        )
        sizes = [e.nbytes() for e in events]
        peaks[A, used] = max(sum(sizes[: i + 1]) for i in range(len(sizes)))
    s_bytes, copies = 64 * 16 * 4, 64 * 16 * 512 * 4
    assert all(s_bytes <= peak <= 4 * s_bytes for peak in peaks.values()), (peaks, copies)
    assert peaks[64, 64] < copies / 100


def test_adapters_in_another_order_give_the_same_bits(device, dtype):
    """Which number an adapter has says nothing of its rows: tables and index turned about together."""
    batch = batch_of(device, dtype, K=2, L=2, A=8, dropout=True)
    order = torch.randperm(8, device=batch.index.device)
    turned = part(batch, list(range(97)))
    turned.pages, turned.ranks, turned.p = batch.pages[order], batch.ranks[order], batch.p[order]
    turned.index = torch.where(batch.index < 0, -1, order.argsort()[batch.index.clamp(0).long()]).int()
    for got, want in zip(turned.run(grads=True), batch.run(grads=True), strict=True):
        assert torch.equal(got, want)


def test_no_adapter_no_rank_or_no_scale_is_the_base_bit_for_bit(device, dtype):
    draw = Draw(device, dtype)
    x, w, bias = draw(9, 40), draw(24, 40), draw(24)
    want = torch.nn.functional.linear(x, w, bias)
    for changes in ({"assignment": "none"}, {"rank": 0}, {"scale": "zero"}):
        batch = batch_of(device, dtype, T=9, shape=(40, 24), **({"K": 1, "assignment": "uniform"} | changes))
        table = batch.table()
        assert torch.equal(ops.multi_lora_linear(x, w, bias, batch.a, batch.b, *table, batch.scales), want), changes


def test_128_adapters_each_of_its_own_rank(device):
    batch = batch_of(device, torch.float32, A=128, T=200, rank=tuple(range(128)), assignment="uniform", scale="none")
    s, y = batch.run()
    for t in (0, 63, 199):
        a = int(batch.index[t, 0])
        f, g = (reference.factors(p.double(), batch.pages, batch.ranks)[a] for p in (batch.a, batch.b))
        rank = len(f)
        low = f @ batch.x[t].double()
        torch.testing.assert_close(s[t, 0, 0, :rank].double(), low, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(y[t].double(), batch.y[t].double() + low @ g, atol=1e-4, rtol=1e-5)
        assert not s[t, 0, 0, rank:].any()


def test_the_same_adapter_twice_in_a_row_adds_up(device):
    batch = batch_of(device, torch.float32, K=2, assignment="identical", scale="none", rank=16)
    y = batch.run()[1]
    once = part(batch, list(range(97)))
    once.index, once.case = batch.index[:, :1].contiguous(), batch.case | {"K": 1}
    torch.testing.assert_close(y - batch.y, 2 * (once.run()[1] - batch.y), atol=1e-5, rtol=1e-5)


def test_one_adapter_for_all_rows_is_lora(device, dtype):
    """multi_lora against lora_shrink and lora_expand_: the same sums, on the CPU and in fp32 in the same order."""
    batch = batch_of(device, dtype, A=1, rank=16, assignment="identical", scale="none")
    s, y = batch.run()
    rows = 16 * int(batch.pages[0, 0, 0])
    a, b = batch.a[rows : rows + 16], batch.b[rows : rows + 16].mT.contiguous()
    want = ops.lora_shrink(batch.x, a)
    if (library() is torch.ops.lrkern and device == "cpu") or dtype == torch.float32:
        assert torch.equal(s[:, 0, 0], want)
    testing.check(s[:, 0, 0], batch.x.double() @ a.double().T, want, "s")
    out = batch.y.clone()
    ops.lora_expand_(out, want, b)
    testing.check(y, batch.y.double() + want.double() @ b.double().mT, out, "y")


def test_mixture_of_experts():
    """Expert and adapter select the pair together: adapter e * A + a, or none where the row has none."""
    A, E, T, I, O = 3, 4, 50, 24, 16
    batch = Batch(BASE | {"A": A * E, "T": T, "shape": (I, O), "rank": (4, 8), "scale": "none"})
    expert, adapter = torch.randint(E, (T,)), torch.randint(-1, A, (T,))
    batch.index = torch.where(adapter < 0, -1, expert * A + adapter).int()[:, None]
    y = batch.run()[1]
    for t in range(T):
        want = batch.y[t].double()
        if adapter[t] >= 0:
            a, b = (reference.factors(p.double(), batch.pages, batch.ranks)[int(batch.index[t, 0])]
                    for p in (batch.a, batch.b))  # fmt: skip
            want = want + batch.x[t].double() @ a.T @ b
        torch.testing.assert_close(y[t].double(), want, atol=1e-4, rtol=1e-5)


def test_a_vocabulary_of_128k():
    """lm_head: expand to 128256 columns."""
    batch = Batch(BASE | {"shape": (64, 128256), "T": 5, "assignment": "uniform"})
    got, truth = batch.run()[1], batch.run(reference, testing.to64)[1]
    torch.testing.assert_close(got.double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_plan_and_layer_compile_to_one_graph():
    def layer(x, index, w, a, b, pages, ranks):
        plan = ops.multi_lora_plan(index, 5)
        return ops.multi_lora_linear(x, w, None, a, b, pages, ranks, plan)

    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counted, fullgraph=True, dynamic=True)
    for T in (7, 97, 64):
        batch, w = batch_of("cpu", torch.float32, T=T), torch.randn(264, 300)
        leaves = [t.detach().requires_grad_() for t in (batch.x, batch.a, batch.b)]
        results = []
        for fn in (layer, compiled):
            y = fn(leaves[0], batch.index, w, leaves[1], leaves[2], batch.pages, batch.ranks)
            results.append((y, *torch.autograd.grad(y.cos().sum(), leaves)))
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q)
    assert counted.frame_count == 1, "for any number of rows"
    torch._dynamo.reset()


def test_autocast_casts_activations_and_base_but_no_pool():
    batch, w = batch_of("cpu", torch.float32), torch.randn(264, 300)
    low = lambda t: t.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        s = ops.multi_lora_shrink(batch.x, batch.a, *batch.table(), batch.scales)
        y = ops.multi_lora_linear(batch.x, w, None, batch.a, batch.b, *batch.table(), batch.scales)
    assert torch.equal(s, ops.multi_lora_shrink(low(batch.x), batch.a, *batch.table(), batch.scales))
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert torch.equal(
        y, ops.multi_lora_linear(low(batch.x), low(w), None, batch.a, batch.b, *batch.table(), batch.scales)
    )


def test_a_gradient_that_would_be_lost_raises():
    batch = batch_of("cpu", torch.float32)
    s, table = batch.run()[0], batch.table()
    y, b = batch.y.clone(), batch.b.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="lrkern::multi_lora_expand_: writes in place .* use multi_lora_expand"):
        ops.multi_lora_expand_(y, s, b, *table)
    assert torch.equal(y, batch.y), "a refused call must not write"


# ---- refusals


def linear(b, **changed):
    args = {"x": b.x, "weight": b.x.new_zeros(264, 300), "bias": None, "a_pool": b.a, "b_pool": b.b}
    return ops.multi_lora_linear(**args | dict(zip(("pages", "ranks", "plan"), b.table(), strict=True)) | changed)


def embedding(b, **changed):
    args = {"ids": b.index[:, 0].clamp(0).long(), "a_pool": b.a} | dict(
        zip(("pages", "ranks", "plan"), b.table(), strict=True)
    )
    return ops.multi_lora_embedding(**args | changed)


REFUSED = [
    ("plan", lambda b: ops.multi_lora_plan(b.index, 3), "index must lie below adapters = 3, got"),
    ("plan", lambda b: ops.multi_lora_plan(b.index.long(), 5), "index must be int32, got int64"),
    ("plan", lambda b: ops.multi_lora_plan(b.index[None], 5), r"index must have shape \[T\] or \[T, K\] with K >= 1, got \[1, 97, 1\]"),
    ("pool", lambda b: ops.multi_lora_shrink(b.x, b.a[:-1], *b.table()), "a_pool must hold whole pages of 16 rows, got"),
    ("pool", lambda b: ops.multi_lora_shrink(b.x, b.a[:, :-1], *b.table()), r"x must have 299 features \(a_pool is \[P, N\] = \[.*, 299\]\), got 300"),
    ("dtype", lambda b: ops.multi_lora_shrink(b.x, b.a.half(), *b.table()), r"a_pool must be float32 \(the dtype of x\), got float16"),
    ("pool", lambda b: ops.multi_lora_shrink(b.x, b.a.T.contiguous().T, *b.table()), "a_pool must be contiguous"),
    ("pool", lambda b: ops.multi_lora_shrink(b.x, b.a.half(), *b.table()), "a_pool must be float32"),
    ("pool", lambda b: ops.multi_lora_shrink(b.x, b.a[:16], *b.table()), r"pages must lie in \[0, 1\), got"),
    ("rows", lambda b: ops.multi_lora_shrink(b.x[:5], b.a, *b.table()), r"plan must have shape \[K, plan length\]"),
    ("plan", lambda b: ops.multi_lora_shrink(b.x, b.a, b.pages, b.ranks, b.table()[2] * 0 + 200), "plan must be what multi_lora_plan made"),
    ("ranks", lambda b: ops.multi_lora_shrink(b.x, b.a, b.pages, b.ranks + 30, b.table()[2]), r"ranks must lie in \[0, 32\], got"),
    ("ranks", lambda b: ops.multi_lora_shrink(b.x, b.a, b.pages, b.ranks[:4], b.table()[2]), r"ranks must have shape \[A, L\] = \[5, 1\]"),
    ("scales", lambda b: ops.multi_lora_shrink(b.x, b.a, *b.table(), b.scales.T), r"scales must .*"),
    ("scales", lambda b: ops.multi_lora_shrink(b.x, b.a, *b.table(), b.scales.requires_grad_()), "scales has no gradient"),
    ("dropout", lambda b: ops.multi_lora_shrink(b.x, b.a, *b.table(), None, torch.full((5,), 1.5, device=b.x.device), torch.tensor([1], device=b.x.device)), r"dropout_p must lie in \[0, 1\], got 1.5"),
    ("dropout", lambda b: ops.multi_lora_shrink(b.x, b.a, *b.table(), None, torch.full((5,), 0.5, device=b.x.device)), "seed must be an int64 tensor"),
    ("slice", lambda b: ops.multi_lora_expand(b.y, b.run()[0], b.b, *b.table(), 1), r"slice must lie in \[0, L = 1\), got 1"),
    ("s", lambda b: ops.multi_lora_expand(b.y, b.run()[0][:, 0], b.b, *b.table()), r"s must have shape \[..., K, L, R\]"),
    ("y", lambda b: ops.multi_lora_expand_(b.y.T.contiguous().T, b.run()[0], b.b, *b.table()), "y must be rows of contiguous elements"),
    ("pools", lambda b: ops.multi_lora_linear(b.x, b.x.new_zeros(264, 300), None, b.a, b.b[:-16], *b.table()), "b_pool must have the rows of a_pool"),
    ("x", lambda b: linear(b, x=b.x[:, :-1]), r"x must have 300 features"),
    ("x", lambda b: linear(b, x=b.x.int()), "x must be float32, float16 or bfloat16, got int32"),
    ("weight", lambda b: linear(b, weight=b.x.new_zeros(264, 299)), "x must have 299 features .weight is .*got 300"),
    ("weight", lambda b: linear(b, weight=b.x.new_zeros(264, 300).half()), r"weight must be float32 \(the dtype of x\), got float16"),
    ("bias", lambda b: linear(b, bias=b.x.new_zeros(263)), r"bias must have shape \[O\] = \[264\], got \[263\]"),
    ("bias", lambda b: linear(b, bias=b.x.new_zeros(264).half()), r"bias must be float32 \(the dtype of x\), got float16"),
    ("ids", lambda b: embedding(b, ids=b.index[:, 0]), "ids must be int64, got int32"),
    ("a_pool", lambda b: embedding(b, a_pool=b.a[:-1]), "a_pool must hold whole pages of 16 rows, got"),
    ("pages", lambda b: embedding(b, pages=b.pages.long()), "pages must be int32, got int64"),
    ("ranks", lambda b: embedding(b, ranks=b.ranks[:4]), r"ranks must have shape \[A, L\] = \[5, 1\]"),
    ("plan", lambda b: embedding(b, ids=b.index[:5, 0].long()), r"plan must have shape \[K, plan length\]"),
    ("scales", lambda b: embedding(b, scales=b.scales.double()), "scales must be float32, got float64"),
]  # fmt: skip


# Of tensors, at which nobody looks on CUDA: test_a_row_of_an_unknown_adapter_or_page_is_nan_and_no_other.
CONTENTS = ("index must lie", "pages must lie", "plan must be what", "ranks must lie", "dropout_p must lie")


@pytest.mark.parametrize(("what", "call", "text"), REFUSED, ids=[f"{w}-{i}" for i, (w, *_) in enumerate(REFUSED)])
def test_refuses(what, call, text, device):
    batch = batch_of(device, torch.float32)
    if library() is not torch.ops.lrkern and text.startswith(CONTENTS):
        call(batch)
        return
    with pytest.raises(RuntimeError, match=f"lrkern::multi_lora.*{text}"):
        call(batch)
    for t in (batch.x, batch.a, batch.b):  # through autograd too
        t.requires_grad_()
    with pytest.raises(RuntimeError, match=f"lrkern::multi_lora.*({text}|writes in place and has no gradient)"):
        call(batch)


def test_a_row_of_an_unknown_adapter_or_page_is_nan_and_no_other(device):
    """Where the glue cannot look (CUDA): neither memory out of range nor a wrong number."""
    if library() is torch.ops.lrkern and device == "cpu":
        pytest.skip("the CPU refuses it")
    batch = batch_of(device, torch.float32, K=1, assignment="uniform", rank=16)
    s, y = batch.run()
    batch.pages[2] = 10**6
    got_s, got_y = batch.run()
    bad = (batch.index == 2).flatten()
    assert bad.any() and got_s[bad].isnan().all() and got_y[bad].isnan().all()
    assert torch.equal(got_s[~bad], s[~bad]) and torch.equal(got_y[~bad], y[~bad])
