# SPDX-License-Identifier: Apache-2.0
"""A family owns its facts: files of its own, a line in each public face, and no word about it anywhere else."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import throwaway
import torch

from lrkern.reference import OPS
from tests.conftest import FULL
from tools import families, gpu_status, sources
from tools.sources import ROOT

FAMILIES = sources.families()
PYTHON = ROOT / "python" / "lrkern"
# A method (VeRA) composes the ops of families; its room in functional/ has its name.
METHODS = {path.stem for path in (PYTHON / "functional").glob("*.py")} - {"__init__", "base", "projection"}

# Public faces have a line for each family or method.
FACES = {PYTHON / room / "__init__.py" for room in ("ops", "functional", "nn", "reference")}
# Files that serve all and yet name one, and why.
EXCEPTIONS = {
    "csrc/cpu/factor.h": "Factor, the low-rank operand of lora.h, is multi-LoRA's too",
    "csrc/cuda/products.cuh": "as cpu/factor.h",
    "python/lrkern/functional/projection.py": "what methods over random bases share: the calls of their ops",
    "python/lrkern/nn/linear.py": "LowRankLinear: every method that has factors computes as a LoRA layer",
    "python/lrkern/peft/__init__.py": "kinds of patched layers, in the order in which messages name them",
    "python/lrkern/files/__init__.py": "the door imports those who make themselves known to it",
    "python/lrkern/files/folder.py": "LORA is the peft_type of what has factors, whatever its method",
    "python/lrkern/files/own.py": "the file says which stream its seeds mean: ops.basis.STREAM_VERSION",
    "python/lrkern/model/storage.py": "a folder of LoRA's gives values to layers that are there, of all others layers are read",
    "bench/suite.py": "a provider is called lora: our own, beside which variants are timed",
    "bench/stored.py": "a layer without its GEMM stands in for lora_linear",
}


def code(path: Path) -> str:
    """The text of a C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def names_of(family: str) -> set[str]:
    """Ops and types of a family of kernels."""
    glue = "".join(code(ROOT / s.path) for s in sources.sources("ops") if s.family == family)
    types = re.findall(r"\b(?:struct|enum class|enum)\s+(\w+)", code(ROOT / "csrc" / f"{family}.h"))
    return {*re.findall(r"LRK_OP\((\w+),", glue), *types}


def classes_of(name: str) -> set[str]:
    path = PYTHON / "nn" / f"{name}.py"
    tree = ast.parse(path.read_text()).body if path.exists() else []
    return {node.name for node in tree if isinstance(node, ast.ClassDef)}


OWNED = {*FAMILIES, *METHODS}
VARIANTS = {path.stem for path in (PYTHON / "nn" / "variants").glob("*.py")} - {
    "__init__"
}  # PEFT's layers of one are its own too
NAMES = {name for family in FAMILIES for name in names_of(family)} | {c for name in OWNED for c in classes_of(name)}
NAMES -= {*dir(torch)}  # scatter_add is torch's too, and whoever says it means that


def owned(path: Path) -> bool:
    """Does the file, or its folder, bear the name of a family or a method, or is it a variant of LoRA or a rule for one, each a method's own?"""
    return (
        bool((OWNED | {"variants", "optim"}) & {*path.relative_to(ROOT).with_suffix("").parts}) or path.stem in VARIANTS
    )


def words(path: Path) -> Iterator[tuple[str, bool]]:
    """(word, whether it is a whole string or a part of an import) of a source without comments and docstrings."""
    if path.suffix != ".py":
        text = code(path)
        yield from ((word, False) for word in re.findall(r"\w+", text))
        yield from ((word, True) for word in re.findall(r'"(\w+)(?:\.h)?"', text))
        return
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]:
                yield from ((word, True) for word in name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from ((word, False) for word in re.findall(r"\w+", node.value))
            yield node.value.lower() if node.value.isupper() else node.value, True  # a peft_type
        else:
            yield from ((getattr(node, key, None), False) for key in ("id", "attr", "name", "arg"))


def known(path: Path) -> set[str]:
    """What a file names of a family or a method."""
    return {w for w, whole in words(path) if w in NAMES or (whole and w in OWNED)}


def shared_files() -> list[Path]:
    """Suites and peers of bench/ and kinds of serving/ are files of their own as well."""
    files = [p for folder in ("csrc", "python/lrkern", "tools") for p in sorted((ROOT / folder).rglob("*"))]
    files += [
        *(ROOT / "bench").glob("*.py"),
        ROOT / "tests" / "conftest.py",
        ROOT / "tests" / "shared" / "fuzz_calls.py",
    ]
    sources = [p for p in files if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and "kinds" not in p.parts]
    return [p for p in sources if not owned(p) and p not in FACES]


def test_no_shared_file_names_a_family():
    found = {str(path.relative_to(ROOT)): sorted(names) for path in shared_files() if (names := known(path))}
    others = {path: names for path, names in found.items() if path not in EXCEPTIONS}
    assert not others, "\n".join(f"{path}: {', '.join(names)}" for path, names in others.items())
    assert EXCEPTIONS.keys() <= found.keys(), "an exception that nothing needs"
    assert len(EXCEPTIONS) <= 11


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_all_its_files(family):
    """Sources that csrc/sources.cmake does not know are told there; these are the rest."""
    own = [f"csrc/{family}.h", f"tests/emulator/{family}_params.cpp", f"tools/families/{family}.py"]
    rooms = "python/lrkern/ops", "python/lrkern/ops/composites", "python/lrkern/reference", "tests/families"
    own += [f"{room}/{family}.py" for room in rooms]
    assert not [path for path in own if not (ROOT / path).exists()]
    assert {op for op in OPS if OPS[op].family.name == family} == set(gpu_status.ops_of(family))
    assert families.load(family).KERNELS.keys() == {k.name for k in gpu_status.kernels() if k.source.family == family}


FOUND = """
import json, sys
from tools import families, gpu_status, sources
sys.path.insert(0, "python/lrkern")  # the reference leans on nothing that has to be built
from reference import OPS
op = OPS["throwaway"]
print(json.dumps({
    "sources": sorted(s.kind for s in sources.sources() if s.family == "throwaway"),
    "ops": gpu_status.ops_of("throwaway"), "registered": op.family.name, "samples": len([*op.samples("cpu", None)]), "formula": op.formula,
    "planned": [*families.load("throwaway").KERNELS], "planned by all": "throwaway" in families.kernels(),
    "row": [line for line in gpu_status.status().splitlines() if "throwaway" in line],
    "digest": sources.digest("throwaway") != sources.digest("lora"),
}))
"""


def test_a_new_family_would_be_found(tmp_path):
    """By all that reads lists. tests/shared/throwaway.py builds and tries it, in .ci/run and with LRK_TEST_FULL."""
    throwaway.copy(tmp_path)
    found = json.loads(throwaway.run(tmp_path, "-c", FOUND))
    row = "| throwaway | csrc/cuda/throwaway/portable.cu | 80, 89, 90a, 100a, 120a | yes | not run on a GPU | - |"
    assert found == {
        "sources": ["cpu", "cuda", "ops", "policy"],
        "ops": ["throwaway"],
        "registered": "throwaway",
        "samples": 4,
        "formula": "y = g x",
        "planned": ["throwaway"],
        "planned by all": True,
        "row": [row],
        "digest": True,
    }


@pytest.mark.skipif(not FULL, reason=".ci/run and LRK_TEST_FULL build it")
def test_a_new_family_works(tmp_path):
    throwaway.try_all(tmp_path)
