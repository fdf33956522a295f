# SPDX-License-Identifier: Apache-2.0
"""Drop-in for Hugging Face PEFT: ``lrkern.peft.patch(model)`` makes an existing PEFT model run on lrkern, in place.

A layer is fused where its forward is y = base(x) + scaling · B(A(dropout(x))) over a plain nn.Linear; any other one runs
PEFT's own code. Only a layer's class changes: parameters, state_dict, configs and files stay PEFT's. Nothing in PEFT is
monkeypatched.

Adapter files of lrkern's own modules: ``save_adapter`` and ``load_adapter`` write and read PEFT's format (safetensors
only).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import functional as F
from .nn import FusedLoRALinear

__all__ = ["Report", "load_adapter", "patch", "save_adapter", "unpatch"]

_DROPOUTS = (nn.Dropout, nn.Identity)
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _FusedLinear(LoraLinear):
    """peft's lora.Linear with a fused forward. Only ``patch`` makes one, by swapping a layer's class."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        plan = "called with more than x" if args or kwargs else _plan(self)
        if isinstance(plan, str) or (x.dtype != plan[0].dtype and not torch.is_autocast_enabled(x.device.type)):
            return super().forward(x, *args, **kwargs)
        return F.lora_linear(x, *plan)


_FusedLinear.__name__ = "Linear"  # repr stays PEFT's, "lora.Linear"


def _plan(layer: LoraLinear) -> "tuple[Tensor, Tensor | None, Tensor, Tensor, float, float, bool] | str":
    """The arguments of functional.lora_linear after x, or why this layer must run PEFT's own forward."""
    if layer.disable_adapters or layer.merged_adapters:
        return "adapters disabled or merged"
    modules = layer._modules  # nn.Module.__getattr__ is the slow way, and this runs on every call
    a_of, b_of = modules["lora_A"]._modules, modules["lora_B"]._modules
    active = [name for name in layer.active_adapters if name in a_of]
    if len(active) != 1:
        return f"{len(active)} active adapters on this layer, fused with 1"
    (name,) = active
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    base, a, b, dropout = modules["base_layer"], a_of[name], b_of[name], modules["lora_dropout"]._modules[name]
    if type(base) is not nn.Linear or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"base layer {type(base).__name__}, fused over an exact nn.Linear"
    weight, wa, wb = base._parameters["weight"], a._parameters["weight"], b._parameters["weight"]
    if type(weight) not in _PLAIN:
        return f"base weight {type(weight).__name__}"
    dtype = weight.dtype
    if dtype not in _DTYPES:
        return f"base dtype {dtype}"
    if wa.dtype != wb.dtype or wa.dtype not in (dtype, torch.float32):
        return f"factors of dtype {wa.dtype}, {wb.dtype} over a base of {dtype}"
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return "lora_bias"
    if type(dropout) not in _DROPOUTS:
        return f"dropout {type(dropout).__name__}"
    if wa.shape[0] > 512:
        return f"rank {wa.shape[0]}, fused up to 512"
    for m in (base, a, b, dropout):
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or "forward" in m.__dict__:
            return "hooks on an inner module"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return weight, base._parameters["bias"], wa, wb, float(layer.scaling[name]), p, True


@dataclass
class Report:
    """Per LoRA layer its name and None (fused) or the reason why PEFT's own code runs."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> int:
        return sum(why is None for why in self.layers.values())

    def __str__(self) -> str:
        lines = [f"lrkern: {self.fused} of {len(self.layers)} LoRA layers fused"]
        return "\n".join(lines + [f"  {name}: PEFT's own code, {why}" for name, why in self.layers.items() if why])


def patch(model: nn.Module) -> Report:
    """Makes every LoRA linear of a PEFT model that can be fused run on lrkern, in place, and reports per layer."""
    layers: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.layer.LoraLayer):
            continue
        if type(module) not in (LoraLinear, _FusedLinear):
            layers[name] = f"{type(module).__name__} is not fused"
            continue
        module.__class__ = _FusedLinear
        plan = _plan(module)
        layers[name] = plan if isinstance(plan, str) else None
    if not layers:
        raise ValueError(f"lrkern.peft.patch: model must have PEFT LoRA layers, got {type(model).__name__} with none")
    return Report(layers)


def unpatch(model: nn.Module) -> None:
    """Gives every layer that ``patch`` took its PEFT class back."""
    for module in model.modules():
        if type(module) is _FusedLinear:
            module.__class__ = LoraLinear


# ---------------------------------------------------------------------------------------------------- adapter files

_PREFIX = "base_model.model."


def _lora_modules(model: nn.Module) -> dict[str, FusedLoRALinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    if not found:
        raise ValueError(f"lrkern.peft: model must have FusedLoRALinear layers, got {type(model).__name__} with none")
    return found


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the factors of a model's FusedLoRALinear layers as a PEFT folder that PeftModel.from_pretrained loads."""
    modules = _lora_modules(model)
    first = next(iter(modules.values()))
    tensors = {}
    for name, m in modules.items():
        for key in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{key}.weight"] = getattr(m, key).weight.detach().cpu().contiguous()
    if any(m.use_rslora != first.use_rslora for m in modules.values()):
        raise ValueError("lrkern.peft.save_adapter: one PEFT folder has one use_rslora for all layers, got both")
    config = peft.LoraConfig(
        r=first.r,
        lora_alpha=first.lora_alpha,
        lora_dropout=first.lora_dropout,
        use_rslora=first.use_rslora,
        target_modules=sorted(modules),
        rank_pattern={name: m.r for name, m in modules.items() if m.r != first.r},
        alpha_pattern={name: m.lora_alpha for name, m in modules.items() if m.lora_alpha != first.lora_alpha},
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "adapter_model.safetensors.partial"  # a reader never meets half a file
    save_file(tensors, partial, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    partial.replace(folder / "adapter_model.safetensors")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Loads a PEFT LoRA folder into a model's FusedLoRALinear layers. The whole file is checked before anything changes:
    safetensors only, every layer present, nothing left over, shapes and scale equal, values finite."""
    folder = Path(folder)
    modules = _lora_modules(model)

    def bad(text: str) -> ValueError:
        return ValueError(f"lrkern.peft.load_adapter: {folder}: {text}; the model is unchanged")

    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not path.is_file():
        raise bad("must hold adapter_model.safetensors (pickle files such as adapter_model.bin are not read)")
    try:
        with safe_open(path, "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, not a dict
        config = json.loads(config_path.read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise bad(f"cannot be read: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        raise bad(f"must be plain LoRA, got peft_type={config.get('peft_type')}, use_dora={config.get('use_dora')}")
    expected = {
        f"{_PREFIX}{n}.{k}.weight": (m, getattr(m, k).weight) for n, m in modules.items() for k in ("lora_A", "lora_B")
    }
    if missing := sorted(expected.keys() - tensors.keys()):
        raise bad(f"lacks {missing[0]} and {len(missing) - 1} more")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise bad(f"has {extra[0]} and {len(extra) - 1} more that the model does not")
    for name, m in modules.items():
        r = _pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        if r != m.r or not math.isclose(scaling, m.scaling):
            raise bad(f"{name} must have r={m.r}, scaling={m.scaling:g}, got r={r}, scaling={scaling:g}")
    for key, (_, weight) in expected.items():
        if tensors[key].shape != weight.shape:
            raise bad(f"{key} must have shape {list(weight.shape)}, got {list(tensors[key].shape)}")
        if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            raise bad(f"{key} must be finite floats")
    with torch.no_grad():
        for key, (_, weight) in expected.items():
            weight.copy_(tensors[key])


def _pattern(pattern: dict[str, float] | None, name: str, default: float) -> float:
    """PEFT matches a pattern's key against the whole name or its tail after a dot."""
    for key, value in (pattern or {}).items():
        if name == key or name.endswith("." + key):
            return value
    return default
