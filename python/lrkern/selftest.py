# SPDX-License-Identifier: Apache-2.0
"""`python -m lrkern selftest`: every op on every device of this machine beside its reference, by the installed package alone.

A device has a process of its own (``work``) that says which sample it begins and what it found. So an op that ends the process, or that
never returns, is one that is wrong, and the next process goes on with the op after it.

A GPU of an architecture that has kernels of its own has a second pass with them, LRKERN_FUSED=all, named "cuda:0 fused".
"""

import faulthandler
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import ops, testing
from .limits import DTYPES
from .ops import first_use
from .reference import OPS, Op

WORKER = [sys.executable, "-W", "ignore", "-m", "lrkern.selftest"]
LIMIT = 120  # seconds that a sample may take
QUICK = 4  # samples of an op and dtype, evenly spread, and the one with every argument
SIZES = {"cpu": (64, 512, 512, 16), "cuda": (512, 2048, 2048, 16)}  # of timings: tokens, features in and out, rank
TIMED = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = 7
OWN = ((9, 0), (10, 0), (12, 0))  # compute capabilities that kernels of one architecture are compiled for
FUSED = " fused"  # ends the name of a device's second pass
TIMING = "timing"  # its place among an op's samples

# ---------------------------------------------------------------------------------------------------- in a device's process


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def samples_of(op: Op, quick: bool) -> list[str]:
    names = [s.name for s in op.samples("cpu", torch.float32)]
    few = {*names[:: -(-len(names) // QUICK)], op.family.direct_sample}
    return [name for name in names if name in few] if quick else names


def check(op: Op, name: str, device: str, dtype: torch.dtype) -> None:
    """Results and gradients against the reference, in memory that was poisoned; a second run, in memory that was not, has the same
    bits."""
    sample = op.sample(name, device, dtype)
    with testing.poisoned():
        testing.check_forward(op, sample, dtype)
        if op.differentiable:
            testing.check_gradient(op, sample, dtype)
        first = testing.results(op, sample)
    testing.check_equal(op, sample, first, testing.results(op, sample))


@torch.no_grad()
def timed(op: Op, device: str) -> list[float]:
    """Milliseconds of the op and of its definition in PyTorch calls, in one dtype: medians of warm calls that take turns. Nothing where
    the device lacks the memory: the definition may make all that the op only looks at."""
    kind = torch.device(device).type
    sample = op.large(*SIZES[kind], False, device=device, dtype=TIMED[kind])
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for _ in range(1 + ROUNDS):
            for fn, found in zip((getattr(ops, op.name), op.truth), times, strict=True):
                finished(device)
                begin = time.perf_counter()
                testing.run_op(op, fn, sample.args, sample.kwargs)
                finished(device)
                found.append(1e3 * (time.perf_counter() - begin))
    except torch.OutOfMemoryError:
        return []
    return [statistics.median(found[1:]) for found in times]


def finished(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def answers(device: str) -> bool:
    """Whether it still computes: after an illegal access a CUDA context does nothing more."""
    try:
        return torch.ones(8, device=device).sum().item() == 8
    except RuntimeError:
        return False


def work(place: str, mode: str, *names: str) -> None:
    with testing.fused(place.endswith(FUSED)):
        work_on(place.removesuffix(FUSED), mode, *names)


def work_on(device: str, mode: str, *names: str) -> None:
    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    for op in map(OPS.__getitem__, names):
        plan = [(dtype, name) for dtype in DTYPES for name in samples_of(op, mode == "quick")]
        for dtype, name in [*plan, (TIMED[torch.device(device).type], TIMING)]:
            say(op=op.name, dtype=name_of(dtype), sample=name)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            try:
                found = {"ms": timed(op, device)} if name == TIMING else check(op, name, device, dtype) or {}
            except AssertionError as error:
                found = {"wrong": str(error)}
            except Exception as error:  # whatever an op does, the others have their turn
                found = {"wrong": f"{op.name}[{name}]: {type(error).__name__}: {error}"}
            say(**found)
            if "wrong" in found and not answers(device):
                return say(end=True, gone=True)
        faulthandler.cancel_dump_traceback_later()
    say(end=True, gone=False)


# ---------------------------------------------------------------------------------------------------- around it


def said_by(command: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a device's process, and how it ended where it had not come to its end."""
    with tempfile.TemporaryFile("w+") as errors:
        env = os.environ | {first_use.QUIET: "1"}  # what comes on stderr is to be why it ended
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, **streams, text=True, env=env)
        try:
            said: dict[str, Any] = {}
            for said in (json.loads(line) for line in process.stdout if line.startswith("{")):
                yield said
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        first = next((line.strip() for line in errors if line.strip()), "")
    if code or not said.get("end"):
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit status {code}"
        yield {"died": f"its process ended with {how} {first}".strip()}


def rows_of(device: str, mode: str) -> Iterator[dict[str, Any]]:
    """What was found of each sample: device, op, dtype, sample, wrong (None where nothing is); of timings ms too."""
    left = list(OPS)
    while left:
        row, gone = {"op": left[0], "dtype": "", "sample": "none"}, True
        for said in said_by([*WORKER, device, mode, *left]):
            if "op" in said:
                row, gone = said, False
            elif "end" in said:
                gone |= said["gone"]
            else:
                if "died" in said:
                    said = {"wrong": f"{row['op']}[{row['sample']}]: {said['died']}"}
                yield {"device": device, **row, "wrong": None, **said}
        left = left[left.index(row["op"]) + 1 :]
        if gone:
            for op in left:
                wrong = f"{op}: not run, {device} does not answer"
                yield {"device": device, "op": op, "dtype": "", "sample": "none", "wrong": wrong}
            return


def devices(info: dict[str, Any], quick: bool) -> dict[str, str]:
    """Their names, and those of second passes; of GPUs of one model only the first where it has to be quick."""
    found = {"cpu": f"{info['cpu']}, {info['cpu_isa']}, {info['threads']} threads"}
    if next(iter(info["ops"].values()))["cuda"]["implementation"] != "none":
        for i in range(info["gpu"]["count"]):
            name = torch.cuda.get_device_name(i)
            if not (quick and name in found.values()):
                found[f"cuda:{i}"] = name
                if torch.cuda.get_device_capability(i) in OWN:
                    found[f"cuda:{i}{FUSED}"] = f"{name}, {testing.FUSED}=all"
    return found


def run(info: dict[str, Any], quick: bool = False, path: Path | None = None) -> int:
    """Prints what is found, op by op, for a report; path gets all of it as JSON. The exit status: 1 where something is wrong, 2 where
    path cannot be written, before anything runs."""
    partial = path and path.with_name(path.name + ".partial")
    try:
        if path and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if partial:
            partial.touch()
    except OSError as error:
        print(f"lrkern selftest: --json must name a file that can be written, got {error}", file=sys.stderr)
        return 2
    try:
        report = found_on(info, quick)
        if path:
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(path)
    finally:
        if partial:
            partial.unlink(missing_ok=True)
    return 0 if report["ok"] else 1


def found_on(info: dict[str, Any], quick: bool) -> dict[str, Any]:
    begin, rows, wrong = time.monotonic(), [], {}
    named = devices(info, quick)
    for device, name in named.items():
        kind = torch.device(device.removesuffix(FUSED)).type
        sizes = "{} tokens, {} to {} features, rank {}".format(*SIZES[kind])
        print(f"\n{device}: {name}\n  {'':<23}samples          a short timing in ms ({sizes},")
        print(f"  {'':<23}                 {name_of(TIMED[kind])}): lrkern, PyTorch calls", flush=True)
        for op, found in grouped(rows_of(device, "quick" if quick else "full")):
            rows += found
            faults = [f"{row['dtype']}: {row['wrong']}" for row in found if row["wrong"]]
            ms = next((row["ms"] for row in found if "ms" in row), [])
            count = sum(row["sample"] not in ("none", TIMING) for row in found)
            print(f"  {op:<23}{count:>4}  {'WRONG' if faults else 'right':<9}", *(f"{t:9.3f}" for t in ms), flush=True)
            for fault in faults:
                print(f"      {fault}", flush=True)
            if faults:
                wrong.setdefault(device, []).append(op)
    seconds = time.monotonic() - begin
    mode = "quick, some samples of each op" if quick else "all samples"
    print(f"\nselftest ({mode}), {len(OPS)} ops in {', '.join(map(name_of, DTYPES))}, {seconds:.0f} s:")
    for device, name in named.items():
        verdict = (
            f"WRONG: {', '.join(wrong[device])}"
            if device in wrong
            else "as their references, two runs equal in every bit"
        )
        print(f"  {device} ({name}): {verdict}")
    return {"info": info, "quick": quick, "devices": named, "seconds": round(seconds, 1), "ok": not wrong, "rows": rows}


def grouped(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    return ((op, list(found)) for op, found in itertools.groupby(rows, key=lambda row: row["op"]))


if __name__ == "__main__":
    work(*sys.argv[1:])
