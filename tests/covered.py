# SPDX-License-Identifier: Apache-2.0
"""What the tests ask of which op: to see that a move of tests between files, or fewer of them, loses no case.

    python tests/covered.py list FILE [PYTEST ARGUMENT ...]     one line a case: check, op, sample, dtype, device
    python tests/covered.py compare BEFORE AFTER                what went and what came

A check is a test function by its name, in whatever file; of a case without an op the ids of all its parameters take
the place of the op. LRK_TEST_FULL=1 counts as it does for pytest.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


FUNCTION = r"<function (?:[\w.<>]*\.)?(\w+|<lambda>)(?: at 0x[0-9a-f]+)?>"  # as an id; its address changes


class Cases:
    """A plugin of pytest that keeps the collected cases."""

    def __init__(self):
        self.lines: set[str] = set()
        self.count = 0

    def pytest_collection_finish(self, session):
        self.count = len(session.items)
        self.lines = {re.sub(FUNCTION, r"\1", line_of(item)) for item in session.items}


def line_of(item) -> str:
    check = getattr(item, "originalname", None) or item.name
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    op, sample = params.pop("op", None), params.pop("sample_name", None)
    dtype, device = str(params.pop("dtype", "-")).removeprefix("torch."), str(params.pop("device", "-"))
    if op is None or params:  # also told apart by what else it is given
        ids = item.callspec.id if hasattr(item, "callspec") else "-"
        return "\t".join((check, ids if op is None else f"{named(op)} {ids}", str(sample or "-"), dtype, device))
    return "\t".join((check, named(op), str(sample or "-"), dtype, device))


def named(op) -> str:
    return getattr(op, "name", None) or str(op)


def collect(path: Path, arguments: list[str]) -> int:
    cases = Cases()
    code = pytest.main(
        [
            "--collect-only",
            "-qq",
            "--no-header",
            "-p",
            "no:xdist",
            "-o",
            "addopts=",
            f"--rootdir={ROOT}",
            *(arguments or [str(ROOT / "tests")]),
        ],
        plugins=[cases],
    )
    path.write_text("".join(f"{line}\n" for line in sorted(cases.lines)))
    print(f"{cases.count} cases, {len(cases.lines)} lines in {path}")
    return int(code)


def compare(before: Path, after: Path) -> int:
    was, now = (set(p.read_text().splitlines()) for p in (before, after))
    for sign, lines in (("-", was - now), ("+", now - was)):
        for line in sorted(lines):
            print(sign, line)
    print(f"{len(was)} before, {len(now)} after: {len(was - now)} went, {len(now - was)} came")
    return int(bool(was - now))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("list", "compare"):
        raise SystemExit(__doc__)
    command, file, *rest = sys.argv[1:]
    sys.exit(collect(Path(file), rest) if command == "list" else compare(Path(file), Path(rest[0])))
