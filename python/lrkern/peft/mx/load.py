# SPDX-License-Identifier: Apache-2.0
"""Models whose files hold weights in MXFP4, loaded as they are: gpt-oss, and what ``quantize`` made and ``save_pretrained`` wrote.

transformers runs such files by Triton kernels, or dequantises them, and marks them as not to be trained. This is another quantiser for
them, by its own hooks (``register_quantizer``): packed bytes stay packed, and adapters over them train.
"""

import copy
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...limits import DTYPES
from ...nn import MXFP4Experts, MXFP4Linear

METHOD = "lrkern_mxfp4"
_THEIRS = "mxfp4"


@register_quantization_config(METHOD)
class MXFP4Config(QuantizationConfigMixin):
    """Without settings: what is in MXFP4, the file says. Written as transformers' own where it holds gpt-oss' experts alone, so that
    others read the file."""

    def __init__(self, **kwargs: Any):
        self.quant_method, self.written = METHOD, kwargs.get("written", {"quant_method": METHOD})

    def to_dict(self) -> dict[str, Any]:
        return dict(self.written)


@register_quantizer(METHOD)
class MXFP4Quantizer(HfQuantizer):
    is_trainable = True  # adapters over it; the packed weights are buffers

    def is_serializable(self, *_: Any) -> bool:
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "lrkern.peft: MXFP4Config must load weights that are in MXFP4 in their file, got a model without; load it as ever and call "
                "lrkern.peft.quantize(model)"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        kind = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        return None if kind in ("U8", torch.uint8) else dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        there = _headers(checkpoint_files, model.base_model_prefix)
        packed: dict[str, nn.Module] = {}
        for name, m in model.named_modules():
            if type(m).__name__ == "GptOssExperts" and f"{name}.gate_up_proj" not in there:
                sizes = m.num_experts, m.hidden_size, m.intermediate_size
                like = {"device": "meta", "dtype": m.gate_up_proj.dtype}
                packed[name] = MXFP4Experts(*sizes, 0, alpha=m.alpha, limit=m.limit, **like)
            elif type(m) is nn.Linear and f"{name}.weight" not in there and f"{name}.codes" in there:
                sizes = m.in_features, m.out_features, m.bias is not None
                packed[name] = MXFP4Linear(*sizes, device="meta", dtype=m.weight.dtype)
        if not packed:
            raise ValueError(f"lrkern.peft: the file of {type(model).__name__} must have weights in MXFP4, got none")
        for name, m in packed.items():
            for key, kept in m._buffers.items():
                _check(f"{name}.{key}", there, kept.shape)
            for key in m._parameters:
                if f"{name}.{key}" not in there:
                    raise ValueError(f"lrkern.peft: the file must have {name}.{key}, got none")
        for name, m in packed.items():
            model.set_submodule(name, m)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for m in model.modules():
            if isinstance(m, (MXFP4Experts, MXFP4Linear)):
                m.requires_grad_(False)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise NotImplementedError(
            "lrkern.peft: a model in MXFP4 must be dequantised as it is loaded, from_pretrained(folder, "
            "quantization_config=transformers.Mxfp4Config(dequantize=True)) for gpt-oss' files, or by lrkern.peft.dequantize(model) for its "
            "linears, got model.dequantize()"
        )

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict]:
        """On the way to a file: whether others can read it."""
        own = any(isinstance(m, MXFP4Linear) for m in model.modules())
        skip = {"quant_method": _THEIRS, "modules_to_not_convert": _NOT_EXPERTS}
        self.quantization_config.written = {"quant_method": METHOD} if own else skip
        return None, {}


# What transformers' quantiser leaves alone in gpt-oss.
_NOT_EXPERTS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def _headers(files: list[str] | None, prefix: str) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every tensor of the files, by its name with and without the model's prefix."""
    there: dict[str, tuple[str, list[int]]] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"lrkern.peft: weights in MXFP4 must come from safetensors files, got {file}")
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118, no dict
                of = f.get_slice(name)
                said = of.get_dtype(), list(of.get_shape())
                there |= {name: said, name.removeprefix(f"{prefix}."): said, f"{prefix}.{name}": said}
    return there


def _check(name: str, there: dict[str, tuple[str, list[int]]], shape: torch.Size) -> None:
    dtype, got = there.get(name, (None, None))
    if dtype is None or dtype != "U8" or got != list(shape):
        said = "none" if dtype is None else f"{dtype} {got}"
        raise ValueError(f"lrkern.peft: the file must have {name} as U8 {list(shape)}, got {said}")


def load_mxfp4(folder: str, model_class: type = transformers.AutoModelForCausalLM, **kwargs: Any) -> nn.Module:
    """A model of transformers whose file has weights in MXFP4, which stay as the file has them: gpt-oss' experts become
    ``nn.MXFP4Experts``, linears that ``quantize`` packed ``nn.MXFP4Linear``; the rest as ever.

    kwargs: of ``from_pretrained`` (dtype, device_map, config, ...). Adapters go over it as over any model, those of experts and packed
    linears after ``register``:

        model = lrkern.peft.load_mxfp4("openai/gpt-oss-20b", dtype=torch.bfloat16)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "experts"])
        lrkern.peft.register(config, model)
        model = peft.get_peft_model(model, config)

    ``save_pretrained`` of what it returns writes such a folder again: gpt-oss' own where only experts are packed. Raises ValueError before
    a weight is read where the config names another quantisation, the file is none of safetensors, or packed bytes or scales are missing
    or of another dtype or shape.
    """
    config = copy.deepcopy(kwargs.pop("config", None))
    if config is None:
        config = transformers.AutoConfig.from_pretrained(folder, **{k: kwargs[k] for k in _HUB if k in kwargs})
    given = getattr(config, "quantization_config", None) or {}
    given = given if isinstance(given, dict) else given.to_dict()
    method = given.get("quant_method", METHOD)
    if (method := getattr(method, "value", method)) not in (_THEIRS, METHOD):
        raise ValueError(f"lrkern.peft.load_mxfp4: config must name {_THEIRS} or no quantisation, got {method!r}")
    if kwargs.get("dtype", "auto") not in ("auto", None, *DTYPES):
        raise ValueError(f"lrkern.peft.load_mxfp4: dtype must be float32, float16 or bfloat16, got {kwargs['dtype']!r}")
    config.quantization_config = {"quant_method": METHOD}
    return model_class.from_pretrained(folder, config=config, **kwargs)


_HUB = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder")
