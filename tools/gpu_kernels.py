# SPDX-License-Identifier: Apache-2.0
"""The kernels by themselves, for tools/gpu.py, which runs each of these in a process of its own:

python tools/gpu_kernels.py cases FAMILY... [--device D] [--seconds S]   every registry sample once, for compute-sanitizer
python tools/gpu_kernels.py ceilings [--device D]                        a large copy and a large GEMM
python tools/gpu_kernels.py time FAMILY... [--device D]                  each kernel at a layer's size, against its roof

D: cuda, cpu, or emulated (cases only). ceilings and time print one JSON object a line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "emulator"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lrkern.ops
from lrkern.ops.dispatch import library, use_library
from lrkern.reference import OPS
from tools.gpu_status import ops_of

DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# ---------------------------------------------------------------------------------------------- cases


def samples(families: list[str], device: str, dtypes=DTYPES) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, forward and backward of one registry sample)."""
    for dtype in dtypes:
        for name in (op for family in families for op in ops_of(family) if op in OPS):
            op = OPS[name]
            for sample in op.samples(device, dtype):

                def run(op=op, sample=sample):
                    args = op.leaves(sample)
                    y = getattr(lrkern.ops, op.name)(*args, **sample.kwargs)
                    if op.differentiable:
                        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
                        torch.autograd.grad(y, wanted, torch.ones_like(y))

                yield f"{name}[{sample.name}] {dtype}", run


def run_cases(families: list[str], device: str, seconds: float) -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor an allocation whose end memcheck knows
    if device == "emulated":
        import build as emulator

        with use_library(emulator.ops()):
            return run_cases(families, "cpu", seconds)
    start, done, total = time.monotonic(), 0, 0
    for name, run in samples(families, device):
        total += 1
        if time.monotonic() - start < seconds:
            print(name, flush=True)
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            done += 1
    print(f"cases: {done} of {total} in {time.monotonic() - start:.1f} s")


# ---------------------------------------------------------------------------------------------- time


def milliseconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """Median of one call. On CUDA replays of a graph between two events, after the L2 cache was overwritten."""
    if device != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings(device: str) -> dict[str, float]:
    """Bytes/s of a large copy (read plus written), flop/s of a large GEMM on random data."""
    cuda = device == "cuda"
    n, m = (1 << 31, 8192) if cuda else (1 << 25, 512)
    source, target = (torch.empty(n, dtype=torch.int8, device=device) for _ in range(2))
    found = {"copy": 2 * n / milliseconds(lambda: target.copy_(source), device, 7) * 1e3}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(m, m, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * m**3 / milliseconds(lambda a=a, b=b: a @ b, device, 7) * 1e3
    return found


@dataclass
class Timed:
    """A call that launches one kernel (and, where it has partial sums, lora_sum after it)."""

    kernel: str
    call: Callable[[], object]
    moved: list[Tensor]  # each read or written once
    flop: int


def lora(device: str, dtype: torch.dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    op = library()
    x, a, b, s, flop = draw(T, N), draw(R, N), draw(N, R), draw(T, R), 2 * T * N * R
    yield Timed("lora_shrink", lambda: op.lora_shrink(x, a), [x, a, s], flop)
    yield Timed("lora_expand", lambda: op.lora_expand_(x, s, b, 1e-4), [x, x, s, b], flop)
    need = (False, True)  # da alone
    yield Timed("lora_wgrad", lambda: op.lora_shrink_bwd(s, x, a, 1.0, 0.0, None, *need), [x, s, a], flop)
    need = (False, False, False, True, True)  # ds and db
    call = lambda need=need: op.linear_expand_bwd(x, None, None, s, b, 1.0, *need)
    yield Timed("lora_shrink_wgrad", call, [x, s, b, s, b], 2 * flop)
    thin, w, c = (
        draw(T, 8),
        draw(N, 8),
        torch.randn(N, device=device),
    )  # a base layer of no weight: the gradient of base_scale alone
    need = (False, False, False, False, False, True)
    layer = (x, thin, w, draw(R, 8), b, s, 1.0, 0.0, None, c, draw(T, N))
    yield Timed("lora_rescale", lambda need=need: op.lora_linear_bwd(*layer, *need), [x, layer[-1]], 2 * T * N)


def multi_lora(device: str, dtype: torch.dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    """16 adapters of rank R, rows in any order, one slot."""
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    op, A, M = library(), 16, (R + 15) // 16
    x, a, b = draw(T, N), draw(16 * M * A, N), draw(16 * M * A, N)
    pages = torch.randperm(A * M, device=device).int().reshape(A, 1, M)
    ranks = torch.full((A, 1), R, dtype=torch.int32, device=device)
    index = torch.randint(A, (T, 1), device=device).int()
    table = pages, ranks, op.multi_lora_plan(index, A)
    s, flop, used = op.multi_lora_shrink(x, a, *table), 2 * T * N * R, a[: A * R]
    yield Timed("multi_lora_plan", lambda: op.multi_lora_plan(index, A), [index, table[2]], T)
    yield Timed("multi_lora_shrink", lambda: op.multi_lora_shrink(x, a, *table), [x, used, s], flop)
    yield Timed("multi_lora_expand", lambda: op.multi_lora_expand_(x, s, b, *table), [x, x, s, used], flop)
    need = (False, True)  # da alone
    call = lambda: op.multi_lora_shrink_bwd(s, x, a, *table, None, None, *need)
    yield Timed("multi_lora_wgrad", call, [x, s, used], flop)
    ids = torch.randint(N, (T,), device=device)
    yield Timed("multi_lora_gather", lambda: op.multi_lora_embedding(ids, a, *table), [ids, s, s], T * R)
    call = lambda: op.multi_lora_embedding_bwd(s, ids, a, *table)
    yield Timed("multi_lora_scatter", call, [ids, s, s, s], T * R)


def basis(device: str, dtype: torch.dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    """256 bases [R, N] for one layer; their first rows as the fixed factor of 16 tokens. flop: of the sums, none for U."""
    op, K, Q = library(), 256, 1024
    T, stream, spec = min(T, 16), (1, 2, 2, 0), ([N], [K], [1.0])  # seed, NOLA, uniform8, tensor
    like, coef, g = (
        torch.empty(0, device=device, dtype=dtype),
        *(torch.randn(*s, device=device) for s in ((K,), (R, N))),
    )
    whole = torch.empty(Q, N, device=device, dtype=dtype)
    yield Timed("basis_fill", lambda: op.basis_fill(like, None, None, *stream, 0, R, 0, 0, Q, N), [whole], Q * N)
    yield Timed("basis_combine", lambda: op.basis_combine(coef, None, *stream, R, *spec), [coef, g], 2 * K * R * N)
    yield Timed("basis_dot", lambda: op.basis_dot(g, *stream, *spec), [coef, g], 2 * K * R * N)
    short, long = (torch.randn(T, n, device=device).to(dtype) for n in (Q, N))
    call = lambda: op.basis_matmul(short, None, None, *stream, 0, R, Q, N, False)
    yield Timed("basis_matmul", call, [short, long], 2 * T * Q * N)
    call = lambda: op.basis_matmul(long, None, None, *stream, 0, R, Q, N, True)
    yield Timed("basis_matmul_transposed", call, [short, long], 2 * T * Q * N)


TIMED = {"lora": lora, "multi_lora": multi_lora, "basis": basis}
PARTS_OF_OTHERS = {
    "lora_sum",
    "multi_lora_sum",
    "multi_lora_finish",
    "multi_lora_wgrad_sum",
    "basis_combine_sum",
    "basis_dot_sum",
    "basis_matmul_x",
    "basis_matmul_sum",
}  # launched before or after the kernels above, inside their time


def time_kernels(families: list[str], device: str) -> Iterator[dict]:
    cuda = device == "cuda"
    T, N, R = (16384, 8192, 16) if cuda else (256, 512, 16)
    roofs = ceilings(device)
    for dtype in DTYPES[:2]:
        name = str(dtype).removeprefix("torch.")
        for family in families:
            for t in TIMED[family](device, dtype, T, N, R):
                with torch.no_grad():
                    ms = milliseconds(t.call, device, 30 if cuda else 3)
                moved = sum(m.nbytes for m in t.moved)
                roof_ms = max(moved / roofs["copy"], t.flop / roofs[name]) * 1e3
                yield {"suite": "kernel", "kernel": t.kernel, "case": f"T={T} N={N} R={R}", "dtype": name,
                       "device": device, "p50_ms": ms, "bytes": moved, "flops": t.flop, "roof_ms": roof_ms,
                       "of_roof": roof_ms / ms}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "ceilings", "time"))
    parser.add_argument("families", nargs="*")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "emulated"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    if args.what == "cases":
        run_cases(args.families, args.device, args.seconds)
    elif args.what == "ceilings":
        for name, rate in ceilings(args.device).items():
            print(json.dumps({"suite": "ceiling", "case": name, "device": args.device, "per_second": rate}))
    else:
        for row in time_kernels(args.families, args.device):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
