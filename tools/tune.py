# SPDX-License-Identifier: Apache-2.0
"""What `tools/gpu.py --tune` measures: the constants that predictions and choices lean on, beside what was predicted.

tune:latency    cycles of a dependent load from each level, beside tools/chips.py
tune:ladder     the steps of tests/emulator/ladder.cu
tune:sweep      lora_shrink in every split it has, bits compared; writes DIR/tuned.h, the row of csrc/policy/tuned.h for this GPU
tune:kernels    each call of each shape of tools/families/, beside what bench/run.py roofline predicts
tune:counters   sectors and DRAM bytes as Nsight Compute counts them, beside those of the emulator, where it may profile

Predictions need g++ and nvcc, so that `tools/gpu.py --prepare --tune` makes them beforehand, into build/gpu/predicted.jsonl.
"""

import csv
import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from tools import sources
from tools.chips import CHIPS
from tools.families import load
from tools.sources import ROOT

PREDICTED = sources.KEPT.parent / "predicted.jsonl"
# That tests/emulator/tune.cu drives.
SOURCES = ("csrc/cuda/lora/portable.cu", "csrc/cuda/device.cu", "csrc/policy/gemm.cpp")
TABLE = ROOT / "csrc" / "policy" / "tuned.h"
SECTORS = ("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum")
DRAM = "dram__bytes.sum"
Outcome = tuple[str, str]
Rows = list[dict]


def chip_of(gpu: str) -> str:
    """Of tools/chips.py, by the name a driver gives: "NVIDIA H200" is h200; "" where it has none."""
    words = re.findall(r"[a-z]+\d+", gpu.lower().replace("rtx ", ""))
    return next((name for name in CHIPS if name in words), "")


def prepare(families: Iterable[str]) -> None:
    """Predictions for chips of one kind of code, as it is not known yet which one will be there."""
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    import roofline

    PREDICTED.parent.mkdir(parents=True, exist_ok=True)
    with PREDICTED.open("w") as f:
        for arch in ("h100", "h200"):
            for row in roofline.calls(arch, list(families)):
                f.write(json.dumps(row) + "\n")


def predicted(chip: str) -> dict[tuple[str, str], dict]:
    """By kernel and case."""
    rows = [json.loads(line) for line in PREDICTED.read_text().splitlines()] if PREDICTED.exists() else []
    return {(r["kernel"], r["case"]): r for r in rows if r["arch"] == chip}


def json_lines(text: str) -> Rows:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# ---------------------------------------------------------------------------------------------- what was found


def latencies(rows: Rows, chip: str) -> Outcome:
    table = CHIPS[chip].latency if chip else {}
    return "passed", ", ".join(
        f"{r['level']} {r['cycles']:.0f} ({table.get(r['level'], '-')} in the table)" for r in rows
    )


def ladder(rows: Rows) -> Outcome:
    if wrong := [r["step"] for r in rows if not r["right"]]:
        return "failed", f"wrong results: {', '.join(wrong)}"
    rate = lambda r: (
        f"{2 * r['n'] ** 3 / r['us'] / 1e3:.0f} GFLOP/s" if r["step"].startswith("gemm") else f"{r['us']:.0f} us"
    )
    return "passed", ", ".join(f"{r['step']} {rate(r)}" for r in rows)


def row_of(rows: Rows) -> dict:
    """The constants that would have chosen best; of equal ones those nearest the counts that stand in, 1."""
    return min((r for r in rows if r["tune"] == "start"), key=lambda r: (round(r["over_best"], 3), abs(r["start"] - 1)))


def table_with(row: dict, gpu: str, text: str) -> str:
    """csrc/policy/tuned.h with this row in the place of the architecture's, before that of all others."""
    new = f"    {{{row['arch']}, {row['sms']}, {row['start']:.4g}}},  // {gpu}, tools/gpu.py --tune\n"
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(f"    {{{row['arch']}, ")]
    at = next(i for i, line in enumerate(kept) if line.startswith("    {0, "))
    return "".join([*kept[:at], new, *kept[at:]])


def sweep(rows: Rows, gpu: str, out: Path) -> Outcome:
    if unequal := [f"T={r['T']} R={r['R']} span={r['span']}" for r in rows if r["tune"] == "sweep" and not r["equal"]]:
        return "failed", f"bits depend on the split: {', '.join(unequal)}"
    row = row_of(rows)
    (out / "tuned.h").write_text(table_with(row, gpu, TABLE.read_text()))
    return "passed", f"start {row['start']:g}: {row['over_best'] - 1:.1%} over the fastest splits; tuned.h"


def beside(rows: Rows, chip: str) -> tuple[Rows, Outcome]:
    """Measured calls with what was predicted of them."""
    known = predicted(chip)
    joined = [r | {"predicted_ms": p["us"] / 1e3, "bound_by": p["bound_by"]} if p else r
              for r in rows for p in [known.get((r["kernel"], r["case"]))]]  # fmt: skip
    ratios = [r["p50_ms"] / r["predicted_ms"] for r in joined if r.get("predicted_ms")]
    note = f"{len(ratios)} of {len(rows)} calls have a prediction for {chip or 'this GPU'}"
    if ratios:
        note += (
            f"; measured over predicted {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
        )
    return joined, ("passed", note)


def counted(text: str) -> dict[str, dict[str, float]]:
    """{kernel: {metric: sum over its launches}} of ncu's CSV, of our kernels alone."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    start = text.find('"ID"')
    for row in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        if name := re.search(r"(\w+)_kernel\b", row.get("Kernel Name") or ""):
            found[name[1]][row["Metric Name"]] += float(row["Metric Value"].replace(",", "") or 0)
    return {name: dict(of) for name, of in found.items()}


def counters(text: str, families: Iterable[str], chip: str) -> tuple[Rows, Outcome]:
    measured = counted(text)
    if not measured:
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        return [], ("refused", (said or ["nothing was profiled"])[0][:200])
    expected: dict[str, dict[str, float]] = defaultdict(lambda: {"sectors": 0.0, "dram": 0.0})
    for family in families:
        last = str(load(family).SHAPES[-1])
        for (_, case), call in predicted(chip).items():
            if case == last and call["family"] == family:
                for what in ("sectors", "dram"):
                    for kernel, value in call[what].items():
                        expected[kernel][what] += value
    rows = []
    for kernel, of in measured.items():
        row = {
            "suite": "counters",
            "kernel": kernel,
            "sectors": sum(of.get(m, 0.0) for m in SECTORS),
            "dram": of.get(DRAM, 0.0),
        }
        rows.append(row | {f"predicted_{what}": value for what, value in expected.get(kernel, {}).items()})
    off = {r["kernel"]: r["sectors"] / r["predicted_sectors"] - 1 for r in rows if r.get("predicted_sectors")}
    worst = max(off, key=lambda k: abs(off[k]), default="")
    note = f"sectors of {len(off)} kernels" + (f", furthest off {worst}: {off[worst]:+.1%}" if off else "")
    return rows, ("passed", note)


# ---------------------------------------------------------------------------------------------- parts of tools/gpu.py


def program_part(what: str) -> Callable:
    def run(session, known: dict) -> Outcome:
        program = session.program("tune", "bench.log", SOURCES)
        if not program:
            return "skipped", f"tune could not be built, and there is no {PREDICTED.parent / 'tune'}"
        code, text = session.run(program, what, *(["small"] if session.rehearse else []), log="bench.log")
        rows = json_lines(text)
        session.rows([{"suite": "tune", **row} for row in rows])
        if code != 0 or not rows:
            return session.plain(code, text)
        gpu = known["gpus"][0][0] if known["gpus"] else "a rehearsal"
        return {"latency": lambda: latencies(rows, chip_of(gpu)), "ladder": lambda: ladder(rows),
                "sweep": lambda: sweep(rows, gpu, session.out)}[what]()  # fmt: skip

    return run


def kernels_part(session, known: dict) -> Outcome:
    command = ["tools/gpu_kernels.py", "shapes", *session.families, "--device", session.device]
    code, text = session.python(*command, log="bench.log")
    rows, outcome = beside(json_lines(text), chip_of(known["gpus"][0][0]) if known["gpus"] else "")
    session.rows(rows)
    return outcome if code == 0 else session.plain(code, text)


def counters_part(session, known: dict) -> Outcome:
    ncu = sources.tool("ncu")
    if not ncu:
        return "skipped", "no ncu"
    metrics = ",".join([*SECTORS, DRAM])
    once = [session.interpreter, "tools/gpu_kernels.py", "once", *session.families, "--device", session.device]
    command = [ncu, "--csv", "--metrics", metrics, "--kernel-name", "regex:_kernel", "--target-processes", "all", *once]
    code, text = session.run(*command, log="bench.log")
    rows, outcome = counters(text, session.families, chip_of(known["gpus"][0][0]) if known["gpus"] else "")
    session.rows(rows)
    return ("failed", "ran out of time") if code is None else outcome


PARTS = [
    ("tune:latency", 30, program_part("latency")),
    ("tune:ladder", 40, program_part("ladder")),
    ("tune:sweep", 40, program_part("sweep")),
    ("tune:kernels", 80, kernels_part),
    ("tune:counters", 60, counters_part),
]
