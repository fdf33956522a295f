# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4: codes by arithmetic in float32, products of what they decode to. Formats: see ops/mx.py."""

import math

import torch
import torch.nn.functional as F

from ...limits import DTYPES
from .common import added, bits16, composite, groups, lie, said, wide

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# of the bits of a magnitude: what is added before its exponent is taken, and what is taken off that
RULES = {"floor": (0, 2), "rceil": (0x7FFFFF, 0), "ceil": (0x7FFFFF, 2), "even": (0x200000, 2),
         "quest": (0, 0), "quest_nearest": (0x800000 - 0x3504F3, 0)}  # fmt: skip


def _decoded(codes):
    """float32 [..., 2 n] of bytes [..., n]"""
    values = torch.tensor([*VALUES, *(-v for v in VALUES)], device=codes.device)
    return values[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]


def _encoded(y, bits):
    """bytes [..., n] of y [..., 2 n] in units of the scale: to the nearest with ties to even, or by random bits"""
    a = y.abs().clamp_max(6.0)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    a = a / step
    if bits is None:
        a = a.round()
    else:
        low = a.floor()
        a = low + ((a < 6 / step) & (bits + 0.5 < (a - low) * 65536))
    a = a * step
    codes = torch.where(a < 2, 2 * a, torch.where(a < 4, a + 2, a / 2 + 4)).to(torch.uint8) | torch.signbit(y) * 8
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _blocks(x, n):
    return F.pad(x.float(), (0, -x.shape[-1] % n)).unflatten(-1, (-1, n))


def _bits(x, blocks, seed):
    """Of x's rows and columns, of blocks' shape"""
    if seed is None:
        return None
    rows = torch.arange(math.prod(x.shape[:-1]), device=x.device)
    return bits16(rows, blocks.shape[-2] * blocks.shape[-1], 5, seed).view(blocks.shape)


def _powers(bytes):
    """2^(b - 127) in float64; NaN for 255"""
    table = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    table[255] = torch.nan
    return table.to(bytes.device)[bytes.int()]


def _hadamard(v, signs):
    """H v / √32 of blocks, sums in the order of the butterfly"""
    if signs is not None:
        v = v * (1 - 2 * (signs.long() >> torch.arange(32, device=v.device) & 1)).to(v.dtype)
    for h in (1, 2, 4, 8, 16):
        a, b = v.unflatten(-1, (-1, 2, h)).unbind(-2)
        v = torch.stack([a + b, a - b], -2).flatten(-3)
    return v * 32**-0.5


def _scale_bytes(v, rule):
    if rule.startswith("quest"):
        total = torch.zeros_like(v[..., 0])
        for x in v.double().unbind(-1):  # fused, in order: the product of two float32 is exact
            total = (total.double() + x * x).float()
        of = (total / 32).sqrt()
        x = (of.double() * torch.tensor(0.487079).double().item() + 1e-8).float()
    else:
        of = v.abs().amax(-1)
        x = of / 6 if rule == "rceil" else of
    more, less = RULES[rule]
    byte = ((x.view(torch.int32).long() + more) >> 23) - less
    byte = torch.where(of == 0, 0, byte.clamp(0, 254))
    return torch.where(v.isfinite().all(-1) & of.isfinite(), byte, 255)


@composite("x:*K signs:1:i32 seed:1:i64")
def mx_quantize(x, rule, hadamard, signs, seed, gain, mask):
    if rule not in RULES:
        raise ValueError(f"rule must be one of {list(RULES)}, got {rule}")
    if signs is not None and not hadamard:
        raise ValueError("signs must be None without hadamard, got a tensor")
    v = _blocks(x, 32)
    v = _hadamard(v, signs) if hadamard else v
    scales = _scale_bytes(v, rule)
    nothing = (scales == 255)[..., None]
    y = (v.double() / _powers(scales)[..., None]).float() * torch.tensor(gain, dtype=torch.float32, device=x.device)
    y = torch.where(nothing, 0.0, y)
    codes = _encoded(y.flatten(-2), None if seed is None else _bits(x, v, seed).flatten(-2))
    within = None
    if mask:
        inside = (y.abs() < 6).long() << torch.arange(32, device=x.device)
        within = inside.sum(-1).to(torch.int32)
    return codes, scales.to(torch.uint8), within


def _check_dtype(dtype):
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {said(DTYPES)}, got {said([dtype])}")


def _check_codes(codes, scales, columns, block=32, what="codes"):
    if codes.dim() < 1 or codes.shape[-1] % (block // 2):
        raise ValueError(
            f"{what} must have whole blocks of {block // 2} bytes as its last dimension, got {list(codes.shape)}"
        )
    G = codes.shape[-1] // (block // 2)
    if scales.shape != (*codes.shape[:-1], G):
        must = [*codes.shape[:-1], G]
        raise ValueError(f"the scales of {what} must have shape {must}, got {list(scales.shape)}")
    lie("columns", columns, max(0, block * G - block + 1), block * G + 1)


def _dequantized(codes, scales, columns, dtype):
    _check_dtype(dtype)
    _check_codes(codes, scales, columns)
    x = _decoded(codes).unflatten(-1, (scales.shape[-1], 32)) * _powers(scales).float()[..., None]
    return x.flatten(-2)[..., :columns].to(dtype)


@composite("codes::u8 scales::u8")
def mx_dequantize(codes, scales, columns, dtype):
    return _dequantized(codes, scales, columns, dtype)


def _dequantized_wide(codes, scales, columns):
    """Of MXFP8, in float32."""
    if codes.dim() < 1 or codes.shape[-1] % 32 or scales.shape != (*codes.shape[:-1], codes.shape[-1] // 32):
        got = f"{list(codes.shape)} beside {list(scales.shape)}"
        raise ValueError(f"a_codes in 8 bits must have whole blocks of 32 elements and a scale for each, got {got}")
    lie("columns", columns, max(0, codes.shape[-1] - 31), codes.shape[-1] + 1)
    x = codes.float().unflatten(-1, (scales.shape[-1], 32)) * _powers(scales).float()[..., None]
    return x.flatten(-2)[..., :columns]


@composite("a_codes::c8 a_scales::u8 b_codes:OB:u8 b_scales::u8 bias:O s:*R u:OR")
def mx_matmul(a_codes, a_scales, b_codes, b_scales, columns, dtype, alpha, bias, s, u):
    wide = a_codes.dtype == torch.float8_e4m3fn
    if a_scales.shape[-1:] != b_scales.shape[-1:]:
        raise ValueError(f"b_codes must have as many blocks as a_codes, got {list(b_codes.shape)}")
    _check_dtype(dtype)
    a = (
        _dequantized_wide(a_codes, a_scales, columns)
        if wide
        else _dequantized(a_codes, a_scales, columns, torch.float32)
    )
    b = _dequantized(b_codes, b_scales, columns, torch.float32)
    if (s is None) != (u is None):
        raise ValueError("s and u must be given together, got one of them")
    for name, t in (("bias", bias), ("s", s), ("u", u)):
        if t is not None and t.dtype != dtype:
            raise ValueError(f"{name} must be {said([dtype])}, got {said([t.dtype])}")
    y = a @ b.mT
    if s is not None:
        if s.shape[:-1] != a.shape[:-1]:
            raise ValueError(f"s must have shape [..., R] = {[*a.shape[:-1], u.shape[1]]}, got {list(s.shape)}")
        y = y + s.float() @ u.float().mT
    y = alpha * y
    return (y if bias is None else y + bias.float()).to(dtype)


def _linear(x, codes, scales, bias, experts):
    need = 2 if experts is None else 3
    if codes.dim() != need:
        raise ValueError(f"codes must have {need} dimensions, got {list(codes.shape)}")
    if bias is not None and bias.shape != codes.shape[:-1]:
        raise ValueError(f"bias must have shape {list(codes.shape[:-1])}, got {list(bias.shape)}")
    _check_codes(codes, scales, x.shape[-1])
    if experts is None:
        return F.linear(x, _dequantized(codes, scales, x.shape[-1], x.dtype), bias)
    of = lambda e, rows: F.linear(
        rows, _dequantized(codes[e], scales[e], x.shape[-1], x.dtype), bias[e] if bias is not None else None
    )
    return _of_experts(x, codes.shape[1], experts, len(codes), of)


def _of_experts(x, O, experts, E, product):
    """Of each row product(its expert, it); zeros where it has none."""
    if experts.shape != x.shape[:-1]:
        raise ValueError(f"experts must have shape {list(x.shape[:-1])}, got {list(experts.shape)}")
    flat, parts, at = x.reshape(experts.numel(), x.shape[-1]), [], []
    for _, e, rows in groups(experts.reshape(-1, 1), E, "experts"):
        at.append(rows), parts.append(product(e, flat[rows]))
    y = flat.new_zeros(len(flat), O)
    return (y.index_copy(0, torch.cat(at), torch.cat(parts)) if at else y).view(*x.shape[:-1], O)


@composite("x:*I codes::u8 scales::u8 bias::=x experts::i32")
def mx_linear(x, codes, scales, bias, experts):
    return _linear(x, codes, scales, bias, experts)


@composite("x:*I codes::u8 scales::u8 bias::=x s:*R b::~x experts::i32")
def mx_linear_expand(x, codes, scales, bias, s, b, experts):
    dtype = wide(b.dtype)
    if s.dtype not in (b.dtype, dtype):
        raise ValueError(f"s must be {said([dtype, b.dtype])}, got {said([s.dtype])}")
    if b.shape != (*codes.shape[:-1], s.shape[-1]):
        raise ValueError(f"b must have shape {[*codes.shape[:-1], s.shape[-1]]}, got {list(b.shape)}")
    y, s, b = _linear(x, codes, scales, bias, experts), s.to(dtype), b.to(dtype)
    if experts is None:
        return added(y, s @ b.mT)
    return added(y, _of_experts(s, b.shape[1], experts, len(b), lambda e, rows: rows @ b[e].mT))


@composite("x:*K amax:1:f32 seed:1:i64")
def nvfp4_quantize(x, amax, seed):
    v = _blocks(x, 16)
    amax = (v.abs().amax() if v.numel() else v.new_zeros(())) if amax is None else amax
    whole = torch.where(amax.isfinite(), (amax.reshape(1) / 2688).clamp_min(2.0**-120), torch.nan)
    m = v.abs().amax(-1)
    scale = torch.where(m.isfinite(), (m / 6 / whole).clamp(2.0**-6, 448), torch.nan).to(torch.float8_e4m3fn)
    real = scale.float().isfinite()[..., None]
    y = torch.where(real, v * torch.where(real, 1 / whole / scale.float()[..., None], 0.0), 0.0)
    codes = _encoded(y.flatten(-2), None if seed is None else _bits(x, v, seed).flatten(-2))
    return codes, scale.view(torch.uint8) & 0x7F, whole


@composite("codes::u8 scales::u8 global_scale:1:f32")
def nvfp4_dequantize(codes, scales, global_scale, columns, dtype):
    _check_dtype(dtype)
    _check_codes(codes, scales, columns, 16)
    scale = global_scale * scales.view(torch.float8_e4m3fn).float()
    return (_decoded(codes).unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2)[..., :columns].to(dtype)
