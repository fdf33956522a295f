# SPDX-License-Identifier: Apache-2.0
"""Suite `op`: every op of the registry alone, at the sizes of a large layer.

base      the linear layer, for ops that hold one
eager     the registry's truth in the case's dtype
lrkern    the op
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import suite
import torch
import torch.nn.functional as F
from suite import Call
from torch import Tensor

from lrkern import ops
from lrkern.reference import OPS

# What a new op needs here: the products it consists of, and the shape of each argument that has no default.
PRODUCTS = {
    "lora_shrink": ("TIR",),
    "linear_expand": ("TIO", "TOR"),
    "lora_linear": ("TIO", "TIR", "TOR"),
    "lora_add": ("TIR", "TOR"),
    "lora_expand_": ("TOR",),
    "multi_lora_plan": (),
    "multi_lora_shrink": ("TIR",),
    "multi_lora_embedding": (),
    "multi_lora_expand": ("TOR",),
    "multi_lora_expand_": ("TOR",),
    "multi_lora_linear": ("TIO", "TIR", "TOR"),
    "basis_fill": (),
    "basis_combine": (),
    "basis_dot": (),
    "basis_matmul": ("TIR",),
    "basis_matmul_": ("TIR",),
}
SHAPES = {
    "x": "TI",
    "weight": "OI",
    "bias": "O",
    "y": "TO",
    "a": "RI",
    "b": "OR",
    "s": "TR",
    "a_pool": "PI",
    "b_pool": "PO",
    "coef": "K",
    "g": "RW",
}
BASIS_SHAPES = SHAPES | {"y": "TR"}  # x U^T [T, R]
FACTORS = ("a", "b", "s", "a_pool", "b_pool")  # these may be fp32 over a 16-bit base
FROZEN = ("weight", "bias")
METADATA = ("index", "adapters", "pages", "ranks", "plan", "ids")  # of multi-LoRA: see table()
ADAPTERS = 16  # rows in any order
ONCE = ("y", "bias")  # backward does not read these again


@dataclass(frozen=True, kw_only=True)
class Case(suite.Case):
    ab: torch.dtype | None = None


def pages_of(case: Case) -> int:
    return (case.R + 15) // 16


def table(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Metadata of multi-LoRA: adapters of rank R, one slot, one slice."""
    index = torch.randint(ADAPTERS, (case.T, 1), generator=generator).int()
    pages = torch.randperm(pages_of(case) * ADAPTERS, generator=generator).int().reshape(ADAPTERS, 1, -1)
    ranks = torch.full((ADAPTERS, 1), case.R, dtype=torch.int32)
    return {"index": index, "adapters": ADAPTERS, "pages": pages, "ranks": ranks,
            "plan": ops.multi_lora_plan(index, ADAPTERS), "ids": torch.randint(case.I, (case.T,), generator=generator)}  # fmt: skip


def stream(case: Case) -> dict[str, Any]:
    """What random bases are named by: NOLA's A and B of 64 bases each, or one basis [R, I]."""
    return {"base": None, "row_scale": None, "col_scale": None, "in_scale": None, "out_scale": None, "seed": 7, "method": 2,
            "distribution": 2, "tensor": 0, "first": 0, "q0": 0, "c0": 0, "R": case.R, "Q": case.R, "C": case.I,
            "transposed": True, "widths": [case.I, case.O], "counts": [64, 64], "scales": [0.125, 0.125],
            "like": torch.empty(1, dtype=case.dtype)}  # fmt: skip


def trained(name: str) -> list[str]:
    return [argument for argument in OPS[name].differentiable if argument in SHAPES and argument not in FROZEN]


def compute(name: str, function: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The result, or what a mutating op wrote."""
    out = function(**inputs)
    return inputs[target] if (target := OPS[name].mutates) else out


@dataclass
class Data(suite.Data):
    name: str = ""


class Suite(suite.Suite):
    def __init__(self, names: list[str]):
        if unknown := [name for name in names if name not in OPS]:
            raise ValueError(f"suite op: {', '.join(unknown)} must be in the registry, which has {', '.join(OPS)}")
        self.names = names or list(OPS)

    def cases(self, quick: bool) -> list[Case]:
        f32, bf16 = torch.float32, torch.bfloat16
        kinds = [(512, "no_grad", f32), (512, "fwd+bwd", f32)]
        if not quick:
            kinds += [(512, "no_grad", bf16), (512, "fwd+bwd", bf16), (1, "no_grad", f32)]
        return [
            Case(method=name, T=T, I=2048, O=2048, R=16, ab=f32 if dtype == bf16 else None, passes=passes, dtype=dtype)
            for name in self.names
            for T, passes, dtype in kinds
            if passes == "no_grad" or trained(name)
        ]

    def data(self, case: Case, device: str, seed: int) -> Data:
        name, generator = case.method, torch.Generator().manual_seed(seed)
        op = OPS[name]
        inputs: dict[str, Any] = {}
        metadata = table(case, generator) if "multi_lora" in name else stream(case) if "basis" in name else {}
        shapes = BASIS_SHAPES if "basis" in name else SHAPES
        for argument, parameter in inspect.signature(op.truth).parameters.items():
            if parameter.default is not parameter.empty:
                continue
            if argument in metadata:
                value = metadata[argument]
                inputs[argument] = value.to(device) if isinstance(value, Tensor) else value
                continue
            sizes = {"P": 16 * pages_of(case) * ADAPTERS, "K": 128, "W": case.I + case.O}
            shape = [sizes[letter] if letter in sizes else getattr(case, letter) for letter in shapes[argument]]
            if argument == "s" and metadata:
                shape[1:] = [1, 1, 16 * pages_of(case)]
            std = shape[-1] ** -0.5 if argument in ("weight", "a", "b", "a_pool") else 1.0
            dtype = (
                torch.float32
                if argument in ("coef", "g")
                else case.ab
                if case.ab and argument in FACTORS
                else case.dtype
            )
            inputs[argument] = (torch.randn(shape, generator=generator) * std).to(device, dtype)
        with torch.no_grad():
            out = None if op.mutates else op.truth(**inputs)
            dy = torch.randn_like(out) if out is not None and out.is_floating_point() else None
        for argument in trained(name) if case.passes != "no_grad" else ():
            inputs[argument].requires_grad_()
        truth = None if name == "multi_lora_plan" else lambda **wide: compute(name, op.truth, wide)
        return Data(inputs, dy, truth, name)

    def work(self, case: Case, data: Data) -> tuple[int, int]:
        """A product once forward, and backward once for each operand that takes a gradient; W takes none."""
        train = case.passes != "no_grad"
        flop = 0
        for product in PRODUCTS[case.method]:
            each = 2 * math.prod(getattr(case, letter) for letter in product)
            flop += each if not train else 2 * each if product == "TIO" else 3 * each
        size = {name: t.nbytes for name, t in data.inputs.items() if isinstance(t, Tensor)}
        result = size.get("y", size.get("index")) if data.dy is None else data.dy.nbytes
        moved = sum(size.values()) + result
        if train:
            again = [name for name in size if name not in ONCE]
            moved += result + sum(size[name] * (1 + data.inputs[name].requires_grad) for name in again)
        return flop, moved

    def base(self, d: Data) -> Call | None:
        linear = lambda x, weight, bias, **_: F.linear(x, weight, bias)
        return Call(lambda: linear(**d.inputs), truth=linear) if "weight" in d.inputs else None

    def eager(self, d: Data) -> Call:
        return Call(lambda: compute(d.name, OPS[d.name].truth, d.inputs))

    def lrkern(self, d: Data) -> Call:
        return Call(lambda: compute(d.name, getattr(ops, d.name), d.inputs))
