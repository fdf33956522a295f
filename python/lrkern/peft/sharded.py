# SPDX-License-Identifier: Apache-2.0
"""What a forward finds where FSDP keeps shards of the parameters between forwards."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, sharded parameters of the model have the type, shape and dtype that FSDP gives them for a forward, and no values:
    to really gather them takes all processes."""
    swapped = []
    try:
        for module, name, shape, dtype in _sharded(model):
            if (p := module._parameters.get(name)) is not None:
                swapped.append((module, name, p))
                whole = torch.empty(shape, dtype=dtype, device="meta")
                module._parameters[name] = nn.Parameter(whole, p.requires_grad)
        yield
    finally:
        for module, name, p in reversed(swapped):
            module._parameters[name] = p


def _sharded(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Size, torch.dtype]]:
    """module, name, shape and dtype. torch tells no one how it shards: these are its own records, in 2.11 and after."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for m in model.modules() if fsdp else ():  # who has not imported it has sharded nothing
        if isinstance(m, fsdp.FSDPModule):
            state = m._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for p in (p for group in groups if group for p in group.fsdp_params):
                local = getattr(p.sharded_param, "_local_tensor", None)
                if p.is_dtensor or type(local) is not Tensor:  # gathered, it is still of a subclass
                    continue
                low = p.mp_policy.param_dtype if local.is_floating_point() else None
                info = p._module_info
                for module, name in (
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names, strict=True),
                ):
                    yield module, name, p.sharded_param.shape, low or p.sharded_param.dtype
        elif isinstance(m, fsdp.FullyShardedDataParallel) and m._handle is not None and m._handle._use_orig_params:
            flat, dtype = m._handle.flat_param, m._handle._fwd_bwd_param_dtype
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                yield info.module, info.param_name, shape, dtype
