# SPDX-License-Identifier: Apache-2.0
"""FusedLoRALinear layers as PEFT folders."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..extras import extra
from ..functional import lora_scaling
from ..limits import MAX_RANK
from ..nn import FusedLoRALinear
from ..nn.lora import CHANGE_W
from .check import check_finite, check_shape, named, refusal, require, shown
from .folder import (
    LORA,
    PREFIX,
    Config,
    Sizes,
    Tensors,
    by_linear,
    check_config,
    peft_type,
    ranks_and_alphas,
    ranks_and_scalings,
    read_adapter,
    write_adapter,
)
from .lora_config import MORE, check_base, lora_config
from .names import as_peft
from .own import check_places
from .plain import plainly

if TYPE_CHECKING:
    import peft

Layers = Mapping[str, FusedLoRALinear]


def _modules(model: nn.Module) -> Layers:
    found = {name: m for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    require(found, f"lrkern.peft: model must have FusedLoRALinear layers, got {type(model).__name__} with none")
    require("" not in found, "lrkern.peft: model must hold its layers by name, got a layer")
    return found


def _key(name: str, key: str) -> str:
    return f"{PREFIX}{name}.{key.replace('vector.weight', 'vector')}"


def _in_file(modules: Layers) -> dict[str, nn.Parameter]:
    """What trains, by the keys that PEFT's files give it. Of rank 0 they have nothing."""
    found = {_key(name, k): p for name, m in modules.items() if m.r for k, p in m.coefficients().items()}
    biases = {_bias_key(name): _bias(m) for name, m in modules.items() if m.train_bias}
    return found | biases


def _bias(m: FusedLoRALinear) -> Tensor | None:
    return getattr(m.base_layer, "bias", None)


def _bias_key(name: str) -> str:
    return _key(name, "base_layer.bias")


def _over_w(m: FusedLoRALinear) -> tuple[int, dict[str, Tensor]]:
    """Rank and factors over the W that the layer was made over: PEFT's conversion where its init took factors A₀, B₀ out of
    W, scaling · (B A - B₀ A₀) = scaling · [B, -B₀] [A; A₀]."""
    a, b, scale = m.factors()
    if m.init not in CHANGE_W:
        return m.r, {}
    a0, b0, scale0 = m.initial
    wide = torch.promote_types(
        a.dtype, a0.dtype if scale0 == scale else torch.float32
    )  # the layer may have been cast since
    a, b, a0, b0 = (t.to(a.device, wide) for t in (a, b, a0, scale0 / scale * b0.to(wide)))
    return 2 * m.r, {"lora_A.weight": torch.cat([a, a0]), "lora_B.weight": torch.cat([b, -b0], 1)}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapters of a model's FusedLoRALinear layers as a PEFT folder that PeftModel.from_pretrained loads.

    It is an adapter of the base model as it was before. Layers of the inits "pissa" and "olora", which change W, become LoRA
    of twice their rank: equal up to rounding in float32, and over a 16-bit W up to the rounding of W - scaling · B₀ A₀ to 16
    bit, which only the layer has. Of train_bias layers the bias is in the folder (bias="lora_only", which has the biases of
    the others as they are). Layers of rank 0 are left out. Neither enabled nor merged is of the adapter.

    Refused with a ValueError before anything is written: use_rslora, use_dora or lora_dropout that differ between layers, of
    which PEFT has one; "pissa" and "olora" above rank 256, or where another W was loaded since; what is not finite; a
    train_bias layer of rank 0; a layer without a name or at two places; and none at all.
    """
    write_adapter(folder, *as_folder("lrkern.peft.save_adapter", model))


def as_folder(
    who: str, model: nn.Module, modules_to_save: Sequence[str] | None = None
) -> tuple["peft.LoraConfig", dict[str, Tensor]]:
    """What ``save_adapter`` writes, for ``write_adapter``; modules_to_save as the config is to name them."""
    with extra(who):
        import peft

    modules = _modules(model)
    check_places(who, model, FusedLoRALinear)
    with refusal(f"{who}: "):
        modules, every = plainly(modules), plainly(dict(model.named_modules()))
        layers = {name: m for name, m in modules.items() if m.r}
        require(layers, f"a layer must have a rank above 0, got {len(modules)} of rank 0")
        for name, m in modules.items():
            require(
                m.r or not m.train_bias, f"{name} must have a rank above 0 or no train_bias: PEFT has no such layer"
            )
        first = next(iter(layers.values()))
        for key in ("use_rslora", "use_dora", "lora_dropout"):
            values = list(dict.fromkeys(getattr(m, key) for m in layers.values()))
            got = "both" if type(values[0]) is bool else f"{values[0]} and {values[-1]}"
            require(len(values) == 1, f"one PEFT folder has one {key} for all layers, got {got}")
        tensors: dict[str, Tensor] = dict(_in_file(layers))
        ranks = {}
        for name, m in layers.items():
            _check_init(name, m)
            r, factors = _over_w(m)
            tensors |= {_key(name, k): t for k, t in factors.items()}
            ranks[name] = r, _alpha(m, r)
        if bias := any(m.train_bias for m in layers.values()):
            with_bias = {name: b for name, m in layers.items() if (b := _bias(m)) is not None}
            tensors |= {_bias_key(name): b for name, b in with_bias.items()}
        for key, t in tensors.items():
            check_finite(key, t)
    one = {key: getattr(first, key) for key in ("use_rslora", "use_dora", "lora_dropout")}
    settings = lora_config(ranks, every, **one, bias="lora_only" if bias else "none")
    del settings["peft_type"]
    return peft.LoraConfig(**settings | {"modules_to_save": modules_to_save}), tensors


def _check_init(name: str, m: FusedLoRALinear) -> None:
    if m.init not in CHANGE_W:
        return
    changed = f"{name} was made with init={m.init!r}, which changed W"
    lost = "another W was loaded since, so that what the init took out of it is not known"
    require(m.initial is not None, f"{changed}: {lost}; save the layer that was trained, or its state_dict")
    most = f"a LoRA over the original W has rank {2 * m.r}, at most {MAX_RANK}"
    require(2 * m.r <= MAX_RANK, f"{changed}: {most}")
    require(m.scaling != 0, f"{changed}: its scaling must not be 0")


def _alpha(m: FusedLoRALinear, r: int) -> float:
    """The lora_alpha that gives the layer's scaling, which may have been written, at this rank."""
    if r == m.r and lora_scaling(m.lora_alpha, r, m.use_rslora) == m.scaling:
        return m.lora_alpha
    return m.scaling * (math.sqrt(r) if m.use_rslora else r)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Loads a PEFT LoRA folder, or one of diffusers', into a model's FusedLoRALinear layers, whatever names its keys have
    (``names.as_peft``). The whole file is checked before anything changes: safetensors only, every layer present, nothing left
    over, shapes and scale equal, values finite in the layer's dtype.

    Layers of the inits "pissa" and "olora", whose W is changed, take back what ``save_adapter`` wrote of such a layer over the
    same W; a folder of another kind, and one that PEFT did not convert, is refused, and so is a merged layer. lora_dropout
    stays the layer's own, and a bias that does not train must be the file's where that has it.
    """
    modules = _modules(model)
    with refusal(f"lrkern.peft.load_adapter: {named(str(folder))}: ", "; the model is unchanged"):
        for name, m in modules.items():
            require(not m.merged, f"{name} is merged in the model; unmerge() it first")
        config, tensors = as_peft(*read_adapter(folder), model)
        new = values(config, tensors, modules)
    with torch.no_grad():
        for weight, value in new:
            weight.copy_(value)


def described(config: Config, tensors: Tensors, linears: Sizes) -> dict[str, dict[str, Any]]:
    """By linear the settings of the FusedLoRALinear that a folder holds for it."""
    check_config(config)
    ab = "lora_A.weight", "lora_B.weight"
    names = by_linear(config, {k: t for k, t in tensors.items() if k.endswith(ab)}, linears, *ab)
    one = {key: bool(config.get(key)) for key in ("use_rslora", "use_dora")} | {
        "dropout": config.get("lora_dropout") or 0.0
    }
    return {
        name: {"r": r, "lora_alpha": alpha, "train_bias": _bias_key(name) in tensors, **one}
        for name, (r, alpha) in ranks_and_alphas(config, names).items()
    }


def values(config: Config, tensors: Tensors, modules: Layers) -> list[tuple[Tensor, Tensor]]:
    """The parameters of layers and what a folder says they are to be. The whole folder is checked."""
    check_config(config)
    kind, bias = peft_type(config), config.get("lora_bias")
    got = f"peft_type={shown(kind)}, lora_bias={shown(bias)}"
    require(kind == LORA and not bias, f"must be LoRA or DoRA, got {got}")
    check_base(config)
    for key in MORE:
        require(not config.get(key), f"{key} must be off, got {shown(config.get(key))}")
    layers = {name: m for name, m in modules.items() if m.r}
    parameters = _in_file(modules)
    frozen = {_bias_key(name): _bias(m) for name, m in modules.items() if not m.train_bias}
    there = frozen.keys() & tensors.keys()
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise ValueError(f"lacks {missing[0]} and {len(missing) - 1} more")
    if extra := sorted(tensors.keys() - parameters.keys() - there):
        raise ValueError(f"has {named(extra[0])} and {len(extra) - 1} more that the model does not")
    new, scaled = dict(tensors), ranks_and_scalings(config, layers)
    for name, m in layers.items():
        r, scaling = scaled[name]
        twice, dora = m.init in CHANGE_W, bool(config.get("use_dora"))
        want = f"r={2 * m.r if twice else m.r}, scaling={m.scaling:g}"
        after = f" (twice its own: init={m.init!r})" if twice else ""
        same = r == m.r * (2 if twice else 1) and math.isclose(scaling, m.scaling)
        require(same, f"{name} must have {want}{after}, got r={r}, scaling={scaling:g}")
        require(dora == m.use_dora, f"{name} must have use_dora={m.use_dora}, got {dora}")
        if twice:
            new |= _first_half(name, m, tensors)
    for key, weight in parameters.items():
        check_shape(key, new[key], weight.shape)
        check_finite(key, new[key])
        check_finite(f"{key} in {weight.dtype}", new[key].to(weight.dtype))
    for key in there:
        own = frozen[key]
        same = own is not None and own.shape == new[key].shape and torch.equal(own, new[key].to(own))
        require(same, f"{key} must be the model's, where it does not train (train_bias), got another")
    return [(weight, new[key]) for key, weight in parameters.items()]


def _first_half(name: str, m: FusedLoRALinear, tensors: Tensors) -> dict[str, Any]:
    """A and B of [A; A₀] and [B, -B₀], where A₀ and B₀ took the same out of W as this layer's did."""
    require(
        m.initial is not None, f"{name} was made with init={m.init!r} and another W was loaded since: its W is unknown"
    )
    a, b = (tensors[_key(name, f"lora_{x}.weight")] for x in "AB")
    check_shape(_key(name, "lora_A.weight"), a, (2 * m.r, m.in_features))
    check_shape(_key(name, "lora_B.weight"), b, (m.out_features, 2 * m.r))
    (a, a0), (b, b0) = a.split(m.r), b.split(m.r, 1)
    mine = m.initial.scale / m.scaling * m.initial.b.float() @ m.initial.a.float()
    same = (mine + b0.float() @ a0.float()).abs().max() <= 1e-4 * mine.abs().max()
    what = f"the layer was made with init={m.init!r}, which changed W"
    require(same, f"{name} must have in its second half what the init took out of W, got something else: {what}")
    return {_key(name, "lora_A.weight"): a, _key(name, "lora_B.weight"): b}
