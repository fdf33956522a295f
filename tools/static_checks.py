# SPDX-License-Identifier: Apache-2.0
"""Static checks of the CUDA code: compiles every .cu for each architecture and reads ptxas -v and the SASS.

python tools/static_checks.py [80 90a ...] [--jobs 2]

Fails where a file does not compile, a kernel has no plan below, or one does not keep to its plan: no spills and no local
memory, the tensor-core instruction and the 128-bit loads it is built around, and as many blocks on an SM as planned.
<family>_smXX.cu files are compiled for their own architecture only. Figures are kept in build/static by a hash of
sources, flags and compiler, so a second run is quick.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.sources import standard

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "static"
ARCHS = ["80", "89", "90a", "100a", "120a"]
FLAGS = [standard(), "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas=-v",
         "-Icsrc", "-Icsrc/cuda"]  # fmt: skip
PROBES = [ROOT / "tests/emulator/wrappers.cu"]  # compiled, without a plan

# ---------------------------------------------------------------------------------------------- what each kernel plans


@dataclass(frozen=True)
class Plan:
    blocks: int  # resident on an SM, at least
    shared: int = 0  # dynamic bytes of a block
    tensor: str = ""  # SASS: HMMA (mma.sync), HGMMA (wgmma), UTC*MMA (tcgen05), OMMA, QMMA (block-scaled mma)
    wide: int = 0  # 128-bit loads from global memory, at least; they serve aligned shapes
    threads: int = 128


SIZE = {"float": 4, "bf16": 2, "f16": 2}


def tile(rows: int, cols: int, elem: str, terms: int) -> int:
    """Bytes of a Tile of tile.cuh: 16 bytes of padding a row, 128-byte pieces."""
    return -(-terms * rows * (cols + 16 // SIZE[elem]) * SIZE[elem] // 128) * 128


def math_of(x: str, f: str) -> tuple[str, int, int, str]:
    """(element, terms of X, terms of F, tensor instruction) as Math in tile.cuh."""
    elem = x if f == x else "bf16"
    return elem, 2 if (x, f) == ("f16", "float") else 1, 2 if f != x else 1, "" if x == "float" else "HMMA"


def vectors(rows: int, cols: int, source: str) -> int:
    """128-bit loads with which each of 128 threads fetches its part of a tile."""
    return max(1, rows * cols * SIZE[source] // 16 // 128)


def shrink(x: str, f: str, ranks: int, n_contig: bool) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    shared = tile(64, 64, elem, xt) + (tile(ranks, 64, elem, ft) if n_contig else tile(64, ranks, elem, ft))
    wide = vectors(64, 64, x) + vectors(ranks, 64, f)
    return Plan(4 if ranks == 16 and SIZE[x] == 2 else 2, shared, tensor, wide)


def expand(x: str, f: str, n_contig: bool) -> Plan:
    elem, _, ft, tensor = math_of(x, f)
    shared = tile(64, 32, elem, ft) + (tile(32, 128, elem, ft) if n_contig else tile(128, 32, elem, ft))
    return Plan(2, shared, tensor, vectors(64, 32, f) + vectors(32, 128, f) + vectors(64, 128, x))


def wgrad(x: str, f: str, ranks: int) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    cols = 128 if ranks == 16 else 64
    shared = tile(64, ranks, elem, ft) + tile(64, cols, elem, xt)
    return Plan(2, shared, tensor, vectors(64, ranks, f) + vectors(64, cols, x))


def shrink_wgrad(x: str, f: str) -> Plan:
    """Its [64, 256] tile of dY leaves room for a second block only where the tile is one 16-bit term."""
    elem, xt, ft, tensor = math_of(x, f)
    shared = tile(64, 256, elem, xt) + tile(256, 16, elem, ft) + tile(64, 16, elem, ft)
    unrolled = 4 if SIZE[x] == 2 else 2
    return Plan(2 if x == f != "float" else 1, shared, tensor, vectors(256, 16, f) + vectors(64, 16, f) + unrolled)


def rescale(x: str) -> Plan:
    return Plan(
        4, 4 * 256 * 4, "", vectors(1, 8, x) + vectors(1, 8, x)
    )  # streams: 8 columns a lane, four rows at a time


def sum_planes(f: str) -> Plan:
    return Plan(8)  # streams fp32, neighbours in one warp


ROWS = -(-64 * 4 // 128) * 128  # a list of 64 rows in shared memory; up to 32 ranks take 128 bytes


def multi_shrink(x: str, f: str, ranks: int) -> Plan:
    elem, xt, ft, tensor = math_of(x, f)
    lists = ROWS + (ROWS if ranks == 64 else 128)
    wide = vectors(64, 64, x) + vectors(ranks, 64, f)
    return Plan(2, tile(64, 64, elem, xt) + tile(ranks, 64, elem, ft) + lists, tensor, wide)


def multi_expand(x: str, f: str, to: str) -> Plan:
    elem, _, ft, tensor = math_of(x, f)
    shared = tile(64, 32, elem, ft) + tile(32, 128, elem, ft) + ROWS + 128
    return Plan(2, shared, tensor, vectors(64, 32, f) + vectors(32, 128, f) + vectors(64, 128, to))


def multi_wgrad(x: str, f: str, ranks: int) -> Plan:
    plain = wgrad(x, f, ranks)
    return replace(plain, shared=plain.shared + ROWS + (ROWS if ranks == 64 else 128))


def multi_plan() -> Plan:
    return Plan(4, 2 * 256 * 4, threads=256)  # one block per slot: few, and no arithmetic


def multi_stream(_: str) -> Plan:
    return Plan(8)


def multi_wgrad_sum(f: str) -> Plan:
    return Plan(8, 128)


def multi_gather(f: str) -> Plan:
    return Plan(8, ROWS + 128)


def basis_fill(_: str) -> Plan:
    return Plan(6)  # little but one piece of a row


def basis_sums(_: str) -> Plan:
    return Plan(4)  # of 4 rows by 16 columns in registers; what they are multiplied by is the same for a whole warp


def basis_stream() -> Plan:
    return Plan(8)


def basis_dots(_: str) -> Plan:
    return Plan(3, wide=8)  # one for each of eight rows at 4 columns a piece, more where it has more


PLANS = {
    "lora_shrink_kernel": shrink,
    "lora_expand_kernel": expand,
    "lora_wgrad_kernel": wgrad,
    "lora_shrink_wgrad_kernel": shrink_wgrad,
    "lora_rescale_kernel": rescale,
    "lora_sum_kernel": sum_planes,
    "multi_lora_plan_kernel": multi_plan,
    "multi_lora_shrink_kernel": multi_shrink,
    "multi_lora_sum_kernel": multi_stream,
    "multi_lora_expand_kernel": multi_expand,
    "multi_lora_finish_kernel": multi_stream,
    "multi_lora_wgrad_kernel": multi_wgrad,
    "multi_lora_wgrad_sum_kernel": multi_wgrad_sum,
    "multi_lora_gather_kernel": multi_gather,
    "multi_lora_scatter_kernel": multi_wgrad_sum,
    "basis_fill_kernel": basis_fill,
    "basis_combine_kernel": basis_sums,
    "basis_combine_sum_kernel": basis_stream,
    "basis_dot_kernel": basis_dots,
    "basis_dot_sum_kernel": basis_stream,
    "basis_matmul_x_kernel": basis_stream,
    "basis_matmul_kernel": basis_sums,
    "basis_matmul_sum_kernel": basis_stream,
    "basis_matmul_transposed_kernel": basis_dots,
}


def plan_of(kernel: str) -> Plan | None:
    """The plan of `name<template arguments>`."""
    name, _, rest = kernel.partition("<")
    value = {"true": True, "false": False}
    words = [w.strip() for w in rest.rstrip(">").split(",")] if rest else []
    return PLANS[name](*(value.get(w, int(w) if w.isdigit() else w) for w in words)) if name in PLANS else None


# ---------------------------------------------------------------------------------------------- what an SM holds

# (warps, blocks, KB of shared memory) of an SM: "Technical Specifications per Compute Capability" in NVIDIA's programming
# guide. All have 65536 registers in four parts and keep 1 KB of shared memory per block for the system.
SM = {"80": (64, 32, 164), "89": (48, 24, 100), "90": (64, 32, 228), "100": (64, 32, 228), "120": (48, 24, 100)}


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


PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '\S+'.*?(?P<stack>\d+) bytes stack frame, (?P<spills>\d+) bytes spill "
    r"stores.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
TENSOR = re.compile(r"(?:[HIQO]G?MMA|DMMA|UTC[A-Z]*MMA)\b")


def plain_names(mangled: list[str]) -> list[str]:
    """`name<template arguments>` of each mangled name, without namespaces, return type and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    names = []
    for line in said.splitlines():
        text = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", line)
        depth, end = 0, len(text)
        for i, c in enumerate(text):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        names.append(text[:end])
    return names


def read_ptxas(text: str) -> dict[str, Figures]:
    """Figures by mangled name from what `ptxas -v` prints."""
    found = {}
    for m in PTXAS.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        found[m["name"]] = Figures(
            "", int(m["registers"]), int(shared[1]) if shared else 0, int(m["spills"]), int(m["stack"])
        )
    for figures, name in zip(found.values(), plain_names(list(found)), strict=True):
        figures.kernel = name
    return found


def count_sass(text: str, found: dict[str, Figures]) -> None:
    """Adds the instructions of nvdisasm's listing to the figures."""
    figures = None
    for line in text.splitlines():
        if line.startswith(".text."):
            figures = found.get(line[6:].rstrip(":"))
        elif figures and (m := INSTRUCTION.match(line)):
            opcode = m[1]
            if tensor := TENSOR.match(opcode):
                figures.tensor[tensor[0]] = figures.tensor.get(tensor[0], 0) + 1
            elif re.match(r"LDG(STS)?\..*128", opcode):
                figures.wide += 1
            elif re.match(r"(LDL|STL)\b", opcode):
                figures.local += 1


def faults(figures: Figures, plan: Plan, arch: str) -> list[str]:
    """How a kernel departs from its plan; empty where it does not."""
    wrong = []
    if figures.spills or figures.local:
        wrong.append(f"{figures.spills} bytes of spills, {figures.local} accesses to local memory")
    if plan.tensor and plan.tensor not in figures.tensor:
        wrong.append(f"no {plan.tensor} instruction")
    if figures.wide < plan.wide:
        wrong.append(f"{figures.wide} loads of 128 bits from global memory, planned are {plan.wide}")
    blocks, limit = occupancy(arch, figures.registers, figures.shared + plan.shared, plan.threads)
    if blocks < plan.blocks:
        wrong.append(f"{blocks} blocks on an SM, planned are {plan.blocks}; {limit} are the limit")
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


@cache
def nvdisasm() -> str:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(place).glob("cu*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm") or ""


@cache
def tools_version() -> str:
    ask = lambda *c: subprocess.run(c, capture_output=True, text=True).stdout
    reader = "".join(map(inspect.getsource, (Figures, plain_names, read_ptxas, count_sass)))
    return ask("nvcc", "--version") + ask(nvdisasm(), "--version") + reader


def digest(source: Path, arch: str) -> str:
    h = hashlib.sha256(json.dumps([FLAGS, arch, tools_version()]).encode())
    for path in [source, *sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc/cuda").rglob("*.cuh"))]:
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def measure(source: Path, arch: str) -> Unit:
    kept = CACHE / f"{source.stem}-{arch}-{digest(source, arch)}.json"
    if kept.exists():
        unit = json.loads(kept.read_text())
        return Unit(**{**unit, "kernels": [Figures(**k) for k in unit["kernels"]]})
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, target, "-cubin", str(source), "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        said, seconds = done.stdout + done.stderr, time.monotonic() - start
        if done.returncode:
            return Unit(source.name, arch, seconds, said, [])
        found = read_ptxas(said)
        count_sass(subprocess.run([nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True).stdout, found)
    unit = Unit(source.name, arch, seconds, "", list(found.values()))
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{source.stem}-{arch}-*.json"):
        old.unlink()
    kept.write_text(json.dumps(asdict(unit)))
    return unit


def jobs_for(archs: list[str]) -> list[tuple[Path, str]]:
    jobs = []
    for source in [*sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), *PROBES]:
        own = re.search(r"(?:^|_)sm(\d+)$", source.stem)
        jobs += [(source, arch) for arch in archs if own is None or arch.rstrip("a") == own[1]]
    return jobs


# ---------------------------------------------------------------------------------------------- the table


def table(units: list[Unit], archs: list[str]) -> str:
    by_kernel: dict[str, dict[str, Figures]] = {}
    for unit in units:
        for figures in unit.kernels:
            by_kernel.setdefault(figures.kernel, {})[unit.arch] = figures
    lines = [
        "Per architecture: registers a thread and blocks on an SM. spills: bytes, tensor and 128-bit: instructions.",
        f"{'kernel':<48}{'shared':>7}{'spills':>7}  {'tensor':<9}{'128-bit':>8}" + "".join(f"{a:>10}" for a in archs),
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
        lines.append(f"{kernel:<48}{shared:>7}{spills:>7}  {tensor:<9}{wide:>8}{cells}")
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
    if not nvdisasm():
        print("static checks: nvdisasm is missing (requirements/dev.txt brings it)")
        return 1
    units, wrong = [], []
    with ThreadPoolExecutor(args.jobs) as pool:
        for unit in pool.map(lambda job: measure(*job), jobs_for(args.archs)):
            units.append(unit)
            if unit.errors:
                wrong.append(f"{unit.source} does not compile for sm_{unit.arch}\n{unit.errors}")
            for figures in unit.kernels:
                if plan := plan_of(figures.kernel):
                    wrong += faults(figures, plan, unit.arch)
                elif unit.source not in [p.name for p in PROBES]:
                    wrong.append(f"{figures.kernel} ({unit.source}) has no plan in {Path(__file__).name}")
    print(table(units, args.archs))
    print(*(f"FAIL {text}" for text in dict.fromkeys(wrong)), sep="\n", end="\n" if wrong else "")
    print(f"static checks: {sum(len(u.kernels) for u in units)} kernels in {len(units)} units,",
          f"{len(wrong)} faults" if wrong else "OK")  # fmt: skip
    return bool(wrong) or not units


if __name__ == "__main__":
    sys.exit(main())
