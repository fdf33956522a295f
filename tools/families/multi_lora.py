# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA's kernels: plans of csrc/cuda/multi_lora/, and calls that launch them."""

from collections.abc import Iterator
from dataclasses import replace

from tools import families
from tools.families import Kernel, Plan, Timed, math_of, streams, tile, type_of_s, vectors

# Beyond the registry: the grid, invariances, isolation.
TESTS = {"tests/ops/test_multi_lora.py": "cpu and no_adapter"}

ROWS = -(-64 * 4 // 128) * 128  # a list of 64 rows in shared memory; up to 32 ranks take 128 bytes


def lists(ranks: int) -> int:
    return ROWS + (ROWS if ranks == 64 else 128)


def shrink(x: str, f: str, ranks: int) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    wide = vectors(64, 64, x) + vectors(ranks, 64, f)
    return Plan(2, tile(64, 64, elem, xt) + tile(ranks, 64, elem, ft) + lists(ranks), tensor, wide)


def expand(x: str, f: str, to: str) -> Plan:
    s = type_of_s(f)
    elem, _, ft, tensor = math_of(x, s)
    shared = tile(64, 32, elem, ft) + tile(32, 128, elem, ft) + lists(32)
    return Plan(2, shared, tensor, vectors(64, 32, s) + vectors(32, 128, f) + vectors(64, 128, to))


def wgrad(x: str, f: str, ranks: int) -> Plan:
    plain = families.wgrad(x, f, ranks)
    return replace(plain, shared=plain.shared + lists(ranks))


KERNELS = {
    "multi_lora_plan": Kernel(streams(4, shared=2 * 256 * 4, threads=256)),  # one block per slot: few
    "multi_lora_shrink": Kernel(shrink, "xf", [(16,), (64,)]),
    "multi_lora_sum": Kernel(streams(8), "f", part=True),
    "multi_lora_expand": Kernel(expand, "xf", [("float",)]),
    "multi_lora_finish": Kernel(streams(8), "x", part=True),
    "multi_lora_wgrad": Kernel(wgrad, "xf", [(16,), (64,)]),
    "multi_lora_wgrad_sum": Kernel(streams(8, shared=128), "f", part=True),
    "multi_lora_gather": Kernel(streams(8, shared=lists(32)), "f"),
    "multi_lora_scatter": Kernel(streams(8, shared=128), "f"),
}


def timed(op, device: str, dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    """16 adapters of rank R, rows in any order, one slot."""
    import torch

    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    A, M = 16, (R + 15) // 16
    x, a, b = draw(T, N), draw(16 * M * A, N), draw(16 * M * A, N)
    pages = torch.randperm(A * M, device=device).int().reshape(A, 1, M)
    ranks = torch.full((A, 1), R, dtype=torch.int32, device=device)
    index = torch.randint(A, (T, 1), device=device).int()
    table = pages, ranks, op.multi_lora_plan(index, A)
    s, flop, used = op.multi_lora_shrink(x, a, *table), 2 * T * N * R, a[: A * R]
    yield Timed("multi_lora_plan", lambda: op.multi_lora_plan(index, A), [index, table[2]], T)
    yield Timed("multi_lora_shrink", lambda: op.multi_lora_shrink(x, a, *table), [x, used, s], flop)
    yield Timed("multi_lora_expand", lambda: op.multi_lora_expand_(x, s, b, *table), [x, x, s, used], flop)
    da = False, True  # that gradient alone
    call = lambda: op.multi_lora_shrink_bwd(s, x, a, *table, None, None, *da)
    yield Timed("multi_lora_wgrad", call, [x, s, used], flop)
    ids = torch.randint(N, (T,), device=device)
    yield Timed("multi_lora_gather", lambda: op.multi_lora_embedding(ids, a, *table), [ids, s, s], T * R)
    call = lambda: op.multi_lora_embedding_bwd(s, ids, a, *table)
    yield Timed("multi_lora_scatter", call, [ids, s, s, s], T * R)
