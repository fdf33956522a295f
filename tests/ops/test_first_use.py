# SPDX-License-Identifier: Apache-2.0
"""The first op on a GPU model without a run on record says so, once, and leaves nothing behind on the way to an op."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lrkern.ops
from lrkern.__main__ import collect, heading
from lrkern.ops import first_use
from lrkern.ops.dispatch import Op

WAYS = ("__call__", "eager")
PLAIN = {way: Op.__dict__[way] for way in WAYS}


@pytest.fixture
def gpus(monkeypatch, caplog):
    """Tensors of GPUs by these names, whose ops are watched as in a fresh process."""

    def these(*names, record=(), started=True):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[getattr(i, "index", i)])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(first_use, "GPUS", record)
        monkeypatch.setattr(first_use, "_told", set())
        first_use._gpus.cache_clear()
        first_use._leave()
        first_use.watch(Op, *WAYS)
        return lambda: [r.getMessage() for r in caplog.records if r.name == "lrkern"]

    with FakeTensorMode():
        yield these
    first_use._leave()
    first_use._gpus.cache_clear()


def untouched():
    return all(Op.__dict__[way] is PLAIN[way] for way in WAYS)


def call(device="cuda:0", direct=False):
    make = lambda *shape: torch.empty(*shape, device=device)
    op = torch.ops.lrkern.lora_add if direct else lrkern.ops.lora_add
    return op(make(2, 8), make(2, 4), make(3, 4), make(8, 3), 1.0)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_said_once(gpus, direct, grad):
    said = gpus("NVIDIA L4")
    assert not untouched()
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            call(direct=direct)
    (line,) = said()
    assert (
        "no run on record on NVIDIA L4" in line
        and "`python -m lrkern selftest --quick`" in line
        and "LRKERN_QUIET=1" in line
    )
    assert "\n" not in line and untouched()


def test_each_model_is_said_once(gpus):
    said = gpus("NVIDIA L4", "NVIDIA H200", "NVIDIA L4", record=("NVIDIA H200",))
    call("cuda:2")
    assert len(said()) == 1 and not untouched(), "the other model may come"
    call("cuda:0")
    call("cuda:1")
    assert len(said()) == 1 and untouched()


def test_nothing_is_said_of_a_model_on_record(gpus):
    said = gpus("NVIDIA H200", record=("NVIDIA H200",))
    call()
    assert not said() and untouched()


def test_cpu_calls_say_nothing(gpus):
    said = gpus("NVIDIA L4", started=False)
    call("cpu")
    assert not said() and not untouched()
    said = gpus()
    call("cpu")
    assert not said() and untouched(), "there is no GPU that might come"


def test_a_compiled_call_says_it_by_its_fake_kernel(gpus):
    said = gpus("NVIDIA L4")
    kernel = lrkern.ops.dispatch.FAKES["lora_add"]
    kernel(*(torch.empty(4, 4, device="cuda:0") for _ in range(4)))
    assert len(said()) == 1 and untouched()


def test_what_watches_compiles(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(first_use, "_gpus", lambda: 1)
    first_use.watch(Op, *WAYS)
    try:
        torch._dynamo.reset()
        torch.compile(call, backend="aot_eager", fullgraph=True)("cpu")
        assert not untouched()
    finally:
        first_use._leave()
        torch._dynamo.reset()


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_a_variable_silences_it(gpus, monkeypatch, value):
    monkeypatch.setenv("LRKERN_QUIET", value)
    said = gpus("NVIDIA L4")
    assert untouched() == (value == "1")
    call()
    assert len(said()) == (value != "1")


def test_without_logging_set_up_it_is_one_line_on_stderr():
    code = "from lrkern.ops import first_use; first_use._gpus = lambda: 0; first_use._tell('NVIDIA L4'); first_use._tell('NVIDIA L4')"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1), done.stderr
    assert done.stderr.startswith("lrkern: its CUDA kernels have no run on record on NVIDIA L4")


@pytest.mark.parametrize("known", [False, True])
def test_info_says_whether_the_gpu_is_on_record(known, monkeypatch, capsys):
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(first_use, "GPUS", ("NVIDIA L4",) if known else ())
    heading(collect())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU")]
    assert "1 x NVIDIA L4, 24.0 GiB, compute capability 8.9, driver " in line and "for CUDA 13.0" in line
    end = (
        "a run of this model is on record" if known else "no run of this model is on record: python -m lrkern selftest"
    )
    assert line.endswith(end)
