# SPDX-License-Identifier: Apache-2.0
"""Device kinds: cpu, cuda (skipped with the reason where there is none) and emulated, the CUDA kernels on the CPU."""

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from recorder import Recorder

import lrkern.ops
from lrkern.ops.dispatch import FAKES, library, use_library

sys.path.append(str(Path(sys.prefix) / "peers"))  # requirements/peers.txt
import build as emulator

FULL = bool(os.environ.get("LRK_TEST_FULL"))


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


@functools.cache
def emulated_ops():
    torch.ops.load_library(str(emulator.extension()))
    for name, fake in FAKES.items():
        torch.library.register_fake(f"lrkern_emulated::{name}", fake)
    return torch.ops.lrkern_emulated


def enter_device(kind, stack):
    """The torch device of the samples. For `emulated` the wrappers call the emulated library's ops on CPU tensors."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not json.loads(lrkern.ops.build_info())["with_cuda"]:
            pytest.skip("this _C.so has no CUDA code")
        stack.enter_context(use_library(Recorder(library(), "cuda")))
        return "cuda"
    if kind == "emulated":
        if why := emulator.why_not():
            pytest.skip(why)
        stack.enter_context(use_library(emulated_ops()))
    return "cpu"


@pytest.fixture
def stack():
    """Contexts that are left at the end of a test."""
    with contextlib.ExitStack() as contexts:
        yield contexts


@pytest.fixture(params=["cpu", "cuda", "emulated"])
def device(request, stack):
    return enter_device(request.param, stack)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A case of a device shows nothing of it where no op of ours was called there."""
    result = yield
    if isinstance(library(), Recorder) and not library().seen:
        pytest.fail(f"no op of lrkern received a {library().kind} tensor", pytrace=False)
    return result


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
