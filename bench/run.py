# SPDX-License-Identifier: Apache-2.0
"""The one benchmark runner:  python bench/run.py lora [--device cpu|cuda] [--quick] [--json F] [--case TEXT]

Per case and provider: median milliseconds, extra over the base layer, milliseconds of the adapter alone, bytes saved for
backward beyond x and the parameters, error against float64, and the time against the roof: the larger of flop over the
GEMM rate and bytes over the copy rate, both measured in the same run. A second base run (A/A) shows the noise: where
the two differ by more than 20% of the smallest figure compared, the case is run again with more rounds and, if it stays
so, marked noisy and not to be cited.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import timing
import torch
from tqdm import tqdm

import lrkern

SUITES = ("lora",)


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    isa = json.loads(lrkern.ops.build_info())["cpu_isa"]
    name = names[0] if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {isa}, torch {torch.__version__}"


def measure(suite, case, device: str, rounds: int, roofs: tuple[float, float], command: str) -> list[dict]:
    copies = suite.copies_of(case, device)
    flop, moved = suite.work(case)
    roof_ms = max(flop / roofs[1], moved / roofs[0]) * 1e3
    error, saved = suite.errors(case, copies[0]), suite.saved(case, copies[0], timing.saved_bytes)
    for attempt in (1, 3):
        with tqdm(total=2 * rounds * attempt, desc=str(case), leave=False) as bar:
            whole = timing.interleaved(suite.calls(case, copies, False), rounds * attempt, device, bar.update)
            alone = timing.interleaved(suite.calls(case, copies, True), rounds * attempt, device, bar.update)
        base, again = (timing.percentiles(whole[n])["p50_ms"] for n in ("base", "base again"))
        p50 = {n: timing.percentiles(t)["p50_ms"] for n, t in whole.items()}
        smallest = min(abs(p50[n] - base) for n in suite.PROVIDERS if n != "base")
        noisy = abs(base - again) > 0.2 * smallest
        if not noisy:
            break
    rows = []
    for name in suite.PROVIDERS:
        rows.append(
            {
                "suite": suite.__name__,
                "case": str(case),
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": device,
                "provider": name,
                **timing.percentiles(whole[name]),
                "extra_over_base": p50[name] / base - 1,
                "adapter_ms": timing.percentiles(alone[name])["p50_ms"] if name in alone else None,
                "saved_bytes": saved[name],
                "bytes": moved,
                "flops": flop,
                "roof_ms": roof_ms,
                "of_roof": roof_ms / p50[name],
                "error": error[name],
                "noise_ms": abs(base - again),
                "noisy": noisy,
                "command": command,
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    adapter = {r["provider"]: r["adapter_ms"] for r in rows}
    print(f"\n{first['case']} {first['dtype']}   (A/A {first['noise_ms']:.3f} ms{', NOISY' if first['noisy'] else ''})")
    print("  provider      ms    extra   adapter ms  vs peft    saved kB   of roof     error")
    for r in rows:
        alone = r["adapter_ms"]
        ratio = f"{alone / adapter['peft']:7.2f}x" if alone is not None else " " * 8
        kept = f"{r['saved_bytes'] / 1e3:10.1f}" if r["saved_bytes"] is not None else " " * 10
        alone = f"{alone:10.3f}" if alone is not None else " " * 10
        print(
            f"  {r['provider']:8}{r['p50_ms']:9.3f} {r['extra_over_base']:+7.1%}  {alone}  {ratio}  {kept}"
            f"   {r['of_roof']:6.1%}   {r['error']:.1e}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--json", type=Path, metavar="F", help="one row per line")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    suite = importlib.import_module(args.suite)
    command = shlex.join(["python", "bench/run.py", *sys.argv[1:]])
    print(f"{machine(args.device)}\n{command}")
    rows: list[dict] = []
    for case in suite.cases(args.quick):
        if args.case not in str(case):
            continue
        roofs = timing.ceilings(args.device, case.dtype)
        rounds = (20 if args.quick else 40) * (10 if case.passes == "no_grad" or case.T < 64 else 1)
        rows += (now := measure(suite, case, args.device, rounds, roofs, command))
        show(now)
        if args.json:
            args.json.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
