# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: adapter_config.json and adapter_model.safetensors, and what their words mean."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..functional import lora_scaling
from .check import refusal, require

if TYPE_CHECKING:
    import peft

UNREADABLE = SafetensorError, OSError, ValueError  # what reading a file may raise

Config = Mapping[str, Any]  # of adapter_config.json
Tensors = Mapping[str, Tensor]  # by their key in the file

PREFIX = "base_model.model."
LORA = "LORA"  # the peft_type of what FusedLoRALinear computes


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what stands at ``path`` once the block has ended without an error: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with safe_open(path, "pt") as f:
        return f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, not a dict


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a PEFT folder, as they are. A ValueError says why where they cannot be read."""
    path, config_path = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
    pickled = "pickle files such as adapter_model.bin are not read"
    require(path.is_file(), f"must hold adapter_model.safetensors ({pickled})")
    with refusal("cannot be read: ", of=UNREADABLE):
        _, tensors = read_tensors(path)
        config = json.loads(config_path.read_text())
    require(isinstance(config, dict), f"adapter_config.json must hold an object, got {type(config).__name__}")
    return config, tensors


def write_adapter(folder: str | Path, config: "peft.PeftConfig | dict[str, Any]", tensors: Tensors) -> None:
    """Writes a PEFT folder; a config may be what ``read_adapter`` gave."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "adapter_model.safetensors") as path:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})
        if isinstance(config, dict):
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        else:
            config.save_pretrained(str(folder))


def peft_type(config: Config) -> Any:
    """Of a config as the file has it, or as PEFT's ``to_dict`` gives it."""
    return getattr(config.get("peft_type"), "value", config.get("peft_type"))


def rank_and_scaling(config: dict[str, Any], name: str) -> tuple[int, float]:
    """Of a layer, as PEFT reads rank_pattern and alpha_pattern: a key is a regex of the name or of its end after a dot."""
    from peft.utils.other import get_pattern_key  # here, for those who write folders without PEFT

    def of(key: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        require(isinstance(patterns, dict), f"{pattern} must be an object, got {patterns!r}")
        return patterns.get(get_pattern_key(patterns, name), config.get(key))

    r, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
    require(type(r) is int and r >= 0, f"r of {name} must be a whole number, got {r!r}")
    finite = type(alpha) in (int, float) and math.isfinite(alpha)
    require(finite, f"lora_alpha of {name} must be a finite number, got {alpha!r}")
    return r, lora_scaling(alpha, r, bool(config.get("use_rslora")))


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """[I, O] of a linear of any kind: nn.Linear, a quantised one, transformers' Conv1D. Not the one inside
    nn.MultiheadAttention, whose forward nobody calls."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    i, o = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    I, O = getattr(module, i, None), getattr(module, o, None)
    return (I, O) if isinstance(I, int) and isinstance(O, int) else None
