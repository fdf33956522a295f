# SPDX-License-Identifier: Apache-2.0
"""What a kernel costs, without a GPU: counts of its very code, and the time that they take at the least.

Traffic comes from the emulator (tests/emulator/traffic.cpp): requests, sectors, what passes L1 and L2, wavefronts of shared
memory, and on which line. Instructions come from the machine code (tools/sass.py): the path past lines that the emulator never
saw touched, its loops as often as the emulator saw their loads or products. A chip's figures come from tools/chips.py.

A launch takes as long as what it needs most of: DRAM, L2, an SM's load/store unit, its issue slots, its multipliers, or
what a block has to wait for one after the other. What the model cannot see stands in docs/perf.md.
"""

import ctypes
import json
import math
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

from tools import sass, static_checks
from tools.chips import Chip
from tools.sass import Instruction, Line

HIDDEN = ("emulated_ptx.h", "emulator.h", "launch.cuh", "warp_ops.cpp")  # a line of theirs is the caller's
OTHER = 24  # cycles of what sets a scoreboard and is no access: special registers, conversions


# ---------------------------------------------------------------------------------------------- counts


@dataclass
class Site:
    """A line's accesses of one kind."""

    line: Line
    shared: bool
    write: bool
    each: int  # bytes of a lane
    figures: dict

    def __getattr__(self, name: str):
        return self.__dict__["figures"][name]


@dataclass
class Counted:
    """One launch, summed over its whole grid."""

    kernel: str  # its instance: name<template arguments>
    figures: dict
    sites: list[Site]

    def __getattr__(self, name: str):
        return self.__dict__["figures"][name]

    @property
    def name(self) -> str:
        return self.figures["kernel"]

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)

    @cached_property
    def busy(self) -> float:
        """Blocks, in terms of the busiest: some return at once."""
        most = max((n for _, n in self.per_block), default=0)
        return sum(weight * n for weight, n in self.per_block) / most if most else self.blocks

    def total(self, value: str, keep: Callable[[Site], bool] = lambda s: True) -> float:
        return sum(s.figures[value] for s in self.sites if keep(s))

    @property
    def bytes_per_sector(self) -> float | None:
        sectors = self.total("sectors", lambda s: not s.shared)
        return self.total("used", lambda s: not s.shared) / sectors if sectors else None

    @property
    def wavefronts_over_ideal(self) -> float | None:
        ideal = self.total("ideal", lambda s: s.shared)
        return self.total("wavefronts", lambda s: s.shared) / ideal if ideal else None


class Counter:
    """A library built with tests/emulator/traffic.cpp."""

    def __init__(self, path: Path, chip: Chip, resident: Callable[[str, int, int], int]):
        self.path, self.lib = path, ctypes.CDLL(str(path))
        self.lib.lrk_traffic_report.restype = ctypes.c_char_p
        self.lib.lrk_traffic_operand.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        self.callback = kind(lambda at, threads, shared: resident(self.function(at), threads, shared))
        numbers = (ctypes.c_int64(n) for n in (chip.sms, chip.l1, chip.l2))
        self.lib.lrk_traffic_chip(*numbers, self.callback)

    @cache  # noqa: B019 (one or two of these live, to the end)
    def function(self, at: int) -> str:
        said = self.ask("-f", [at])
        return sass.plain_names([said[0]])[0]

    def ask(self, how: str, addresses: Iterable[int]) -> list[str]:
        given = "\n".join(hex(a) for a in addresses)
        command = ["addr2line", *([how] if how else []), "-e", str(self.path)]
        return subprocess.run(command, input=given, check=True, capture_output=True, text=True).stdout.splitlines()

    def lines(self, addresses: list[int]) -> dict[int, Line]:
        """Of the calls that return to these addresses."""
        found: dict[int, Line] = {}
        at = None
        for row in self.ask("-ai", [a - 1 for a in addresses]):
            if row.startswith("0x"):
                at = int(row, 16) + 1
            elif at not in found:
                path, _, number = row.split(" ")[0].rpartition(":")
                if Path(path).name not in HIDDEN:
                    found[at] = sass.short(path), int(number) if number.isdigit() else 0
        return found

    def count(self, call: Callable[[], object], operands: dict[str, tuple[int, int]] | None = None) -> list[Counted]:
        """What a call launches. operands: address and bytes of its tensors, by name."""
        self.lib.lrk_traffic_begin()
        for name, (at, size) in (operands or {}).items():
            self.lib.lrk_traffic_operand(name.encode(), at, size)
        call()
        launches = json.loads(self.lib.lrk_traffic_report())
        lines = self.lines(sorted({s["at"] for one in launches for s in one["sites"]}))
        known = lambda s: lines.get(s["at"], ("?", 0))
        return [
            Counted(
                self.function(one["function"]),
                one,
                [Site(known(s), bool(s["shared"]), bool(s["write"]), s["bytes"], s) for s in one["sites"]],
            )
            for one in launches
        ]


# ---------------------------------------------------------------------------------------------- machine code


class Machine:
    """The kernels of some sources, compiled for a chip; without nvcc there is none, and why says so."""

    def __init__(self, chip: Chip, compiled: Iterable[Path]):
        self.chip, self.why, self.units = chip, "", {}
        if shutil.which("nvcc") is None:
            self.why = "nvcc is not on PATH"
        elif not sass.nvdisasm():
            self.why = "nvdisasm is missing (requirements/dev.txt brings it)"
        self.units = {} if self.why else {p: static_checks.measure(p, chip.arch) for p in compiled}
        for unit in self.units.values():
            if unit.errors:
                raise RuntimeError(f"{unit.source} does not compile for sm_{unit.arch}\n{unit.errors}")
        self.figures = {f.kernel: f for unit in self.units.values() for f in unit.kernels}

    def resident(self, kernel: str, threads: int, shared: int) -> int:
        """Blocks on an SM; by the kernel's plan where nothing is compiled."""
        if figures := self.figures.get(kernel):
            return static_checks.occupancy(self.chip.arch, figures.registers, figures.shared + shared, threads)[0]
        plan = static_checks.plan_of(kernel)
        return plan.blocks if plan else 1

    @cache  # noqa: B019
    def listed(self, source: Path) -> dict[str, sass.Code]:
        cubin, *_ = static_checks.compiled(source, self.chip.arch)
        codes = sass.parse(sass.disassemble(cubin))
        return dict(zip(sass.plain_names(list(codes)), codes.values(), strict=True))

    def code(self, kernel: str) -> sass.Code | None:
        for source, unit in self.units.items():
            if any(f.kernel == kernel for f in unit.kernels):
                return self.listed(source)[kernel]
        return None


def bytes_of_lane(counted: Counted) -> dict[Line, float]:
    """That a lane moves on each line, in the warp of a busy block that moves most there."""
    found: dict[Line, float] = defaultdict(float)
    for s in counted.sites:
        if not s.shared:
            found[s.line] += s.longest * s.each / counted.busy
    return found


def path_of(code: sass.Code, counted: Counted) -> sass.Path:
    """The path past lines that were never touched, with as many trips as were counted."""
    touched = bytes_of_lane(counted)
    plain = lambda x: x.name in ("LDG", "STG")
    listed = {x.line for x in code.instructions if plain(x)}
    cold = lambda x: plain(x) and x.line not in touched
    path = sass.hot_path(code, cold if listed & touched.keys() else lambda x: False)
    loops = path.loops()
    products = counted.products / counted.busy / counted.warps
    tensor = lambda x: bool(sass.TENSOR.match(x.op))

    def passages(loop: sass.Path) -> float:
        """How often a warp goes through a loop's body."""
        of = [*path.own(), *(x for each in loops for x in each.own())]
        if any(map(tensor, loop.own())):
            straight = sum(map(tensor, path.own()))
            return (products - straight) / (sum(map(tensor, of)) - straight)
        seen = []
        for line in {x.line for x in loop.own() if plain(x)}:
            before = sum(x.bytes for x in path.own() if plain(x) and x.line == line)
            inside = sum(x.bytes for x in of if plain(x) and x.line == line) - before
            seen.append(((touched[line] - before) / inside, sum(x.bytes for x in loop.own() if x.line == line)))
        return max(seen, key=lambda s: s[1])[0] if seen else 1.0

    def settle(within: sass.Path, times: float) -> None:
        for loop in (item for item in within.items if isinstance(item, sass.Path)):
            wanted = max(passages(loop), 0.0)
            if not any(plain(x) or tensor(x) for x in loop.own()):  # as often as what is inside asks for, once
                wanted = times
            loop.trips = wanted / max(times, 1e-9)
            settle(loop, max(wanted, 1e-9))

    settle(path, 1.0)
    listed: dict[Line | None, float] = defaultdict(float)
    for line in touched:
        listed[line] = path.count(lambda x, line=line: x.bytes if plain(x) and x.line == line else 0)

    def share(piece: list[Instruction]) -> float:
        """By the accesses in it: an edge, or a row that is not there, is gone past."""
        seen = [touched[x.line] / listed[x.line] for x in piece if plain(x) and listed[x.line]]
        return min(1.0, *seen) if seen else 1.0

    at = code.instructions
    return path.with_shares(share, {id(at[i]) for i in code.labels.values() if i < len(at)})


# ---------------------------------------------------------------------------------------------- time


@dataclass
class Prediction:
    """Columns of one kernel of one call."""

    kernel: str
    grid: list[int]
    blocks_per_sm: int
    waves: float
    sms: float  # share of them that has a block
    sample: str
    dram_bytes: float
    least_bytes: float
    l2_bytes: float
    bytes_per_sector: float | None
    sectors_per_request: float | None
    lines_per_request: float | None
    wavefronts_over_ideal: float | None
    in_flight_bytes_per_sm: float | None
    issue_slots: float | None
    tensor_slots: float
    launches: int
    predicted_us: float
    roof_us: float
    bound_by: str
    parts: dict[str, float] = field(default_factory=dict)  # microseconds, each by itself


def predict(counted: Counted, chip: Chip, code: sass.Code | None, least: float, flop: float) -> Prediction:
    cycles_us = chip.clock * 1e3
    slots = chip.sms * counted.resident
    waves = counted.busy / slots
    share = min(1.0, counted.busy / chip.sms)
    rounds = math.ceil(waves - 1e-6) if waves <= 2 else waves  # of blocks in one place
    on_busiest = math.ceil(counted.busy / chip.sms - 1e-6) if waves <= 2 else counted.busy / chip.sms
    a_block = lambda total: total / counted.busy  # of the busiest kind
    of_sm = lambda total: a_block(total) * on_busiest  # of the busiest SM

    reads = [s for s in counted.sites if not s.shared]
    lines = sum(s.lines for s in reads)
    requests = sum(s.requests for s in reads)
    wavefronts = counted.total("wavefronts", lambda s: s.shared)
    parts = {
        "DRAM": counted.dram / chip.reached / 1e3,
        "L2": counted.l2 / chip.l2_rate / 1e3,
        "L1": of_sm(lines + wavefronts) / cycles_us,
        "tensor cores": of_sm(counted.products) * 16 * 8 * 16 / chip.tensor / cycles_us,
    }
    flight = issue = None
    held = min(counted.resident, max(1, math.ceil(counted.busy / chip.sms)))
    if code:
        path = path_of(code, counted)
        latency = latencies(counted, chip)
        issue = path.count(lambda x: 1) * counted.busy * counted.warps
        accesses = path.count(lambda x: x.bytes > 0) * counted.busy * counted.warps
        multiplied = path.count(lambda x: x.name in sass.FMA) * counted.busy * counted.warps
        loads = {i for i in sass.feeding(path)}
        copies = counted.copies / counted.waits * counted.threads if counted.waits else 0.0  # of a block
        plain = {id(x) for p in (path, *path.loops()) for x in p.own() if x.name == "LDG"} & loads
        flight = (sass.in_flight(path, plain) * counted.warps + copies) * held
        parts |= {
            "issue slots": of_sm(issue) / 4 / cycles_us,
            "load/store unit": of_sm(accesses) * 32 / chip.lanes / cycles_us,
            "multipliers": of_sm(multiplied) * 32 / chip.fp32 / cycles_us,
            "waiting": sass.cycles(path, latency) * rounds / cycles_us,
        }
    bound = max(parts, key=lambda k: parts[k])
    run = "all" if counted.run == counted.blocks else f"{counted.run} of {counted.blocks} blocks"
    return Prediction(
        kernel=counted.name,
        grid=counted.grid,
        blocks_per_sm=counted.resident,
        waves=counted.blocks / slots,
        sms=share,
        sample=run,
        dram_bytes=counted.dram,
        least_bytes=least,
        l2_bytes=counted.l2,
        bytes_per_sector=counted.bytes_per_sector,
        sectors_per_request=sum(s.sectors for s in reads) / requests if requests else None,
        lines_per_request=lines / requests if requests else None,
        wavefronts_over_ideal=counted.wavefronts_over_ideal,
        in_flight_bytes_per_sm=flight,
        issue_slots=issue,
        tensor_slots=counted.products,
        launches=1,
        predicted_us=parts[bound],
        roof_us=max(least / chip.reached, flop / (2e-9 * chip.tensor * chip.sms * chip.clock * 1e9)) / 1e3,
        bound_by=bound,
        parts=parts,
    )


def added(a: Prediction, b: Prediction) -> Prediction:
    """Two launches of one kernel in a call: sums, and of what is no sum the one of the longer."""
    longer = a if a.predicted_us >= b.predicted_us else b
    names = (
        "dram_bytes",
        "least_bytes",
        "l2_bytes",
        "issue_slots",
        "tensor_slots",
        "launches",
        "predicted_us",
        "roof_us",
    )
    both = {name: (getattr(a, name) or 0) + (getattr(b, name) or 0) for name in names}
    return replace(longer, **both)


def latencies(counted: Counted, chip: Chip) -> Callable[[Instruction], float]:
    """Of a load by the levels that answered on its line."""
    by_line: dict[Line, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for s in counted.sites:
        if not s.shared and not s.write:
            by_line[s.line] = [a + b for a, b in zip(by_line[s.line], s.figures["from"], strict=True)]
    levels = [chip.latency[name] for name in ("l1", "l2", "dram")]
    every = [sum(of) for of in zip(*by_line.values(), strict=True)] if by_line else [0.0, 1.0, 0.0]

    def latency(x: Instruction) -> float:
        if x.name in ("LDS", "LDSM"):
            return chip.latency["shared"]
        if x.name not in ("LDG", "LDGSTS", "ATOMG", "LD"):
            return OTHER
        seen = by_line.get(x.line) or every
        return sum(a * b for a, b in zip(seen, levels, strict=True)) / (sum(seen) or 1)

    return latency
