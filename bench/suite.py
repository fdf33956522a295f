# SPDX-License-Identifier: Apache-2.0
"""What a suite is. bench/suites/<name>.py defines a class ``Suite`` derived from the one below, with

    cases(quick)               its cases
    data(case, device, seed)   one copy of a case's tensors
    work(case, data)           the least work there is: (flop, bytes); none where no roof makes sense
    <provider>(data) -> Call   a method named by a provider id: how that provider computes the case over that copy, or
                               None where it has no part in the case, or over further copies no more part

The runner does the rest: passes, interleaving, A/A, ceilings, errors, memory, rows.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lrkern import testing

# Ids are fixed for all suites; tables list them in this order. A row "again" is the first one's second run.
PROVIDERS = ("base", "eager", "compile", "peft", "published", "full", "stored", "loop", "gather", "patched", "merged",
             "followed", "vllm",
             "torchao", "bnb", "int4pack", "gnf4", "bf16", "fp32", "copy", "marlin", "humming", "concat", "addmm", "lora", "lrkern",
             "fused")  # fmt: skip
# Other people's code that need not be there: any failure of these lists them as missing, with the reason.
OPTIONAL = ("compile", "published", "vllm", "torchao", "bnb", "int4pack", "gnf4", "marlin", "humming")
SLOW = ("compile",)  # many seconds a case before the first result: not with --quick

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Its text is space-separated key=value in the order of the fields; a suite adds keys in a subclass."""

    method: str | None = None  # or type
    type: str | None = None
    k: int | None = None
    A: int | None = None
    T: int | None = None
    I: int | None = None
    O: int | None = None
    R: int | None = None
    passes: str  # fwd, bwd, fwd+bwd or no_grad: fwd records for backward, bwd leaves the forward untimed
    dtype: torch.dtype

    def __str__(self) -> str:
        keys = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("passes", "dtype")}
        text = [f"{key}={SHORT.get(value, value)}" for key, value in keys.items() if value is not None]
        return " ".join([*text, f"pass={self.passes}"])


@dataclass
class Call:
    """How a provider computes a case over one copy of its tensors."""

    forward: Callable[[], Any]  # the result, or a tuple of results
    alone: "Call | None" = None  # the same with the base GEMM replaced by a stored result
    around: Callable[[], AbstractContextManager] = nullcontext  # forward and its backward run inside
    truth: Callable[..., Tensor] | None = None  # what forward computes, where that is not the data's truth
    exact: bool = True  # whether forward computes a truth at all; another random basis has none
    elements: int | None = None  # it makes
    basis_bytes: int | None = None  # of random bases that stay in memory between calls
    reads: int | None = None  # bytes of the weight as this provider keeps it, once a pass
    beside: "tuple[str, Call] | None" = None  # what its time is set against in pairs of calls, by its name


def by_path(call: Call, fused: bool) -> Call:
    """A call of lrkern with LRKERN_FUSED=all, or without, whatever it was said to be before. A graph keeps what its capture saw."""

    @contextmanager
    def around():
        with call.around(), testing.fused(fused):
            yield

    return replace(call, around=around, alone=call.alone and by_path(call.alone, fused))


@dataclass
class Data:
    """One copy of a case's tensors. Gradients are taken of the inputs that require them."""

    inputs: dict[str, Any]  # x, the parameters and other arguments, by name
    dy: Any = None  # the gradient of the result
    truth: Callable[..., Tensor] | None = None  # the result from float64 inputs; None: no error is measured


class Suite:
    against: str | None = "eager"  # the provider the table's ratios refer to
    device = "cpu"
    headline = "ms"  # the table's first column
    cold = True  # copies of the data rotate over more than the last-level cache
    devices = ("cpu", "cuda")

    def __init__(self, names: list[str]):
        if names:
            raise ValueError(f"suite {self.name()} takes no names, got {' '.join(names)}")

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def providers(cls) -> tuple[str, ...]:
        return tuple(name for name in PROVIDERS if hasattr(cls, name))

    def on(self, device: str) -> "Suite":
        """The suite for a device, of which it may ask something else."""
        self.device = device
        return self

    def work(self, case: Case, data: Data) -> tuple[int, int] | None:
        return None

    def rotation(self, case: Case) -> int:
        """Bytes over which the copies of a case rotate at least, where that is more than the caches ask for."""
        return 0

    def slow(self, case: Case) -> tuple[str, ...]:
        """Providers that are left out with --quick."""
        return SLOW

    def exact(self, case: Case) -> Case:
        """The case without what makes its result random."""
        return case

    def notes(self) -> Iterable[str]:
        """Lines printed before the first case."""
        return ()
