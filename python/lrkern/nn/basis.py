# SPDX-License-Identifier: Apache-2.0
"""What the linear layers over random bases share: a seed in place of the bases, in the state_dict too."""

import math
import random
from typing import Any, ClassVar

import torch

from ..functional import Basis
from ..ops.basis import DISTRIBUTIONS, STREAM_VERSION
from .linear import AdapterLinear

# Times this, elements of the distribution have variance 1.
UNIT = dict.fromkeys(("uniform8", "uniform16", "uniform32", "ternary6"), math.sqrt(3.0))
UNIT |= {"sign": 1.0, "ternary4": math.sqrt(2.0)}

# Where seeds come from. Processes that make the same layers in the same order get the same ones, as DDP needs: it would
# not notice bases that differ.
_seeds = random.Random("lrkern")


def _draw(generator: torch.Generator) -> int:
    """A seed that is rank 0's in all processes: torch seeds its generator differently in each."""
    seed = [int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed, 0)
    return seed[0]


def share_seed(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One seed for all layers, where their settings give them one generator or nothing to take it from."""
    given = next(iter(settings.values())).get("seed")
    if given is not None and not isinstance(given, torch.Generator):
        return settings
    seed = _seeds.getrandbits(63) if given is None else _draw(given)
    return {name: s | {"seed": seed} for name, s in settings.items()}


class BasisLinear(AdapterLinear):
    """y = x Wᵀ + bias + dropout(x) ΔWᵀ with ΔW made of a few trained coefficients and random matrices that exist only as a
    seed: they are regenerated in forward and backward, on any device the same bits.

    Nothing random is stored: the state_dict has base_layer.weight, base_layer.bias, the coefficients, and ``seed`` and
    ``stream_version`` as int64 scalars. Loading takes the seed over, and refuses another stream version than this lrkern
    generates. Only nn.Linear's own initialisation (not from_linear) and dropout use torch's generator.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        settings: what the subclass lists, by keyword. Common to all:
        seed: of the bases, in [0, 2^63). None takes a new one, from a generator of lrkern's own that starts anew in every
            process: processes that make the same layers get the same ones, whatever they told torch. A torch.Generator such as
            ``torch.default_generator`` draws one, which follows manual_seed. Where torch.distributed is initialised all processes take
            what rank 0's draws, seeded or not, and must all make the layer; made before that, layers of processes that were not
            seeded alike have bases that differ, which DDP does not notice. repr shows the seed. Layers given the same one share their bases: of shapes that differ, the columns are prefixes of one
            another's. A deepcopy keeps the seed. It is a constant to torch.compile: layers that are compiled one by one
            share a graph only where they share the seed.
        distribution: of the bases' elements, "uniform8", "uniform16", "uniform32" (n bits, in (-1, 1)), "sign" (±1),
            "ternary6" (±1 with probability 1/6 each, else 0) or "ternary4" (1/4 each).
        dropout: probability on the adapter's input.
        adapter_dtype: of the coefficients; None means float32 over a 16-bit base, else the base's dtype.
    """

    METHOD: ClassVar[str]  # of the random stream
    stream_version = STREAM_VERSION

    def _adopt(self, base, r, dropout, seed, distribution, adapter_dtype) -> dict[str, Any]:
        given = isinstance(seed, torch.Generator)
        if seed is not None and not given:
            self._whole("seed", seed, 0, 2**63 - 1)
        self._probability("dropout", dropout)
        self._one_of("distribution", distribution, DISTRIBUTIONS)
        like = super()._adopt(base, r, adapter_dtype)
        if given:  # once nothing is refused any more
            seed = _draw(seed)
        self.dropout, self.distribution = float(dropout), distribution
        self.seed = _seeds.getrandbits(63) if seed is None else seed
        return like

    def _basis(self, rows: int, cols: int, scale: float, tensor: int) -> Basis:
        """A matrix of the layer's stream whose elements have the standard deviation ``scale``."""
        unit = UNIT[self.distribution]
        return Basis(self.seed, self.METHOD, rows, cols, self.r, scale * unit, self.distribution, tensor)

    # The seed is a plain number, so that forward never waits for a device to read it, and a tensor only in a state_dict.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("seed", "stream_version"):
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.int64, device="cpu")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        rest, found = dict(state_dict), {"stream_version": STREAM_VERSION, "seed": self.seed}
        for name in found:
            value = rest.pop(prefix + name, None)
            if value is None:
                missing += [prefix + name] if strict else []
            elif value.numel() != 1 or value.is_floating_point():
                raise RuntimeError(f"{type(self).__name__}: {prefix}{name} must be one whole number, got {value}")
            else:
                found[name] = int(value)
        version, seed = found.values()
        # An error that is raised, not collected: the base layer below would be loaded all the same.
        if version != STREAM_VERSION:
            raise RuntimeError(
                f"{type(self).__name__}: {prefix}stream_version must be {STREAM_VERSION}, the random stream this lrkern "
                f"generates, got {version}, another lrkern's; the layer is unchanged"
            )
        if seed < 0:
            raise RuntimeError(f"{type(self).__name__}: {prefix}seed must not be negative, got {seed}")
        known = len(errors)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if len(errors) == known:
            self.seed = seed
