# SPDX-License-Identifier: Apache-2.0
"""Packages that only some rooms need: who misses one is told how to install it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(who: str, name: str = "peft") -> Iterator[None]:
    """Around imports of what the extra ``name`` of pyproject.toml installs. A missing one stays a ModuleNotFoundError, with the
    command that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in ("peft", "safetensors", "transformers"):
            raise  # broken inside, not missing
        text = f'{who} needs {needed}, which is not installed; run `pip install "lrkern[{name}]"`'
        raise ModuleNotFoundError(text, name=error.name) from None
