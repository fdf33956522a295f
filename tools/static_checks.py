# SPDX-License-Identifier: Apache-2.0
"""Static checks of the CUDA code: compiles every .cu for each architecture and reads ptxas -v and the SASS.

python tools/static_checks.py [80 90a ...] [--jobs 2]

Fails where a file does not compile, a kernel has no plan in tools/families/, or one does not keep to its plan: no spills
and no local memory, the tensor-core instruction and the 128-bit loads and stores it is built around, as many blocks on an SM and bytes
of loads under way as planned (scoreboards say which loads are waited for together), and no more machine code or, where the
plan says so, instructions of a trip of the loop with its products; and where ptxas says that it gave up speed. smXX.cu files are compiled for their own architecture only.
Figures are kept in build/static by a hash of what the source includes, flags and compiler, so a second run is quick.
"""

import argparse
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import sass
from tools.families import Plan, kernels
from tools.sources import INCLUDES, ROOT, Source, cutlass, digest_of, sources, standard

CACHE = ROOT / "build" / "static"
ARCHS = ["80", "89", "90a", "100a", "120a"]
FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas=-v", "-lineinfo",
         *(f"-I{folder}" for folder in INCLUDES)]  # fmt: skip
PROBES = [  # compiled, without a plan
    Source("cuda", "", arch, Path(f"tests/emulator/{name}.cu"))
    for name, arch in (("wrappers", ""), ("tune", ""), ("wrappers_sm90", "90"), ("cases_sm90", "90"))
]


def plan_of(kernel: str) -> Plan | None:
    """The plan of `name_kernel<template arguments>`."""
    name, _, rest = kernel.partition("<")
    value = {"true": True, "false": False}
    words = [w.strip() for w in rest.rstrip(">").split(",")] if rest else []
    known = kernels().get(name.removesuffix("_kernel"))
    return known and known.plan(*(value.get(w, int(w) if w.isdigit() else w) for w in words))


# ---------------------------------------------------------------------------------------------- what an SM holds

# (warps, blocks, KB of shared memory) of an SM: "Technical Specifications per Compute Capability" in NVIDIA's programming
# guide. All have 65536 registers in four parts and keep 1 KB of shared memory per block for the system.
SM = {
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "89": (48, 24, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}


def occupancy(arch: str, registers: int, shared: int, threads: int) -> tuple[int, str]:
    """Blocks an SM holds, and what limits them."""
    warps, blocks, kilobytes = SM[arch.rstrip("af")]
    per_block = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    room = {
        "registers": 65536 // 4 // per_warp * 4 // per_block,
        "shared memory": kilobytes * 1024 // (-(-shared // 128) * 128 + 1024),
        "warps": warps // per_block,
        "blocks": blocks,
    }
    if shared > (kilobytes - 1) * 1024:
        return 0, "shared memory"
    limit = min(room, key=lambda k: room[k])
    return room[limit], limit


# ---------------------------------------------------------------------------------------------- reading the compiler


@dataclass
class Figures:
    """One kernel on one architecture."""

    kernel: str  # name<template arguments>
    registers: int
    shared: int  # static bytes
    spills: int  # bytes stored
    stack: int  # bytes
    local: int = 0  # loads and stores of local memory
    wide: int = 0  # 128-bit loads from global memory
    tensor: dict[str, int] = field(default_factory=dict)
    code: int = 0  # bytes of machine code
    flight: int = 0  # bytes that a warp has under way while it waits for memory, each loop taken LONG times
    stores: int = 0  # of 128 bits to global memory
    loop: int = 0  # instructions of a trip of the longest loop with tensor instructions, the inner ones apart


PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '\S+'.*?(?P<stack>\d+) bytes stack frame, (?P<spills>\d+) bytes spill "
    r"stores.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
LONG = 8


def read_ptxas(text: str) -> dict[str, Figures]:
    """Figures by mangled name from what `ptxas -v` prints."""
    found = {}
    for m in PTXAS.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        found[m["name"]] = Figures(
            "", int(m["registers"]), int(shared[1]) if shared else 0, int(m["spills"]), int(m["stack"])
        )
    for figures, name in zip(found.values(), sass.plain_names(list(found)), strict=True):
        figures.kernel = name
    return found


def count_sass(text: str, found: dict[str, Figures]) -> None:
    """Adds the instructions of nvdisasm's listing to the figures."""
    for name, code in sass.parse(text, found.__contains__).items():
        figures = found[name]
        for x in code.instructions:
            if tensor := sass.TENSOR.match(x.op):
                figures.tensor[tensor[0]] = figures.tensor.get(tensor[0], 0) + 1
            figures.wide += x.name in ("LDG", "LDGSTS") and x.bytes == 16
            figures.stores += x.name == "STG" and x.bytes == 16
            figures.local += x.name in ("LDL", "STL")
        figures.code = 16 * len(code.instructions)
        path = sass.hot_path(code)
        for loop in path.loops():
            loop.trips = LONG
            own = loop.own()
            if any(sass.TENSOR.match(x.op) for x in own):
                figures.loop = max(figures.loop, len(own))
        figures.flight = round(sass.in_flight(path, sass.feeding(path)))


def on_an_sm(figures: Figures, plan: Plan, arch: str) -> int:
    """Bytes of loads that the warps of a full SM have under way."""
    blocks, _ = occupancy(arch, figures.registers, figures.shared + plan.shared, plan.threads)
    return figures.flight * -(-plan.threads // 32) * blocks


def faults(figures: Figures, plan: Plan, arch: str) -> list[str]:
    """How a kernel departs from its plan; empty where it does not."""
    wrong = []
    if figures.spills or figures.local:
        wrong.append(f"{figures.spills} bytes of spills, {figures.local} accesses to local memory")
    wrong += [f"no {each} instruction" for each in plan.tensor.split() if each not in figures.tensor]
    if figures.wide < plan.wide:
        wrong.append(f"{figures.wide} loads of 128 bits from global memory, planned are {plan.wide}")
    if figures.stores < plan.stores:
        wrong.append(f"{figures.stores} stores of 128 bits to global memory, planned are {plan.stores}")
    blocks, limit = occupancy(arch, figures.registers, figures.shared + plan.shared, plan.threads)
    if blocks < plan.blocks:
        wrong.append(f"{blocks} blocks on an SM, planned are {plan.blocks}; {limit} are the limit")
    if (flight := on_an_sm(figures, plan, arch)) < plan.flight:
        wrong.append(f"{flight} bytes of loads under way on an SM, planned are {plan.flight}")
    if plan.loop and figures.loop > plan.loop:
        wrong.append(f"{figures.loop} instructions of a trip of its loop, planned are at most {plan.loop}")
    if figures.code > plan.code:
        wrong.append(f"{figures.code} bytes of machine code, planned are at most {plan.code}")
    return [f"{figures.kernel} on sm_{arch}: {text}" for text in wrong]


# ---------------------------------------------------------------------------------------------- compiling


@dataclass
class Unit:
    """One source compiled for one architecture."""

    source: str
    arch: str
    seconds: float
    errors: str
    kernels: list[Figures]
    losses: list[str] = field(default_factory=list)  # what ptxas says it gave up: wgmma one after the other, setmaxnreg


@cache
def compiler() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


@cache
def reader() -> str:
    said = subprocess.run([sass.nvdisasm(), "--version"], capture_output=True, text=True).stdout
    return said + "".join(map(inspect.getsource, (Figures, Unit, sass, read_ptxas, count_sass)))


def compiled(source: Path, arch: str) -> tuple[Path, str, float]:
    """The machine code of a source, what the compiler said and how long it took. Kept; a source that fails leaves none."""
    headers = ["-isystem", cutlass()] if needs_cutlass(source) else []
    key = digest_of([source], arch, compiler(), standard(), *FLAGS, version("nvidia-cutlass") if headers else "")
    name = f"{'-'.join(source.parts[-2:])}-{arch}"
    cubin, said = CACHE / f"{name}-{key}.cubin", CACHE / f"{name}-{key}.txt"
    if cubin.exists() and said.exists():
        seconds, _, text = said.read_text().partition("\n")
        return cubin, text, float(seconds)
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{name}-*"):
        old.unlink()
    start, target = time.monotonic(), f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", standard(), *FLAGS, *headers, target, "-cubin", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    text, seconds = done.stdout + done.stderr, time.monotonic() - start
    if done.returncode:
        cubin.unlink(missing_ok=True)
    else:
        said.write_text(f"{seconds}\n{text}")
    return cubin, text, seconds


def needs_cutlass(source: Path) -> bool:
    return source.stem.endswith(("sm100", "sm120"))


def measure(source: Path, arch: str) -> Unit:
    cubin, said, seconds = compiled(source, arch)
    if not cubin.exists():
        return Unit(str(source), arch, seconds, said, [])
    kept = cubin.with_suffix(f".{hashlib.sha256(reader().encode()).hexdigest()[:8]}.json")
    if kept.exists():
        unit = json.loads(kept.read_text())
        return Unit(**{**unit, "kernels": [Figures(**k) for k in unit["kernels"]]})
    found = read_ptxas(said)
    count_sass(sass.disassemble(cubin), found)
    losses = re.findall(r"Potential Performance Loss: (.*)", said)
    unit = Unit(str(source), arch, seconds, "", list(found.values()), losses)
    for old in CACHE.glob(f"{cubin.stem}.*.json"):
        old.unlink()
    kept.write_text(json.dumps(asdict(unit)))
    return unit


# ---------------------------------------------------------------------------------------------- the table


def table(units: list[Unit], archs: list[str]) -> str:
    by_kernel: dict[str, dict[str, Figures]] = {}
    for unit in units:
        for figures in unit.kernels:
            by_kernel.setdefault(figures.kernel, {})[unit.arch] = figures
    lines = [
        "Per architecture: registers a thread and blocks on an SM. spills: bytes, tensor and 128-bit: instructions, flight: KB of",
        "loads under way on a full SM where fewest are, code: KB of machine code where it is longest.",
        f"{'kernel':<48}{'shared':>7}{'spills':>7}  {'tensor':<9}{'128-bit':>8}{'flight':>7}{'code':>6}"
        + "".join(f"{a:>10}" for a in archs),
    ]
    for kernel, on in sorted(by_kernel.items()):
        plan = plan_of(kernel) or Plan(0)
        shared = max(f.shared for f in on.values()) + plan.shared
        least: Counter = Counter(min(on.values(), key=lambda f: sum(f.tensor.values())).tensor)
        tensor = " ".join(f"{n} {name}" for name, n in least.items()) or "-"
        cells = ""
        for arch in archs:
            if figures := on.get(arch):
                blocks, _ = occupancy(arch, figures.registers, figures.shared + plan.shared, plan.threads)
                cells += f"{figures.registers:>6}r{blocks:>2}b"
            else:
                cells += f"{'':>10}"
        spills, wide = max(f.spills for f in on.values()), min(f.wide for f in on.values())
        flight = min(on_an_sm(f, plan, arch) for arch, f in on.items()) / 1024
        code = max(f.code for f in on.values()) / 1024
        lines.append(f"{kernel:<48}{shared:>7}{spills:>7}  {tensor:<9}{wide:>8}{flight:>7.1f}{code:>6.0f}{cells}")
    lines.append("\nSeconds to compile:")
    for source in dict.fromkeys(u.source for u in units):
        of = {u.arch: f"{u.seconds:.1f}" for u in units if u.source == source}
        lines.append(f"{source:<79}" + "".join(f"{of.get(a, ''):>10}" for a in archs))
    slowest = max(units, key=lambda u: u.seconds)
    lines.append(f"slowest: {slowest.source} for sm_{slowest.arch}, {slowest.seconds:.1f} s")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", default=ARCHS)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("static checks: skipped, no nvcc on PATH")
        return 0
    if not sass.nvdisasm():
        print("static checks: nvdisasm is missing (requirements/dev.txt brings it)")
        return 1
    units, wrong = [], []
    every = [*sources("cuda"), *PROBES]
    if left := [] if cutlass() else [s for s in every if needs_cutlass(s.path)]:
        print(f"static checks: {len(left)} files skipped, the wheel nvidia-cutlass is not installed")
        every = [s for s in every if s not in left]
    jobs = [(s.path, arch) for s in every for arch in args.archs if s.arch in ("", arch.rstrip("a"))]
    with ThreadPoolExecutor(args.jobs) as pool:
        for unit in pool.map(lambda job: measure(*job), jobs):
            units.append(unit)
            if unit.errors:
                wrong.append(f"{unit.source} does not compile for sm_{unit.arch}\n{unit.errors}")
            wrong += [f"{unit.source} for sm_{unit.arch}: {loss}" for loss in unit.losses]
            for figures in unit.kernels:
                if plan := plan_of(figures.kernel):
                    wrong += faults(figures, plan, unit.arch)
                elif unit.source not in [str(p.path) for p in PROBES]:
                    wrong.append(f"{figures.kernel} ({unit.source}) has no plan in tools/families/")
    print(table(units, args.archs))
    print(*(f"FAIL {text}" for text in dict.fromkeys(wrong)), sep="\n", end="\n" if wrong else "")
    print(f"static checks: {sum(len(u.kernels) for u in units)} kernels in {len(units)} units,",
          f"{len(wrong)} faults" if wrong else "OK")  # fmt: skip
    return bool(wrong) or not units


if __name__ == "__main__":
    sys.exit(main())
