# SPDX-License-Identifier: Apache-2.0
"""The sources of csrc/ as csrc/sources.cmake finds them, and what each includes. `python tools/sources.py` prints the list."""

import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "gpu" / "sources.txt"  # by tools/gpu.py --prepare, for a machine without cmake
INCLUDES = ("csrc", "csrc/cuda")  # folders that #include "..." looks into, after the includer's own


def tool(name: str) -> str:
    """Its path: beside this Python, on PATH, or in a CUDA toolkit; "" where there is none."""
    homes = [os.environ.get("CUDA_HOME", ""), *sorted(glob.glob("/usr/local/cuda*"), reverse=True)]
    paths = [Path(sys.executable).parent / name, shutil.which(name), *(Path(h, "bin", name) for h in homes if h)]
    return next((str(p) for p in paths if p and os.access(p, os.X_OK)), "")


@cache
def cutlass() -> str:
    """The headers of CUTLASS in the wheel nvidia-cutlass, which files of sm_100a and sm_120a include; "" where it is not installed."""
    spec = importlib.util.find_spec("cutlass_library")
    return str(Path(spec.origin).parent / "source" / "include") if spec and spec.origin else ""


@dataclass(frozen=True)
class Source:
    kind: str  # ops, policy, cpu or cuda
    family: str  # "" where families share it
    arch: str  # "90" of an ..._sm90.cu or sm90.cu, "" for every architecture
    path: Path  # below ROOT


@cache
def printed() -> str:
    if cmake := tool("cmake"):
        command = [cmake, "-P", ROOT / "csrc" / "sources.cmake"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"csrc/sources.cmake: {done.stderr.strip()}")
        return done.stdout
    if KEPT.exists():
        return KEPT.read_text()
    raise RuntimeError(f"no cmake, and no {KEPT.relative_to(ROOT)} (python tools/gpu.py --prepare where there is one)")


def standard() -> str:
    """The C++ standard, as compilers take it: -std=c++20."""
    return f"-std=c++{re.search(r'^std (.*)$', printed(), re.M)[1]}"


def sources(kind: str = "") -> list[Source]:
    lines = [line.split() for line in printed().splitlines() if line and not line.startswith("std ")]
    every = [Source(*(word.strip("-") for word in line[:3]), Path(line[3])) for line in lines]
    return [s for s in every if kind in ("", s.kind)]


def families() -> list[str]:
    return sorted({s.family for s in sources() if s.family})


def included(path: Path) -> dict[str, Path | None]:
    """What stands in a file's #include "...", and the file of ours that it is, below ROOT. Branches of #if count."""
    found: dict[str, Path | None] = {}
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', (ROOT / path).read_text(), re.M):
        places = [Path(os.path.normpath(folder / name)) for folder in (path.parent, *map(Path, INCLUDES))]
        found[name] = next((p for p in places if (ROOT / p).is_file()), None)
    return found


def closure(paths: Iterable[Path]) -> list[Path]:
    """The files and all that they include of ours, through each other."""
    found: set[Path] = set()
    new = set(paths)
    while new:
        found |= new
        new = {p for path in new for p in included(path).values() if p} - found
    return sorted(found)


def digest_of(paths: Iterable[Path], *more: str) -> str:
    """Of what is compiled where these files are."""
    h = hashlib.sha256("".join(more).encode())
    for path in closure(paths):
        h.update((ROOT / path).read_bytes())
    return h.hexdigest()[:12]


def digest(family: str) -> str:
    """Of the sources that decide what a family's kernels compute and how they are launched: its .cu and its policy."""
    return digest_of(s.path for s in sources() if s.family in ("", family) and s.kind in ("cuda", "policy"))


if __name__ == "__main__":
    print(printed(), end="")
