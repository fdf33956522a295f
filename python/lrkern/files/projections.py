# SPDX-License-Identifier: Apache-2.0
"""PEFT folders of methods whose layers share one pair of projections: the pair read or drawn again, and folders of lrkern's
own adapters written.

PEFT keeps one pair for all layers, as large as the largest need it. Without save_projection a file holds none of it, and the
loader draws the pair from torch's CPU generator.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..extras import extra
from ..functional import Basis
from ..functional.projection import Projection
from ..nn.linear import AdapterLinear
from .check import check_finite, check_shape, is_whole, named, refusal, require, shown
from .folder import (
    PREFIX,
    Config,
    Tensors,
    check_config,
    features_of,
    linear_of,
    peft_type,
    read_adapter,
    write_adapter,
)
from .lora_config import targets
from .names import as_peft

Shapes = Iterable[tuple[int, int]]  # [I, O] of the adapted linears
Layers = Mapping[str, tuple[tuple[int, int], Tensor, Tensor]]  # by name: [I, O] and the two tensors that train
Shape = tuple[int, ...]
Pair = tuple[Tensor, Tensor]


class Method(NamedTuple):
    """What the folders hold of a method whose layers share a pair A, B."""

    own: str  # what PEFT's names of its tensors begin with
    vectors: tuple[str, str]  # what trains, after ``own``
    pair: Callable[[int, int, int], tuple[Shape, Shape]]  # of A and B, by the rank and the largest sizes i, o
    trained: Callable[[int, int, int], tuple[Shape, Shape]]  # of a layer's vectors, by r, I, O
    draw: Callable  # config, shapes of A and B, generator, drawn_in: the pair as PEFT draws it
    options: Callable[[AdapterLinear], dict[str, Any]]  # of PEFT's config, from one of lrkern's layers


METHODS: dict[str, Method] = {}  # by peft_type


def kind_of(config: Config) -> str:
    check_config(config)
    kind = peft_type(config)
    require(kind in METHODS, f"peft_type must be {' or '.join(METHODS)}, got {shown(kind)}")
    return kind


def pair_shapes(kind: str, r: int, shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of PEFT's pair for these linears."""
    return METHODS[kind].pair(r, *map(max, zip(*shapes, strict=True)))


def uniform(generator: torch.Generator, shape: Shape, a: float, dtype: torch.dtype) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=dtype), a, generator=generator)


def draw_projections(config: Config, shapes: Shapes, drawn_in: torch.dtype = torch.bfloat16) -> Pair:
    """The pair that PEFT draws for this config over linears of these [I, O], in float32, bit for bit.

    PEFT draws RandLoRA's dense projections in bfloat16, or in float16 where accelerate finds no bfloat16 (old macOS, GPUs
    before Ampere); no file says which, so say drawn_in=torch.float16 for one from such a machine. An adapter that was added to
    a model beside an earlier, larger one was trained with that one's pair: its own file does not tell either.
    A ValueError says why where the pair cannot be the same.
    """
    kind, r, key = kind_of(config), config.get("r"), config.get("projection_prng_key")
    _check_rank(r)
    require(key is not None, "projection_prng_key must be a 64-bit integer, got None")
    require(drawn_in in (torch.bfloat16, torch.float16), f"drawn_in must be bfloat16 or float16, got {drawn_in}")
    generator = torch.Generator("cpu").manual_seed(0)
    same = torch.rand(2, generator=generator).tolist() == [0.49625658988952637, 0.7682217955589294]
    why = "this torch's CPU generator gives other numbers than PEFT's did"
    require(same, f"projections cannot be drawn again: {why}")
    return METHODS[kind].draw(config, *pair_shapes(kind, r, shapes), generator.manual_seed(key), drawn_in)


def projections(config: Config, tensors: Tensors, shapes: Shapes, drawn_in: torch.dtype = torch.bfloat16) -> Pair:
    """The pair of a PEFT folder: stored, or drawn again where save_projection is off. A ValueError says why not."""
    kind, shapes = kind_of(config), list(shapes)
    names = _pair_names(METHODS[kind])
    if not any(name in tensors for name in names):
        absent = not config.get("save_projection", True)
        require(absent, f"lacks {names[0]}, which save_projection says it holds")
        return draw_projections(config, shapes, drawn_in)
    _check_rank(config.get("r"))
    for name, shape in zip(names, pair_shapes(kind, config["r"], shapes), strict=True):
        require(name in tensors, f"lacks {name}")
        check_shape(name, tensors[name], shape)
        check_finite(name, tensors[name])
    A, B = (tensors[name].float() for name in names)
    return A, B


def _check_rank(r: Any) -> None:
    require(is_whole(r, 1, 2**31 - 1), f"r must be a whole number above 0, got {shown(r)}")


def check_trained(config: Config, tensors: Tensors, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The vectors of these linears: before a pair is drawn, whose size a config of a few bytes only claims."""
    method = METHODS[kind_of(config)]
    _check_rank(r := config.get("r"))
    for name, (I, O) in shapes.items():
        for vector, shape in zip(method.vectors, method.trained(r, I, O), strict=True):
            key = f"{PREFIX}{name}.{method.own}_{vector}"
            require(key in tensors, f"lacks {named(key)}")
            check_shape(key, tensors[key], shape)


def _pair_names(method: Method) -> list[str]:
    return [f"base_model.{method.own}_{x}" for x in "AB"]


def store_projections(
    folder: str | Path, model: nn.Module, to: str | Path, drawn_in: torch.dtype = torch.bfloat16
) -> None:
    """Writes a PEFT VeRA or RandLoRA folder once more with its projections in it, so that it means the same everywhere.

    model: the base model, whose linears tell the sizes. RandLoRA's pair is stored once, not once per layer as PEFT does.
    """
    with refusal(f"lrkern.convert_peft.store_projections: {named(str(folder))}: ", "; nothing is written"):
        config, tensors = as_peft(*read_adapter(folder), model)
        method = METHODS[kind_of(config)]
        ends = tuple(f".{method.own}_{vector}" for vector in method.vectors)
        names = dict.fromkeys(linear_of(k, ends) for k in tensors if linear_of(k, ends))
        modules = dict(model.named_modules())
        shapes = {name: features_of(modules[name]) if name in modules else None for name in names}
        unknown = next((named(name) for name, shape in shapes.items() if shape is None), None)
        require(names and unknown is None, f"must be an adapter of this model's linears, got {unknown or 'none'}")
        check_trained(config, tensors, shapes)
        pair = projections(config, tensors, shapes.values(), drawn_in)
    shared = tuple(f".{method.own}_{x}" for x in "AB")
    kept = {k: t for k, t in tensors.items() if not k.endswith(shared)}
    stored = dict(zip(_pair_names(method), pair, strict=True))
    write_adapter(to, config | {"save_projection": True}, kept | stored)


def _rows(p: Projection, rows: int, cols: int, what: str) -> Tensor:
    """The first rows and columns in float32, of a Basis as many as are asked for."""
    if isinstance(p, Basis):
        return p._replace(rows=rows, cols=cols).fill(torch.empty(0))
    enough = p.shape[0] >= rows and p.shape[1] >= cols
    require(enough, f"lrkern.convert_peft: {what} must have at least shape {[rows, cols]}, got {list(p.shape)}")
    return p[:rows, :cols].detach().float().cpu()


def write_layers(folder: str | Path, layers: Mapping[str, AdapterLinear], named: Mapping[str, nn.Module]) -> None:
    """Writes layers that share one pair, as a folder that stores it."""
    first = next(iter(layers.values()))
    vectors = {name: ((m.in_features, m.out_features), *m.coefficients().values()) for name, m in layers.items()}
    A, B = first.projections()  # any rows and columns of them: sizes follow from the layers
    options = {"target_modules": targets(layers, named)} | METHODS[first.PEFT_TYPE].options(first)
    save_pair(folder, first.PEFT_TYPE, vectors, A, B, **options)


def save_pair(folder: str | Path, kind: str, layers: Layers, A: Projection, B: Projection, **options: Any) -> None:
    """Writes a folder with its projections; options: what PEFT's config takes beside the rank."""
    with extra("lrkern.files.save"):
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # here, for those who write own files without PEFT

    require(layers, "lrkern.convert_peft: layers must hold at least one, got none")
    method = METHODS[kind]
    own, (v_name, w_name) = method.own, method.vectors
    r = len(next(iter(layers.values()))[1])
    a_shape, b_shape = pair_shapes(kind, r, [shape for shape, _, _ in layers.values()])
    for name, ((I, O), v, w) in layers.items():
        got, expected = [list(v.shape), list(w.shape)], [list(shape) for shape in method.trained(r, I, O)]
        what = f"{name}.{own}_{v_name} and {own}_{w_name}"
        require(got == expected, f"lrkern.convert_peft: {what} must have shapes {expected}, got {got}")
    pair = _rows(A, r, a_shape[-1], "A"), _rows(B, math.prod(b_shape[1:]), b_shape[0], "B").mT
    tensors = {n: t.reshape(s) for n, t, s in zip(_pair_names(method), pair, (a_shape, b_shape), strict=True)}
    for name, (_, v, w) in layers.items():
        tensors |= {f"{PREFIX}{name}.{own}_{v_name}": v, f"{PREFIX}{name}.{own}_{w_name}": w}
    key = A.seed if isinstance(A, Basis) else 0  # PEFT wants one key of the adapters of one model
    options = {"target_modules": targets(layers)} | options
    options |= {"r": r, "projection_prng_key": key, "save_projection": True}
    write_adapter(folder, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options, inference_mode=True), tensors)
