# SPDX-License-Identifier: Apache-2.0
"""vLLM's LoRA ops, of which `make peers` keeps vllm/lora/ops in .venv/peers: torch_ops on the CPU, Triton on CUDA.

The rest of vLLM is not there. What the Triton files import from it is given here, with vLLM's defaults.
"""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

PEERS = Path(sys.prefix) / "peers"


def _module(name: str, **attributes) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def _rest_of_vllm() -> None:
    import triton
    import triton.language as tl

    quiet = SimpleNamespace(warning_once=lambda *_: None, info_once=lambda *_: None)
    capability = lambda: 10 * torch.cuda.get_device_capability()[0]
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        has_device_capability=lambda least: capability() >= least,
        is_device_capability=lambda exact: capability() == exact,
    )

    def not_registered(**_):
        raise AttributeError("the plain function is used")  # what lora_shrink_op.py and lora_expand_op.py look for

    _module(
        "vllm.envs",
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=False,
    )
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    _module("vllm.logger", init_logger=lambda _: quiet)
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils")
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    _module("vllm.utils.torch_utils", async_tensor_h2d=torch.tensor, direct_register_custom_op=not_registered)
    # The package's own __init__ would import the mixture-of-experts and FP8 kernels with far more of vLLM.
    _module("vllm.lora.ops.triton_ops", __path__=[str(PEERS / "vllm/lora/ops/triton_ops")])


@cache
def _files(device_type: str) -> tuple[ModuleType, ...]:
    if not (PEERS / "vllm/lora/ops").is_dir():
        raise ImportError("vllm/lora/ops is not in .venv/peers: make peers")
    for name in ("vllm", "vllm.lora"):  # by path, so that the other peers stay off sys.path
        _module(name, __path__=[str(PEERS / name.replace(".", "/"))])
    if device_type == "cpu":
        return (importlib.import_module("vllm.lora.ops.torch_ops"),)
    _rest_of_vllm()
    names = ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")
    return tuple(importlib.import_module(f"vllm.lora.ops.triton_ops.{name}") for name in names)


def add_lora(x: Tensor, a: Tensor, b: Tensor, index: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """Of y [T, O], adds scale * (x A^T) B^T of each row's adapter, in place, as add_lora_linear of vLLM's wrappers does.

    a [A, R, I], b [A, O, R], index [T] int64 with -1 for none. The metadata of a batch, which vLLM makes once for all
    layers, is made here.
    """
    T, A, R = len(x), *a.shape[:2]
    if x.device.type == "cpu":
        (ops,) = _files("cpu")

        def run(y: Tensor) -> Tensor:
            s = torch.zeros(T, R)
            ops.bgmv_shrink(x, a, s, index, scale)
            ops.bgmv_expand_slice(s, b, y, index, 0, y.shape[1], True)
            return y

        return run
    metadata, shrink, expand = _files("cuda")
    meta = metadata.LoRAKernelMeta.make(A, T, x.device)
    meta.prepare_tensors(index.int())

    def run(y: Tensor) -> Tensor:
        s = torch.empty(1, T, R, device=x.device)
        shrink.lora_shrink(x, [a], s, *meta.meta_args(T, False), scale)
        expand.lora_expand(s, [b], y, *meta.meta_args(T, False), offset_start=0, add_inputs=True)
        return y

    return run
