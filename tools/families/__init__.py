# SPDX-License-Identifier: Apache-2.0
"""What the tools know of a family of kernels: families/<family>.py, where torch is imported by the calls alone. It has

KERNELS                             every kernel by the name it is launched under, which is its function's but for _kernel
SHAPES                              the layers that bench/run.py roofline looks at
timed(op, device, dtype, shape)     calls of the ops `op` for a layer, one for each kernel that is no part
TESTS                               test files beside the registry's, and what a rehearsal runs of each
SUITES                              benchmark suites beside the one of its name, where it has some
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from types import ModuleType
from typing import Any

from tools import sources


@dataclass(frozen=True)
class Plan:
    blocks: int  # resident on an SM, at least
    shared: int = 0  # dynamic bytes of a block
    tensor: str = ""  # SASS, all of these: HMMA (mma.sync), HGMMA (wgmma), UTC*MMA (tcgen05), OMMA.SF, QMMA.SF
    wide: int = 0  # 128-bit loads from global memory, at least; they serve aligned shapes
    flight: int = 0  # bytes of loads under way on an SM that is full, at least
    code: int = 32 << 10  # bytes of machine code, at most: what an SM's instruction cache holds
    threads: int = 128
    stores: int = 0  # of 128 bits to global memory, at least
    loop: int = 0  # instructions of a trip of the loop with the tensor instruction, at most; 0: not asked


@dataclass(frozen=True)
class Kernel:
    plan: Callable[..., Plan]  # of its template arguments
    # The first of them: "x" of activations, "f" of factors, x's or fp32; "xf" both, "xw" beside fp32 ones, "x16" of 16 bits; "bf16": of that
    # alone, which is no argument.
    types: str = ""
    rest: Iterable[tuple] = ((),)  # what may follow
    part: bool = False  # launched before or after another kernel, inside its time
    by_ops: bool = True  # launched by them over the emulator; else by an op on one architecture alone
    # Axes of the grid along which an operand of Timed.moved is read again, as its tiles do not lie along them.
    again: dict[str, str] = field(default_factory=dict)

    def plans(self, x: str) -> set[Plan]:
        """Of its instantiations over activations of type x."""
        pairs = {
            "": [()],
            "x": [(x,)],
            "x16": [(x,)] if SIZE[x] == 2 else [],
            "bf16": [()] if x == "bf16" else [],
            "f": [(x,), ("float",)],
            "xf": [(x, x), (x, "float")],
            "xw": [(x, "float")],
        }[self.types]
        return {self.plan(*types, *rest) for types in pairs for rest in self.rest}


@dataclass(frozen=True)
class Mixed(Kernel):
    """Not of all types of activations: `rest` begins with those it has."""

    def plans(self, x: str) -> set[Plan]:
        return {self.plan(*args) for args in self.rest if args[0] == x}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer and its batch, spelled as bench/ spells a case."""

    k: int | None = None  # bases
    A: int | None = None  # adapters
    T: int
    I: int
    O: int
    R: int

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


@dataclass
class Timed:
    """A call that launches one kernel, and its parts."""

    kernel: str
    call: Callable[[], object]
    moved: dict[str, Any]  # tensors, each read or written once
    flop: int
    index: tuple[Any, ...] = ()  # tensors of indices: read, but of no weight
    also: tuple[str, ...] = ()  # kernels with a time of their own that the call launches as well


def load(family: str) -> ModuleType:
    return importlib.import_module(f"tools.families.{family}")


@cache
def kernels() -> dict[str, Kernel]:
    return {name: kernel for family in sources.families() for name, kernel in load(family).KERNELS.items()}


# ---- of tile.cuh, in which every family's products are made

SIZE = {"float": 4, "bf16": 2, "f16": 2}


def tile(rows: int, cols: int, elem: str, terms: int) -> int:
    """Bytes of a Tile: 16 bytes of padding a row, 128-byte pieces."""
    return -(-terms * rows * (cols + 16 // SIZE[elem]) * SIZE[elem] // 128) * 128


def math_of(x: str, f: str) -> tuple[str, int, int, str]:
    """(element, terms of X, terms of F, tensor instruction) as Math."""
    elem = x if f == x else "bf16"
    return elem, 2 if (x, f) == ("f16", "float") else 1, 2 if f != x else 1, "" if x == "float" else "HMMA"


def type_of_s(f: str) -> str:
    """Of S beside factors of type f, as TypeOfS in csrc/lora.h."""
    return "float" if f == "f16" else f


def vectors(rows: int, cols: int, source: str) -> int:
    """128-bit loads with which each of 128 threads fetches its part of a tile."""
    return max(1, rows * cols * SIZE[source] // 16 // 128)


# Of kernels that make products. Their code holds every slow path beside the fast one, and each warp waits for every load
# before it asks for the next: figures of today, to be left behind.
SLOW_PATHS = 128 << 10


def one_by_one(blocks: int, warps: int = 4) -> int:
    """Bytes under way where a warp has one 128-bit load at a time."""
    return blocks * warps * 32 * 16


def streams(blocks: int, **plan: int) -> Callable[..., Plan]:
    """Of a kernel without products, whatever its types."""
    return lambda *_: Plan(blocks, **plan)


def wgrad(x: str, f: str, ranks: int) -> Plan:
    s = type_of_s(f)
    elem, xt, ft, tensor = math_of(x, s)
    cols = 128 if ranks == 16 else 64
    shared = tile(64, ranks, elem, ft) + tile(64, cols, elem, xt)
    return Plan(2, shared, tensor, vectors(64, ranks, s) + vectors(64, cols, x), one_by_one(2), SLOW_PATHS)
