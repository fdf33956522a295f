# SPDX-License-Identifier: Apache-2.0
"""The one benchmark runner:  python bench/run.py SUITE [NAME...] [--device cpu|cuda] [--quick] [--json F] [--plot F.png]
                           python bench/run.py --list [SUITE]
                           python bench/run.py roofline [KERNEL or FAMILY...] [--arch h100|...]   predicted, without a GPU
                           python bench/run.py tuners [TUNER...] [--quick]   PEFT's own comparison, stock and patched

Providers interleave call by call. The first one, base where there is one, runs twice (A/A), which shows the noise: where
the medians of the two differ by more than 20% of the smallest figure compared, the case is run again with more rounds, at
most three times in all; if it stays so it is marked noisy, not to be cited. Compared is the adapter alone where a suite
times it, else what a provider adds to the base, else its whole time.

On CUDA graphs are timed, with another buffer in the L2 before each. A provider that cannot be captured is timed as it is called, host
time included, and the run says so. `fused` is lrkern with LRKERN_FUSED=all, where that launches other kernels; `kernels` in rows
of lrkern's are the names of those that ran.

Each provider's result, and after a backward its gradients, are held against float64 before it is timed. Off by more than a tenth,
other people's code is listed as missing, and any other ends the run.

--quick aims at under two minutes a suite on two idle cores, the emulator's first build left out. The time that is left is
shared among the cases that are left, all of a case counted: its data, its figures for which calls run once, its timing. Cases
are fewer; rounds are as many as fit, at least three; a noisy case runs again only where that fits; the roof's GEMM is smaller
on the CPU. Left out, and named at the end: what torch.compile compiles, training in 16 bits of more than 64 rows on a CPU
without instructions for them, and on a busy machine the cases that had not begun when the time was up.

Every row says its rounds. The A/A run is the row "again".
"""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import report
import timing
import torch
from suite import OPTIONAL, SHORT, SLOW, Call, Case, Data, Suite
from timing import Step
from torch import Tensor
from tqdm import tqdm

import lrkern

SUITES = {path.stem: path for path in sorted(Path(__file__).parent.glob("suites/*.py"))}
SECONDS = {True: 3.0, False: 12.0}  # of timing per case and attempt at most, by --quick
ON_CUDA = 2.0  # the same there, where a round is milliseconds and cases are hundreds
QUICK = 100.0  # seconds after which no case begins
ROUNDS = {True: (3, 2000), False: (5, 2000)}  # by --quick
ATTEMPTS = 3
NOISE = 0.2  # of the smallest figure compared
WRONG = 0.1  # an error that is no rounding

Key = tuple[str, str]  # (provider, "whole" | "alone" | "again")


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    isa = json.loads(lrkern.ops.build_info())["cpu_isa"]
    name = names[0] if names else platform.machine()
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{name}, {cores} cores, {threads} threads, {isa}, torch {torch.__version__}"


# ---------------------------------------------------------------------------------------------------- what is timed


def tensors(data: Data) -> list[Tensor]:
    return [t for t in data.inputs.values() if isinstance(t, Tensor)]


def leaves(data: Data) -> list[Tensor]:
    return [t for t in tensors(data) if t.requires_grad]


def step(passes: str, data: Data, call: Call) -> Step:
    """The timed part of a call: its forward, its backward or both."""
    wanted = leaves(data)

    def fwd(_=None):
        with call.around():
            return call.forward()

    def bwd(y):
        with call.around():
            return torch.autograd.grad(y, wanted, data.dy, allow_unused=True)

    def both(_):
        y = fwd()
        return y, bwd(y)

    def no_grad(_):
        with torch.no_grad():
            return fwd()

    return {"fwd": Step(fwd), "bwd": Step(bwd, fwd), "fwd+bwd": Step(both), "no_grad": Step(no_grad)}[passes]


@dataclass
class Field:
    """The providers of a case, ready to be timed."""

    copies: list[Data]
    calls: dict[str, Call] = field(default_factory=dict)  # over the first copy
    steps: dict[Key, list[Step]] = field(default_factory=dict)  # one per copy
    beside: dict[str, list[Step]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def enter(self, provider: str, passes: str, make: Callable[[Data], Call | None]) -> None:
        pairs = [(data, call) for data in self.copies if (call := make(data)) is not None]
        if not pairs:
            return
        calls = [call for _, call in pairs]
        ways = {"whole": calls, "alone": [call.alone for call in calls]}
        steps_of = lambda made: [step(passes, data, call) for (data, _), call in zip(pairs, made, strict=True)]
        steps = {(provider, way): steps_of(made) for way, made in ways.items() if made[0]}
        for first, *_ in steps.values():
            first.run(first.ready())  # what compiles compiles here
        self.calls[provider] = calls[0]
        if calls[0].beside:
            self.beside[provider] = steps_of([call.beside[1] for call in calls])
        self.steps |= steps

    def leave(self, provider: str, reason: str) -> None:
        self.missing[provider] = reason
        self.calls.pop(provider)
        self.beside.pop(provider, None)
        self.steps = {key: steps for key, steps in self.steps.items() if key[0] != provider}

    def by_kernels(self) -> dict[str, list[str]]:
        """The kernels of lrkern's two paths, on CUDA; `fused` leaves where it has none of its own."""
        found = {p: timing.kernels_of(self.steps[p, "whole"][0]) for p in ("lrkern", "fused") if p in self.calls}
        if "fused" in found and not found["fused"]:
            self.leave("fused", "torch's profiler sees no kernels: which ones LRKERN_FUSED=all launches is not known")
        elif "fused" in found and found["fused"] <= found.get("lrkern", set()):
            self.leave("fused", "LRKERN_FUSED=all launches no other kernels here")
        return {provider: sorted({name[:120] for name in names}) for provider, names in found.items()}


def too_slow(case: Case, device: str) -> bool:
    """Whether one step takes tens of seconds: for dY W in 16 bits torch has a plain loop where oneDNN finds no instructions."""
    if device != "cpu" or case.dtype.itemsize != 2 or "bwd" not in case.passes or (case.T or 0) <= 64:
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def line_up(suite: Suite, case: Case, device: str, quick: bool) -> Field:
    torch.compiler.reset()
    copies = [suite.data(case, device, 0)]
    if suite.cold:
        count = timing.copies_beyond_cache(sum(t.nbytes for t in tensors(copies[0])), device, suite.rotation(case))
        copies += [suite.data(case, device, seed) for seed in range(1, count)]
    result = Field(copies)
    for provider in suite.providers():
        if quick and provider in suite.slow(case):
            result.missing[provider] = "not with --quick" if provider in SLOW else f"of T={case.T} not with --quick"
            continue
        try:
            result.enter(provider, case.passes, getattr(suite, provider))
        except Exception as error:
            if provider not in OPTIONAL:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            result.missing[provider] = "not installed" if isinstance(error, ModuleNotFoundError) else reason
    return result


# ---------------------------------------------------------------------------------------------------- figures


def error(suite: Suite, case: Case, provider: str, device: str) -> float | None:
    """Relative Frobenius error against float64: the largest of the result and, after a backward, the gradients."""
    data = suite.data(suite.exact(case), device, 0)  # fresh, since calls may write into theirs
    call = getattr(suite, provider)(data)
    truth = call.truth or data.truth
    if truth is None or not call.exact:
        return None
    real = lambda t: isinstance(t, Tensor) and t.is_floating_point()
    wide = {k: t.detach().double().requires_grad_(t.requires_grad) if real(t) else t for k, t in data.inputs.items()}

    def results(y: Tensor, inputs: dict[str, Any]) -> list[Tensor | None]:
        wanted = leaves(Data(inputs))
        return [y, *torch.autograd.grad(y, wanted, data.dy.to(y), allow_unused=True)] if "bwd" in case.passes else [y]

    with torch.set_grad_enabled(case.passes != "no_grad"), call.around():
        got, want = results(call.forward(), data.inputs), results(truth(**wide), wide)
    pairs = [(g.double(), w) for g, w in zip(got, want, strict=True) if w is not None]
    return max(((g - w).norm() / w.norm()).item() for g, w in pairs)


def checked(suite: Suite, case: Case, ready: Field, device: str) -> dict[str, float | None]:
    """The errors of all providers; of `ready` those leave that may be missing and are wrong."""
    errors: dict[str, float | None] = {}
    for provider, call in [*ready.calls.items()]:
        exact = call.exact and (call.truth or ready.copies[0].truth)  # else there is no need to make fresh data
        errors[provider] = found = error(suite, case, provider, device) if exact else None
        if found is None or found <= WRONG:
            continue
        if provider not in OPTIONAL:
            raise RuntimeError(f"{provider} computes something else: error {found:.2g} of {case}")
        ready.leave(provider, f"computes something else: error {found:.2g}")
    return errors


def noise(p50: dict[Key, float]) -> tuple[float, bool]:
    """(A/A difference in ms, whether it is too large for the smallest figure compared)."""
    (first,) = (provider for provider, kind in p50 if kind == "again")
    base = p50[first, "whole"] if first == "base" else 0.0
    figures = [p50.get((p, "alone"), abs(t - base)) for (p, kind), t in p50.items() if kind == "whole" and p != "base"]
    difference = abs(p50[first, "again"] - p50[first, "whole"])
    return difference, difference > NOISE * min(figures, default=base)


def measure(
    suite: Suite,
    case: Case,
    device: str,
    seconds: float,
    command: str,
    tick: Callable[[float], Any] = lambda share: None,
    limit: float | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """The rows of one case, and why some providers are missing. ``seconds`` are those of the timed calls of an attempt,
    ``limit``, given with --quick, those of the whole case. ``tick`` is told the share of the case that is done."""
    quick = limit is not None
    end = timing.clock() + limit if quick else math.inf
    ready = line_up(suite, case, device, quick)
    # First the figures for which calls run once: they leave their memory behind for the timed ones.
    errors = checked(suite, case, ready, device)
    kernels = ready.by_kernels() if device == "cuda" else {}
    steps, memory = ready.steps, {}
    for provider, call in ready.calls.items():
        with call.around():
            saved = None if case.passes == "no_grad" else timing.saved_bytes(call.forward, tensors(ready.copies[0]))
        memory[provider] = saved, timing.peak_bytes(steps[provider, "whole"][0], device)
    first = next(iter(ready.calls))
    steps[first, "again"] = steps[first, "whole"]
    flop, moved = suite.work(case, ready.copies[0]) or (None, None)
    roof_ms = None
    if flop is not None:
        gemm, copy = ceilings(device, case.dtype, quick)
        roof_ms = max(flop / gemm, moved / copy) * 1e3

    eager: dict[Key, str] = {}
    round_ms = sum(times[0] for times in timing.interleaved(steps, 1 if quick else 2, device, eager=eager).values())
    # All attempts are to fit; an untimed call goes before each timed one.
    seconds = min(seconds, (end - timing.clock()) / (2**ATTEMPTS - 1) / 2)
    least, most = ROUNDS[quick]
    rounds = min(max(int(seconds * 1e3 / round_ms), least), most)
    for attempt in range(ATTEMPTS):
        begin, count = timing.clock(), rounds * 2**attempt
        times = timing.interleaved(steps, count, device, tick, warm=True)
        p50 = {key: statistics.median(t) for key, t in times.items()}
        noise_ms, noisy = noise(p50)
        now = timing.clock()
        if not noisy or now + 2 * (now - begin) > end:
            break
    ratios = {name: timing.paired(steps[name, "whole"], other, seconds, device) for name, other in ready.beside.items()}

    rows = []
    named = {first: (first, "whole"), "again": (first, "again")} | {name: (name, "whole") for name in ready.calls}
    memory["again"], errors["again"] = (None, None), None  # told once
    copied = ready.calls["copy"].reads / p50["copy", "whole"] if "copy" in ready.calls else None  # bytes a ms
    for name, key in named.items():
        mine, call = p50[key], ready.calls[key[0]]
        reads = call.reads and (call.reads * (1 + (case.passes == "fwd+bwd")))
        pairs = ratios.get(name)
        rows.append(
            {
                "suite": suite.name(),
                "case": str(case),
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": device,
                "provider": name,
                **timing.percentiles(times[key]),
                "extra_over_base": mine / p50["base", "whole"] - 1 if first == "base" else None,
                "adapter_ms": p50.get((name, "alone")),
                "saved_bytes": memory[name][0],
                "bytes": moved,
                "flops": flop,
                "roof_ms": roof_ms,
                "of_roof": roof_ms and roof_ms / mine,
                "reads": reads,
                "of_read": reads and (None if copied else reads / mine * 1e3 / read_bandwidth(device)),
                "of_copy": reads and copied and reads / mine / copied,
                "beside": call.beside[0] if pairs else None,
                "paired": pairs and statistics.median(pairs),
                "pairs": pairs and len(pairs),
                "error": errors[name],
                "peak_bytes": memory[name][1],
                "elements": call.elements,
                "basis_bytes": call.basis_bytes,
                "rounds": count,
                "noise_ms": noise_ms,
                "noisy": noisy,
                "kernels": kernels.get(name),
                "eager": next((why for (provider, _), why in eager.items() if provider == name), None),
                "command": command,
            }
        )
    return rows, ready.missing


ceilings = cache(timing.ceilings)
read_bandwidth = cache(timing.read_bandwidth)


# ---------------------------------------------------------------------------------------------------- the command


def progress(bar: tqdm, done: int) -> Callable[[float], None]:
    """One bar for all cases, of which so many are done."""

    def tick(share: float) -> None:
        bar.n = max(bar.n, done + min(share, 0.99))
        bar.update(0)

    return tick


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "bench/run.py", *given])
    if given[:1] == ["roofline"]:
        return importlib.import_module("roofline").main(given[1:])
    if given[:1] == ["tuners"]:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
        return importlib.import_module("tuners").main(given[1:], machine, command)
    about = "".join("\n" + ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0] for path in SUITES.values())
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__ + about, formatter_class=plain)
    parser.add_argument("suite", choices=SUITES, nargs="?")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose text holds TEXT")
    parser.add_argument("--list", action="store_true", help="the suites, or the cases and providers of one")
    parser.add_argument("--json", type=Path, metavar="F", help="one row per line, written case by case")
    parser.add_argument("--plot", type=Path, metavar="F.png")
    args = parser.parse_args(argv)
    if args.list and not args.suite:
        print("\n".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0] for path in SUITES.values()))
        return 0
    if not args.suite:
        parser.error("the following arguments are required: suite")
    if args.device == "cuda" and not (args.list or torch.cuda.is_available()):
        parser.error("--device cuda: torch sees no GPU")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        suite: Suite = importlib.import_module(f"suites.{args.suite}").Suite(args.names).on(args.device)
    except ValueError as wrong:
        parser.error(str(wrong))
    if args.device not in suite.devices:
        parser.error(f"suite {args.suite} runs on {' and '.join(suite.devices)}, got --device {args.device}")
    cases = suite.cases(args.quick)
    if not (chosen := [case for case in cases if args.case in str(case)]):
        parser.error(f"--case {args.case!r} is in no case:\n" + "\n".join(map(str, cases)))
    slow = [case for case in chosen if args.quick and too_slow(case, args.device)]
    left_out = dict.fromkeys(slow, "no instructions for 16 bits here")
    chosen = [case for case in chosen if case not in left_out]
    if args.list:
        print(
            f"providers: {' '.join(suite.providers())}", *(f"{case} {SHORT[case.dtype]}" for case in chosen), sep="\n"
        )
        return 0
    if args.json:
        args.json.write_text("")

    print(f"{machine(args.device)}\n{command}", flush=True)
    for line in suite.notes():
        print(line, flush=True)
    rows: list[dict] = []
    missing: dict[str, str] = {}
    code, begin = 0, timing.clock()
    seconds = min(SECONDS[args.quick], ON_CUDA if args.device == "cuda" else math.inf)
    bar = tqdm(total=len(chosen), leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    try:
        for i, case in enumerate(chosen):
            left = begin + QUICK - timing.clock()
            if args.quick and left <= 0:
                left_out |= dict.fromkeys(chosen[i:], "the time was up")
                break
            limit = left / (len(chosen) - i) if args.quick else None
            bar.set_description(f"{case} {SHORT[case.dtype]}")
            now, reasons = measure(suite, case, args.device, seconds, command, progress(bar, i), limit)
            bar.write(report.table(now, suite.against, suite.headline))
            progress(bar, i + 1)(0)
            rows += now
            missing = reasons | missing  # the first reason
            if args.json:
                with args.json.open("a") as f:
                    f.write("".join(json.dumps(row) + "\n" for row in now))
    except KeyboardInterrupt:
        print("\nstopped: what was measured until then is kept")
        code = 130
    finally:
        bar.close()
    if suite.headline == "extra" and rows:
        print(report.means(rows))
    for case, reason in left_out.items():
        print(f"left out: {case} {SHORT[case.dtype]} ({reason}, and --quick)")
    for provider, reason in missing.items():
        print(f"missing: {provider} ({reason})")
    if args.plot and rows:
        report.plot(rows, args.plot, machine(args.device))
    return code


if __name__ == "__main__":
    sys.exit(main())
