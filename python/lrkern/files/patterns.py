# SPDX-License-Identifier: Apache-2.0
"""Regexes that anybody may have written, matched as Python's ``re`` does, within a bounded time and beside other threads.

A match of ``re`` cannot be interrupted and holds the interpreter: one that backtracks for ever would stop a whole server.
What takes few steps for certain, names and simple patterns, is matched here; the rest in a short-lived process, a bare Python
that shares nothing with this one and that the kernel ends after SECONDS of work.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

from .check import shown

SECONDS = 0.2  # of work for one key of a config; up to four are matched for one adapter
_WAIT = 2.0  # of wall time, for a machine that does not even start the process
_LENGTH = 1000  # of a pattern that is looked at here
_STEPS = 100_000  # of one match, about a millisecond in which no other thread runs
_WORK = 20_000_000  # of all matches for one key

_HELPER = f"""
import signal
signal.setitimer(signal.ITIMER_PROF, {SECONDS})  # its signal ends a process that does not ask for it, whatever that does
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
whole, patterns, names = json.load(sys.stdin)
try:
    tried = []
    for p in patterns:
        compiled = re.compile(p)
        tried.append(compiled.fullmatch if whole else compiled.match)
    found = []
    for name in names:
        hit = next(((i, m) for i, match in enumerate(tried) if (m := match(name))), None)
        found.append(hit and [hit[0], hit[1].groupdict().get("idx")])
except re.error as error:
    found = f"is no regex: {{error}}, got "
except (RecursionError, OverflowError, MemoryError):
    found = "is nested too deeply or too large to be matched, got "
json.dump(found, sys.stdout)
"""

Found = list[tuple[int, str | None] | None]


def first_matches(what: str, patterns: Sequence[str], names: Iterable[str], whole: bool = False) -> Found:
    """For each name the index of the first pattern that matches at its beginning, or wholly, and its group ``idx``.

    A ValueError names ``what`` the patterns are where one is no regex or takes too long.
    """
    names = list(names)
    if not patterns or not names:
        return [None] * len(names)
    longest = max(map(len, names))
    parsed = [_parsed(p) for p in patterns]
    steps = [_ways(p, longest) * (len(text) + longest) for p, text in zip(parsed, patterns, strict=True)]
    if max(steps) > _STEPS:
        return _elsewhere(what, patterns, names, whole)
    tries = _candidates([_tail(p, whole) for p in parsed], names)
    if sum(steps[i] for each in tries for i in each) > _WORK:
        return _elsewhere(what, patterns, names, whole)
    compiled = [re.compile(p) for p in patterns]
    compiled = [p.fullmatch if whole else p.match for p in compiled]
    found: Found = []
    for name, each in zip(names, tries, strict=True):
        hit = next(((i, m) for i in each if (m := compiled[i](name))), None)
        found.append(hit and (hit[0], hit[1].groupdict().get("idx")))
    return found


def _candidates(tails: Sequence[str], names: Sequence[str]) -> list[Sequence[int]]:
    """By name which patterns may match at all."""
    by_tail: dict[str, list[int]] = {}
    for i, tail in enumerate(tails):
        by_tail.setdefault(tail, []).append(i)
    lengths = sorted({len(tail) for tail in tails})
    found = []
    for name in names:
        ends = [by_tail.get(name[len(name) - n :], ()) for n in lengths if n <= len(name)]
        # $ stands before a newline too
        found.append(sorted(i for each in ends for i in each) if "\n" not in name else range(len(tails)))
    return found


def _elsewhere(what, patterns, names, whole):
    worst = shown(max(patterns, key=len))
    late = f"{what} must match this model's names within {SECONDS} s, got {worst}"
    try:
        # No fork of this process's threads and memory: subprocess uses vfork or posix_spawn, and closes descriptors.
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HELPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                out, _ = process.communicate(json.dumps([whole, patterns, names]).encode(), timeout=_WAIT)
            except subprocess.TimeoutExpired as error:
                raise ValueError(late) from error
            finally:
                process.kill()
    except OSError as error:
        raise ValueError(f"{what} cannot be matched without a process of {sys.executable!r}: {error}") from error
    if process.returncode:
        raise ValueError(late)
    found = json.loads(out)
    if isinstance(found, str):
        raise ValueError(f"{what} {found}{worst}")
    return [hit and tuple(hit) for hit in found]


_MANY = [(None, None)]  # in place of a pattern that is not looked at


def _parsed(pattern: str):
    if len(pattern) > _LENGTH:
        return _MANY
    try:
        return parser.parse(pattern)
    except Exception:  # no regex, or one that warns where warnings are errors: the process says
        return _MANY


_ONE = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}  # take one character, in one way


def _ways(items, n: int) -> float:
    """A match against n characters takes no more steps than this many times the lengths of the pattern and the name."""
    ways = 1.0
    for op, arguments in items:
        if op is sre.IN and any(kind is sre.RANGE and value[1] > 255 for kind, value in arguments):
            return math.inf  # compiled one character at a time where case is ignored
        if op in _ONE or op is sre.AT:
            continue
        if op is sre.SUBPATTERN:
            ways *= _ways(arguments[-1], n)
        elif op is sre.BRANCH:
            ways *= sum(_ways(branch, n) for branch in arguments[1])
        elif op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, part = arguments
            if len(part) == 1 and part[0][0] in _ONE:
                ways *= min(int(high) - low, n) + 1
            elif high <= 1:
                ways *= 1 + _ways(part, n)
            else:
                return math.inf
        else:  # looking around, going back to a group
            return math.inf
    return ways


def _tail(parsed, whole: bool) -> str:
    """What a name must end with: a config may have a pattern for every linear of a large model."""
    if parsed is _MANY or parsed.state.flags & re.IGNORECASE:
        return ""
    return _literal_end(parsed)[0] if whole or list(parsed)[-1:] == [(sre.AT, sre.AT_END)] else ""


def _literal_end(items) -> tuple[str, bool]:
    """And whether that is all of it."""
    tail = ""
    for op, arguments in reversed(list(items)):
        if op is sre.LITERAL:
            tail = chr(arguments) + tail
        elif op is sre.SUBPATTERN and not arguments[1] and not arguments[2]:
            inner, all_of_it = _literal_end(arguments[-1])
            tail = inner + tail
            if not all_of_it:
                return tail, False
        elif op is not sre.AT:
            return tail, False
    return tail, True
