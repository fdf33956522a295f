# SPDX-License-Identifier: Apache-2.0
"""python bench/run.py roofline [KERNEL or FAMILY...] [--arch h100|h200|b200|a100|a6000] [--dtype bf16|fp16|fp32] [--case TEXT]
                            [--tokens T...] [--json F]

What the CUDA kernels cost, predicted without a GPU: counts of the very kernels from the emulator, instructions from nvcc's
machine code, a chip's figures from tools/chips.py (tools/roofline.py says how). A line for each kernel of a call; `sum` adds
them up. Times are predictions of what the kernels take, without the gaps between launches: docs/perf.md says how far off.

    waves      of blocks through the chip; after it the share of SMs that have a block
    sample     blocks that were emulated for all; the first two waves and the last
    DRAM, L2   MB; least: the operands' bytes, each once
    B/sect     bytes used of each 32-byte sector; sectors and 128-byte lines of a request behind it
    wf         wavefronts of shared memory over the least there can be
    flight     KB that an SM's warps have under way while they wait for memory, in steady state
    issue      million issue slots; mma: thousand products among them, wgmma's in mma's size
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "emulator"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build
from lrkern import testing
from lrkern.ops.dispatch import use_library
from tools import families, gpu_status, roofline, sources
from tools.chips import CHIPS, Chip
from tools.families import Shape, Timed
from tools.roofline import Counter, Machine, Prediction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEYS = ("kernel", "case", "dtype", "arch", "grid", "blocks_per_sm", "waves", "dram_bytes", "least_bytes", "l2_bytes",
        "bytes_per_sector", "wavefronts_over_ideal", "in_flight_bytes_per_sm", "issue_slots", "launches", "predicted_us",
        "roof_us", "bound_by")  # fmt: skip
HEAD = (f"  {'kernel':<24}{'grid':>12}{'b/SM':>5}{'waves':>7}{'SMs':>5}{'DRAM':>8}{'least':>8}{'L2':>8}{'B/sect':>7}"
        f"{'s/req':>6}{'l/req':>6}{'wf':>6}{'flight':>7}{'issue':>8}{'mma':>7}{'us':>8}{'roof':>7}{'x':>8}  bound by")  # fmt: skip


def operands(timed: Timed) -> dict[str, tuple[int, int]]:
    named: dict[str, Tensor] = {**timed.moved, **{f"{roofline.INDEX} {i}": t for i, t in enumerate(timed.index)}}
    return {name: (t.data_ptr(), t.nbytes) for name, t in named.items()}


def calls_of(family: str, chip: Chip, dtype: torch.dtype, shape: Shape) -> Iterator[Timed]:
    """Of each kernel that the chip runs and the emulator has, those of its architecture alone with LRKERN_FUSED=all."""
    archs = {k.name: k.source.arch for k in gpu_status.kernels()}
    ops = torch.ops.lrkern_traffic
    for timed in families.load(family).timed(ops, "cpu", dtype, shape):
        if (arch := archs[timed.kernel]) in ("", chip.arch.rstrip("a")):
            with testing.fused(bool(arch)), use_library(ops):
                yield timed


def predictions(timed: Timed, counter: Counter, machine: Machine) -> Iterator[Prediction]:
    """Of each kernel that a call launches, in order; launches of one kernel are added up."""
    found: dict[str, Prediction] = {}
    with torch.no_grad():
        launches = counter.count(timed.call, operands(timed))
    for counted in launches:
        main = counted.name == timed.kernel
        least = sum(t.nbytes for t in timed.moved.values()) if main else counted.dram
        code = machine.code(counted.kernel)
        now = roofline.predict(counted, machine.chip, code, least, timed.flop if main else 0)
        found[counted.name] = roofline.added(found[counted.name], now) if counted.name in found else now
    yield from found.values()


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row(p: Prediction) -> str:
    flight = None if p.in_flight_bytes_per_sm is None else p.in_flight_bytes_per_sm / 1024
    issue = None if p.issue_slots is None else p.issue_slots / 1e6
    kernel = p.kernel + (f" x{p.launches}" if p.launches > 1 else "")
    return (
        f"  {kernel:<24}{'x'.join(map(str, p.grid)):>12}{p.blocks_per_sm:>5}{p.waves:>7.2f}{p.sms:>5.0%}{p.dram_bytes / 1e6:>8.1f}"
        f"{p.least_bytes / 1e6:>8.1f}{p.l2_bytes / 1e6:>8.1f}{number(p.bytes_per_sector, '7.1f'):>7}"
        f"{number(p.sectors_per_request, '6.1f'):>6}{number(p.lines_per_request, '6.1f'):>6}"
        f"{number(p.wavefronts_over_ideal, '6.2f'):>6}{number(flight, '7.1f'):>7}{number(issue, '8.2f'):>8}"
        f"{p.tensor_slots / 1e3:>7.1f}{p.predicted_us:>8.1f}{p.roof_us:>7.1f}"
        f"{number(p.predicted_us / p.roof_us if p.roof_us else None, '.3g'):>8}  {p.bound_by}"
    )


def main(argv: list[str]) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/run.py roofline", description=__doc__, formatter_class=plain)
    parser.add_argument("names", nargs="*", metavar="KERNEL or FAMILY")
    parser.add_argument("--arch", choices=CHIPS, default="h100")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose text holds TEXT")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="each case with these T for its own")
    parser.add_argument("--json", type=Path, metavar="F", help="one row per line")
    args = parser.parse_args(argv)
    known = {family: set(families.load(family).KERNELS) for family in sources.families()}
    if unknown := [n for n in args.names if n not in known and not any(n in kernels for kernels in known.values())]:
        parser.error(f"{', '.join(unknown)} is no kernel and no family: {', '.join(known)}")
    if why := build.why_not():
        parser.error(f"nothing can be emulated here: {why}")
    wanted = {f: None if not args.names or f in args.names else {n for n in args.names if n in known[f]} for f in known}
    wanted = {family: kernels for family, kernels in wanted.items() if kernels is None or kernels}

    counter, machine = model(args.arch, wanted)
    chip = machine.chip
    print(
        f"predicted for {args.arch}: {chip.sms} SMs at {chip.clock} GHz, {chip.dram / 1e3:.2f} TB/s; nothing ran on a GPU"
    )
    if machine.why:
        print(f"no machine code: {machine.why}. Left out are issue slots, bytes in flight and the times that follow from\n"
              "them; blocks on an SM are those of the plans in tools/families/.")  # fmt: skip
    if args.json:
        args.json.write_text("")
    for family, kernels in wanted.items():
        for shape in shapes_of(family, args.tokens):
            if args.case in str(shape):
                case(family, kernels, shape, counter, machine, args)
    return 0


def shapes_of(family: str, tokens: list[int] | None) -> list[Shape]:
    shapes = families.load(family).SHAPES
    if tokens is None:
        return shapes
    return list(dict.fromkeys(replace(shape, T=T) for shape in shapes for T in tokens))


def model(arch: str, wanted: Collection[str]) -> tuple[Counter, Machine]:
    """Of these families on this chip."""
    chip = CHIPS[arch]
    compiled = [s.path for s in sources.sources("cuda") if s.family in wanted and s.arch in ("", chip.arch.rstrip("a"))]
    machine = Machine(chip, compiled)
    counter = Counter(build.extension("traffic"), chip, machine.resident)
    torch.ops.load_library(str(counter.path))
    return counter, machine


def calls(arch: str, wanted: Collection[str]) -> Iterator[dict]:
    """What tools/tune.py holds measured calls against: each whole call of each shape, in bfloat16."""
    counter, machine = model(arch, wanted)
    for family in wanted:
        for shape in families.load(family).SHAPES:
            torch.manual_seed(0)
            for timed in calls_of(family, machine.chip, torch.bfloat16, shape):
                found = list(predictions(timed, counter, machine))
                yield {"arch": arch, "family": family, "kernel": timed.kernel, "case": str(shape),
                       "us": sum(p.predicted_us for p in found),
                       "bound_by": next(p.bound_by for p in found if p.kernel == timed.kernel),
                       "sectors": {p.kernel: p.sectors for p in found}, "dram": {p.kernel: p.dram_bytes for p in found}}  # fmt: skip


def case(family: str, kernels: set[str] | None, shape: Shape, counter: Counter, machine: Machine, args) -> None:
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    parts = {name for name, kernel in families.kernels().items() if kernel.part}
    shown = False
    for timed in calls_of(family, machine.chip, dtype, shape):
        if kernels is not None and timed.kernel not in kernels and not kernels & parts:
            continue
        found = list(predictions(timed, counter, machine))
        if kernels is not None and timed.kernel not in kernels:  # asked for are sums, of whatever call
            found = [p for p in found if p.kernel in kernels]
        if not found:
            continue
        if not shown:
            print(f"\n{family} {shape} {args.dtype}\n{HEAD}", flush=True)
            shown = True
        for p in found:
            print(row(p) + ("" if p.sample == "all" else f"; {p.sample}"), flush=True)
        if len(found) > 1:
            print(
                f"  {'sum':<24}{sum(p.launches for p in found):>3} launches{sum(p.predicted_us for p in found):>90.1f}"
            )
        if args.json:
            with args.json.open("a") as f:
                for p in found:
                    said = {
                        **asdict(p),
                        "case": str(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "arch": args.arch,
                    }
                    f.write(json.dumps({key: said[key] for key in KEYS}) + "\n")
