# SPDX-License-Identifier: Apache-2.0
"""How a call of an op reaches the library."""

from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[1] / "_C.so"
if not LIBRARY.exists():
    raise ImportError(f"lrkern: {LIBRARY} is not built; run `pip install .` (or `make build`) in the checkout")
if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"lrkern needs torch >= 2.11, got {torch.__version__}")
torch.ops.load_library(str(LIBRARY))

_library: Any = torch.ops.lrkern


def library() -> Any:
    """The library that plain tensors' calls go to: torch.ops.lrkern, or another of the same ops (``use_library``)."""
    return _library


class use_library:
    """The one seam below the wrappers: inside, they and their backward call the ops of ``stand_in`` (the emulated kernels, a
    recorder, ops without their GEMM). Calls that the dispatcher has to see (compile, tensor subclasses) come through it."""

    def __init__(self, stand_in: Any):
        self.stand_in = stand_in

    def __enter__(self) -> None:
        global _library
        self.before, _library = _library, self.stand_in

    def __exit__(self, *_: object) -> None:
        global _library
        _library = self.before
