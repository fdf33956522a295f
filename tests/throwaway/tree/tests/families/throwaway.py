# SPDX-License-Identifier: Apache-2.0
import random
from typing import Any

import torch

from tests.families import Layer


def draw(rng: random.Random, schema, layer: Layer) -> dict[str, Any]:
    return layer.tensors(rng, schema, dy="TI") | {"gain": torch.randn(layer.I)}
