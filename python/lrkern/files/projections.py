# SPDX-License-Identifier: Apache-2.0
"""PEFT's VeRA and RandLoRA folders: their projections read or drawn again, and folders of lrkern's own adapters written.

PEFT keeps one pair for all layers, as large as the largest need it: vera_A [r, In] and vera_B [Out, r]; randlora_A
[r, 1, Min] and randlora_B [Max, N, r], N = ceil(Min / r), where In and Out are the largest sizes over the adapted linears, Min and
Max the smaller and larger of these two. Without save_projection a file holds none of it, and the loader draws the pair
from torch's CPU generator.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from .. import peft as files
from ..functional.projection import Basis, Projection
from ..peft.layer import features_of

OWN = {"VERA": ("vera", "lambda_d", "lambda_b"), "RANDLORA": ("randlora", "lambda", "gamma")}  # names in PEFT's files
_PREFIX = "base_model.model."
Shapes = Iterable[tuple[int, int]]  # [I, O] of the adapted linears
Layers = Mapping[str, tuple[tuple[int, int], Tensor, Tensor]]  # by name: [I, O], d and b, or lam and gam


def kind_of(config: Mapping[str, Any]) -> str:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind not in OWN:
        raise ValueError(f"peft_type must be VERA or RANDLORA, got {kind!r}")
    return kind


def pair_shapes(kind: str, r: int, shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of PEFT's pair for these linears."""
    i, o = (max(sizes) for sizes in zip(*shapes, strict=True))
    if kind == "VERA":
        return (r, i), (o, r)
    return (r, 1, min(i, o)), (max(i, o), math.ceil(min(i, o) / r), r)


def draw_projections(
    config: Mapping[str, Any], shapes: Shapes, drawn_in: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """The pair that PEFT draws for this config over linears of these [I, O], in float32, bit for bit.

    PEFT draws RandLoRA's dense projections in bfloat16, or in float16 where accelerate finds no bfloat16 (old macOS, GPUs
    before Ampere); no file says which, so say drawn_in=torch.float16 for one from such a machine. An adapter that was added to
    a model beside an earlier, larger one was trained with that one's pair: its own file does not tell either.
    A ValueError says why where the pair cannot be the same.
    """
    kind, r, key = kind_of(config), config.get("r"), config.get("projection_prng_key")
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be a whole number above 0, got {r!r}")
    if type(key) is not int or not -(2**63) <= key < 2**64:
        raise ValueError(f"projection_prng_key must be a 64-bit integer, got {key!r}")
    if drawn_in not in (torch.bfloat16, torch.float16):
        raise ValueError(f"drawn_in must be bfloat16 or float16, got {drawn_in}")
    generator = torch.Generator("cpu").manual_seed(0)
    if torch.rand(2, generator=generator).tolist() != [0.49625658988952637, 0.7682217955589294]:
        raise ValueError(
            "projections cannot be drawn again: this torch's CPU generator gives other numbers than PEFT's did"
        )
    generator.manual_seed(key)
    a_shape, b_shape = pair_shapes(kind, r, shapes)
    uniform = lambda shape, a, dtype: nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a, generator=generator)
    if kind == "VERA":
        return uniform(a_shape, 0, torch.float32), uniform(b_shape, 0, torch.float32)
    if config.get("sparse") or config.get("very_sparse"):
        s = math.sqrt(a_shape[-1]) if config.get("very_sparse") else 3  # -1 and 1 with probability 1 / 2s each
        drawn = (torch.rand(shape, generator=generator) for shape in (a_shape, b_shape))
        pair = [(u > 1 - 1 / (2 * s)).float() - (u < 1 / (2 * s)).float() for u in drawn]
    else:
        M, n, _ = b_shape
        a = uniform(a_shape, math.sqrt(5), drawn_in)
        pair = [a, torch.cat([uniform((M, 1, r), math.sqrt(5), drawn_in) for _ in range(n)], 1)]
    A, B = (p / p.std() for p in pair)
    return A.float(), B.float()


def projections(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    drawn_in: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """The pair of a PEFT folder: stored, or drawn again where save_projection is off. A ValueError says why not."""
    kind, shapes = kind_of(config), list(shapes)
    names = [f"base_model.{OWN[kind][0]}_{x}" for x in "AB"]
    if not any(name in tensors for name in names):
        if config.get("save_projection", True):
            raise ValueError(f"lacks {names[0]}, which save_projection says it holds")
        return draw_projections(config, shapes, drawn_in)
    if type(config.get("r")) is not int or config["r"] < 1:
        raise ValueError(f"r must be a whole number above 0, got {config.get('r')!r}")
    for name, shape in zip(names, pair_shapes(kind, config["r"], shapes), strict=True):
        if name not in tensors:
            raise ValueError(f"lacks {name}")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensors[name].shape)}")
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            raise ValueError(f"{name} must be finite floats")
    A, B = (tensors[name].float() for name in names)
    return A, B


def store_projections(
    folder: str | Path, model: nn.Module, to: str | Path, drawn_in: torch.dtype = torch.bfloat16
) -> None:
    """Writes a PEFT VeRA or RandLoRA folder once more with its projections in it, so that it means the same everywhere.

    model: the base model, whose linears tell the sizes. RandLoRA's pair is stored once, not once per layer as PEFT does.
    """
    try:
        config, tensors = files.read_adapter(folder)
        own, v, w = OWN[kind_of(config)]
        key = re.compile(rf"base_model\.model\.(.+)\.{own}_({v}|{w})")
        names = dict.fromkeys(match[1] for k in tensors if (match := key.fullmatch(k)))
        modules = dict(model.named_modules())
        shapes = [features_of(modules[name]) if name in modules else None for name in names]
        if None in shapes or not names:
            got = list(names)[shapes.index(None)] if names else "none"
            raise ValueError(f"must be an adapter of this model's linears, got {got}")
        pair = projections(config, tensors, shapes, drawn_in)
    except ValueError as error:
        raise ValueError(f"lrkern.convert_peft.store_projections: {folder}: {error}; nothing is written") from error
    shared = re.compile(rf".*\.{own}_[AB]")
    kept = {k: t for k, t in tensors.items() if not shared.fullmatch(k)}
    files.write_adapter(to, config | {"save_projection": True}, kept | _stored(own, *pair))


def _stored(own: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {f"base_model.{own}_A": A, f"base_model.{own}_B": B}


def _rows(p: Projection, rows: int, cols: int, what: str) -> Tensor:
    """The first rows and columns in float32, of a Basis as many as are asked for."""
    if isinstance(p, Basis):
        return p._replace(rows=rows, cols=cols).fill(torch.empty(0))
    if p.shape[0] < rows or p.shape[1] < cols:
        raise ValueError(f"lrkern.convert_peft: {what} must have at least shape {[rows, cols]}, got {list(p.shape)}")
    return p[:rows, :cols].detach().float().cpu()


def _save(folder, kind: str, r: int, layers: Layers, A: Projection, B: Projection, options: dict[str, Any]) -> None:
    if not layers:
        raise ValueError("lrkern.convert_peft: layers must hold at least one, got none")
    own, v_name, w_name = OWN[kind]
    a_shape, b_shape = pair_shapes(kind, r, [shape for shape, _, _ in layers.values()])
    for name, ((I, O), v, w) in layers.items():
        n = math.ceil(min(I, O) / r)
        expected = ((r,), (O,)) if kind == "VERA" else ((r, n), (n, min(I, O)))
        if (v.shape, w.shape) != expected:
            raise ValueError(
                f"lrkern.convert_peft: {name}.{own}_{v_name} and {own}_{w_name} must have shapes {[*map(list, expected)]}, "
                f"got {[list(v.shape), list(w.shape)]}"
            )
    pair = _rows(A, r, a_shape[-1], "A"), _rows(B, math.prod(b_shape[1:]), b_shape[0], "B").mT
    tensors = _stored(own, *(t.reshape(shape) for t, shape in zip(pair, (a_shape, b_shape), strict=True)))
    for name, (_, v, w) in layers.items():
        tensors |= {f"{_PREFIX}{name}.{own}_{v_name}": v, f"{_PREFIX}{name}.{own}_{w_name}": w}
    key = A.seed if isinstance(A, Basis) else 0  # PEFT wants one key of the adapters of one model
    make = peft.VeraConfig if kind == "VERA" else peft.RandLoraConfig
    options |= {"r": r, "target_modules": sorted(layers), "projection_prng_key": key, "save_projection": True}
    files.write_adapter(folder, make(**options, inference_mode=True), tensors)


def save_vera(folder: str | Path, layers: Layers, A: Projection, B: Projection, dropout: float = 0.0) -> None:
    """Writes VeRA adapters as ``functional.vera_linear`` has them as a folder that stock PEFT loads, with the projections.

    layers: by name ([I, O], d [r], b [O]); A [r, >= In] and B [r, >= Out] shared by all of them, a ``Basis`` or tensors.
    """
    r = len(next(iter(layers.values()))[1]) if layers else 0
    _save(folder, "VERA", r, layers, A, B, {"vera_dropout": dropout})


def save_randlora(
    folder: str | Path, layers: Layers, A: Projection, B: Projection, alpha: float, dropout: float = 0.0
) -> None:
    """The same for RandLoRA as ``functional.randlora_linear`` has it without paper_pairing, scale = alpha / r.

    layers: by name ([I, O], lam [r, n], gam [n, min(I, O)]); A [r, >= Min] and B [>= N r, >= Max] whose row is j r + k.
    """
    r = len(next(iter(layers.values()))[1]) if layers else 0
    _save(folder, "RANDLORA", r, layers, A, B, {"randlora_alpha": alpha, "randlora_dropout": dropout})
