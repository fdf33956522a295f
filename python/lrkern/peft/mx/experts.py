# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA over gpt-oss' experts in MXFP4, ``nn.MXFP4Experts``: in its adapters, configs and files like any other layer."""

import math
import warnings
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ... import ops
from ...limits import MAX_RANK
from ...nn import MXFP4Experts
from ..layer import WRAPPERS

_LAYERS = ("gate_up", "down")


class Factors(nn.Module):
    """A or B of one adapter, of both layers of every expert."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))


class LoraOverExperts(nn.Module, LoraLayer):
    """A LoRA of rank r over gate_up_proj and down_proj of each expert: lora_A.gate_up [E, r, H], lora_B.gate_up [E, 2 N, r],
    lora_A.down [E, r, N], lora_B.down [E, H, r] under an adapter's name, float32; the base has none of its own (r=0).

    Several active adapters add up. Refused with a ValueError: dropout, DoRA and every other variant, biases, inits other than True, False
    and "gaussian", ranks above 512, and a batch of several adapters (adapter_names=).
    """

    _before: dict[str, Tensor] | None = None  # the base's bytes, while an adapter is merged

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: peft.LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        if base_layer.r:
            must = "experts under PEFT's LoRA must have none of their own"
            raise ValueError(f"lrkern.peft: {must}, got MXFP4Experts with r={base_layer.r}; make them with r=0")
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.hidden_size, module.hidden_size

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        got = {name: getattr(config, name) for name in ("lora_dropout", "lora_bias", "fan_in_fan_out")}
        refused = [f"{name}={value!r}" for name, value in got.items() if value]
        if config.init_lora_weights not in (True, False, "gaussian"):
            refused.append(f"init_lora_weights={config.init_lora_weights!r}")
        if not 1 <= r <= MAX_RANK:
            refused.append(f"r={r}")
        if refused:
            must = f"experts in MXFP4 must have a plain LoRA of rank 1 to {MAX_RANK} without dropout and biases"
            raise ValueError(f"lrkern.peft: {must}, got {', '.join(refused)}")
        self.resolve_lora_variant(config=config)  # PEFT's refusal of DoRA and the like
        base = self.get_base_layer()
        E, H, N, device = base.num_experts, base.hidden_size, base.intermediate_size, base.gate_up_proj_blocks.device
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name], self.lora_bias[adapter_name] = (
            config.use_rslora,
            False,
            False,
        )
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = Factors({"gate_up": (E, r, H), "down": (E, r, N)}, device)
        self.lora_B[adapter_name] = Factors({"gate_up": (E, 2 * N, r), "down": (E, H, r)}, device)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """As PEFT's of each expert by itself; False leaves B random too."""
        r = self.r[adapter_name]
        for a in self.lora_A[adapter_name].parameters():
            bound = 1 / math.sqrt(a.shape[2])
            a.normal_(std=1 / r) if init_lora_weights == "gaussian" else a.uniform_(-bound, bound)
        if init_lora_weights is False:
            for b in self.lora_B[adapter_name].parameters():
                b.uniform_(-(bound := 1 / math.sqrt(r)), bound)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor, **kwargs: Any) -> Tensor:
        if kwargs:
            must = "experts in MXFP4 run one choice of adapters a batch"
            raise ValueError(f"lrkern.peft: {must}, got {', '.join(map(repr, kwargs))}")
        base = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        still = self.disable_adapters or self.merged
        names = [] if still else [name for name in self.active_adapters if name in self.lora_A]
        return (self._adapted(base, names) if names else base)(hidden_states, router_indices, routing_weights)

    def _adapted(self, base: MXFP4Experts, names: list[str]) -> MXFP4Experts:
        """The experts with these adapters as their own: all else is shared. Several are one of their ranks' sum, scales in B."""
        factors = {}
        for layer in _LAYERS:
            a, b = ([getattr(of[name], layer) for name in names] for of in (self.lora_A, self.lora_B))
            if len(names) > 1:
                b = [factor * self.scaling[name] for factor, name in zip(b, names, strict=True)]
                a, b = [torch.cat(a, 1)], [torch.cat(b, 2)]
            factors |= {f"{layer}_lora_A": a[0], f"{layer}_lora_B": b[0]}
        adapted = object.__new__(type(base))
        adapted.__dict__ = base.__dict__ | {"_parameters": base._parameters | factors}
        adapted.__dict__ |= {
            "r": sum(self.r[name] for name in names),
            "scaling": self.scaling[names[0]] if len(names) == 1 else 1.0,
        }
        return adapted

    def _why(self) -> None:
        """For the report: it runs on lrkern, patched or not."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W before the first merge and the changes of all merged adapters are summed in float32 and rounded to MXFP4 once, with a warning;
        ``unmerge`` puts the very bytes back. ValueError, and nothing changes, where a sum is not finite."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        before = self._before or {name: t.clone() for name, t in base.named_buffers()}
        merged = {name: torch.empty_like(t) for name, t in before.items()}
        for layer in _LAYERS:
            blocks, scales = (f"{layer}_proj_{kind}" for kind in ("blocks", "scales"))
            factors = [
                (getattr(self.lora_A[name], layer), getattr(self.lora_B[name], layer), self.scaling[name])
                for name in [*self.merged_adapters, *names]
            ]
            features = factors[0][0].shape[2]
            for e in range(base.num_experts):
                w = ops.mx_dequantize(before[blocks][e].flatten(1), before[scales][e], features, torch.float32)
                for a, b, scale in factors:
                    w.addmm_(b[e].float(), a[e].float(), alpha=scale)
                if not w.isfinite().all():
                    must = f"merge must leave {layer}_proj of expert {e} finite"
                    raise ValueError(f"lrkern.peft: {must}, got inf or nan; nothing is changed")
                codes, found, _ = ops.mx_quantize(w)
                merged[blocks][e], merged[scales][e] = codes.view_as(merged[blocks][e]), found
        _put(base, merged)
        self._before = before
        self.merged_adapters.extend(names)
        warnings.warn(
            "lrkern.peft: merging into experts in MXFP4 rounds W + ΔW to 4 bits, so that the merged model is not quite the adapted one",
            stacklevel=2,
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._before is not None:
            _put(self.get_base_layer(), self._before)
        self._before = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _put(experts: MXFP4Experts, values: dict[str, Tensor]) -> None:
    for name, kept in experts.named_buffers():
        kept.copy_(values[name])


WRAPPERS[MXFP4Experts] = LoraOverExperts
