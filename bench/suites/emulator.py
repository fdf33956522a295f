# SPDX-License-Identifier: Apache-2.0
"""Suite `emulator`: what it costs to run the CUDA kernels on the CPU. Per op the time of all its registry samples, and
above them what a switch between two emulated threads costs."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import suite
import torch
from suite import Call, Case
from torch import Tensor

from lrkern import ops
from lrkern.ops.dispatch import use_library
from lrkern.reference import OPS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "emulator"))
import build


class Data(suite.Data):
    def __init__(self, case: Case, device: str, seed: int):
        self.op = op = OPS[case.method]
        self.samples = list(op.samples(device, case.dtype))
        inputs = {f"{s.name}.{name}": value for s in self.samples for name, value in op.named(s).items()}
        dy = tuple(torch.randn_like(op.truth(*s.args, **s.kwargs)) for s in self.samples) if op.differentiable else None
        for key, t in inputs.items():
            if case.passes != "no_grad" and isinstance(t, Tensor) and key.rpartition(".")[2] in op.differentiable:
                t.requires_grad_()
        super().__init__(inputs, dy)


class Suite(suite.Suite):
    data = Data
    against, cold = None, False
    devices = ("cpu",)

    def __init__(self, names: list[str]):
        super().__init__(names)
        if why := build.why_not():
            raise ValueError(f"nothing can be emulated here: {why}")

    def notes(self) -> Iterable[str]:
        """switch_cost.cu: what a round of each call costs, and the switches between threads in it."""
        build.ops()  # here, so that no case waits for it
        program = build.executable("switch_cost", [build.HERE / "switch_cost.cu"], "plain")
        for line in build.execute(program).stdout.splitlines():
            found = re.match(r"(\w+)\s+([\d.]+) ns per switch\s+([\d.]+) ns per (\w+)", line)
            name, per_switch, per_call, unit = found.groups()
            yield f"{name:10} {1e3 / float(per_switch):7.1f} M thread switches/s {float(per_call):9.1f} ns per {unit}"

    def cases(self, quick: bool) -> list[Case]:
        """Quick ones: every op forward, of the backwards the two shrinks, since a large op's takes a second a call."""
        dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16)
        backwards = ("lora_shrink", "multi_lora_shrink") if quick else OPS
        return [
            Case(method=name, passes=passes, dtype=dtype)
            for name, op in OPS.items()
            if not (quick and op.mutates)  # the twin of one that is there
            for passes in ("no_grad", "fwd+bwd")
            if passes == "no_grad" or (op.differentiable and name in backwards)
            for dtype in dtypes
        ]

    def lrkern(self, d: Data) -> Call:
        op = getattr(ops, d.op.name)
        return Call(lambda: tuple(op(*s.args, **s.kwargs) for s in d.samples), around=lambda: use_library(build.ops()))
