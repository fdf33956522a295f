# SPDX-License-Identifier: Apache-2.0
"""Machine code of NVIDIA GPUs as nvdisasm lists it: instructions with their scoreboards, the path that a kernel takes
through its loops, and how a warp walks it.

An instruction's control word (bits 105-125 of its 128) says how many cycles pass before the next one may issue, which of
six scoreboards is set until its result is there, and which scoreboards it waits for. Loads have no other way to be waited
for, so these bits say how many of them are under way together, whatever the source looks like.
"""

import importlib.util
import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path as File

Line = tuple[str, int]  # the end of a source's path (two parts), and a number


@dataclass(slots=True)
class Instruction:
    op: str  # with its modifiers: LDG.E.128
    text: str  # op and operands
    predicate: str  # "@!P0", or ""
    stall: int  # cycles before the next one issues
    sets: int  # the scoreboard that its result clears, 7 for none
    frees: int  # the one that clears when its operands have been read, 7 for none
    waits: int  # mask of scoreboards
    line: Line | None  # the innermost one that is no wrapper's
    target: str = ""  # of a branch; "" too where it lies outside
    share: float = 1.0  # of the passages of its path in which it runs

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def multiplies(self) -> bool:
        return self.name in FMA and not MOVE.match(self.text)

    @property
    def bytes(self) -> int:
        """Of one lane, moved from or to memory; 0 for what moves none."""
        if self.name not in MEMORY:
            return 0
        if self.name == "LDSM":
            return 4 * int(self.op.rpartition(".")[2]) if self.op[-1] in "24" else 4
        words = self.op.split(".")
        return next((size for word, size in SIZES.items() if word in words), 4)


MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "LD", "ST", "ATOMG", "RED")
SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
TENSOR = re.compile(r"(?:[HIQO]G?MMA(?:\.SF)?|DMMA|UTC[A-Z]*MMA)\b")  # .SF: by scales of blocks
FMA = ("FFMA", "FMUL", "FADD", "HFMA2", "DFMA")
MOVE = re.compile(r"HFMA2\S* R\d+, -?RZ, -?RZ, ")  # how nvcc sets a register to a constant in the multipliers' pipe
WRAPPERS = "cuda/ptx.cuh"  # its lines are the caller's
LISTED = re.compile(r"(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<text>(?P<op>[A-Z][A-Za-z0-9_.]*).*)")


@cache
def nvdisasm() -> str:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(File(place).glob("cu*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm") or ""


def disassemble(cubin: str | File) -> str:
    command = [nvdisasm(), "-hex", "-c", "-gi", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain_names(mangled: list[str]) -> list[str]:
    """`name<template arguments>` of each mangled name, without namespaces, return type and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    bare = re.sub(r"(?m)\(anonymous namespace\)::|\b\w+::|^void ", "", said)
    return re.findall(r"(?m)^\w+(?:<.*?>(?=\())?", bare)


def short(path: str) -> str:
    return "/".join(File(path).parts[-2:])


@dataclass
class Code:
    """One kernel's instructions, in the order they lie in memory."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction behind each


def parse(text: str, wanted: Callable[[str], bool] = lambda mangled: True) -> dict[str, Code]:
    """By mangled name, what `nvdisasm -hex -c -gi` lists."""
    found: dict[str, Code] = {}
    code, line, listing = None, None, False
    for row in text.splitlines():
        if row.startswith(".text."):
            name = row[6:].rstrip(":")
            code, line = (found.setdefault(name, Code()) if wanted(name) else None), None
        elif code is None:
            continue
        elif (row := row.strip()).startswith("/* 0x"):  # the upper half of the one before
            control, last = int(row[3:21], 16) >> 41, code.instructions[-1]
            last.stall, last.sets, last.frees = control & 15, control >> 5 & 7, control >> 8 & 7
            last.waits = control >> 11 & 63
        elif row.startswith("/*") and (m := LISTED.match(row[row.index("*/") + 2 : row.find(";")].strip())):
            target = re.search(r"`\((\.L\w+)\)", m["text"]) if m["op"].startswith("BRA") else None
            code.instructions.append(
                Instruction(m["op"], m["text"], m["predicate"] or "", 1, 7, 7, 0, line, target[1] if target else "")
            )
        elif m := re.match(r"(\.L\w+):", row):
            code.labels[m[1]] = len(code.instructions)
        elif (m := re.match(r'//## File "([^"]+)", line (\d+)', row)) and not (listing and line[0] != WRAPPERS):
            line = short(m[1]), int(m[2])
        listing = row.startswith("//## File")
    return found


# ---------------------------------------------------------------------------------------------- the path taken


@dataclass
class Path:
    """What a warp executes, in order: instructions, and loops that have a path of their own."""

    items: list["Instruction | Path"]
    trips: float = 1.0  # of a loop

    def own(self) -> list[Instruction]:
        return [item for item in self.items if isinstance(item, Instruction)]

    def loops(self) -> list["Path"]:
        """All of them, the inner ones first."""
        mine = [item for item in self.items if isinstance(item, Path)]
        return [inner for loop in mine for inner in (*loop.loops(), loop)]

    def with_shares(self, share: Callable[[list[Instruction]], float], starts: Collection[int]) -> "Path":
        """The same, with a share for each piece without a branch. starts: ids of instructions that labels stand before."""
        items: list[Instruction | Path] = []
        piece: list[Instruction] = []

        def close() -> None:
            of = share(piece)
            items.extend(replace(x, share=of) for x in piece)
            piece.clear()

        for item in self.items:
            if isinstance(item, Path) or id(item) in starts:
                close()
            if isinstance(item, Path):
                items.append(item.with_shares(share, starts))
                continue
            piece.append(item)
            if item.target:
                close()
        close()
        return Path(items, self.trips)

    def count(self, value: Callable[[Instruction], float]) -> float:
        """The sum of value over what is executed."""
        return sum(
            value(item) * item.share if isinstance(item, Instruction) else item.trips * item.count(value)
            for item in self.items
        )


Score = tuple[float, int, int]  # bytes and products, plain multiply-adds, instructions not executed


def hot_path(code: Code, cold: Callable[[Instruction], bool] = lambda i: False) -> Path:
    """The way through a kernel that moves most bytes and multiplies most, and of such the shortest: where a vector may be
    loaded in one access or element by element it is the one access, and what makes a dropout mask or walks an edge is left
    out. `cold`: an
    instruction that is known not to run, so that no path leads through it, or past it where it is predicated. A branch is taken
    for one of all lanes."""
    graph = Graph(code)
    return graph.path(graph.blocks, 0, cold)


class Graph:
    """Basic blocks, and the loops that dominators tell."""

    def __init__(self, code: Code):
        self.code, at = code, code.instructions
        ends = {i + 1 for i, x in enumerate(at) if x.target or x.name in ("EXIT", "RET", "BRX", "JMX")}
        starts = sorted({0, *ends, *(code.labels[x.target] for x in at if x.target in code.labels)} - {len(at)})
        self.range = dict(zip(starts, [*starts[1:], len(at)], strict=True))
        self.next = {block: self.follow(block) for block in starts}
        self.blocks = self.reachable()
        self.before = {b: [a for a in self.blocks if b in self.next[a]] for b in self.blocks}
        self.body: dict[int, set[int]] = defaultdict(set)  # of each loop, by its first block
        over = self.dominators()
        for a in self.blocks:
            for b in self.next[a]:
                if b in over[a]:
                    self.body[b] |= self.reaching(a, b)

    def follow(self, block: int) -> list[int]:
        end = self.range[block]
        last = self.code.instructions[end - 1]
        found = [self.code.labels[last.target]] if last.target in self.code.labels and last.name == "BRA" else []
        leaves = last.name in ("EXIT", "RET", "BRX", "JMX", "BRA") and not last.predicate and ".DIV" not in last.op
        leaves = leaves and not re.match(r"BRA\S* !?U?P\d", last.text)  # BRA P5, ...: a condition too
        return found + ([end] if not leaves and end in self.range else [])

    def reachable(self) -> list[int]:
        """In reverse postorder."""
        order, seen, stack = [], {0}, [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            for b in rest:
                if b not in seen:
                    seen.add(b)
                    stack.append((b, iter(self.next[b])))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    def dominators(self) -> dict[int, set[int]]:
        every = set(self.blocks)
        over = {b: {0} if b == 0 else every for b in self.blocks}
        changed = True
        while changed:
            changed = False
            for b in self.blocks[1:]:
                now = set.intersection(*(over[a] for a in self.before[b])) | {b}
                changed, over[b] = changed or now != over[b], now
        return over

    def reaching(self, last: int, first: int) -> set[int]:
        body, new = {first}, [last]
        while new:
            if (b := new.pop()) not in body:
                body.add(b)
                new += self.before[b]
        return body

    def path(self, blocks: Collection[int], first: int, cold: Callable[[Instruction], bool], inside: int = -1) -> Path:
        """From `first` to where a loop begins again (inside: its first block) or the kernel ends."""
        heads = [h for h in self.body if h in blocks and h != inside]
        outer = [h for h in heads if not any(h in self.body[g] and h != g for g in heads)]
        home = {b: h for h in outer for b in self.body[h]}
        node = lambda b: home.get(b, b)
        best: dict[int, tuple[Score, list]] = {}  # from a node to the end: by the last nodes first
        for block in reversed([b for b in self.blocks if b in blocks and node(b) == b]):
            if block in home:
                body = self.path(self.body[block], block, cold, block)
                mine, score = [body], score_of([x for p in (body, *body.loops()) for x in p.own()])
                leaving = {b for a in self.body[block] for b in self.next[a] if b not in self.body[block]}
            else:
                mine = self.code.instructions[block : self.range[block]]
                if any(cold(x) and not x.predicate for x in mine):
                    continue
                mine = [x for x in mine if not cold(x)]
                score, leaving = score_of(mine), set(self.next[block])
            # Back edges end the path; so do edges out of the loop, which the last trip alone takes.
            ways = [best[node(b)] for b in leaving if b != inside and b in blocks and node(b) in best]
            if inside in leaving:
                ways.append(((0.0, 0, 0), []))
            if not ways and (leaving or inside >= 0):  # it leads nowhere that belongs to the path
                continue
            more, rest = max(ways, key=lambda way: way[0], default=((0.0, 0, 0), []))
            best[block] = tuple(a + b for a, b in zip(score, more, strict=True)), [*mine, *rest]
        return Path(best[first][1] if first in best else [])


def score_of(instructions: Collection[Instruction]) -> Score:
    moved = sum(64 if TENSOR.match(x.op) else x.bytes for x in instructions)
    return moved, sum(x.multiplies for x in instructions), -len(instructions)


# ---------------------------------------------------------------------------------------------- a warp on its way

Latency = Callable[[Instruction], float]
READ = 12  # cycles until an access has read its registers
FILLED, WALKED = 4, 16  # trips of a loop until a pipeline is full; 12 more hold whole rounds of 1, 2, 3, 4 or 6 stages


class Walk:
    """One warp by itself, in order: the cycle it is in, and what is under way."""

    def __init__(self, latency: Latency, stalls: bool = True):
        self.latency, self.stalls = latency, stalls
        self.now = 0.0
        self.ready = [0.0] * 6  # when each scoreboard is clear
        self.copies: list[float] = []  # asynchronous copies since the last commit: when they land
        self.groups: list[float] = []

    def step(self, x: Instruction) -> None:
        for i in range(6):
            if x.waits >> i & 1:
                self.now = max(self.now, self.ready[i])
        if x.name == "DEPBAR" and (m := re.search(r"SB\d, (0x[0-9a-f]+|\d+)", x.text)):
            left = int(m[1], 0)
            self.now = max([self.now, *self.groups[: len(self.groups) - left]])
            self.groups = self.groups[len(self.groups) - left :] if left else []
        done = self.now + x.share * self.latency(x)
        if x.name == "LDGSTS":
            self.copies.append(done)
        elif x.name == "LDGDEPBAR":
            self.groups.append(max(self.copies, default=self.now))
            self.copies = []
        for i in (x.sets, x.frees if self.stalls else 7):
            if i < 6:
                self.ready[i] = max(self.ready[i], done if i == x.sets else self.now + READ)
        if self.stalls:
            self.now += x.share * max(1, x.stall)

    def along(self, path: Path) -> "Walk":
        """The first trips of a loop are walked; the others take as long as the later ones of these."""
        for item in path.items:
            if isinstance(item, Instruction):
                self.step(item)
                continue
            ends = [self.now]
            for _ in range(min(WALKED, math.ceil(item.trips))):
                self.along(item)
                ends.append(self.now)
            if 0 < item.trips < len(ends) - 1:  # the last one is not whole
                self.skip((item.trips - len(ends) + 1) * (ends[-1] - ends[-2]))
            if item.trips > WALKED:
                each = (ends[-1] - ends[FILLED]) / (WALKED - FILLED)
                self.skip(each * (item.trips - WALKED))
        return self

    def skip(self, time: float) -> None:
        self.now += time
        self.ready = [at + time for at in self.ready]
        self.copies = [at + time for at in self.copies]
        self.groups = [at + time for at in self.groups]


def cycles(path: Path, latency: Latency) -> float:
    """That one warp takes by itself."""
    walk = Walk(latency).along(path)
    return max([walk.now, *walk.ready])


def in_flight(path: Path, loads: Collection[int]) -> float:
    """Bytes of these loads, by id, that a warp has under way, on average over the time in which it waits for one: were
    nothing else to take time, a load that is waited for by itself would take as long as many that are waited for together."""
    moved = path.count(lambda x: x.bytes if id(x) in loads else 0) * 32
    waited = Walk(lambda x: 1.0 if id(x) in loads else 0.0, stalls=False).along(path)
    return moved / max([waited.now, *waited.ready, *waited.groups, 1.0])


def feeding(path: Path) -> set[int]:
    """Ids of the loads whose values reach a multiplication or a store, other than by being an address. Where vectors are
    among them they are vectors alone: single elements beside them are indices, scales and edges."""
    order = [x for p in (path, *path.loops()) for x in [*p.own()] * 2]  # twice: what one trip loads the next one stores
    holds: dict[str, set[int]] = defaultdict(set)  # by register, the loads in it
    found: set[int] = set()
    for x in order:
        operands = re.sub(r"\[[^\]]*\]|desc", "", x.text.partition(" ")[2])
        named = registers(operands)
        stores = x.name.startswith("ST") or TENSOR.match(x.op) or x.multiplies
        sources = named if x.name.startswith("ST") else named[1:]
        reaching = set().union(*(holds[r] for r in sources)) if sources else set()
        if stores:
            found |= reaching
        if x.name == "LDGSTS":
            found.add(id(x))
        elif named and not x.name.startswith(("ST", "BRA", "RED")):
            first = named[0]
            width = x.bytes // 4 if x.name in MEMORY and x.bytes > 4 else 2 if "WIDE" in x.op or ".64" in x.op else 1
            value = {id(x)} if x.name == "LDG" else reaching
            for i in range(max(1, width)):
                holds[f"R{int(first[1:]) + i}"] = value
    vectors = {id(x) for x in order if x.bytes == 16}
    return found & vectors or found


def registers(operands: str) -> list[str]:
    return re.findall(r"\bR\d+", operands)
