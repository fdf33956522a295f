# SPDX-License-Identifier: Apache-2.0
"""A family that is thrown away: a copy of the tree, the files of tests/throwaway/tree/ laid over it and LINES added, so
that what a family costs is known and stays so.  python tests/shared/throwaway.py   builds the copy and tries it all.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "tests" / "throwaway" / "tree"
LINES = {  # all that files which are there already gain
    "python/lrkern/ops/__init__.py": "from .throwaway import throwaway\n",
    "python/lrkern/reference/__init__.py": "from .throwaway import throwaway\n",
}
LEFT_OUT = (".git", ".venv", ".cache", "build", "dist", "out", "__pycache__", "*.so", "*.egg-info", "throwaway")


def copy(folder: Path) -> None:
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    for path in (path for path in TREE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        target = folder / path.relative_to(TREE)
        if target.exists():
            raise FileExistsError(f"{target.relative_to(folder)}: a family changes no file but by a line")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name, line in LINES.items():
        with (folder / name).open("a") as f:
            f.write(line)


def run(folder: Path, *command: str, **env: str) -> str:
    """What the command says, which runs in the copy and over its package."""
    start = time.monotonic()
    own = {"PYTHONPATH": str(folder / "python"), "OMP_NUM_THREADS": "1", "LRK_TEST_FULL": ""}
    env = os.environ | own | env
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    print(f"{time.monotonic() - start:6.0f} s  {' '.join(command)}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def says(text: str, *words: str) -> None:
    if missing := [word for word in words if word not in text]:
        raise SystemExit(f"{text}\nlacks {missing}")


def try_all(folder: Path) -> None:
    copy(folder)
    nvcc = shutil.which("nvcc") is not None
    cuda = {"LRK_CUDA": "ON", "LRK_CUDA_ARCHS": "80-real"} if nvcc else {"LRK_CUDA": "OFF"}
    run(folder, "setup.py", "-q", "build_ext", "--inplace", **cuda)
    says(run(folder, "-m", "lrkern", "info"), "throwaway")
    run(folder, "tools/gpu_status.py")
    says((folder / "docs" / "gpu.md").read_text(), "| throwaway | csrc/cuda/throwaway/portable.cu |")
    if nvcc:
        says(run(folder, "tools/static_checks.py", "80"), "throwaway_kernel<bf16>")
    # Its registry tests on every device there is, its launchers in each build of the emulator, its evidence, its suite.
    test = lambda *arguments: run(folder, "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    says(test("tests/ops", "tests/csrc/test_emulator.py", "tests/tools", "tests/bench", "-k", "throwaway"), " passed")
    test("tests/test_layers.py", "tests/test_families.py", "tests/tools/test_gpu_status.py", "-k", "not new_family")
    test("tests/tools/test_gpu.py", "tests/tools/test_static.py", "-k", "every_kernel")
    says(run(folder, "bench/run.py", "op", "throwaway", "--quick"), "method=throwaway T=64", "lrkern")
    print("a family is its own files and a line in each face: built, emulated, checked, timed and documented")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try_all(Path(folder))
