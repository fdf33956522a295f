# SPDX-License-Identifier: Apache-2.0
"""lrkern: fused adapter kernels for PyTorch.

lrkern.adapt(model, "lora", r=16)              # any method of lrkern.methods() into a model, in place
from lrkern.nn import FusedLoRALinear          # a LoRA linear of your own
import lrkern.peft; lrkern.peft.patch(model)   # a PEFT model, in place
"""

__version__ = "0.1.0"

import importlib
import importlib.util
from typing import Any

from . import _moved, functional, nn, ops  # noqa: F401

DOOR = "adapt", "disable", "load", "merge", "methods", "save", "unmerge"  # of whole models: lrkern.model's
__all__ = ["__version__", "functional", "nn", "ops", *DOOR]


def __getattr__(name: str) -> Any:
    """The other rooms, some of which import PEFT, which takes seconds, come when they are used."""
    if name in DOOR:
        return getattr(importlib.import_module(".model", __name__), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
