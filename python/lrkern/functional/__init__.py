# SPDX-License-Identifier: Apache-2.0
"""Stateless compositions of the ops: adapters as users name them. Letters as in ops."""

# ruff: noqa: F403
from .dora import *
from .lora import *
from .nola import *
from .projection import *
from .randlora import *
from .vera import *
