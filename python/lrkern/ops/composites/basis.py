# SPDX-License-Identifier: Apache-2.0
"""Random bases: the elements of docs/rng.md some rows at a time, and products with them in float32."""

import torch

from .common import added, composite, lie, philox

BITS = {2: 8, 3: 16, 4: 32, 5: 1, 6: 16, 7: 2}  # of an element, by distribution
PANEL = 1 << 21  # elements whose words are there at once


def value(h, distribution):
    if distribution == 5:
        return 1.0 - 2.0 * h
    if distribution == 6:
        return (h >= 54613).float() - (h < 10923).float()
    if distribution == 7:
        return (h & 1).float() - (h >> 1).float()
    h, b = (h >> 8, 24) if distribution == 4 else (h, BITS[distribution])
    return (2 * h + 1).float() / 2**b - 1 if b < 24 else ((2 * h + 1).double() / 2**b - 1).float()


def elements(seed, method, distribution, tensor, first, R, q0, c0, Q, C, device):
    """U[q0 : q0 + Q, c0 : c0 + C] of the stack in float32, exact."""
    lie("seed", seed, 0, 2**63)
    lie("method", method, 2, 64)
    if distribution not in BITS:
        raise ValueError(f"distribution must be one of {sorted(BITS)}, got {distribution}")
    lie("tensor", tensor, 0, 2**32)
    lie("R", R, 1, 2**32 + 1)
    for name, n in {"first": first, "q0": q0, "c0": c0, "Q": Q, "C": C}.items():
        lie(name, n, 0, 2**63)
    lie("first plus bases", first + -(-(q0 + Q) // R), 0, 2**16 + 1)
    b = BITS[distribution]
    E, lead = 128 // b, c0 % (128 // b)
    lie("columns", c0 + C, 0, E * 2**32 + 1)
    block, parts = c0 // E + torch.arange(-(-(lead + C) // E), device=device), []
    for q in torch.arange(q0, q0 + Q, device=device).split(max(1, PANEL // max(C, 1))):
        at = q[:, None].expand(-1, len(block))
        tag = first + at // R + (method << 16 | distribution << 22)
        words = philox(block.expand_as(at), at % R, tensor, tag, seed)
        bits = words.unsqueeze(-1) >> torch.arange(0, 32, b, device=device) & (1 << b) - 1  # [q, blocks, 4, 32 / b]
        parts.append(value(bits.flatten(1)[:, lead : lead + C], distribution))
    return torch.cat(parts) if Q else torch.empty(0, C, device=device)


@composite("like:* row_scale:Q:f32 col_scale:C:f32")
def basis_fill(like, row_scale, col_scale, seed, method, distribution, tensor, first, R, q0, c0, Q, C, scale):
    for name, t, n in (("row_scale", row_scale, Q), ("col_scale", col_scale, C)):
        if t is not None and len(t) != n:
            raise ValueError(f"{name} must have shape [{n}], got {list(t.shape)}")
    u = scale * elements(seed, method, distribution, tensor, first, R, q0, c0, Q, C, like.device)
    u = u if row_scale is None else u * row_scale[:, None]
    return (u if col_scale is None else u * col_scale).to(like.dtype)


def segments(widths, counts, scales):
    if not len(widths) == len(counts) == len(scales) > 0:
        got = f"{len(widths)}, {len(counts)} and {len(scales)}"
        raise ValueError(f"widths, counts and scales must have one entry for each segment, got {got}")
    return list(zip(widths, counts, scales, strict=True))


def of_last(name, t, *sizes):
    if t.shape[t.dim() - len(sizes) :] != sizes or t.dim() < len(sizes):
        raise ValueError(f"{name} must have shape [..., {', '.join(map(str, sizes))}], got {list(t.shape)}")


@composite("coef:*K:f32 base:QW:f32")
def basis_combine(coef, base, seed, method, distribution, tensor, R, widths, counts, scales):
    parts = segments(widths, counts, scales)
    of_last("coef", coef, sum(counts))
    if base is not None:
        of_last("base", base, R, sum(widths))
    out = []
    for i, (c, (width, count, scale)) in enumerate(zip(coef.split(counts, -1), parts, strict=True)):
        u = elements(seed, method, distribution, tensor + i, 0, R, 0, 0, count * R, width, coef.device)
        out.append((scale * c @ u.reshape(count, R * width)).unflatten(-1, (R, width)))
    out = torch.cat(out, -1)
    return out if base is None else out + base


@composite("g:*QW:f32")
def basis_dot(g, seed, method, distribution, tensor, widths, counts, scales):
    parts, R = segments(widths, counts, scales), g.shape[-2]
    of_last("g", g, R, sum(widths))
    out = []
    for i, (part, (width, count, scale)) in enumerate(zip(g.split(widths, -1), parts, strict=True)):
        u = elements(seed, method, distribution, tensor + i, 0, R, 0, 0, count * R, width, g.device)
        out.append(scale * (part.flatten(-2) @ u.reshape(count, R * width).mT))
    return torch.cat(out, -1)


def _matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    n, m = (C, Q) if transposed else (Q, C)
    of_last("x", x, n)
    for name, t, size in (("in_scale", in_scale, n), ("out_scale", out_scale, m)):
        if t is not None:
            of_last(name, t, size)
    u = elements(seed, method, distribution, tensor, first, R, 0, 0, Q, C, x.device)
    x = x.float() if in_scale is None else x.float() * in_scale
    y = x @ (u.mT if transposed else u)
    return y if out_scale is None else y * out_scale


@composite("x:*N in_scale:N:f32 out_scale:M:f32")
def basis_matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed, fp32):
    y = _matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed)
    return y if fp32 else y.to(x.dtype)


@composite("y:*M x:*N in_scale:N:f32 out_scale:M:f32")
def basis_matmul_(y, x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed):
    z = _matmul(x, in_scale, out_scale, seed, method, distribution, tensor, first, R, Q, C, transposed)
    of_last("y", y, z.shape[-1])
    y.copy_(added(y, z))
