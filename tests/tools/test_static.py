# SPDX-License-Identifier: Apache-2.0
"""tools/static_checks.py: what it reads out of the compiler's words, that it can fail, and that its plans are the kernels'."""

import shutil
from dataclasses import replace

import pytest
import torch

import build as emulator
import lrkern.ops
from lrkern import testing
from lrkern.ops.dispatch import use_library
from tools import families, gpu_kernels, gpu_status, sass, sources, static_checks
from tools.families import Plan
from tools.static_checks import Figures, count_sass, faults, occupancy, plan_of, read_ptxas

# ---- recorded: nvcc 13.0 and nvdisasm 13.5

SHRINK = "_ZN3lrk39_GLOBAL__N__5763f17b_7_lora_cu_9685baeb13shrink_kernelINS_4bf16ES2_Li16ELb0EEEvNS_16LoraShrinkParamsENS0_9VectorizeEPf"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SHRINK}' for 'sm_80'
ptxas info    : Function properties for {SHRINK}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 464 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 74.532 ms
ptxas info    : Compiling entry function '_Z13greedy_kernelPKfPfi' for 'sm_80'
ptxas info    : Function properties for _Z13greedy_kernelPKfPfi
    272 bytes stack frame, 536 bytes spill stores, 560 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 272 bytes cumulative stack size, 128 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 37.320 ms
"""
SASS = f"""//--------------------- .text.{SHRINK} --------------------------
	.section	.text.{SHRINK},"ax",@progbits
.text.{SHRINK}:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*02c0*/              @!P0 BRA `(.L_x_1) ;
        /*0420*/                   LDG.E.128 R4, [R2.64] ;
        /*0b30*/               @P1 LDG.E.128 R12, [R12.64] ;
        /*0c00*/                   LDG.E.U16 R13, [R12.64] ;
        /*0d00*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*83f0*/                   HMMA.16816.F32.BF16 R68, R84.reuse, R72, R68 ;
        /*8400*/                   HMMA.16816.F32.BF16 R64, R84.reuse, R74, R64 ;
.text._Z13greedy_kernelPKfPfi:
        /*0230*/                   STL [R1+0x90], R18                                (*"SpillRefill"*);
        /*0240*/                   LDL R18, [R1+0x90]                                (*"SpillRefill"*);
        /*0250*/                   LDG.E R18, [R28.64] ;
        /*0260*/                   FFMA R18, R19, R20, R21 ;
.text._Z12wgmma_kernelIfEvmmPf:
        /*0060*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
"""


def read() -> list[Figures]:
    found = read_ptxas(PTXAS)
    count_sass(SASS, found)
    return list(found.values())


def test_ptxas_and_sass_are_read():
    shrink, greedy = read()
    assert shrink == Figures("shrink_kernel<bf16, bf16, 16, false>", 128, 0, 0, 0, 0, 3, {"HMMA": 2}, 128, 512)
    assert greedy == Figures("greedy_kernel", 32, 128, 536, 272, 2, 0, {}, 64)


def test_a_kernel_that_keeps_to_its_plan_has_no_faults():
    shrink, _ = read()
    assert faults(shrink, Plan(4, 12288, "HMMA", 3), "80") == []
    assert faults(replace(shrink, tensor={"HGMMA": 4}), Plan(4, tensor="HGMMA"), "90a") == []


@pytest.mark.parametrize(
    ("change", "plan", "message"),
    [
        ({"spills": 12}, Plan(1), "12 bytes of spills, 0 accesses to local memory"),
        ({"local": 2}, Plan(1), "0 bytes of spills, 2 accesses to local memory"),
        ({"tensor": {}}, Plan(1, tensor="HMMA"), "no HMMA instruction"),
        ({"tensor": {"HMMA": 8}}, Plan(1, tensor="HGMMA"), "no HGMMA instruction"),
        ({"wide": 2}, Plan(1, wide=3), "2 loads of 128 bits from global memory, planned are 3"),
        ({"stores": 7}, Plan(1, stores=8), "7 stores of 128 bits to global memory, planned are 8"),
        ({"registers": 129}, Plan(4), "3 blocks on an SM, planned are 4; registers are the limit"),
        ({"shared": 30000}, Plan(4, 12288), "3 blocks on an SM, planned are 4; shared memory are the limit"),
        ({}, Plan(1, 164 * 1024), "0 blocks on an SM, planned are 1; shared memory are the limit"),
        ({"flight": 512}, Plan(1, flight=8193), "8192 bytes of loads under way on an SM, planned are 8193"),
        ({"loop": 302}, Plan(1, loop=301), "302 instructions of a trip of its loop, planned are at most 301"),
        ({"code": 1025}, Plan(1, code=1024), "1025 bytes of machine code, planned are at most 1024"),
    ],
)
def test_each_departure_from_the_plan_is_a_fault(change, plan, message):
    shrink, _ = read()
    assert faults(replace(shrink, **change), plan, "80") == [f"{shrink.kernel} on sm_80: {message}"]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [  # CUDA's occupancy calculator
        ("80", 32, 0, 128, 16), ("80", 64, 0, 256, 4), ("80", 255, 0, 128, 2), ("80", 168, 0, 128, 3),
        ("80", 32, 48 * 1024, 128, 3), ("80", 32, 163 * 1024, 128, 1), ("80", 32, 164 * 1024, 128, 0),
        ("89", 32, 0, 128, 12), ("89", 16, 0, 32, 24), ("89", 32, 99 * 1024, 128, 1), ("90a", 32, 100 * 1024, 128, 2),
        ("100a", 16, 0, 32, 32), ("120a", 40, 0, 1024, 1), ("120a", 80, 0, 1024, 0),
    ],
)  # fmt: skip
def test_occupancy(arch, registers, shared, threads, blocks):
    assert occupancy(arch, registers, shared, threads)[0] == blocks


# ---- the plans


def test_every_kernel_has_a_plan():
    assert {k.name for k in gpu_status.kernels()} == set(families.kernels())
    assert plan_of("unheard_of_kernel<float>") is None


TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
def test_plans_name_the_shared_memory_and_threads_of_the_launches(dtype, stack):
    """Over the registry's samples the emulator sees every launch that the plans for a type foresee, and no unplanned one."""
    if why := emulator.why_not():
        pytest.skip(why)
    stack.enter_context(use_library(emulator.ops()))
    emulator.launched()
    for arch in (80, 90):
        with testing.fused(arch == 90), emulator.setting("arch", arch):
            for _, run in gpu_kernels.samples(sources.families(), "cpu", [dtype]):
                run()
    s, b = (
        torch.ones(4, 11, requires_grad=True),
        torch.ones(40, 11),
    )  # few columns, fp32 factors: dS by a pass of its own
    lrkern.ops.linear_expand(torch.ones(4, 8).to(dtype), torch.ones(40, 8).to(dtype), None, s, b).sum().backward()
    launched = emulator.launched()
    for name, kernel in families.kernels().items():
        if not kernel.by_ops:
            continue
        seen = {launch[1:] for launch in launched if launch[0] == name}
        planned = {x: {(p.threads, p.shared) for p in kernel.plans(x)} for x in TYPES.values()}
        of_any_type = set().union(*planned.values())  # y may have another than x
        assert seen <= of_any_type, name
        assert planned[TYPES[dtype]] <= seen or (kernel.part and not seen), (
            name
        )  # a part may serve x of other types alone


# ---- with the compiler

BROKEN = """
__global__ void __launch_bounds__(1024, 2) greedy_kernel(const float* x, float* y, int n) {  // 32 registers
  float acc[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] = acc[i] * acc[(i + 7) % 64] + x[k];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = acc[i];
}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    if not sass.nvdisasm():
        pytest.skip("no nvdisasm (requirements/dev.txt)")
    monkeypatch.setattr(static_checks, "CACHE", tmp_path / "cache")


@pytest.mark.parametrize("arch", static_checks.ARCHS)
def test_a_broken_kernel_is_caught_when_compiled(arch, compiler, tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text(BROKEN)
    for unit in (static_checks.measure(source, arch), static_checks.measure(source, arch)):  # the second from the cache
        (greedy,) = unit.kernels
        assert unit.errors == "" and greedy.registers <= 64 and greedy.local > 0
        text = "\n".join(faults(greedy, Plan(1, tensor="HMMA", wide=1, threads=1024), arch))
        for word in ("bytes of spills", "no HMMA", "0 loads of 128 bits"):
            assert word in text
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1


def test_a_source_that_does_not_compile_is_told(compiler, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { undeclared(); }")
    assert "undeclared" in static_checks.measure(source, "80").errors
