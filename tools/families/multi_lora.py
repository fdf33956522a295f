# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA's kernels: plans of csrc/cuda/multi_lora/, and calls that launch them."""

from collections.abc import Iterator
from dataclasses import replace

from tools import families
from tools.families import (
    SLOW_PATHS,
    Kernel,
    Mixed,
    Plan,
    Shape,
    Timed,
    math_of,
    one_by_one,
    streams,
    tile,
    type_of_s,
    vectors,
)
from tools.families.lora import GEMMS, gemm_shared

# Beyond the registry: the grid, invariances, isolation.
TESTS = {"tests/ops/test_multi_lora.py": "cpu and no_adapter"}

ROWS = -(-64 * 4 // 128) * 128  # a list of 64 rows in shared memory; up to 32 ranks take 128 bytes


def lists(ranks: int) -> int:
    return ROWS + (ROWS if ranks == 64 else 128)


def shrink(x: str, f: str, ranks: int) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    wide = vectors(64, 64, x) + vectors(ranks, 64, f)
    shared = tile(64, 64, elem, xt) + tile(ranks, 64, elem, ft) + lists(ranks)
    return Plan(2, shared, tensor, wide, one_by_one(2), SLOW_PATHS)


def expand(x: str, f: str, to: str) -> Plan:
    s = type_of_s(f)
    elem, _, ft, tensor = math_of(x, s)
    shared = tile(64, 32, elem, ft) + tile(32, 128, elem, ft) + lists(32)
    wide = vectors(64, 32, s) + vectors(32, 128, f) + vectors(64, 128, to)
    return Plan(2, shared, tensor, wide, one_by_one(2), SLOW_PATHS)


def wgrad(x: str, f: str, ranks: int) -> Plan:
    plain = families.wgrad(x, f, ranks)
    return replace(plain, shared=plain.shared + lists(ranks))


def page_shrink(x: str, pages: int, tiles: int, plain: bool) -> Plan:
    """A step's part of the pool and of 8 rows of x, all under way at once."""
    shared = 8 * pages * tiles * 512
    if not plain:
        return Plan(1, shared, "HMMA", code=SLOW_PATHS, threads=256)
    pool, rows, flight = (16, 8 // pages, 60 << 10) if tiles == 1 else (8, 4 // pages, 22 << 10 >> pages - 1)
    return Plan(2, shared, "HMMA", pool + tiles * rows, flight, threads=256)


def page_expand(x: str, to: str, pages: int, plain: bool) -> Plan:
    """Four ranks of the pool and two rows of the base for each window of a page, all under way at once."""
    if not plain:
        return Plan(2, 0, "HMMA", code=SLOW_PATHS)
    held, tiles = 2 if x == "f16" else 4, 1 if pages == 1 else 2
    return Plan(2, 0, "HMMA", 4 * held + 2 * tiles * held // pages, 16 << 10)


def gemm(x: str, along_n: bool, dropout: bool, tile_n: int) -> Plan:
    return Plan(1, gemm_shared(tile_n, pages=True), "HGMMA", threads=384, code=SLOW_PATHS)


KERNELS = {
    "multi_lora_plan": Kernel(streams(4, shared=128 + 1024, threads=256)),  # one block per slot: few
    "multi_lora_page_shrink": Kernel(
        page_shrink, "x16", [(pages, tiles, True) for pages in (1, 2) for tiles in (1, 4)], again={"x": "y", "a": "z"}
    ),
    "multi_lora_page_expand": Kernel(page_expand, "x16", [("float", 1, False)], again={"s": "y"}),
    "multi_lora_shrink": Kernel(shrink, "xw", [(16,), (64,)], again={"x": "y"}),
    "multi_lora_sum": Kernel(streams(8), "", part=True),
    "multi_lora_expand": Kernel(expand, "xw", [("float",)], again={"s": "y"}),
    "multi_lora_finish": Kernel(streams(8), "x", part=True),
    "multi_lora_wgrad": Kernel(wgrad, "xf", [(16,), (64,)], again={"ds": "y"}),
    "multi_lora_wgrad_sum": Kernel(streams(8, shared=128), "f", part=True),
    "multi_lora_lists": Kernel(streams(4, shared=128), part=True),
    "multi_lora_gemm": Mixed(gemm, rest=[("bf16", *rest) for rest in GEMMS], again={"x": "y", "w": "x"}),
    "multi_lora_gather": Kernel(streams(8, shared=lists(32)), "f"),
    "multi_lora_scatter": Kernel(streams(8, shared=128 + 2 * 512 + 1024), "f"),
}


SHAPES = [
    *(Shape(A=A, T=64, I=4096, O=4096, R=R) for R in (16, 64) for A in (16, 64)),
    Shape(A=16, T=8192, I=4096, O=4096, R=16),
]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """Adapters of one rank, rows in turn, one slot."""
    import torch

    T, I, O, R, A, M = shape.T, shape.I, shape.O, shape.R, shape.A or 16, (shape.R + 15) // 16
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    x, y, a, b = draw(T, I), draw(T, O), draw(16 * M * A, I), draw(16 * M * A, O)
    pages = torch.randperm(A * M, device=device).int().reshape(A, 1, M)
    ranks = torch.full((A, 1), R, dtype=torch.int32, device=device)
    index = (torch.arange(T, device=device) % A).int().unsqueeze(1)
    table = pages, ranks, op.multi_lora_plan(index, A)
    s, used = op.multi_lora_shrink(x, a, *table), R * min(A, T)
    yield Timed("multi_lora_plan", lambda: op.multi_lora_plan(index, A), {"index": index, "plan": table[2]}, T)
    wide = a.float(), b.float(), s.float()  # of another type than x
    for name, (u, v, sums) in {"multi_lora_page": (a, b, s), "multi_lora": wide}.items():
        moved = {"x": x, "a": u[:used], "s": sums}
        call = lambda u=u: op.multi_lora_shrink(x, u, *table)
        yield Timed(f"{name}_shrink", call, moved, 2 * T * I * R, table)
        moved = {"y": y, "base": y, "s": sums, "b": v[:used]}
        call = lambda v=v, sums=sums: op.multi_lora_expand_(y, sums, v, *table)
        yield Timed(f"{name}_expand", call, moved, 2 * T * O * R, table)
    if dtype == torch.bfloat16:
        w = draw(O, I)
        moved = {"x": x, "w": w, "s": s, "b": b[:used], "y": y}
        call = lambda: op.multi_lora_linear(x, w, None, a, b, *table)
        yield Timed("multi_lora_gemm", call, moved, 2 * T * I * O, table, also=("multi_lora_page_shrink",))
    da = False, True  # that gradient alone
    call = lambda: op.multi_lora_shrink_bwd(s, x, a, *table, None, None, *da)
    yield Timed("multi_lora_wgrad", call, {"x": x, "ds": s, "da": a[:used]}, 2 * T * I * R, table)
    ids = torch.randint(I, (T,), device=device)
    call = lambda: op.multi_lora_embedding(ids, a, *table)
    yield Timed("multi_lora_gather", call, {"ids": ids, "gathered": s, "s": s}, T * R, table)
    call = lambda: op.multi_lora_embedding_bwd(s, ids, a, *table)
    yield Timed("multi_lora_scatter", call, {"ids": ids, "ds": s, "before": s, "after": s}, T * R, table)
