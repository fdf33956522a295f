# SPDX-License-Identifier: Apache-2.0
"""The mainloop of sm_90a as it ships: random problems in clusters of one and two, and each of its waits left out in turn."""

import re

import pytest

import build as emulator
from tests.csrc.test_emulator import params_program

LOOP = "csrc/cuda/gemm_sm90.cuh"
FAMILIES = ["lora", "multi_lora"]
CALL = re.compile(
    r"\b(mbarrier_\w+|fence_\w+|sync_\w+|wgmma_\w+(<\d>)?|bulk_\w+(<\d>)?|wait_predecessor|fewer_registers<\w+>)\("
)
OURS = ("bulk_share",)  # named like wrappers
PAGES_ALONE = (
    "fetch_pages",
    "add_pages",
    "not_finite_pages",
    "add_to_owners",
    "clear_page",
    "copy_s",
)


def of_gemm(family, variant, cases, *schedules, **env):
    return emulator.execute(params_program(family, variant), cases, 5, *schedules, LRK_PARAMS_OP="gemm", **env)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "cases", "schedules"), [("plain", 60, (0, 1, 7)), ("tracked", 25, (0,)), ("sanitized", 25, (1,))]
)
def test_random_problems(family, variant, cases, schedules):
    done = of_gemm(family, variant, cases, *schedules)
    assert done.returncode == 0 and f"{cases} cases, 0 failed" in done.stdout, done.stdout + done.stderr


def test_words_of_pages_alternate_through_the_tiles():
    """With the same words for each tile a consumer may read one tile's while the other writes the next's, a race in these cases."""
    done = emulator.execute(params_program("multi_lora", "tracked"), 20, 1, 0, LRK_PARAMS_OP="short_gemm")
    assert done.returncode == 0 and "20 cases, 0 failed" in done.stdout, done.stdout + done.stderr


def waits():
    lists = "csrc/cuda/multi_lora/gemm.cu"
    for number, text in enumerate((emulator.ROOT / lists).read_text().splitlines(), 1):
        if "sync_threads()" in text:
            yield pytest.param("multi_lora", f"{lists}:{number}", id=f"multi_lora-lists-sync_threads-{number}")
    """Of the code of the loop, by the function that a line stands in: some serve pages alone."""
    function = ""
    for number, text in enumerate((emulator.ROOT / LOOP).read_text().splitlines(), 1):
        text = text.split("//")[0]
        if head := re.match(r"  (?:static )?__device__ __forceinline__ \S+ (\w+)\(", text):
            function = head[1]
        call = CALL.search(text)
        if not call or call[1] in (head and head[1], *OURS, *(["sync_warp"] if function == "release" else [])):
            continue  # what release keeps together are lanes that read themselves: test_mx_sm90.py
        pages = function in PAGES_ALONE or "Tail::kPages" in text
        for family in FAMILIES[1:] if pages else FAMILIES:
            yield pytest.param(family, f"{LOOP}:{number}", id=f"{family}-{function}-{call[1]}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), list(waits()))
def test_every_wait_arrive_and_fence_is_missed(family, place):
    done = of_gemm(family, "tracked", 120, 0, LRK_EMU_SKIP=place)
    assert done.returncode == 1 and "FAIL gemm" in done.stdout
