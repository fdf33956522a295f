# SPDX-License-Identifier: Apache-2.0
"""Files that a reader never meets half written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what stands at ``path`` once the block has ended without an error."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
