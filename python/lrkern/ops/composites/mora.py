# SPDX-License-Identifier: Apache-2.0
"""MoRA: the two index maps as tables of what is summed into each place. Types: see ops/mora.py."""

import math

import torch
import torch.nn.functional as F

from .common import added, composite, lie, wide


def _check(type, rank, chunks=0):
    if type not in (1, 2, 3, 4, 6):
        raise ValueError(f"type must be 1, 2, 3, 4 or 6 (there is no 5), got {type}")
    lie("rank", rank, 1, 2**28)
    if type == 6 and rank % 2:
        raise ValueError(f"rank must be even for type 6, whose rotation is of pairs, got {rank}")
    lie("chunks", chunks, 0, 2**28)
    lie("chunks times rank", chunks * rank, 0, 2**28)
    if chunks and type != 6:
        raise ValueError(f"chunks must be 0 but for type 6, got {chunks}")


def _cycles(to, places, last):
    """[to, .] of what lies at to, to + n, ..., below last; -1 behind the end"""
    i = torch.arange(to)[:, None] + to * torch.arange(-(-last // max(to, 1)))
    return torch.where(i < last, i % max(places, 1), -1)


def _table(features, rank, type, circular, chunks, output, to_slots):
    """Where each slot [n r, .] has its columns, or each column [features, .] its slots."""
    slots = chunks * rank
    if type in ((2, 4) if output else (2, 3)):
        q, rest = divmod(features, rank)
        if to_slots:
            s = torch.arange(rank)
            i = (s * q + s.clamp_max(rest))[:, None] + torch.arange(q + 1)
            return torch.where(torch.arange(q + 1) < (q + (s < rest))[:, None], i, -1)
        j = torch.arange(features)
        return torch.where(j < rest * (q + 1), j // (q + 1), rest + (j - rest * (q + 1)) // max(q, 1))[:, None]
    last = -(-features // rank) * rank if circular and not output else features
    last = min(last, slots) if type == 6 and not output else last if slots else 0
    return _cycles(slots, features, last) if to_slots else _cycles(features, slots, last)


def _summed(x, table):
    """[..., n] of x [..., N], sums in float32"""
    if not x.shape[-1] or not table.numel():
        return x.new_zeros(*x.shape[:-1], len(table))
    padded = F.pad(x.float(), (0, 1))
    return padded[..., table.to(x.device)].sum(-1).to(x.dtype)  # -1 is the zero at the end


def _turned(h, back=False):
    n, half = h.shape[-2], h.shape[-1] // 2
    theta = 10000.0 ** (torch.arange(half, dtype=torch.float64) / -half)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * theta * (-1 if back else 1)
    c, s = (t.to(h.device, torch.float32) for t in (angle.cos(), angle.sin()))
    a, b = h.float().split(half, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(h.dtype)


def _chunks(type, rank, *features):
    return min(-(-n // rank) for n in features) if type == 6 else 1


def _fold(x, rank, type, circular, chunks, adjoint=False):
    """[..., n, r], n = 1 but for type 6"""
    h = _summed(x, _table(x.shape[-1], rank, type, circular, chunks, adjoint, True)).unflatten(-1, (chunks, rank))
    return _turned(h) if type == 6 and not adjoint else h


def _unfold(h, features, type, circular=True, adjoint=False):
    """The transpose, of h [..., n, r]"""
    table = _table(features, h.shape[-1], type, circular, h.shape[-2], not adjoint, False)
    return _summed((_turned(h, back=True) if type == 6 and adjoint else h).flatten(-2), table)


@composite("x:*I")
def mora_compress(x, rank, type, circular, chunks, adjoint):
    _check(type, rank, chunks)
    h = _fold(x.to(wide(x.dtype)), rank, type, circular, chunks or _chunks(type, rank, x.shape[-1]), adjoint)
    return h if type == 6 else h.squeeze(-2)


def _decompressed(h, features, type, circular, adjoint):
    if type == 6 and h.dim() < 2:
        raise ValueError(f"h must have at least 2 dimensions, got {h.dim()}")
    _check(type, h.shape[-1])
    lie("out_features", features, 0, 2**28)
    return _unfold(h if type == 6 else h.unsqueeze(-2), features, type, circular, adjoint)


@composite("h:*r")
def mora_decompress(h, out_features, type, circular, adjoint):
    return _decompressed(h, out_features, type, circular, adjoint)


@composite("y:*O h::~y")
def mora_decompress_(y, h, type, circular, adjoint):
    z = _decompressed(h, y.shape[-1], type, circular, adjoint)
    if z.shape != y.shape:
        raise ValueError(f"h must have shape [..., r] or [..., n, r] beside y {list(y.shape)}, got {list(h.shape)}")
    y.copy_(added(y, z))


def _delta(x, m, O, type, circular, h=None):
    """h: of compress(x), what x itself is not there for"""
    m, r = m.to(wide(m.dtype)), m.shape[0]
    _check(type, r)
    folded = _fold(x.to(m.dtype), r, type, circular, _chunks(type, r, x.shape[-1], O))
    return _unfold((folded if h is None else folded + h.view_as(folded)) @ m.mT, O, type)


@composite("y:*O x:*I m:rr:~x m:rr:~y")
def mora_add(y, x, m, type, circular):
    return added(y, _delta(x, m, y.shape[-1], type, circular))


def _again(x, weight, bias, m, type, circular, h):
    return added(F.linear(x, weight, bias), _delta(x, m, len(weight), type, circular, h))


@composite("x:*I weight:OI:=x bias:O:=x m:rr:~x", again=_again)
def mora_linear(x, weight, bias, m, type, circular):
    _check(type, m.shape[0])
    y = added(F.linear(x, weight, bias), _delta(x, m, len(weight), type, circular))
    if type == 6:
        return y, None
    h = _fold(x.to(wide(m.dtype)), m.shape[0], type, circular, 1)
    return y, h.reshape(math.prod(x.shape[:-1]), m.shape[0])
