# SPDX-License-Identifier: Apache-2.0
"""What the linear layers over random bases share: a seed in place of the bases, state, merging."""

import math
import random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional.projection import UNIFORM
from ..ops.basis import DISTRIBUTIONS, STREAM_VERSION

# Times this, elements of the distribution have variance 1.
UNIT = dict.fromkeys(("uniform8", "uniform16", "uniform32", "ternary6"), UNIFORM)
UNIT |= {"sign": 1.0, "ternary4": math.sqrt(2.0)}

# Where seeds come from. Processes that make the same layers in the same order get the same ones, as DDP needs: it would
# not notice bases that differ.
_seeds = random.Random("lrkern")


class BasisLinear(nn.Module):
    """y = x Wᵀ + bias + dropout(x) ΔWᵀ with ΔW made of a few trained coefficients and random matrices that exist only as a
    seed: they are regenerated in forward and backward, on any device the same bits.

    W stays frozen; the coefficients train. Nothing random is stored: the state_dict has base_layer.weight,
    base_layer.bias, the coefficients, and ``seed`` and ``stream_version`` as int64 scalars. Loading takes the seed over, and
    refuses another stream version than this lrkern generates. torch's generator is used by nn.Linear's own
    initialisation (not by from_linear) and by dropout, for nothing else.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        settings: what the subclass lists, by keyword. Common to all:
        seed: of the bases, in [0, 2^63). None takes a new one, from a generator of lrkern's own that starts anew in every
            process. Layers given the same one share their bases: of shapes that differ, the columns are prefixes of one
            another's. A deepcopy keeps the seed. It is a constant to torch.compile: layers that are compiled one by one
            share a graph only where they share the seed.
        distribution: of the bases' elements, "uniform8", "uniform16", "uniform32" (n bits, in (-1, 1)), "sign" (±1),
            "ternary6" (±1 with probability 1/6 each, else 0) or "ternary4" (1/4 each).
        dropout: probability on the adapter's input.
        adapter_dtype: of the coefficients; None means float32 over a 16-bit base, else the base's dtype.
    """

    SETTINGS: ClassVar[tuple[str, ...]]  # attributes that, given to from_linear, make the same layer again
    stream_version = STREAM_VERSION

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__()
        self._set_up(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), **settings)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any):
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        if not isinstance(linear, nn.Linear) or type(linear.weight.data) is not Tensor:
            raise TypeError(
                f"{cls.__name__}.from_linear: linear must be an nn.Linear with a plain weight, got {linear}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_up(linear, **settings)
        return self

    def _set_up(self, base: nn.Linear, **settings: Any) -> None:
        raise NotImplementedError

    def _common(self, base, r, dropout, seed, distribution, adapter_dtype) -> None:
        if seed is None:
            seed = _seeds.getrandbits(63)
        self._whole("seed", seed, 0, 2**63 - 1)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{type(self).__name__}: dropout must lie in [0, 1], got {dropout}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"{type(self).__name__}: distribution must be one of {sorted(DISTRIBUTIONS)}, got {distribution!r}"
            )
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.dropout, self.seed, self.distribution = r, float(dropout), seed, distribution
        dtype = base.weight.dtype
        low = dtype in (torch.float16, torch.bfloat16)
        self._coefficients = {"dtype": adapter_dtype or (torch.float32 if low else dtype), "device": base.weight.device}
        self.base_layer = base.requires_grad_(False)
        self.enabled, self.merged = True, False

    def _whole(self, name: str, value: Any, low: int, high: int) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must be a whole number in {low}..{high}, got {value!r}")

    def _finite(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value!r}")

    def _constant(self, value: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, value, **self._coefficients))

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this layer again: from_linear(linear, **settings), but for the values of the coefficients."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged or not self.enabled else self._adapted(x)

    def _adapted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW [out, in] of the generated bases in float32: what ``merge`` adds to W."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """W += delta_weight(), rounded once to W's dtype; forward is the base layer from then on. Refuses a non-finite
        result and leaves W as it was."""
        if not self.merged:
            self._write(self.base_layer.weight.float() + self.delta_weight())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes from W what ``merge`` added: W up to the rounding of its dtype."""
        if self.merged:
            self._write(self.base_layer.weight.float() - self.delta_weight())
        self.merged = False

    def _write(self, new: Tensor) -> None:
        w = self.base_layer.weight
        new = new.to(w.dtype)
        if not new.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}.merge: W + delta_weight() must be finite, got inf or nan; W is unchanged"
            )
        w.copy_(new)

    def enable_adapter(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def disable_adapter(self) -> None:
        self.enabled = False

    # The seed is a plain number, so that forward never waits for a device to read it, and a tensor only in a state_dict.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("seed", "stream_version"):
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.int64, device="cpu")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        rest, found = dict(state_dict), {}
        for name in ("stream_version", "seed"):
            value = rest.pop(prefix + name, None)
            if value is None:
                missing += [prefix + name] if strict else []
            elif value.numel() != 1 or value.is_floating_point():
                raise RuntimeError(f"{type(self).__name__}: {prefix}{name} must be one whole number, got {value}")
            else:
                found[name] = int(value)
        # An error that is raised, not collected: the base layer below would be loaded all the same.
        if (version := found.get("stream_version", STREAM_VERSION)) != STREAM_VERSION:
            raise RuntimeError(
                f"{type(self).__name__}: {prefix}stream_version must be {STREAM_VERSION}, the random stream this lrkern "
                f"generates, got {version}, another lrkern's; the layer is unchanged"
            )
        if (seed := found.get("seed", self.seed)) < 0:
            raise RuntimeError(f"{type(self).__name__}: {prefix}seed must not be negative, got {seed}")
        known = len(errors)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if len(errors) == known:
            self.seed = seed

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += "".join(f", {name}={value}" for name, value in self.settings.items())
        return text + (", merged" if self.merged else "") + ("" if self.enabled else ", disabled")
