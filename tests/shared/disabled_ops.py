# SPDX-License-Identifier: Apache-2.0
"""Started with LRKERN_DISABLE: tries ops of the registry, those that are named or all, and prints what was wrong, as JSON.  how:

values: forward and gradients of the samples against the truth. refusals: bad arguments are refused as by a kernel, and nothing written.
compiled: a graph gives what the op gives, backward too. autocast: the op casts what it casts.
"""

import json
import os
import sys
from pathlib import Path

import torch
from op_checks import check_forward, check_gradient, gradients, is_float, run_op, want_gradients

import lrkern.ops
from lrkern.reference import OPS

sys.path.append(str(Path(__file__).parents[1] / "ops"))
FULL = bool(os.environ.get("LRK_TEST_FULL"))
LOW = torch.bfloat16, torch.float16


def values(op):
    """Where not full, a sample has one of the 16-bit dtypes."""
    for dtype in (torch.float32, *LOW):
        for i, s in enumerate(op.samples("cpu", dtype)):
            if FULL or dtype == torch.float32 or dtype == LOW[i % 2]:
                check_forward(op, s, dtype)
                if op.differentiable:
                    check_gradient(op, s, dtype)


def must_refuse(name, call, text):
    try:
        call()
    except RuntimeError as error:
        assert str(error).startswith(f"lrkern::{name}"), error
    else:
        raise AssertionError(f"accepted: {text}")


def refusals(op):
    """But of strides, at any of which a composite reads and writes."""
    from test_multi_lora import REFUSED, batch_of
    from test_refusals import CASES, good

    for name, change, text in CASES:
        if name == op.name and "one pitch" not in text:
            kwargs = good(name) | change
            before = kwargs["y"].clone() if "y" in kwargs else None
            if not op.mutates:
                want_gradients(op, kwargs)
            must_refuse(f"{name}: ", lambda name=name, kwargs=kwargs: getattr(lrkern.ops, name)(**kwargs), text)
            assert before is None or torch.equal(before, kwargs["y"]), "a refused call must not write"
    if op.name == "multi_lora_linear":  # and of its family
        for _, call, text in REFUSED:
            if "contiguous" not in text:
                must_refuse("multi_lora", lambda call=call: call(batch_of("cpu", torch.float32)), text)


def compiled(op):
    s, fn = op.sample(op.family.direct_sample, "cpu", torch.float32), getattr(lrkern.ops, op.name)
    if op.differentiable:
        torch._dynamo.reset()
        graph = torch.compile(lambda *args, **kwargs: fn(*args, **kwargs), backend="aot_eager", fullgraph=True)
        got, want = gradients(op, graph, s), gradients(op, fn, s)
        for name in want:
            assert torch.equal(got[name], want[name]), name


def autocast(op):
    s, fn = op.sample(op.family.direct_sample, "cpu", torch.float32), getattr(lrkern.ops, op.name)
    cast = [a.half() if n in op.casts and is_float(a) else a for n, a in zip(op.parameters, s.args, strict=False)]
    want = run_op(op, fn, cast, s.kwargs)
    with torch.autocast("cpu", torch.float16):
        got = run_op(op, fn, s.args, s.kwargs)
    for g, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
        assert g is w is None or (g.dtype == w.dtype and torch.equal(g.nan_to_num(7), w.nan_to_num(7)))


def wrong(check, op):
    try:
        check(op)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    checks = [globals()[how] for how in sys.argv[1:] if how not in OPS]
    ops = [name for name in sys.argv[1:] if name in OPS] or OPS
    print(json.dumps({name: {check.__name__: wrong(check, OPS[name]) for check in checks} for name in ops}))
