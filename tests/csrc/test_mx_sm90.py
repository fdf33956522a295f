# SPDX-License-Identifier: Apache-2.0
"""MXFP4's kernels of sm_90a as they ship: random problems, and each of their waits left out in turn."""

import re

import pytest

import build as emulator
from tests.csrc.test_emulator import params_program
from tests.csrc.test_gemm_sm90 import CALL as OF_LOOP
from tests.csrc.test_gemm_sm90 import LOOP

KERNELS = {"few": "csrc/cuda/mx/few_sm90.cu", "many": "csrc/cuda/mx/gemm_sm90.cu"}  # by what *_params.cpp calls them


CALL = re.compile(OF_LOOP.pattern.replace("wait_predecessor", "wait_predecessor|cp_async_wait<[^>]+>"))


def of_mx(op, variant, cases, *schedules, **env):
    return emulator.execute(params_program("mx", variant), cases, 7, *schedules, LRK_PARAMS_OP=op, **env)


@pytest.mark.parametrize("op", [*KERNELS, "swizzle"])
@pytest.mark.parametrize(
    ("variant", "cases", "schedules"), [("plain", 60, (0, 1, 7)), ("tracked", 25, (0,)), ("sanitized", 25, (1,))]
)
def test_random_problems(op, variant, cases, schedules):
    done = of_mx(op, variant, cases, *schedules)
    assert done.returncode == 0 and f"{cases} cases, 0 failed" in done.stdout, done.stdout + done.stderr


def waits():
    lines = (emulator.ROOT / LOOP).read_text().splitlines()
    (kept,) = [
        i for i, text in enumerate(lines, 1) if re.search(r"sync_warp\(\);  // where lanes read of the stage", text)
    ]
    yield pytest.param("many", f"{LOOP}:{kept}", id="many-release-sync_warp")
    for op, path in KERNELS.items():
        for number, text in enumerate((emulator.ROOT / path).read_text().splitlines(), 1):
            if call := CALL.search(text.split("//")[0]):
                yield pytest.param(op, f"{path}:{number}", id=f"{op}-{call[1]}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "place"), list(waits()))
def test_every_wait_arrive_and_fence_is_missed(op, place):
    done = of_mx(op, "tracked", 240, 0, LRK_EMU_SKIP=place)
    assert done.returncode == 1 and f"FAIL {op}" in done.stdout
