# SPDX-License-Identifier: Apache-2.0
"""sm_90a's kernels of MXFP4: whatever wait, arrive, fence or copy of theirs is left out, the tracked build misses it."""

import re

import pytest

import build as emulator
from tests.csrc.test_emulator import params_program

CALL = re.compile(
    r"\b(mbarrier_\w+|fence_\w+|sync_\w+|wgmma_\w+(<\d>)?|bulk_(load|store|commit|wait)\w*(<\d>)?|cp_async_wait<[^>]+>|wait_predecessor)\("
)
MAINLOOP = "csrc/cuda/gemm_sm90.cuh"  # of which these are not the pages' alone
SHARED = ("explicit __device__ __forceinline__ Gemm", "void meet", "void fetch", "void bulk_share", "void release")


def lines(path, heads=None):
    """Numbers and texts of a file's lines, or of those of functions whose first line has one of the heads."""
    inside = heads is None
    for number, text in enumerate((emulator.ROOT / path).read_text().splitlines(), 1):
        inside = inside or any(f"{head}(" in text for head in heads)
        if inside:
            yield number, text.split("//")[0]
        inside = inside and (heads is None or text != "  }")


def places():
    files = {p.relative_to(emulator.ROOT): None for p in (emulator.ROOT / "csrc/cuda/mx").glob("*_sm90.cu")}
    for path, heads in {**files, MAINLOOP: SHARED}.items():
        for number, text in lines(path, heads):
            if (found := CALL.search(text)) and "__device__" not in text:
                yield pytest.param(f"{path}:{number}", id=f"{str(path).rpartition('/')[2]}-{found[1]}-{number}")


def test_every_kind_is_among_them():
    kinds = {re.sub(r"<.*", "", p.id.split("-")[1]) for p in places()}
    assert kinds == {
        "mbarrier_init", "fence_mbarrier_init", "mbarrier_arrive_expect", "mbarrier_wait", "mbarrier_arrive_at", "bulk_load",
        "bulk_load_multicast", "bulk_store", "bulk_commit", "bulk_wait_read", "sync_threads", "sync_warp", "sync_named",
        "sync_cluster", "wgmma_fence", "wgmma_commit", "wgmma_wait", "fence_async", "cp_async_wait", "wait_predecessor",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", list(places()))
def test_each_is_missed(place):
    done = emulator.execute(params_program("mx", "tracked"), 120, 5, 0, LRK_EMU_SKIP=place)
    assert done.returncode == 1
    assert "emulator: " in done.stderr or "FAIL" in done.stdout  # of a copy: what it would have moved is not there
