# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/gpu.md: every kernel, and what a GPU has shown of it, and which fused paths, kernels of one architecture in place
of the portable ones, may be the default there; and the GPU models that the package takes for tried.
Generated from bench/evidence/.

python tools/gpu_status.py              rewrites both
python tools/gpu_status.py --check      exit status 1 if one is not current
python tools/gpu_status.py --keep DIR   copies what tools/gpu.py wrote to DIR into bench/evidence/, then rewrites

Kernels are read from csrc/cuda: each __global__ function under the name its launcher gives it.
"""

import argparse
import importlib
import json
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import sources
from tools.sources import ROOT, Source
from tools.static_checks import ARCHS

EVIDENCE = ROOT / "bench" / "evidence"
PAGE = ROOT / "docs" / "gpu.md"
MODELS = ROOT / "python" / "lrkern" / "ops" / "first_use.py"
BEGIN, END = "<!-- status: python tools/gpu_status.py -->\n", "<!-- end of status -->\n"
FILES = ("env.txt", "tests.txt", "sanitizer.txt", "bench.jsonl", "summary.md", "parts.json")


@dataclass(frozen=True)
class Kernel:
    name: str  # as launches report it; its function is name_kernel
    source: Source


def read_kernels(source: Source) -> list[Kernel]:
    text = re.sub(r"//[^\n]*", "", (ROOT / source.path).read_text())
    launched = set(re.findall(r'\blaunch\(\s*"(\w+)",\s*\1_kernel\b', text))
    bare = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
    names = re.findall(r"__global__\s+(?:static\s+)?void\s+(\w+?)(?:_kernel)?\s*\(", bare)
    if set(names) != launched:
        raise ValueError(f"{source.path}: defined are {sorted(names)}, launched under their names {sorted(launched)}")
    return [Kernel(name, source) for name in names]


def kernels() -> list[Kernel]:
    return [kernel for source in sources.sources("cuda") for kernel in read_kernels(source)]


def ops_of(family: str) -> list[str]:
    """Names of the public ops that a family's glue registers."""
    text = "".join((ROOT / s.path).read_text() for s in sources.sources("ops") if s.family == family)
    return [n for n in re.findall(r"LRK_OP\((\w+),", text) if not n.endswith(("_fwd", "_bwd"))]


def suites_of(family: str) -> list[str]:
    """bench/suites/<family>.py, and what tools/families/<family>.py names beside it."""
    names = [family, *getattr(importlib.import_module(f"tools.families.{family}"), "SUITES", ())]
    return [name for name in names if (ROOT / "bench" / "suites" / f"{name}.py").exists()]


def fused_paths() -> list[tuple[str, str]]:
    """(family, architecture) of kernels that are compiled for one."""
    return sorted({(k.source.family, k.source.arch) for k in kernels() if k.source.arch})


# ---------------------------------------------------------------------------------------------- evidence


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Evidence:
    folder: Path
    env: dict[str, str]
    parts: dict[str, dict]
    rows: list[dict]

    @staticmethod
    def read(folder: Path) -> "Evidence":
        env = dict(line.split(": ", 1) for line in (folder / "env.txt").read_text().splitlines() if ": " in line)
        return Evidence(folder, env, json.loads((folder / "parts.json").read_text()), rows_of(folder / "bench.jsonl"))

    def covers(self, family: str) -> bool:
        return f"source {family}" in self.env

    def verdict(self, prefix: str) -> str:
        """Of the parts whose name begins so: passed, failed (also where one ran out of time) or not run."""
        states = [p["status"] for name, p in self.parts.items() if name.startswith(prefix)]
        ran = [s for s in states if s not in ("skipped", "refused")]
        if not ran:
            return "not run"
        some = f" ({len(ran)} of {len(states)} ran)" if len(ran) < len(states) else ""
        return ("failed" if "failed" in ran else "passed") + some


def all_evidence() -> list[Evidence]:
    """Oldest first: folders are named by date."""
    return [Evidence.read(f.parent) for f in sorted(EVIDENCE.glob("*/parts.json"))]


def evidence_of(family: str, arch: str, everything: list[Evidence]) -> list[Evidence]:
    """That of a family's kernels for one architecture, or for all of them."""
    return [e for e in everything if e.covers(family) and arch in ("", e.env.get("capability"))]


def evidence_cell(family: str, arch: str, found: list[Evidence]) -> str:
    if not found:
        return "not run on a GPU"
    last, path = found[-1], "fused:" if arch else ""
    name = f"[{last.env['date'][:10]} {last.env['gpu']}](../bench/evidence/{last.folder.name}/summary.md)"
    text = f"{name}: tests {last.verdict(f'{path}tests')}, sanitizers {last.verdict(f'{path}sanitizer')}"
    return text if last.env[f"source {family}"] == sources.digest(family) else f"{text}; the source has changed since"


def roofline_cell(kernel: str, found: list[Evidence]) -> str:
    rows = [r for r in found[-1].rows if r.get("suite") == "kernel" and r["kernel"] == kernel] if found else []
    return ", ".join(f"{r['dtype']} {r['of_roof']:.0%}" for r in rows) or "-"


def may_be_default(family: str, arch: str, everything: list[Evidence]) -> tuple[bool, str]:
    """Whether the last evidence of this architecture shows a family's fused path right and faster than its portable one, and why: all
    tests passed, of the source as it is, no sanitizer failed, and the benchmarks ran through, with results no further off than twice the
    portable ones, no case slower and one faster by more than the noise."""
    found = [e for e in evidence_of(family, arch, everything) if e.env.get("rehearsal") != "True"]
    if not found:
        return False, f"no run on sm_{arch}"
    last = found[-1]
    if last.env[f"source {family}"] != sources.digest(family):
        return False, f"the source has changed since {last.folder.name}"
    if (tests := last.verdict("fused:tests")) != "passed":
        return False, f"tests {tests}"
    if last.verdict("fused:sanitizer").startswith("failed"):
        return False, "sanitizers failed"
    failed = [s for s in suites_of(family) if last.verdict(f"bench:{s}") != "passed"]
    if failed:  # as it does where a result is wrong
        return False, f"bench:{failed[0]} {last.verdict(f'bench:{failed[0]}')}"
    timed: dict[tuple, dict[str, dict]] = {}
    for row in last.rows:
        if row.get("suite") in suites_of(family) and row.get("provider") in ("lrkern", "fused"):
            timed.setdefault((row["suite"], row["case"], row["dtype"]), {})[row["provider"]] = row
    pairs = {case: (of["lrkern"], of["fused"]) for case, of in timed.items() if len(of) == 2}
    if not pairs:
        return False, "not timed beside the portable path"
    where = lambda bad: next((f"{case} {dtype}" for (_, case, dtype), pair in pairs.items() if bad(*pair)), "")
    if case := where(lambda old, new: (new["error"] or 0) > 2 * (old["error"] or 0)):
        return False, f"further off in {case}"
    if case := where(lambda old, new: new["p50_ms"] > old["p50_ms"] + new["noise_ms"]):
        return False, f"slower in {case}"
    if not where(lambda old, new: new["p50_ms"] < old["p50_ms"] - new["noise_ms"]):
        return False, "no faster than noise"
    mean = statistics.geometric_mean(new["p50_ms"] / old["p50_ms"] for old, new in pairs.values())
    return True, f"{mean:.2f}x the portable path's time over {len(pairs)} cases, {last.folder.name}"


def defaults() -> str:
    everything = all_evidence()
    lines = ["| fused path of | on sm_ | by evidence | because |", "|" + "---|" * 4]
    for family, arch in fused_paths():
        may, why = may_be_default(family, arch, everything)
        lines.append(f"| {family} | {arch} | {'may be the default' if may else 'opt-in'} | {why} |")
    return "\n" + "\n".join(lines) + "\n" if fused_paths() else ""


def status() -> str:
    # Emulated are portable kernels and those for sm_90.
    lines = ["| kernel | source | compiled for sm_ | emulated | last evidence | share of roofline |", "|" + "---|" * 6]
    everything = all_evidence()
    for k in kernels():
        family, arch = k.source.family, k.source.arch
        found = evidence_of(family, arch, everything)
        archs = [a for a in ARCHS if arch in ("", a.rstrip("a"))]
        cells = [k.name, str(k.source.path), ", ".join(archs), "yes" if arch in ("", "90") else "no",
                 evidence_cell(family, arch, found), roofline_cell(k.name, found)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + defaults()


def page_with(table: str, page: str) -> str:
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN.strip()!r} and {END.strip()!r}")
    return head + BEGIN + "\n" + table + "\n" + END + tail


def models_with(everything: list[Evidence], module: str) -> str:
    """The module with the names of GPUs on which all tests passed that ran, of a whole run or a family's."""
    passed = [e.env for e in everything if e.verdict("tests").startswith("passed")]
    names = sorted({env["gpu"] for env in passed if env.get("rehearsal") != "True"} - {"none"})
    listed = "".join(f"\n    {json.dumps(name)}," for name in names) + "\n" * bool(names)
    text, found = re.subn(r"^(GPUS: .*?= )\((?:\n.*?^)?\)$", lambda m: f"{m[1]}({listed})", module, flags=re.M | re.S)
    if found != 1:
        raise ValueError(f"{MODELS.name} has no GPUS = (...)")
    return text


def keep(out: Path) -> Path:
    env = Evidence.read(out).env
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", env["gpu"].removeprefix("NVIDIA ")).strip("-")
    folder = EVIDENCE / f"{env['date'][:10]}-{gpu}-{env['commit'][:9]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (out / name).exists():
            shutil.copyfile(out / name, folder / name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.keep:
        print(f"kept in {keep(args.keep).relative_to(ROOT)}")
    stale = 0
    for path, current in (
        (PAGE, lambda text: page_with(status(), text)),
        (MODELS, lambda text: models_with(all_evidence(), text)),
    ):
        before = path.read_text()
        after = current(before)
        stale |= after != before
        if args.check:
            print(f"{path.relative_to(ROOT)}: {'current' if after == before else 'run python tools/gpu_status.py'}")
        else:
            path.write_text(after)
    return stale if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
