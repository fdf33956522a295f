# SPDX-License-Identifier: Apache-2.0
"""lrkern: fused adapter kernels for PyTorch.

from lrkern.nn import FusedLoRALinear          # a LoRA linear of your own
import lrkern.peft; lrkern.peft.patch(model)   # a PEFT model, in place
"""

__version__ = "0.1.0"

from . import _moved, functional, nn, ops  # noqa: F401

__all__ = ["__version__", "functional", "nn", "ops"]
