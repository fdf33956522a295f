# SPDX-License-Identifier: Apache-2.0
"""How adapters of a family become what the pool holds, factors or vectors: one function each, by peft_type."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from ..files import folder as files
from ..files.projections import projections
from ..functional.projection import Projection
from ..nn import NOLALinear, VeRALinear
from ..nn.basis import BasisLinear


class Factors(NamedTuple):
    """What an adapter adds to one linear: y += scale · (x Aᵀ) Bᵀ."""

    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float


class Vectors(NamedTuple):
    """What an adapter adds to one linear where a pair of projections is shared: y += b ⊙ ((d ⊙ (x Aᵀ)) B)."""

    d: Tensor  # [r]
    b: Tensor  # [O]


class Shared(NamedTuple):
    """Adapters of vectors. All of a pool have the same pair, of which a linear takes the first columns."""

    a: Projection  # [r, largest I]
    b: Projection  # [r, largest O]
    vectors: dict[str, Vectors]  # by linear


# By peft_type, how a family's config and file become factors by name, or vectors and their pair: (config, tensors by their key
# in the file, [I, O] of every linear of the model by name). It refuses with a ValueError what it cannot serve exactly.
Family = Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, tuple[int, int]]], dict[str, Factors] | Shared]
FAMILIES: dict[str, Family] = {}

# Of a LoraConfig, what makes an adapter more than A and B beside frozen weights.
_MORE = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_NOT_PLAIN = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # of init_lora_weights: the first five change W
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_VERA_KEY = re.compile(r"base_model\.model\.(.+)\.vera_lambda_([bd])")


def _plain(config: Mapping[str, Any], more: tuple[str, ...]) -> None:
    """Refuses what trains more than the adapter's own tensors."""
    for key in more:
        if config.get(key):
            raise ValueError(f"{key} must be off, got {config[key]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias must be 'none', got {config['bias']!r}")


def _by_linear(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]],
    key: re.Pattern,
    kinds: dict[str, str],
) -> dict[str, dict[str, Tensor]]:
    """By linear the tensors of these kinds, all there, of the linears that the config names and no other."""
    what = " and ".join(kinds.values())
    found: dict[str, dict[str, Tensor]] = {}
    for k, tensor in tensors.items():
        match = key.fullmatch(k)
        if not match:
            raise ValueError(f"must hold {what} of linears, got {k}")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"must hold {what} of linears, got none")
    if unknown := sorted(found.keys() - linears.keys()):
        raise ValueError(f"must be of this model's linears, got {unknown[0]}")
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = peft.LoraConfig(**{key: config.get(key) for key in keys})
    lacking = [
        f"{name}.{text.removesuffix('.weight')}" for name in found for x, text in kinds.items() if x not in found[name]
    ]
    if wanted.target_modules and wanted.target_modules != "all-linear":  # a file of PEFT's has their names
        named = {name for name in linears if check_target_module_exists(wanted, name)}
        lacking += sorted(named - found.keys())
        if extra := sorted(found.keys() - named):
            raise ValueError(f"must be target_modules', got {extra[0]}")
    if lacking:
        raise ValueError(f"lacks {lacking[0]} and {len(lacking) - 1} more")
    return found


def _lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]]):
    """LoRA and rsLoRA (Hu et al., arXiv 2106.09685; arXiv 2312.03732) as PEFT writes them."""
    _plain(config, _MORE)
    if str(config.get("init_lora_weights", True)).lower().startswith(_NOT_PLAIN):
        raise ValueError(
            f"init_lora_weights must leave the base weights as they are, got {config['init_lora_weights']!r} (PEFT converts "
            "such adapters: save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    found = _by_linear(config, tensors, linears, _KEY, {"A": "lora_A.weight", "B": "lora_B.weight"})
    result = {}
    for name, factors in found.items():
        (I, O), (r, scaling) = linears[name], files.rank_and_scaling(config, name)
        for x, shape in (("A", (r, I)), ("B", (O, r))):
            if factors[x].shape != shape:
                raise ValueError(f"{name}.lora_{x} must have shape {list(shape)}, got {list(factors[x].shape)}")
        result[name] = Factors(factors["A"], factors["B"], scaling)
    return result


def _vera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]]) -> Shared:
    """VeRA (Kopiczko et al., arXiv 2310.11454) as PEFT writes it: with its projections, or drawn again from their key."""
    _plain(config, ("modules_to_save",))
    own = {k: t for k, t in tensors.items() if k not in ("base_model.vera_A", "base_model.vera_B")}
    found = _by_linear(config, own, linears, _VERA_KEY, {"d": "vera_lambda_d", "b": "vera_lambda_b"})
    A, B = projections(config, tensors, [linears[name] for name in found])
    for name, vectors in found.items():
        for x, shape in (("d", (config["r"],)), ("b", (linears[name][1],))):
            if vectors[x].shape != shape:
                raise ValueError(f"{name}.vera_lambda_{x} must have shape {list(shape)}, got {list(vectors[x].shape)}")
    return Shared(A, B.mT, {name: Vectors(vectors["d"], vectors["b"]) for name, vectors in found.items()})


FAMILIES["LORA"] = _lora
FAMILIES["VERA"] = _vera


# ---- lrkern's own files (nn.basis_file), by the class of their layers


def of_layers(layers: Mapping[str, BasisLinear], linears: Mapping[str, tuple[int, int]]) -> dict[str, Factors] | Shared:
    """What the layers of a file add: factors, or for VeRA layers that share a pair their vectors."""
    for name, layer in layers.items():
        if name not in linears:
            raise ValueError(f"must be of this model's linears, got {name}")
        if (layer.in_features, layer.out_features) != linears[name]:
            raise ValueError(f"{name} must be {list(linears[name])}, got {[layer.in_features, layer.out_features]}")
        if not isinstance(layer, NOLALinear | VeRALinear):
            raise ValueError(
                f"{name} must be NOLALinear or VeRALinear, got {type(layer).__name__}, which has full rank"
            )
    if all(isinstance(layer, VeRALinear) for layer in layers.values()):
        pairs = {
            (a._replace(cols=layer.max_in), b._replace(cols=layer.max_out))
            for layer in layers.values()
            for a, b in [layer.projections()]
        }
        if len(pairs) == 1:
            vectors = {name: Vectors(m.vera_lambda_d, m.vera_lambda_b) for name, m in layers.items()}
            return Shared(*pairs.pop(), vectors)
    return {name: Factors(*layer.factors()) for name, layer in layers.items()}
