# SPDX-License-Identifier: Apache-2.0
"""Device kinds: cpu, cuda (skipped with the reason where there is none) and emulated, the CUDA kernels on the CPU."""

import contextlib
import fcntl
import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from recorder import Recorder

import lrkern.ops
from lrkern.ops.dispatch import FAKES, library, use_library

sys.path.append(str(Path(sys.prefix) / "peers"))  # requirements/peers.txt
import build as emulator

FULL = bool(os.environ.get("LRK_TEST_FULL"))
CPUINFO = Path("/proc/cpuinfo")
AMX = (
    CPUINFO.exists() and " amx_bf16" in CPUINFO.read_text()
)  # ATen's and bitsandbytes' bf16 products round and flush otherwise

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # several pytest workers share the cores, and most tensors here are tiny


@functools.cache
def no_cuda() -> str:
    """Why no test runs on a CUDA device, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if json.loads(lrkern.ops.build_info())["with_cuda"] else "this _C.so has no CUDA code"


def of_a_variant(item, params: dict) -> bool:
    """Some two dozen methods, each in hundreds of tests: quick runs hold each to its formula, and no more."""
    kind = params.get("cls")
    return item.path.parent.name in ("variants", "model", "optim", "compress") or ".variants." in getattr(
        kind, "__module__", ""
    )


def needs_a_gpu(item) -> bool:
    """One that is here only to be skipped."""
    skips = [m.kwargs.get("reason") for m in item.iter_markers("skipif") if m.args == (True,)]
    return bool(no_cuda()) and no_cuda() in (*skips, *(m.kwargs.get("reason") for m in item.iter_markers("skip")))


def pytest_collection_modifyitems(config, items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("device") == "cuda" and no_cuda():
            item.add_marker(pytest.mark.skip(reason=no_cuda()))
        if params.get("device") == "emulated" and params.get("dtype") not in (None, torch.bfloat16):
            item.add_marker(pytest.mark.slow)
        if of_a_variant(item, params) and not item.name.startswith("test_values_and_gradients[float32"):
            item.add_marker(pytest.mark.slow)
    if not FULL:  # schedules and their bits are the params programs' matter, which run every launcher
        again = [item for item in items if getattr(item, "originalname", "") == "test_two_runs_are_bit_equal"]
        left_out = {item for item in again if item.callspec.params["device"] == "emulated"}
        left_out |= {item for item in items if needs_a_gpu(item)}  # half of all: to report each takes minutes
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=[*left_out])
    if hasattr(config, "workerinput"):
        # Each of two workers is given one half and steals from the other's end: long tests first, some for each.
        slow = [item for item in items if item.get_closest_marker("slow")]
        rest = [item for item in items if not item.get_closest_marker("slow")]
        items[:] = slow[::2] + rest[: len(rest) // 2] + slow[1::2] + rest[len(rest) // 2 :]


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
        if why := no_cuda():
            pytest.skip(why)
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


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """two_processes.run, once for all pytest workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    @functools.cache
    def results(workers: str) -> dict[str, str | None]:
        with open(folder / f"{workers}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / f"{workers}.json"
            if not done.exists():
                done.write_text(json.dumps(two_processes.run(workers, tmp_path_factory.mktemp("gloo"))))
            return json.loads(done.read_text())

    return results
