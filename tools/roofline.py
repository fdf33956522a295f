# SPDX-License-Identifier: Apache-2.0
"""What a kernel costs, without a GPU: counts of its very code, and the time that they take at the least.

Traffic comes from the emulator (tests/emulator/traffic.cpp): requests, sectors, what passes L1 and L2, wavefronts of shared
memory, and on which line. Instructions come from the machine code (tools/sass.py): the path past lines that the emulator never
saw touched, its loops as often as the emulator saw their barriers, products or loads. A chip's figures come from tools/chips.py.

A launch takes as long as what it needs most of: DRAM, L2, an SM's load/store unit, its issue slots, its multipliers, or
what a block has to wait for one after the other. Of a kernel that copies boxes (ptx_sm90.cuh) the machine code is not followed, as
its warps do different things: what counts is what it moves and multiplies. What the model cannot see stands in docs/perf.md.
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

HIDDEN = (
    "emulated_ptx.h",
    "emulator.h",
    "launch.cuh",
    "warp_ops.cpp",
    "emulated_ptx_sm90.h",
)  # a line of theirs is the caller's
GLOBAL = ("LDG", "LDGSTS", "ATOMG", "LD")
SHARED_BY_WARPS = ("L1", "tensor cores", "issue slots", "load/store unit", "multipliers")
OTHER = 24  # cycles of what sets a scoreboard and is no access: special registers, conversions


# ---------------------------------------------------------------------------------------------- counts


@dataclass
class Site:
    """Accesses of one place in the code."""

    frames: tuple[Line, ...]  # its own line, and those of the calls around it that were inlined
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


INDEX = "index"  # what names of operands that are indices begin with


def departures(counted: Counted, again: dict[str, str]) -> dict[str, str]:
    """How the traffic of an aligned shape, all of whose blocks ran, is not what it should be, by kind. again: of Kernel.
    Bytes of L2 are held to those that differ times the blocks along the axes that read them again; nothing here is a number
    that a kernel's author chose."""
    streamed = [o for o in counted.operands if not o["name"].startswith(INDEX)]
    sectors, every = (sum(o["sectors"] for o in of) for of in (streamed, counted.operands))
    found = {}
    if (used := sum(o["used"] for o in streamed) / max(sectors, 1)) < 30:
        found["sectors"] = f"{used:.1f} bytes used of a sector"
    if every - sectors > 0.02 * every:
        found["index"] = f"{(every - sectors) / every:.0%} of the sectors are indices"
    if (over := counted.wavefronts_over_ideal or 1.0) > 1.1:
        found["wavefronts"] = f"{over:.2f} times the least wavefronts of shared memory"
    if counted.landed:  # blocks that stay: their grid says nothing of tiles
        return found
    grid = dict(zip("xyz", counted.grid, strict=True))
    formula = sum(o["unique"] * math.prod(grid[axis] for axis in again.get(o["name"], "")) for o in streamed)
    if (l2 := sum(o["l2"] for o in streamed)) > 1.1 * formula:
        found["L2"] = f"{l2 / formula:.2f} times the bytes of L2 that its tiles ask for"
    return found


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
        self.lib.lrk_emulator_set(b"arch", ctypes.c_int64(int(chip.arch.rstrip("a"))))

    @cache  # noqa: B019 (one or two of these live, to the end)
    def function(self, at: int) -> str:
        said = self.ask("-f", [at])
        return sass.plain_names([said[0]])[0]

    def ask(self, how: str, addresses: Iterable[int]) -> list[str]:
        given = "\n".join(hex(a) for a in addresses)
        command = ["addr2line", how, "-e", str(self.path)]
        return subprocess.run(command, input=given, check=True, capture_output=True, text=True).stdout.splitlines()

    def lines(self, addresses: list[int]) -> dict[int, tuple[Line, ...]]:
        """Of the calls that return to these addresses, and of what they were inlined into."""
        found: dict[int, tuple[Line, ...]] = {}
        for row in self.ask("-ai", [a - 1 for a in addresses]):
            if row.startswith("0x"):
                at = int(row, 16) + 1
                found[at] = ()
            else:
                path, _, number = row.split(" ")[0].rpartition(":")
                if Path(path).name not in HIDDEN and number.isdigit():
                    found[at] += ((sass.short(path), int(number)),)
        return found

    def count(self, call: Callable[[], object], operands: dict[str, tuple[int, int]] | None = None) -> list[Counted]:
        """What a call launches. operands: address and bytes of its tensors, by name."""
        self.lib.lrk_traffic_begin()
        for name, (at, size) in (operands or {}).items():
            self.lib.lrk_traffic_operand(name.encode(), at, size)
        call()
        launches = json.loads(self.lib.lrk_traffic_report())
        lines = self.lines(sorted({s["at"] for one in launches for s in one["sites"]}))
        return [
            Counted(
                self.function(one["function"]),
                one,
                [Site(lines[s["at"]], bool(s["shared"]), bool(s["write"]), s["bytes"], s) for s in one["sites"]],
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


def plain(x: Instruction) -> bool:
    return x.name in ("LDG", "STG")


class Places:
    """Where the machine code does what the sites do. g++ and nvcc may each name an inlined access by another of the calls it
    went through, so that lines which one site has in common are one place."""

    def __init__(self, code: sass.Code, counted: Counted):
        known = {wide: {x.line for x in code.instructions if x.bytes and plain(x) == wide} for wide in (True, False)}
        self.of: dict[Line, Line] = {}  # a line, and the one that stands for its place
        for s in counted.sites:
            mine = [line for line in s.frames if line in known[not s.shared]]
            joined = {self.of.get(line, line) for line in mine}
            self.of |= {line: mine[0] for line, at in self.of.items() if at in joined}
            self.of |= dict.fromkeys(mine, mine[0] if mine else None)
        self.bytes: dict[Line | None, float] = defaultdict(float)  # of a lane, in the warp that moves most there
        self.requests: dict[Line | None, float] = defaultdict(float)  # of a warp, of shared memory
        for s in counted.sites:
            if s.shared:
                self.requests[self.place(s)] += s.requests / counted.busy / counted.warps
            else:
                self.bytes[self.place(s)] += s.longest * s.each / counted.busy

    def place(self, at: "Site | Instruction") -> Line | None:
        lines = at.frames if isinstance(at, Site) else (at.line,)
        return next((self.of[line] for line in lines if line in self.of), None)


def path_of(code: sass.Code, counted: Counted, places: Places) -> sass.Path:
    """The path past lines that were never touched, with as many trips as were counted."""
    touched, place = places.bytes, places.place
    cold = lambda x: plain(x) and place(x) is None
    path = sass.hot_path(code, cold if places.of else lambda x: False)
    loops = path.loops()
    made = {  # by a warp: what tells how often a loop's body runs, the surest first
        "BAR": (counted.barriers / counted.busy, lambda x: x.name == "BAR"),
        "mma": (counted.products / counted.busy / counted.warps, lambda x: bool(sass.TENSOR.match(x.op))),
    }
    of = [*path.own(), *(x for each in loops for x in each.own())]

    def tells(x: Instruction) -> bool:
        return plain(x) or any(is_it(x) for _, is_it in made.values())

    def passages(loop: sass.Path) -> float:
        """How often a warp goes through a loop's body."""
        for count, is_it in made.values():
            if any(map(is_it, loop.own())):
                straight = sum(map(is_it, path.own()))
                return (count - straight) / (sum(map(is_it, of)) - straight)
        seen = []
        for at in {place(x) for x in loop.own() if plain(x)}:
            mine = [x for x in loop.own() if plain(x) and place(x) == at]
            here = lambda xs, at=at: sum(x.bytes for x in xs if plain(x) and place(x) == at)
            if all(x.predicate for x in mine):  # some of them, by a count of rows: one at the least
                seen.append((touched[at] / mine[0].bytes, mine[0].bytes))
                continue
            seen.append(((touched[at] - here(path.own())) / (here(of) - here(path.own())), here(loop.own())))
        return max(seen, key=lambda s: s[1])[0] if seen else 1.0

    def settle(within: sass.Path, times: float) -> None:
        for loop in (item for item in within.items if isinstance(item, sass.Path)):
            wanted = max(passages(loop), 0.0)
            if not any(map(tells, loop.own())):  # as often as what is inside asks for, once
                wanted = times
            loop.trips = wanted / max(times, 1e-9)
            settle(loop, max(wanted, 1e-9))

    settle(path, 1.0)
    listed: dict[Line | None, float] = defaultdict(float)
    for at in touched:
        listed[at] = path.count(lambda x, at=at: x.bytes if plain(x) and place(x) == at else 0)

    def share(piece: list[Instruction]) -> float:
        """By the accesses in it: an edge, or a row that is not there, is gone past."""
        sure = [place(x) for x in piece if plain(x) and not x.predicate]
        seen = [touched[at] / listed[at] for at in sure if listed[at]]
        return min([1.0, *seen])

    every = code.instructions
    return path.with_shares(share, {id(every[i]) for i in code.labels.values() if i < len(every)})


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
    sectors: float  # of global memory, that warps ask L1 for
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

    if counted.multiplied and not chip.wgmma:
        raise ValueError(f"{counted.name}: sm_{chip.arch} has no wgmma")
    in_shared = counted.operands_read + counted.landed + counted.stored  # bytes
    if in_shared:
        code = None
    places = Places(code, counted) if code else None
    path = path_of(code, counted, places) if code else None
    pieces = split(path, places) if code else lambda s: 1.0
    sites = [s for s in counted.sites if not s.shared]
    sectors, lines, requests = (
        sum(getattr(s, name) * pieces(s) for s in sites) for name in ("sectors", "lines", "requests")
    )
    through_l1 = lines - sum(s.lines for s in sites if s.box)
    # What is stored in pieces goes to L2 in pieces; what is loaded in pieces finds the first one's sectors in L1.
    l2 = counted.l2 + sum(s.sectors * 32 * (pieces(s) - 1) for s in sites if s.write)
    parts = {
        "DRAM": counted.dram / chip.reached / 1e3,
        "L2": l2 / chip.l2_rate / 1e3,
        "L1": of_sm(through_l1 + counted.total("wavefronts", lambda s: s.shared) + in_shared / chip.shared) / cycles_us,
        "tensor cores": of_sm(counted.products) * 16 * 8 * 16 / chip.tensor / cycles_us,
    }
    if counted.multiplied:
        parts["tensor cores"] += of_sm(counted.multiplied) / chip.wgmma / cycles_us
    if counted.landed:
        parts["L2 into SMs"] = of_sm(counted.landed) / chip.port / cycles_us
    flight = issue = None
    held = min(counted.resident, max(1, math.ceil(counted.busy / chip.sms)))
    if code:
        latency = latencies(counted, chip, places)
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
            "L1": of_sm(lines + shared_wavefronts(counted, path, places)) / cycles_us,
            "multipliers": of_sm(multiplied) * 32 / chip.fp32 / cycles_us,
        }
        # A block's own work hides no wait of its own where barriers hold its warps together; other blocks' work does.
        near = sass.cycles(path, lambda x: 0 if x.name in GLOBAL else latency(x))
        work = max(parts[name] for name in SHARED_BY_WARPS) * cycles_us / on_busiest
        held_together = any(x.name == "BAR" for loop in path.loops() for x in loop.own())
        more = max(0.0, work - near) if held_together else 0.0
        parts["waiting"] = (sass.cycles(path, latency) + more) * rounds / cycles_us
    rate = chip.wgmma if counted.multiplied else chip.tensor
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
        l2_bytes=l2,
        sectors=sectors,
        bytes_per_sector=sum(s.used for s in sites) / sectors if sectors else None,
        sectors_per_request=sectors / requests if requests else None,
        lines_per_request=lines / requests if requests else None,
        wavefronts_over_ideal=counted.wavefronts_over_ideal,
        in_flight_bytes_per_sm=flight,
        issue_slots=issue,
        tensor_slots=counted.products + counted.multiplied / (16 * 8 * 16),
        launches=1,
        predicted_us=parts[bound],
        roof_us=max(least / chip.reached, flop / (2 * rate * chip.sms * chip.clock)) / 1e3,
        bound_by=bound,
        parts=parts,
    )


def split(path: sass.Path, places: Places) -> Callable[[Site], float]:
    """Into how many accesses nvcc has broken one of a site's: vectors that it could not keep whole."""
    each: dict[Line | None, list[float]] = defaultdict(
        lambda: [0.0, 0.0]
    )  # of global memory: accesses, bytes of a lane
    for p in (path, *path.loops()):
        for x in p.own():
            if plain(x):
                of = each[places.place(x)]
                of[0], of[1] = of[0] + 1, of[1] + x.bytes

    def pieces(s: Site) -> float:
        count, size = each[places.place(s)]
        return max(1.0, s.each * count / size) if size else 1.0

    return pieces


def shared_wavefronts(counted: Counted, path: sass.Path, places: Places) -> float:
    """With as many accesses as the machine code has on each line: nvcc may make one of some that lie side by side."""
    listed: dict[Line | None, float] = defaultdict(float)
    for at in places.requests:
        listed[at] = path.count(lambda x, at=at: bool(x.bytes) and not plain(x) and places.place(x) == at)
    total = 0.0
    for s in counted.sites:
        if s.shared:
            of, made = listed[places.place(s)], places.requests[places.place(s)]
            total += s.wavefronts * (min(1.0, of / made) if of else 1.0)
    return total


def added(a: Prediction, b: Prediction) -> Prediction:
    """Two launches of one kernel in a call: sums, and of what is no sum the one of the longer."""
    longer = a if a.predicted_us >= b.predicted_us else b
    names = (
        "dram_bytes",
        "least_bytes",
        "l2_bytes",
        "sectors",
        "issue_slots",
        "tensor_slots",
        "launches",
        "predicted_us",
        "roof_us",
    )
    both = {name: (getattr(a, name) or 0) + (getattr(b, name) or 0) for name in names}
    return replace(longer, **both)


def latencies(counted: Counted, chip: Chip, places: Places) -> Callable[[Instruction], float]:
    """Of a load by the levels that answered at its place."""
    by_place: dict[Line | None, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for s in counted.sites:
        if not s.shared and not s.write:
            at = places.place(s)
            by_place[at] = [a + b for a, b in zip(by_place[at], s.figures["from"], strict=True)]
    levels = [chip.latency[name] for name in ("l1", "l2", "dram")]
    every = [sum(of) for of in zip(*by_place.values(), strict=True)] if by_place else [0.0, 1.0, 0.0]

    def latency(x: Instruction) -> float:
        if x.name in ("LDS", "LDSM"):
            return chip.latency["shared"]
        if x.name not in GLOBAL:
            return OTHER
        seen = by_place.get(places.place(x)) or every
        return sum(a * b for a, b in zip(seen, levels, strict=True)) / (sum(seen) or 1)

    return latency
