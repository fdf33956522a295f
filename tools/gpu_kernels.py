# SPDX-License-Identifier: Apache-2.0
"""The kernels by themselves, for tools/gpu.py, which runs each of these in a process of its own:

python tools/gpu_kernels.py cases FAMILY... [--device D] [--seconds S]   every registry sample once, for compute-sanitizer
python tools/gpu_kernels.py ceilings [--device D]                        a large copy and a large GEMM
python tools/gpu_kernels.py time FAMILY... [--device D]                  each kernel at a layer's size, against its roof
python tools/gpu_kernels.py shapes FAMILY... [--device D]                each call of each shape of tools/families/, in bfloat16
python tools/gpu_kernels.py once FAMILY... [--device D]                  each call of the last shape, once, for a profiler

D: cuda, cpu, or emulated (cases only). ceilings and time print one JSON object a line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "emulator"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lrkern.ops
from bench import timing
from lrkern import testing
from lrkern.ops.dispatch import library, use_library
from lrkern.reference import OPS
from tools import gpu_status
from tools.families import Shape, Timed, load

SMALL = Shape(A=4, T=20, I=64, O=64, R=4)  # a rehearsal's
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# ---------------------------------------------------------------------------------------------- cases


def samples(families: list[str], device: str, dtypes=DTYPES) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, forward and backward of one registry sample)."""
    for dtype in dtypes:
        for op in (op for op in OPS.values() if op.family.name in families):
            for sample in op.samples(device, dtype):

                def run(op=op, sample=sample):
                    args = op.leaves(sample)
                    y = getattr(lrkern.ops, op.name)(*args, **sample.kwargs)
                    if op.differentiable:
                        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
                        torch.autograd.grad(y, wanted, torch.ones_like(y))

                yield f"{op.name}[{sample.name}] {dtype}", run


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


def ceilings(device: str) -> dict[str, float]:
    """Bytes/s of a large copy (read plus written), flop/s of a large GEMM on random data."""
    found = {}
    for name in ("bfloat16", "float32"):
        found[name], found["copy"] = timing.ceilings(device, getattr(torch, name))
    return found


def time_kernels(families: list[str], device: str) -> Iterator[dict]:
    cuda = device == "cuda"
    shape = Shape(T=16384, I=8192, O=8192, R=16) if cuda else Shape(T=256, I=512, O=512, R=16)
    roofs = ceilings(device)
    for dtype in DTYPES[:2]:
        name = str(dtype).removeprefix("torch.")
        for family in families:
            for t in calls(family, shape, device, dtype):
                step = timing.Step(lambda _, t=t: t.call())
                with torch.no_grad():
                    ms = statistics.median(timing.interleaved({"": [step]}, 30 if cuda else 3, device)[""])
                moved = sum(m.nbytes for m in t.moved.values())
                roof_ms = max(moved / roofs["copy"], t.flop / roofs[name]) * 1e3
                yield {"suite": "kernel", "kernel": t.kernel, "case": str(shape), "dtype": name,
                       "device": device, "p50_ms": ms, "bytes": moved, "flops": t.flop, "roof_ms": roof_ms,
                       "of_roof": roof_ms / ms}  # fmt: skip


def calls(family: str, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Timed]:
    """Of each kernel that the device runs, those of its architecture alone with LRKERN_FUSED=all."""
    archs = {k.name: k.source.arch for k in gpu_status.kernels()}
    here = "{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else ""
    for timed in load(family).timed(library(), device, dtype, shape):
        if (arch := archs[timed.kernel]) in ("", here):
            with testing.fused(bool(arch)):
                yield timed


def time_shapes(families: list[str], device: str) -> Iterator[dict]:
    for family in families:
        for shape in load(family).SHAPES if device == "cuda" else [SMALL]:
            for t in calls(family, shape, device):
                step = timing.Step(lambda _, t=t: t.call())
                with torch.no_grad():
                    ms = statistics.median(timing.interleaved({"": [step]}, 20 if device == "cuda" else 2, device)[""])
                yield {"suite": "shape", "kernel": t.kernel, "case": str(shape), "dtype": "bfloat16", "p50_ms": ms}


def once(families: list[str], device: str) -> None:
    for family in families:
        for t in calls(family, load(family).SHAPES[-1] if device == "cuda" else SMALL, device):
            with torch.no_grad():
                t.call()
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cases", "ceilings", "time", "shapes", "once"))
    parser.add_argument("families", nargs="*")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "emulated"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    timing.SIZES["cpu"] = 1 << 25, 512  # a rehearsal's
    if args.what == "cases":
        run_cases(args.families, args.device, args.seconds)
    elif args.what == "ceilings":
        for name, rate in ceilings(args.device).items():
            print(json.dumps({"suite": "ceiling", "case": name, "device": args.device, "per_second": rate}))
    elif args.what == "once":
        once(args.families, args.device)
    else:
        for row in (time_kernels if args.what == "time" else time_shapes)(args.families, args.device):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
