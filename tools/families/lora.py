# SPDX-License-Identifier: Apache-2.0
"""LoRA's kernels: plans of csrc/cuda/lora/, and calls that launch them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from tools import families
from tools.families import (
    SIZE,
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

# Beyond the registry: batch invariance, thousands of tokens, what lies between rows, dropout's bits.
TESTS = {"tests/ops/test_lora.py": "cpu and rank_0", "tests/ops/test_lora_sizes.py": "nothing"}


BOOLS = (False, True)


def limits(x: str, terms: int, plain: bool, blocks: int, together: int) -> dict[str, int]:
    """Of a kernel for aligned operands without dropout and DoRA's scale: the loads that a warp has under way together, where
    their tile is one term (what is taken apart waits), and an instruction cache. The others have every slow way inside."""
    flight = one_by_one(blocks) * (together if plain and terms == 1 else 1)
    return {"flight": flight, "code": 32 << 10 if plain and x != "float" else SLOW_PATHS}


def shrink(x: str, f: str, ranks: int, n_contig: bool, plain: bool) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    shared = tile(64, 64, elem, xt) + (tile(ranks, 64, elem, ft) if n_contig else tile(64, ranks, elem, ft))
    wide = vectors(64, 64, x) + vectors(ranks, 64, f)
    blocks = 4 if ranks == 16 and SIZE[x] == 2 and xt == 1 else 2
    return Plan(blocks, shared, tensor, wide, **limits(x, xt, plain, blocks, 4))


def expand(x: str, f: str, n_contig: bool, plain: bool) -> Plan:
    s = type_of_s(f)
    elem, _, ft, tensor = math_of(x, s)
    shared = tile(64, 32, elem, ft) + (tile(32, 128, elem, ft) if n_contig else tile(128, 32, elem, ft))
    wide = vectors(64, 32, s) + vectors(32, 128, f) + vectors(64, 128, x)
    return Plan(2, shared, tensor, wide, stores=vectors(64, 128, x), **limits(x, ft, plain, 2, 5))


def wgrad(x: str, f: str, ranks: int, plain: bool) -> Plan:
    terms = math_of(x, type_of_s(f))[1]
    return replace(families.wgrad(x, f, ranks), **limits(x, terms, plain and x != "f16", 2, 6))  # f16, 64: 32.5 KB


def shrink_wgrad(x: str, f: str, plain: bool) -> Plan:
    """Its [64, 256] tile of dY leaves room for a second block only where the tile is one 16-bit term."""
    s = type_of_s(f)
    elem, xt, ft, tensor = math_of(x, s)
    shared = tile(64, 256, elem, xt) + tile(256, 16, elem, ft) + tile(64, 16, elem, ft)
    unrolled = 4 if SIZE[x] == 2 else 2
    blocks = 2 if x == s != "float" else 1
    wide = vectors(256, 16, f) + vectors(64, 16, s) + unrolled
    flight = limits(x, xt, plain, blocks, 8)["flight"]  # a tile of dY at once, each vector with code of its own
    return Plan(blocks, shared, tensor, wide, flight=flight, code=SLOW_PATHS)


def rescale(x: str) -> Plan:
    return Plan(
        4, 4 * 256 * 4, wide=2 * vectors(1, 8, x), stores=vectors(1, 8, x), flight=one_by_one(4)
    )  # streams: 8 columns a lane, four rows at a time


def gemm_shared(tile_n: int, pages: bool = False) -> int:
    """Of csrc/cuda/gemm_sm90.cuh: a ring of stages, the results of two warpgroups on their way, barriers."""
    stages = 4 if tile_n == 256 else 6
    return stages * 2 * 64 * (128 + tile_n) + 2 * 2 * 64 * 128 + 2 * 128 + (128 if pages else 0)


def gemm(x: str, along_n: bool, dropout: bool, tile_n: int) -> Plan:
    """An SM to itself. What it loads comes by boxes, which registers know nothing of."""
    return Plan(1, gemm_shared(tile_n), "HGMMA", threads=384, code=SLOW_PATHS)


GEMMS = [(*way, tile_n) for way in ((False, False), (True, False), (True, True)) for tile_n in (128, 256)]


def gemm_sm100(x: str, along_n: bool) -> Plan:
    """By CUTLASS, a block on an SM; its code holds the roles of its warps and an epilogue."""
    return Plan(1, shared=224 << 10, tensor="UTCHMMA", code=64 << 10, threads=256)


KERNELS = {
    "lora_shrink": Kernel(shrink, "xf", list(product((16, 64), BOOLS, BOOLS)), again={"x": "y", "a": "x"}),
    "lora_expand": Kernel(expand, "xf", list(product(BOOLS, BOOLS)), again={"s": "y", "b": "x"}),
    "lora_wgrad": Kernel(wgrad, "xf", list(product((16, 64), BOOLS)), again={"ds": "y", "x": "z"}),
    "lora_shrink_wgrad": Kernel(shrink_wgrad, "xf", [(False,), (True,)], again={"s": "y", "b": "x"}),
    "lora_rescale": Kernel(rescale, "x"),
    "lora_gemm": Kernel(gemm, "x16", GEMMS, again={"x": "y", "w": "x"}),
    "lora_gemm_sm100": Kernel(gemm_sm100, "x16", [(along_n,) for along_n in BOOLS], part=True, by_ops=False),
    "lora_terms": Mixed(
        streams(8), rest=[("bf16", "bf16", False), ("float", "f16", True), ("float", "float", True)], part=True
    ),
    "lora_sum": Kernel(streams(8), "f", part=True),  # fp32, neighbours in one warp
}


SHAPES = [
    *(Shape(T=T, I=4096, O=4096, R=16) for T in (1, 16, 64, 4096, 8128, 8192, 8200, 16384)),
    Shape(T=8192, I=4096, O=14336, R=16),
    *(Shape(T=8192, I=4096, O=4096, R=R) for R in (8, 64)),
]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    import torch

    T, I, O, R = shape.T, shape.I, shape.O, shape.R
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    x, y, a, b, s = draw(T, I), draw(T, O), draw(R, I), draw(O, R), draw(T, R)
    s = s.float() if dtype == torch.float16 else s
    yield Timed("lora_shrink", lambda: op.lora_shrink(x, a), {"x": x, "a": a, "s": s}, 2 * T * I * R)
    moved = {"y": y, "base": y, "s": s, "b": b}
    yield Timed("lora_expand", lambda: op.lora_expand_(y, s, b, 1e-4), moved, 2 * T * O * R)
    da = False, True  # that gradient alone
    call = lambda: op.lora_shrink_bwd(s, x, a, 1.0, 0.0, None, *da)
    yield Timed("lora_wgrad", call, {"x": x, "ds": s, "da": a}, 2 * T * I * R)
    ds_db = False, False, False, True, True
    call = lambda: op.linear_expand_bwd(y, None, None, s, b, 1.0, *ds_db)
    yield Timed("lora_shrink_wgrad", call, {"dy": y, "s": s, "b": b, "ds": s, "db": b}, 4 * T * O * R)
    if dtype != torch.float32:
        w = draw(O, I)
        moved = {"x": x, "w": w, "s": s, "b": b, "y": y}
        yield Timed("lora_gemm", lambda: op.lora_linear(x, w, None, a, b), moved, 2 * T * I * O, also=("lora_shrink",))
    # A base layer of no weight: the gradient of base_scale alone.
    thin, w, c, z = draw(T, 8), draw(O, 8), torch.randn(O, device=device), draw(T, O)
    layer = y, thin, w, draw(R, 8), b, s, 1.0, 0.0, None, c, z
    dc = False, False, False, False, False, True
    yield Timed("lora_rescale", lambda: op.lora_linear_bwd(*layer, *dc), {"dy": y, "base": z}, 2 * T * O)
