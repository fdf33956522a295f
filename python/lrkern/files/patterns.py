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
_LENGTH = 10_000  # of all patterns of one key that are looked at here
_STEPS = 100_000  # of one match, about a millisecond in which no other thread runs
_SHAPES = 16  # of names of one length, each of which is looked up
_WORK = 100_000_000  # of all matches for one key

_HELPER = f"""
import signal
signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it does; a parent may ignore or block it
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
signal.setitimer(signal.ITIMER_PROF, {SECONDS})
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
    if sum(map(len, patterns)) > _LENGTH:
        return _elsewhere(what, patterns, names, whole)
    steps = [_steps(p, longest) for p in patterns]
    if max(steps) > _STEPS or sum(steps) * len(names) > _WORK:
        return _elsewhere(what, patterns, names, whole)
    compiled = [re.compile(p) for p in patterns]
    compiled = [p.fullmatch if whole else p.match for p in compiled]
    found: Found = []
    for name in names:
        hit = next(((i, m) for i, match in enumerate(compiled) if (m := match(name))), None)
        found.append(hit and (hit[0], hit[1].groupdict().get("idx")))
    return found


_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+")


def first_keys(what: str, keys: Sequence[str], names: Iterable[str]) -> list[int | None]:
    """For each name the index of the first key that is a regex of it or of its end after a dot.

    A config may have a name for every linear of a large model: those are looked up and not tried one after the other."""
    names = list(names)
    plain = [not any("\n" in name for name in names) and bool(_NAME.fullmatch(key)) for key in keys]
    odd = []
    # By length, whether it is anchored and where it has a dot that stands for any character: by text the first index.
    tables: dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, int]]] = {}
    for i, key in enumerate(keys):
        text = key.removeprefix("^").replace(r"\.", "\\")
        shape = key.startswith("^"), tuple(at for at, c in enumerate(text) if c == ".")
        shapes = tables.setdefault(len(text), {})
        if plain[i] and (shape in shapes or len(shapes) < _SHAPES):
            shapes.setdefault(shape, {}).setdefault(text.replace("\\", "."), i)
        else:
            odd.append(i)
    found = []
    for name, hit in zip(names, first_matches(what, [rf"(.*\.)?({keys[i]})$" for i in odd], names), strict=True):
        hits = [odd[hit[0]]] if hit else []
        for start in (0, *(at + 1 for at, c in enumerate(name) if c == ".")):
            end = name[start:]
            for (anchored, dots), table in tables.get(len(end), {}).items():
                chars = list(end)
                for at in dots:
                    chars[at] = "."
                if not (anchored and start) and (i := table.get("".join(chars))) is not None:
                    hits.append(i)
        found.append(min(hits, default=None))
    return found


def _elsewhere(what, patterns, names, whole):
    worst = shown(max(patterns, key=len))
    late = f"{what} must match this model's names within {SECONDS} s of work, got {worst}"
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
            except subprocess.TimeoutExpired:
                raise ValueError(late) from None
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


def _steps(pattern: str, n: int) -> float:
    """No fewer than a match against n characters takes: the ways through the pattern, each as long as it and the name."""
    try:
        return _ways(parser.parse(pattern), n) * (len(pattern) + n)
    except Exception:  # no regex, or one that warns where warnings are errors: the process says
        return math.inf


_ONE = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}  # take one character, in one way


def _ways(items, n: int) -> float:
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
                ways *= (min(int(high) - low, n) + 1) * _ways(part, n)
            elif high <= 1:
                ways *= 1 + _ways(part, n)
            else:
                return math.inf
        else:  # looking around, going back to a group
            return math.inf
    return ways
