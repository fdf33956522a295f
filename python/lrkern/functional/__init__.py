# SPDX-License-Identifier: Apache-2.0
"""Stateless compositions of the ops: adapters as users name them. Letters as in ops."""

# ruff: noqa: F401, F403
from .allora import *
from .dora import *
from .hydra import *
from .lora import *
from .middle import *
from .miss import *
from .mora import *
from .mx import *
from .nola import *
from .projection import *
from .quartet import *
from .randlora import *
from .vera import *

__all__ = sorted(name for name, thing in vars().items() if getattr(thing, "__module__", "").startswith(__name__))

from .lora import dropout_seed
