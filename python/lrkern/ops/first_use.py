# SPDX-License-Identifier: Apache-2.0
"""The first op on a GPU of a model that has no run on record says so, once, in one line.

By ``logging``: where nobody set that up it is one line on stderr, else it goes where the user's own lines go. ``warnings`` would take two
lines, name a place in lrkern, and under -W error end a training run on a new GPU for a remark.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Whose tests passed in bench/evidence/, as torch.cuda.get_device_name() has it; tools/gpu_status.py writes this.
GPUS: tuple[str, ...] = ()

QUIET = "LRKERN_QUIET"
_told: set[str] = set()
_watched: list[tuple[type, str, Callable]] = []  # what stood there before


def watch(op: type, *ways: str) -> None:
    """Puts ``look`` before these methods, until there is nothing more to say: then they are again what they were."""
    if torch.backends.cuda.is_built() and os.environ.get(QUIET, "0") in ("", "0"):
        for way in ways:
            _watched.append((op, way, getattr(op, way)))
            setattr(op, way, _looking(getattr(op, way)))


def _looking(method: Callable) -> Callable:
    @functools.wraps(method)
    def first(self, *args):
        if not torch.compiler.is_compiling():  # of a compiled call the fake kernel, which runs in Python, asks
            look(args)
        return method(self, *args)

    return first


def look(args: Iterable[Any]) -> None:
    if not _watched:
        return
    if not _gpus():
        _leave()
    elif torch.cuda.is_initialized():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_cuda:
                return _tell(torch.cuda.get_device_name(arg.device))


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()  # asks NVML, and leaves CUDA as it is for who forks


def _tell(name: str) -> None:
    if name not in _told and name not in GPUS:
        logging.getLogger("lrkern").warning(
            f"lrkern: its CUDA kernels have no run on record on {name}; `python -m lrkern selftest --quick` checks them here ({QUIET}=1 "
            "silences this line)"
        )
    _told.add(name)
    if _told >= {torch.cuda.get_device_name(i) for i in range(_gpus())}:
        _leave()


def _leave() -> None:
    while _watched:
        setattr(*_watched.pop())
