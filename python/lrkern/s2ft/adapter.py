# SPDX-License-Identifier: Apache-2.0
"""S2FT adapters: what training changed of a model's slices, apart from the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.check import is_finite, is_whole, require, shown
from ..files.folder import PREFIX, write_adapter
from ..files.lora_config import lora_config
from ..limits import MAX_RANK
from .select import check_index


class Slice(NamedTuple):
    """Of a linear: W[:, index] += change [O, s] (side "input"), or W[index, :] += change [s, I] ("output"). index int64 [s],
    ascending; change float32; channels: how many W has on that side, I or O."""

    side: str
    index: Tensor
    change: Tensor
    channels: int

    @property
    def dim(self) -> int:
        """Of W, whose channels the index counts."""
        return 1 if self.side == "input" else 0

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of W."""
        other = self.change.shape[1 - self.dim]
        return (other, self.channels) if self.side == "input" else (self.channels, other)


Adapter = dict[str, Slice]  # by the linear's name


def checked(who: str, adapter: Any) -> Adapter:
    """The adapter, if it is one whole, with indices in int64 on the CPU: anybody may have made it."""
    require(isinstance(adapter, Mapping), f"{who}: adapter must be slices by name, got {type(adapter).__name__}")
    found: Adapter = {}
    for name, s in adapter.items():
        named = isinstance(name, str) and name and isinstance(s, Slice)
        require(named, f"{who}: adapter must be slices by name, got {shown(name)}: {type(s).__name__}")
        require(s.side in ("input", "output"), f"{who}: side of {name} must be input or output, got {shown(s.side)}")
        whole = f"channels of {name} must be a whole number from 0 to 2147483647"
        require(is_whole(s.channels, 0, 2**31 - 1), f"{who}: {whole}, got {shown(s.channels)}")
        index = check_index(who, name, s.index, s.channels)
        require(bool((index.diff() > 0).all()), f"{who}: index of {name} must ascend, got {shown(index.tolist())}")
        right = isinstance(s.change, Tensor) and s.change.dtype == torch.float32 and s.change.dim() == 2
        right = right and s.change.shape[s.dim] == len(index)
        sizes = f"[O, {len(index)}]" if s.side == "input" else f"[{len(index)}, I]"
        got = f"{s.change.dtype} {list(s.change.shape)}" if isinstance(s.change, Tensor) else type(s.change).__name__
        require(right, f"{who}: change of {name} must be float32 {sizes}, got {got}")
        require(bool(s.change.isfinite().all()), f"{who}: change of {name} must be finite, got inf or nan")
        found[name] = s._replace(index=index, change=s.change.detach())
    return found


def fuse(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """One adapter that does what all do together: Σ weights[i] · adapters[i], of each linear over the union of the indices, in
    float32 and in order. weights: 1 each where None. Slices that do not overlap are kept as they are, times their weight.

    Refused with a ValueError: a linear that is sliced by columns in one and by rows in another, for which there is no slice, or of
    another size; weights that are not one finite number an adapter; sums that overflow.
    """
    who = "lrkern.s2ft.fuse"
    require(len(adapters) > 0, f"{who}: adapters must have one at least, got none")
    adapters = [checked(who, adapter) for adapter in adapters]
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    numbers = len(weights) == len(adapters) and all(is_finite(w) for w in weights)
    require(numbers, f"{who}: weights must be {len(adapters)} finite numbers, got {shown(weights)}")
    fused: Adapter = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        slices = [(w, adapter[name]) for w, adapter in zip(weights, adapters, strict=True) if name in adapter]
        first = slices[0][1]
        for _, s in slices:
            same = (s.side, s.shape) == (first.side, first.shape)
            must = f"{name} must be sliced on one side of one size, {first.side} of {list(first.shape)}"
            require(same, f"{who}: {must}, got {s.side} of {list(s.shape)}")
        index = torch.cat([s.index for _, s in slices]).unique()
        sizes = [*first.change.shape]
        sizes[first.dim] = len(index)
        change = torch.zeros(sizes, device=first.change.device)
        for w, s in slices:
            at = torch.searchsorted(index, s.index).to(change.device)
            change.index_add_(first.dim, at, s.change.to(change.device), alpha=w)
        require(bool(change.isfinite().all()), f"{who}: change of {name} must be finite, got inf or nan")
        fused[name] = Slice(first.side, index, change, first.channels)
    return fused


def to_lora(adapter: Adapter, folder: str | Path) -> None:
    """Writes the adapter as a plain PEFT LoRA folder, exactly: of columns, A [s, I] has a 1 in each row, at index, and B is the change;
    of rows, A is the change and B [O, s] has a 1 in each column. Rank s, lora_alpha s, a scaling of 1, float32.

    Refused with a ValueError before anything is written: more than 512 channels of a linear, the most that LoRA kernels take, and an
    adapter with none.
    """
    who = "lrkern.s2ft.to_lora"
    layers = {name: s for name, s in checked(who, adapter).items() if len(s.index)}
    require(layers, f"{who}: adapter must have a channel, got none")
    for name, s in layers.items():
        most = f"{MAX_RANK} channels, the highest rank that LoRA kernels take"
        require(len(s.index) <= MAX_RANK, f"{who}: {name} must have at most {most}, got {len(s.index)}")
    tensors = {}
    for name, s in layers.items():
        ones = torch.nn.functional.one_hot(s.index, s.channels).float()  # [s, channels]
        change = s.change.cpu()
        pair = (ones, change) if s.side == "input" else (change, ones.mT)
        tensors |= {f"{PREFIX}{name}.lora_{key}.weight": t for key, t in zip("AB", pair, strict=True)}
    ranks = {name: (len(s.index), len(s.index)) for name, s in layers.items()}
    write_adapter(folder, lora_config(ranks, None), tensors)
