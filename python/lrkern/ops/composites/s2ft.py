# SPDX-License-Identifier: Apache-2.0
"""S2FT: columns gathered and scattered by their index, slot by slot."""

import math

import torch
import torch.nn.functional as F

from .common import added, composite, groups, read, wide

SLICES = "index::i32 ids::i32 scales::f32"


def _rows(t):
    """[T, N]"""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _slots(t):
    """[T, K] of [T] or [T, K]"""
    return t if t.dim() == 2 else t.unsqueeze(1)


def _columns(T, N, index, ids, scales):
    """Of each slot: columns [T or 1, s], -1 where there is none, and the slot's scale [T, 1]."""
    want = 1 if ids is None else 2
    if index.dim() != want:
        raise ValueError(f"index must have {want} dimensions, got {list(index.shape)}")
    index = index.long()
    before = F.pad(index, (1, 0), value=-1)[..., :-1]
    first = torch.arange(index.shape[-1], device=index.device) == 0
    fits = (index > before) & (index < N) & (first | (before >= 0)) | (index == -1) & (want == 2)
    if not read("index", fits.all()):
        *a, j = read("index", (~fits).nonzero()[0])
        got = f"{read('index', index[(*a, j)])} at {j}" + (f" of adapter {a[0]}" if a else "")
        raise ValueError(f"index must ascend in [0, {N}), with -1 behind the end, got {got}")
    if ids is None:
        if scales is not None:
            raise ValueError("scales must be None without ids, got a tensor")
        return [(index[None], None)]
    if ids.dim() not in (1, 2) or len(ids) != T or (scales is not None and scales.shape != ids.shape):
        got = f"{list(ids.shape)} and {None if scales is None else list(scales.shape)}"
        raise ValueError(f"ids and scales must have shape [T] or [T, K], T = {T}, got {got}")
    if ids.dim() == 2 and not ids.shape[1]:
        raise ValueError(f"ids must have at least one slot, got {list(ids.shape)}")
    if not read("ids", (ids < len(index)).all()):
        raise ValueError(f"ids must lie below A = {len(index)}, got {ids.max()}")
    if not len(index):
        index = index.new_full((1, index.shape[1]), -1)
    ids, scales = _slots(ids).long(), None if scales is None else _slots(scales).unsqueeze(-1)
    found = [index[k.clamp_min(0)].masked_fill((k < 0)[:, None], -1) for k in ids.unbind(1)]
    return [(c, None if scales is None else scales[:, k]) for k, c in enumerate(found)]


def _gathered(x, columns, dtype):
    """[T, s] of one slot, of x [T, N] in float32, as the sums of its gradient are"""
    at, scale = columns
    h = x.gather(1, at.clamp_min(0).expand(len(x), -1)) if x.shape[1] else x.new_zeros(len(x), at.shape[1])
    h = torch.where(at < 0, 0.0, h)
    return (h if scale is None else h * scale).to(dtype)


def _gather(x, index, ids, scales):
    flat = _rows(x).float()
    slots = [_gathered(flat, c, x.dtype) for c in _columns(len(flat), flat.shape[1], index, ids, scales)]
    lead = (*x.shape[:-1], *(ids.shape[1:] if ids is not None else ()))
    return torch.stack(slots, 1).reshape(*lead, index.shape[-1])


def _scatter(y, h, index, ids, scales):
    columns = _columns(math.prod(y.shape[:-1]), y.shape[-1], index, ids, scales)
    sizes = (*y.shape[:-1], *(ids.shape[1:] if ids is not None else ()), index.shape[-1])
    if h.shape != sizes:
        raise ValueError(f"h must have shape {list(sizes)}, got {list(h.shape)}")
    flat = _rows(y)
    delta = flat.new_zeros(
        len(flat), flat.shape[1] + 1, dtype=torch.float32
    )  # the last column is for those that are none
    for (at, scale), slot in zip(columns, h.reshape(len(flat), len(columns), index.shape[-1]).unbind(1), strict=True):
        slot = torch.where(at < 0, 0.0, slot.float() if scale is None else slot.float() * scale)
        delta = delta.scatter_add(1, torch.where(at < 0, flat.shape[1], at).expand(len(flat), -1), slot)
    return (flat.float() + delta[:, :-1]).to(y.dtype).view(y.shape)


def _product(y, x, d, index, ids, scales):
    dtype, flat, want = wide(d.dtype), _rows(x).float(), 2 if ids is None else 3
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have shape [..., O] beside x {list(x.shape)}, got {list(y.shape)}")
    sizes = (*index.shape, y.shape[-1])
    if d.shape != sizes:
        letters = "[s, O]" if want == 2 else "[A, s, O]"
        raise ValueError(f"d must have shape {letters} = {list(sizes)}, got {list(d.shape)}")
    slots = [_gathered(flat, c, dtype) for c in _columns(len(flat), flat.shape[1], index, ids, scales)]
    d = d.to(dtype)
    if ids is None:
        return added(y, (slots[0] @ d).view(y.shape))
    delta = flat.new_zeros(len(flat), y.shape[-1], dtype=dtype)
    for k, a, rows in groups(_slots(ids), len(d), "ids"):  # no row meets another adapter's numbers
        true = read("index", (index[a] >= 0).sum())
        delta = delta.index_add(0, rows, slots[k][rows, :true] @ d[a, :true])
    return added(y, delta.view(y.shape))


@composite(f"x:*N {SLICES}")
def slice_gather(x, index, ids, scales):
    return _gather(x, index, ids, scales)


@composite(f"y:*N h::~y {SLICES}")
def scatter_add(y, h, index, ids, scales):
    return _scatter(y, h, index, ids, scales)


@composite(f"y:*N h::~y {SLICES}")
def scatter_add_(y, h, index, ids, scales):
    y.copy_(_scatter(y, h, index, ids, scales))


@composite(f"x:*I y::=x d::~x {SLICES}")
def gather_matmul(y, x, d, index, ids, scales):
    return _product(y, x, d, index, ids, scales)


@composite(f"x:*I y::=x d::~x {SLICES}")
def gather_matmul_(y, x, d, index, ids, scales):
    y.copy_(_product(y, x, d, index, ids, scales))


def _again(x, weight, bias, slice, index, dim, h):
    """Another forward may have written to weight since. What is added is zero, but has the slice's gradient."""
    nothing, index = (slice - slice.detach()).to(x.dtype), index.long()
    y = F.linear(x, weight.index_copy(dim, index, slice.detach().to(weight.dtype)), bias)
    if dim == 0:
        return y.index_add(-1, index, F.linear(x, nothing))
    return y if h is None else y + F.linear(h, nothing).view(y.shape)


@composite("x:*I weight:OI:=x bias:O:=x slice::~x index:s:i32", again=_again)
def slice_linear(x, weight, bias, slice, index, dim):
    """Writes the slice into weight, but not under a transform of torch.func, which may have one for each sample."""
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 (rows of weight) or 1 (columns), got {dim}")
    (at, _), *_ = _columns(0, weight.shape[dim], index, None, None)
    sizes = (*weight.shape[:dim], len(index), *weight.shape[dim + 1 :])
    if slice.shape != sizes:
        letters = "[O, s]" if dim else "[s, I]"
        raise ValueError(f"slice must have shape {letters} = {list(sizes)}, got {list(slice.shape)}")
    if torch._C._are_functorch_transforms_active():
        weight = weight.index_copy(dim, at[0], slice.to(weight.dtype))
    else:
        weight.data.index_copy_(
            dim, at[0], slice.to(weight.dtype)
        )  # its version stays: backward is of this W in any case
    return F.linear(x, weight, bias), _rows(x)[:, at[0]] if dim == 1 else None
