# SPDX-License-Identifier: Apache-2.0
"""The layer rules of docs/design.md §1: what each part of the tree may include, import and know."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.sources import standard

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "lrkern"
C_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
MAX_LINES = 600

STANDARD = r"<[a-z_0-9]+>"  # <cstdint>; anything with a slash or a dot is somebody's library
CONTRACTS = "|".join(re.escape(path.name) for path in sorted(CSRC.glob("*.h")))
SHARED = rf'"(\.\./)?({CONTRACTS})"'


def tree(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)


def code(path: Path) -> str:
    """The text of a C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def own(folder: str, *suffixes: str) -> str:
    return rf'"({folder}/)?(' + "|".join(re.escape(path.name) for path in tree(CSRC / folder, *suffixes)) + ')"'


# folder: what its files may include, and words their code may not contain.
RULES = {
    ".": ([STANDARD, SHARED], r"\btorch\b|cuda_runtime|\bPy[A-Z]"),
    "policy": ([STANDARD, SHARED], r"\btorch\b|\bcuda[A-Z]\w*|pybind"),
    "cpu": ([STANDARD, SHARED, own("cpu", ".h"), "<immintrin.h>", "<arm_neon.h>"], r"\btorch\b|\bcuda[A-Z]\w*|pybind"),
    "cuda": (
        [STANDARD, SHARED, own("cuda", ".cuh", ".h"), r"<cuda\w*\.hp*>", r'"emulat\w+\.h"'],
        r"\btorch\b|\bat::|\bc10::",
    ),
    "ops": (
        [STANDARD, SHARED, own("ops", ".h"), r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/.*>"],
        r"\bat::|\bc10::|pybind|<<<|__global__|cutlass|\bdim3\b",
    ),
    "host": ([STANDARD, SHARED, r"<pybind11/.*>"], r"\btorch::|\bat::|<<<|_cpu\(|_cuda\("),
}


def files_of(folder: str) -> list[Path]:
    if folder == ".":
        return sorted(path for path in CSRC.iterdir() if path.suffix in C_SUFFIXES)
    return tree(CSRC / folder, *C_SUFFIXES)


@pytest.mark.parametrize("folder", RULES)
def test_c_layers(folder):
    allowed, forbidden = RULES[folder]
    faults = []
    for path in files_of(folder):
        text = code(path)
        extra = [r"<cut(e|lass)/.*>"] if re.search(r"(^|_)sm\d+$", path.stem) else []
        for include in re.findall(r'#\s*include\s*([<"][^>"]+[>"])', text):
            if not any(re.fullmatch(pattern, include) for pattern in allowed + extra):
                faults.append(f"{path.relative_to(ROOT)} includes {include}")
        body = re.sub(r"#\s*include[^\n]*", "", text)
        faults += [f"{path.relative_to(ROOT)} knows {word}" for word in set(re.findall(forbidden, body))]
    assert not faults, "\n".join(faults)


def test_every_layer_has_a_rule():
    """csrc/torch would shadow <torch/...> under -Icsrc; any other new folder needs its line above."""
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == set(RULES) - {"."}


@pytest.mark.parametrize("header", sorted(CSRC.glob("*.h")), ids=lambda path: path.name)
def test_each_shared_header_compiles_alone(header):
    compiler = os.environ.get("CXX", "g++")
    command = [
        compiler,
        standard(),
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-x",
        "c++",
        "-include",
        header,
        "-",
    ]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Python


def imports(path: Path) -> set[str]:
    """Absolute dotted names of what a module of the package imports: `from . import nn` in ops.py is lrkern.nn."""
    package = [*path.relative_to(PYTHON.parent).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + (node.module.split(".") if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def module(name: str) -> list[Path]:
    """The files of lrkern.<name>, a module or a folder."""
    return [path for path in (PYTHON / f"{name}.py",) if path.exists()] + tree(PYTHON / name, ".py")


def test_only_ops_calls_torch_ops_lrkern():
    users = [path.name for path in tree(PYTHON, ".py") if "torch.ops" in path.read_text() and path.parent.name != "ops"]
    assert not users, f"torch.ops belongs to lrkern.ops, seen in {users}"


@pytest.mark.parametrize("name", ["functional", "nn"])
def test_upper_layers_know_only_ops(name):
    for path in module(name):
        below = {i for i in imports(path) if i.startswith("lrkern")}
        known = tuple(f"lrkern.{layer}" for layer in ("limits", "ops", "functional", "caches", "nn"))
        assert all(i.startswith(known) for i in below), f"{path.name} imports {below}"


def test_reference_is_independent():
    """The truth may not lean on what it judges."""
    for path in module("reference"):
        roots = {name.split(".")[0] for name in imports(path) if not name.startswith("lrkern.reference.")}
        assert roots <= {"torch", *sys.stdlib_module_names}, f"{path.name} imports {roots}"


def test_nothing_at_run_time_needs_host():
    for path in tree(PYTHON, ".py"):
        if path.name != "__main__.py":
            assert not any(name.endswith("._host") for name in imports(path)), f"{path.name} imports lrkern._host"


# ---- the whole tree

SOURCES = [
    path
    for folder in ("csrc", "python", "tests", "tools", "bench", "examples")
    for path in tree(ROOT / folder, *C_SUFFIXES, ".py", ".sh")
] + [ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile", "tools/setup.sh", ".ci/run")]


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) >= MAX_LINES
    }
    assert not long, f"files over {MAX_LINES} lines: {long}; a family that outgrows one becomes a folder"


def test_licence_line():
    bare = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:200]
    ]
    assert not bare, f"no SPDX line in {bare}"


def test_nothing_of_one_machine():
    """No home folders, no workplace, no host of a package registry: a clone must work anywhere."""
    words = ["/" + "root/", "/" + "home/", "/" + "work/", "pypi" + ".org", "python" + "hosted.org", "/" + "opt/"]
    texts = (
        SOURCES
        + sorted((ROOT / "docs").rglob("*.md"))
        + sorted(ROOT.glob("*.md"))
        + sorted((ROOT / "requirements").glob("*"))
    )
    faults = [f"{path.relative_to(ROOT)}: {word}" for path in texts for word in words if word in path.read_text()]
    assert not faults, "\n".join(faults)
