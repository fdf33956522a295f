# SPDX-License-Identifier: Apache-2.0
"""Kernels by CUTLASS, which nothing here can run: what it says on the host of the shapes that the choice gives it and of where scales lie,
and what is in the machine code."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tools import sass, static_checks
from tools.sources import ROOT, cutlass, digest_of, standard

sys.path.insert(0, str(ROOT / "tests" / "emulator"))
import build as emulator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH"),
    pytest.mark.skipif(not cutlass(), reason="the wheel nvidia-cutlass is not installed"),
]
HERE = Path("tests/csrc")
PRODUCTS = {100: Path("csrc/cuda/mx/product_sm100.cu"), 120: Path("csrc/cuda/mx/product_sm120.cu")}
GEMM = Path("csrc/cuda/lora/gemm_sm100.cu")


def host(name: str, arch: int) -> str:
    """What tests/csrc/<name>_host.cu prints."""
    emulator.OUT.mkdir(parents=True, exist_ok=True)
    source = HERE / f"{name}_host.cu"
    program = emulator.OUT / f"{name}_host_sm{arch}-{digest_of([source], static_checks.compiler())}"
    if not program.exists():
        emulator.run(["nvcc", standard(), "-w", "--expt-relaxed-constexpr", "-Icsrc", "-Icsrc/cuda", "-isystem", cutlass(), f"-DARCH={arch}",
                      f"-gencode=arch=compute_{arch}a,code=sm_{arch}a", source, "-o", program])  # fmt: skip
    done = emulator.execute(program)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("arch", PRODUCTS)
def test_products_fit_as_the_choice_says_and_scales_lie_as_cutlass_has_them(arch):
    """can_implement over a grid of shapes, with the arguments of a launch; tile_atom_to_shape_SFA and _SFB beside swizzled_scale, which
    test_mx.py holds against torchao's to_blocked."""
    said = host("product", arch)
    assert re.search(r"layouts: \d{6,} places, 0 wrong", said), said
    for taken, refused in re.findall(r"(\d+) taken, (\d+) refused", said):
        assert int(taken) > 1000 and int(refused) > 1000
    for shared, threads in re.findall(r"(\d+) bytes of shared memory, (\d+) threads", said):
        plan = static_checks.plan_of(f"mx_product_sm{arch}_kernel<false>")
        assert int(shared) <= plan.shared and int(threads) == plan.threads


def kernels(source: Path, arch: int) -> dict[str, static_checks.Figures]:
    unit = static_checks.measure(source, f"{arch}a")
    assert not unit.errors and not unit.losses
    return {figures.kernel: figures for figures in unit.kernels}


def test_products_of_4_bits_are_block_scaled():
    """UTCOMMA and OMMA.SF multiply blocks by their scales, FP4 alone; beside them the bf16 products of the tail."""
    assert {"UTCOMMA", "UTCHMMA"} <= kernels(PRODUCTS[100], 100)["mx_product_sm100_kernel<false>"].tensor.keys()
    assert {"OMMA.SF", "HMMA"} <= kernels(PRODUCTS[120], 120)["mx_product_sm120_kernel<false>"].tensor.keys()


def test_products_of_8_and_4_bits_are_block_scaled():
    """UTCQMMA with scales has a third operand in tensor memory: both operands' scales lie there."""
    assert {"UTCQMMA", "UTCHMMA"} <= kernels(PRODUCTS[100], 100)["mx_product_sm100_kernel<true>"].tensor.keys()
    assert {"QMMA.SF", "HMMA"} <= kernels(PRODUCTS[120], 120)["mx_product_sm120_kernel<true>"].tensor.keys()
    cubin, _, _ = static_checks.compiled(PRODUCTS[100], "100a")
    lines = re.findall(r"UTCQMMA .*", sass.disassemble(cubin))
    assert lines and all(line.count("tmem[") == 3 for line in lines)


def test_lora_fits_as_the_choice_says():
    said = host("gemm", 100)
    assert said.count("taken") == 4, "bfloat16 and float16, W along K and along N"
    plan = static_checks.plan_of("lora_gemm_sm100_kernel<bf16, false>")
    for taken, refused, shared, threads in re.findall(
        r"(\d+) taken, (\d+) refused, .* (\d+) bytes of .*, (\d+) threads", said
    ):
        assert int(taken) > 1000 and int(refused) > 1000 and int(shared) <= plan.shared and int(threads) == plan.threads


def test_lora_has_its_products_in_tensor_memory():
    found = kernels(GEMM, 100)
    assert found.keys() == {
        f"lora_gemm_sm100_kernel<{t}, {along}>" for t in ("bf16", "f16") for along in ("false", "true")
    }
    assert all("UTCHMMA" in figures.tensor for figures in found.values())
