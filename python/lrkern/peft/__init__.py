# SPDX-License-Identifier: Apache-2.0
"""Drop-in for Hugging Face PEFT.

``lrkern.peft.patch(model)`` makes an existing PEFT model run on lrkern, in place; ``register(config, model)`` makes the
layers that PEFT creates from a config fused from the start; ``report(model)`` says what runs, ``unpatch(model)`` undoes it.
``PatchCallback`` does it in transformers' and TRL's trainers.
Both also take AdaLoRA layers, VeRA and RandLoRA layers, with the projections that PEFT stores, and MiSS layers.

A LoRA layer over an exact nn.Linear runs as one op. Over any other base layer (bitsandbytes, GPTQ, AWQ, torchao, ...) the
base runs untouched and lrkern adds the low-rank part. DoRA is fused over both. What a layer does is decided in every call
from the layer as it then is (``layer.Patched``); what is not fused runs PEFT's own forward. Only a layer's class changes:
parameters, state_dict, configs and files stay PEFT's, and nothing in PEFT is monkeypatched.

``quantize(model)`` turns the base of a PEFT model into MXFP4 in place, 4.25 bits an element, and ``dequantize(model)`` into dense
layers again (``peft.mx``). ``load_mxfp4(folder)`` loads a model whose file is in MXFP4, as gpt-oss' is, and leaves it packed; experts
take LoRA as linears do (``peft.mx.experts``).

``patch(model, mixed_training=True)``: PEFT's mixed batches, adapter_names=, may also train, several adapters at once.

Adapter files of lrkern's own modules: ``save_adapter`` and ``load_adapter`` write and read PEFT's format (safetensors
only).
"""

from ..extras import extra

with extra("lrkern.peft"):
    import safetensors  # noqa: F401, first: without it PEFT fails in words of its own

    # isort: split
    import peft  # noqa: F401

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..files.folder import rank_and_scaling, read_adapter, write_adapter  # noqa: F401
from ..files.lora import load_adapter, save_adapter
from ..nn.linear import AdapterLinear
from .layer import KINDS, Patched, Swapped, cannot_patch, patch_layer, swap_back

# isort: off
from .lora import FusedLora as _Fused, _create  # noqa: F401, for pickles of 0.1
from .vera import FusedVera  # noqa: F401, the kinds of layers in the order that messages name them
from .randlora import FusedRandLora  # noqa: F401
from .miss import FusedMiss  # noqa: F401
from .adalora import FusedAdaLora  # noqa: F401

# isort: on
from .lora.mixed import allow_training
from .mx import Quantized, dequantize, quantize, quantized
from .mx.experts import LoraOverExperts
from .mx.load import load_mxfp4
from .sharded import gathered
from .summary import Report
from .trainer import PatchCallback
from .waiting import register

__all__ = [
    "PatchCallback",
    "Quantized",
    "Report",
    "dequantize",
    "load_adapter",
    "load_mxfp4",
    "patch",
    "quantize",
    "quantized",
    "register",
    "report",
    "save_adapter",
    "unpatch",
]


def _is_model(model: nn.Module, who: str) -> None:
    if not isinstance(model, nn.Module):
        got = "None" if model is None else f"a {type(model).__name__}"
        raise TypeError(f"lrkern.peft.{who}: model must be a PEFT model, an nn.Module, got {got}")


def _layers(model: nn.Module, who: str) -> dict[str, BaseTunerLayer]:
    _is_model(model, who)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, tuple(KINDS))}
    if not layers:
        first, *others = (kind._method for kind in KINDS.values())
        must = f"model must have PEFT {first} layers (or {', '.join(others)})"
        raise ValueError(f"lrkern.peft.{who}: {must}, got {type(model).__name__} with {_instead(model)}")
    return layers


def _instead(model: nn.Module) -> str:
    """What a model has in place of layers to patch."""
    modules = list(model.modules())
    if others := sorted({type(m).__module__.split(".")[-2] for m in modules if isinstance(m, BaseTunerLayer)}):
        return f"none, but layers of PEFT's {', '.join(others)}"
    if any(isinstance(m, AdapterLinear) for m in modules):
        return "layers of lrkern.nn, which are fused as they are"
    return "none; get_peft_model comes first"


def patch(model: nn.Module, mixed_training: bool = False) -> Report:
    """Makes the LoRA, AdaLoRA, VeRA, RandLoRA and MiSS linears of a PEFT model run on lrkern, in place, and reports per layer.

    mixed_training: ``adapter_names=`` is taken while the model trains too, where PEFT raises: a batch trains those of its
    adapters that require gradients. Without it PEFT's refusal stays.
    """
    layers = _layers(model, "patch")
    if mixed_training:
        allow_training(model)
    for layer in layers.values():
        patch_layer(layer)
    return report(model)


def report(model: nn.Module) -> Report:
    """What each adapted layer of the model would do if it were called now, with what FSDP has sharded gathered. Changes
    nothing, and asks nothing of other processes."""
    layers = _layers(model, "report").items()
    with gathered(model):
        return Report(
            {
                n: m._why() if isinstance(m, (Patched, LoraOverExperts)) else cannot_patch(m) or "not patched"
                for n, m in layers
            }
        )


def unpatch(model: nn.Module) -> None:
    """Gives everything that ``patch`` or ``register`` took its PEFT class back."""
    _is_model(model, "unpatch")
    swapped = [m for m in model.modules() if isinstance(m, Swapped)]
    for m in swapped:
        if "_lrkern_base" not in type(m).__dict__:  # such as FSDP2's own subclass of a layer
            raise RuntimeError(f"lrkern.peft.unpatch: {type(m).__name__} was made of a patched layer, undo that first")
    for m in swapped:
        swap_back(m)
