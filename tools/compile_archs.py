# SPDX-License-Identifier: Apache-2.0
"""Compiles every csrc/cuda/*.cu for each architecture, shipped or not, and shows registers and spills.

python tools/compile_archs.py [80 90a ...] [--jobs 2]: exit status 1 if one does not compile. <family>_smXX.cu files are
compiled for their own architecture only.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["80", "89", "90a", "100a", "120a"]
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"]


def compile_one(job: tuple[Path, str]) -> tuple[Path, str, float, int, int, str]:
    """(source, arch, seconds, most registers of a kernel, bytes spilled by all kernels, errors)."""
    source, arch = job
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, target, "-Xptxas=-v", f"-I{ROOT / 'csrc'}", "-c", source, "-o", f"{folder}/out.o"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    text = done.stdout + done.stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", text)), default=0)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", text)))
    return source, arch, time.monotonic() - start, registers, spilled, text if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", default=ARCHS)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("compile-archs: skipped, no nvcc on PATH")
        return 0
    jobs = []
    for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")):
        own = re.search(r"_sm(\d+)$", source.stem)
        jobs += [(source, arch) for arch in args.archs if own is None or arch.rstrip("a") == own[1]]
    failed = 0
    print(f"{'file':<24}{'arch':>6}{'seconds':>9}{'registers':>11}{'spill bytes':>13}")
    with ThreadPoolExecutor(args.jobs) as pool:
        for source, arch, seconds, registers, spilled, errors in pool.map(compile_one, jobs):
            name = source.relative_to(ROOT / "csrc" / "cuda")
            print(
                f"{name!s:<24}{arch:>6}{seconds:>9.1f}{registers:>11}{spilled:>13}{'  FAILED' * bool(errors)}",
                flush=True,
            )
            if errors:
                print(errors, file=sys.stderr)
                failed += 1
    print(f"compile-archs: {len(jobs) - failed} of {len(jobs)} compile")
    return bool(failed) or not jobs


if __name__ == "__main__":
    sys.exit(main())
