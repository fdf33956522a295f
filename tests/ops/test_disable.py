# SPDX-License-Identifier: Apache-2.0
"""LRKERN_DISABLE: what it names runs as composites, right in values, gradients and refusals, and nothing else does."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_checks import gradients
from recorder import Recorder

import lrkern.ops.disable
from lrkern import __main__ as main
from lrkern.ops.dispatch import OPS as KNOWN
from lrkern.ops.dispatch import use_library
from lrkern.reference import OPS

ROOT = Path(__file__).parents[2]


def python(disable, *command):
    env = os.environ | {"LRKERN_DISABLE": disable, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.stdout or done.stderr


@functools.cache
def found(disable, *how):
    return json.loads(python(disable, "tests/shared/disabled_ops.py", *how))


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("how", ["autocast", "compiled", "refusals", "values"])
def test_all_disabled(op, how):
    assert found("all", "values", "refusals", "compiled", "autocast")[op][how] is None


ROUTES = """
import json, torch, lrkern.ops
parts = [x.name for x in torch._C._jit_get_all_schemas() if x.name.startswith("lrkern::") and x.name != "lrkern::build_info"]
lines = {n: torch._C._dispatch_dump_table(n).splitlines() for n in parts}
of = lambda n, key: next(line for line in lines[n] if line.startswith(key + ":"))
print(json.dumps([lrkern.ops.disabled(), {n.removeprefix("lrkern::"): ["[kernel]" in of(n, key) for key in ("CPU", "CUDA")] for n in parts}]))
"""


@pytest.mark.parametrize("op", ["all", "lora_linear, mora_compress", "mx_linear_expand,scatter_add_"])
def test_what_is_replaced(op):
    """By the dispatcher's own table: the op with its X_fwd and X_bwd, the ops that its gradient is made of, and no other."""
    said, replaced = json.loads(python(op, "-c", ROUTES))
    wanted = list(KNOWN) if op == "all" else [n for n in op.replace(" ", "").split(",") if n]
    wanted = {*wanted, *(g for n in wanted for g in KNOWN[n].gradient)}
    parts = {part for n in wanted for part in (n, KNOWN[n].fwd, KNOWN[n].bwd) if part}
    assert {*said} == wanted
    assert {name for name, (cpu, cuda) in replaced.items() if cpu and cuda} == parts
    assert not any(cpu != cuda for cpu, cuda in replaced.values())


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name)
def test_a_gradient_is_made_of_what_its_op_names(op):
    """Else a disabled op would reach a kernel by another's name."""
    allowed = {part for n in (op.name, *KNOWN[op.name].gradient) for part in (n, n + "_fwd", n + "_bwd")}
    for s in op.samples("cpu", torch.float32):
        recorder = Recorder(torch.ops.lrkern, "cpu")
        with use_library(recorder):
            gradients(op, getattr(lrkern.ops, op.name), s)
        assert {*recorder.calls} <= allowed, s.name


def test_one_op_alone():
    """Values of the disabled one and of one that is not, whose kernel still runs."""
    some = ["gather_matmul", "gather_matmul_", "slice_gather"]
    assert found("gather_matmul", "values", *some) == {name: {"values": None} for name in some}


def test_unknown_names_are_refused():
    for names in ("lora_linear,lora_liner", "lora_linear_bwd", "all,lora_linear"):
        with pytest.raises(
            ValueError, match=r"LRKERN_DISABLE must be all or names of ops, got \w+; ops are basis_fill, "
        ):
            lrkern.ops.disable.disable(names)
    assert lrkern.ops.disabled() == ()
    assert "ValueError: LRKERN_DISABLE must be" in python("lora", "-c", "import lrkern.ops")


def test_info_says_so(capsys):
    said = python("mora_add", "-m", "lrkern")
    assert "LRKERN_DISABLE=mora_add" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  mora_add ")]
    assert line.endswith("(disabled: ATen's calls)")
    main.show(main.collect())
    assert "disabled:" not in capsys.readouterr().out
