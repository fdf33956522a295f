# SPDX-License-Identifier: Apache-2.0
"""The layer rules of docs/design.md §1: what each part of the tree may include, import and know."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.sources import included, standard

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "lrkern"
C_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
MAX_LINES = 600

STANDARD = r"<[a-z_0-9]+>"  # <cstdint>; anything with a slash or a dot is somebody's library
TORCH = r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/.*>"

# folder: what its files may include beside csrc/*.h and its own headers, and words their code may not contain.
RULES = {
    ".": ([STANDARD], r"\btorch\b|cuda_runtime|\bPy[A-Z]"),
    "policy": ([STANDARD], r"\btorch\b|\bcuda[A-Z]\w*|pybind"),
    "cpu": ([STANDARD, "<immintrin.h>", "<arm_neon.h>"], r"\btorch\b|\bcuda[A-Z]\w*|pybind"),
    "cuda": ([STANDARD, r"<cuda\w*\.hp*>", r'"emulat\w+\.h"'], r"\btorch\b|\bat::|\bc10::"),
    "ops": ([STANDARD, TORCH], r"\bat::|\bc10::|pybind|<<<|__global__|cutlass|\bdim3\b"),
    "host": ([STANDARD, r"<pybind11/.*>"], r"\btorch::|\bat::|<<<|_cpu\(|_cuda\("),
}


def tree(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts)


def code(path: Path) -> str:
    """The text of a C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def files_of(folder: str) -> list[Path]:
    if folder == ".":
        return sorted(path for path in CSRC.iterdir() if path.suffix in C_SUFFIXES)
    return tree(CSRC / folder, *C_SUFFIXES)


def of_the_house(path: Path, header: Path | None) -> bool:
    """Is it a shared header, one of the includer's layer, or one of its family's folder there?"""
    layer = path.relative_to(ROOT).parts[:2]
    own = path.relative_to(ROOT).parts[:-1], (*layer, path.stem)
    return header is not None and header.parts[:-1] in (("csrc",), layer, *own)


@pytest.mark.parametrize("folder", RULES)
def test_c_layers(folder):
    allowed, forbidden = RULES[folder]
    faults = []
    for path in files_of(folder):
        name, text = path.relative_to(ROOT), code(path)
        extra = [r"<cut(e|lass)/.*>"] if re.search(r"(^|_)sm\d+$", path.stem) else []
        ours = {f'"{said}"' for said, header in included(name).items() if of_the_house(path, header)}
        for include in set(re.findall(r'#\s*include\s*([<"][^>"]+[>"])', text)) - ours:
            if not any(re.fullmatch(pattern, include) for pattern in allowed + extra):
                faults.append(f"{name} includes {include}")
        body = re.sub(r"#\s*include[^\n]*", "", text)
        faults += [f"{name} knows {word}" for word in set(re.findall(forbidden, body))]
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


# Each room imports those below it and no other. reference and testing stand apart: nothing that users call leans on them.
FLOORS = (
    "limits",
    "extras",
    "ops",
    "functional",
    "caches",
    "nn",
    "optim",
    "peft",
    "files",
    "convert",
    "compress",
    "model",
    "s2ft",
    "serving",
)
APART = {"reference", "testing"}
FACES = {"__init__", "__main__", "_moved", "selftest"}  # of the package; they may know every room
REEXPORTS = {"lrkern.peft": {"files"}}  # lrkern.peft.save_adapter and load_adapter are public there


def module(name: str) -> list[Path]:
    """The files of lrkern.<name>, a module or a folder."""
    return [path for path in (PYTHON / f"{name}.py",) if path.exists()] + tree(PYTHON / name, ".py")


def dotted(path: Path) -> str:
    """The name a file of the package is imported by."""
    return ".".join(path.relative_to(PYTHON.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in tree(PYTHON, ".py")}


def imports(path: Path, nodes: list[ast.AST] | None = None) -> set[str]:
    """Absolute dotted names of what a module of the package imports (in these statements): `from . import nn` in ops.py is
    lrkern.nn."""
    package = [*path.relative_to(PYTHON.parent).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + (node.module.split(".") if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """The modules of the package among imported names: lrkern.ops.dispatch of lrkern.ops.dispatch.library."""
    return {m for name in names if (m := name if name in MODULES else name.rpartition(".")[0]) in MODULES}


def room(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def test_every_room_has_its_floor():
    assert {room(name) for name in MODULES} - {""} == {*FLOORS, *APART, *FACES} - {"__init__"}


@pytest.mark.parametrize("floor", FLOORS)
def test_rooms_import_what_is_below_them(floor):
    known, faults = {*FLOORS[: FLOORS.index(floor) + 1]}, {}
    for path in module(floor):
        if above := {room(i) for i in ours(imports(path))} - known - REEXPORTS.get(dotted(path), set()):
            faults[path.name] = above
    assert not faults, f"{floor} knows {known}, imported are {faults}"


def test_no_module_imports_itself_through_others():
    """Where they are loaded: imports inside functions may wait for one another."""
    left = {name: ours(imports(path, ast.parse(path.read_text()).body)) - {name} for name, path in MODULES.items()}
    while ends := {name for name in left if not left[name] or not any(name in below for below in left.values())}:
        left = {name: below - ends for name, below in left.items() if name not in ends}
    assert not left, f"a circle: {left}"


def test_only_ops_calls_torch_ops_lrkern():
    users = [path.name for path in tree(PYTHON, ".py") if "torch.ops" in path.read_text() and path.parent.name != "ops"]
    assert not users, f"torch.ops belongs to lrkern.ops, seen in {users}"


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
