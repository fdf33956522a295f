# SPDX-License-Identifier: Apache-2.0
"""Timing shared by every suite: candidates interleave round by round, so that machine noise hits all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[int], object]  # called with the round's number, to rotate over copies of the data

LAST_LEVEL_CACHE = 64 << 20  # more than the last-level cache of the machines we measure on


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(call: Call, i: int, device: str, flush: Tensor | None) -> float:
    """Milliseconds of one call. On CUDA by events, after the L2 cache was overwritten."""
    if device == "cuda":
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    call(i)
    return (time.perf_counter() - begin) * 1e3


def interleaved(calls: dict[str, Call], rounds: int, device: str, tick: Callable[[], None] = lambda: None):
    """{name: sorted milliseconds of every round}. The order within a round turns by one each round."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    names = list(calls)
    for name in names:
        for i in range(3):
            calls[name](i)
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(once(calls[name], i, device, flush))
        tick()
    return {name: sorted(t) for name, t in times.items()}


def percentiles(times: list[float]) -> dict[str, float]:
    at = lambda q: times[min(len(times) - 1, round(q * (len(times) - 1)))]
    return {"p20_ms": at(0.2), "p50_ms": statistics.median(times), "p80_ms": at(0.8)}


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes/s of a large copy, flop/s of a large GEMM), measured here and now."""
    n = 1 << (28 if device == "cuda" else 26)
    src, dst = (torch.empty(n, dtype=torch.int8, device=device) for _ in range(2))
    m = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
    best = {
        k: v[0] for k, v in interleaved({"copy": lambda i: dst.copy_(src), "gemm": lambda i: a @ b}, 7, device).items()
    }
    return 2 * n / best["copy"] * 1e3, 2 * m**3 / best["gemm"] * 1e3


def saved_bytes(run: Callable[[], object], exclude: list[Tensor]) -> int:
    """Bytes autograd keeps for backward, by storage, beyond those of `exclude` (x and the parameters)."""
    own = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(kept.values())
