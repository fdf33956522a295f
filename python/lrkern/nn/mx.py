# SPDX-License-Identifier: Apache-2.0
"""Frozen layers whose weights are in MXFP4, 4.25 bits an element: a linear one, a base for adapters, and gpt-oss' experts with LoRA."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import ops
from ..limits import DTYPES, MAX_RANK, PAGE
from ..ops.mx import BLOCK, RULES
from .plain import no_linear

_KEYS = {"codes": "weight_blocks", "scales": "weight_scales"}  # and how transformers names what it keeps of a weight


class MXFP4Linear(nn.Module):
    """y = x Wᵀ + bias with W [out, in] in MXFP4 (OCP Microscaling Formats 1.0), frozen; ``ops.mx_linear``.

    x [..., in] is float32, float16 or bfloat16 and y has its dtype; W is exact in each product, the bias is cast. Gradients are those of x
    and, where it requires one, of the bias. Backward reads the same bytes as forward: nothing of W's size is kept.

    Buffers: codes uint8 [out, 16 G] and scales uint8 [out, G], G = ceil(in / 32), that no ``.to(dtype)`` touches; bias [out] or None. They
    are the state_dict's keys, and ``load_state_dict`` takes weight_blocks [out, G, 16] and weight_scales [out, G] too, as transformers
    keeps the weights of gpt-oss. There is no ``weight``: whoever would write to a dense copy of W would change nothing.

    Args:
        in_features, out_features, bias, device: as nn.Linear. W and bias are zeros, to be loaded.
        dtype: in which W was, and is again where nobody says otherwise; ``.to(dtype)`` changes it.
        rule: how a W that is written is scaled, see ``ops.mx_quantize``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rule: str = "even",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"MXFP4Linear: dtype must be float32, float16 or bfloat16, got {dtype!r}")
        if rule not in RULES:
            raise ValueError(f"MXFP4Linear: rule must be one of {list(RULES)}, got {rule!r}")
        self.in_features, self.out_features, self.dtype, self.rule = in_features, out_features, dtype, rule
        blocks = -(-in_features // BLOCK)
        for name, size in (("codes", 16 * blocks), ("scales", blocks)):
            self.register_buffer(name, torch.zeros(out_features, size, dtype=torch.uint8, device=device))
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rule: str = "even") -> "MXFP4Linear":
        """Of an existing layer, which stays as it is: W is quantised, the bias used as it is and not copied.

        Raises TypeError for what is no nn.Linear or has another kind of weight (quantised, sharded), ValueError for an unknown rule, a
        dtype that is none of the three, or a W with inf or nan.
        """
        if got := no_linear(linear):
            raise TypeError(f"{cls.__name__}.from_linear: linear must be an nn.Linear with a plain weight, got {got}")
        w, sizes = linear.weight, (linear.in_features, linear.out_features)
        self = cls(*sizes, False, rule=rule, device="meta", dtype=w.dtype)
        self.codes, self.scales = self._packed(w, "from_linear")
        self.bias = linear.bias
        return self

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        in_features: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "MXFP4Linear":
        """Of a weight as transformers keeps those of gpt-oss: blocks uint8 [out, G, 16], low nibble first, and scales uint8 [out, G], one
        expert's at a time. in_features: 32 G where None. The tensors are used as they are."""
        if blocks.ndim != 3 or blocks.shape[2] != BLOCK // 2:
            raise ValueError(
                f"{cls.__name__}.from_blocks: blocks must have shape [out, G, 16], got {list(blocks.shape)}"
            )
        out, count, _ = blocks.shape
        features = BLOCK * count if in_features is None else in_features
        if -(-features // BLOCK) != count:
            must = f"in_features must lie in ({BLOCK * (count - 1)}, {BLOCK * count}]"
            raise ValueError(f"{cls.__name__}.from_blocks: {must}, got {in_features}")
        if bias is not None and bias.shape != (out,):
            raise ValueError(f"{cls.__name__}.from_blocks: bias must have shape [{out}], got {list(bias.shape)}")
        self = cls(features, out, False, device="meta", dtype=dtype)
        given = {"codes": blocks.flatten(1), "scales": scales}
        for name, t in given.items():
            if why := self._unlike(name, t):
                raise ValueError(f"{cls.__name__}.from_blocks: {'blocks' if name == 'codes' else name} {why}")
        self.codes, self.scales = given.values()
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return self

    def _packed(self, weight: Tensor, who: str) -> tuple[Tensor, Tensor]:
        if not weight.isfinite().all():
            raise ValueError(f"{type(self).__name__}.{who}: weight must be finite, got inf or nan; nothing is changed")
        codes, scales, _ = ops.mx_quantize(weight.detach(), self.rule)
        return codes, scales

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """W becomes this weight [out, in], rounded to MXFP4 by ``rule``. ValueError where it is not finite."""
        if weight.shape != (self.out_features, self.in_features):
            must = f"weight must have shape {[self.out_features, self.in_features]}"
            raise ValueError(f"{type(self).__name__}.write: {must}, got {list(weight.shape)}")
        for kept, new in zip((self.codes, self.scales), self._packed(weight, "write"), strict=True):
            kept.copy_(new)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in], dense: exact in float32 and bfloat16 but for scales of 2^126 and 2^127, of which large codes overflow. dtype: the
        layer's where None."""
        return ops.mx_dequantize(self.codes, self.scales, self.in_features, self.dtype if dtype is None else dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An nn.Linear of the dequantised W, frozen, in dtype or the layer's; its bias is this one's where that has this dtype."""
        dtype = self.dtype if dtype is None else dtype
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, bias = nn.Parameter(self.dequantize(dtype), False), self.bias
        if bias is not None and bias.dtype != dtype:
            bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
        linear.bias = bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return ops.mx_linear(x, self.codes, self.scales, self._bias(x))

    # What adapters may ask of a base layer, see nn.plain.offers.

    def with_low_rank(self, x: Tensor, s: Tensor, b: Tensor) -> Tensor:
        """x Wᵀ + bias + S Bᵀ in one accumulator, ``ops.mx_linear_expand``; s [..., R] has the scale in it, b [out, R]."""
        return ops.mx_linear_expand(x, self.codes, self.scales, self._bias(x), s, b)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return ops.mx_linear(x, self.codes, self.scales)

    def _bias(self, x: Tensor) -> Tensor | None:
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    @property
    def W_q(self) -> Tensor:
        """The codes, by the name at which PEFT knows that a weight is to be asked for by ``dequantize()`` (DoRA's does)."""
        return self.codes

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} keeps W in codes and scales and has no weight; dequantize() makes one, and "
                "lrkern.peft.dequantize(model) dense layers"
            )
        return super().__getattr__(name)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def _unlike(self, name: str, t: Tensor) -> str | None:
        shape = [self.out_features, self._buffers[name].shape[1]]
        if list(t.shape) == shape and t.dtype == torch.uint8:
            return None
        return f"must be uint8 of {shape} bytes, got {t.dtype} {list(t.shape)}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # An error that is raised, not collected: copy_ would take codes of another dtype, and the bias would be loaded all the same.
        given = dict(state_dict)
        for name, theirs in _KEYS.items():
            if prefix + name not in given and prefix + theirs in given:
                t = given.pop(prefix + theirs)
                given[prefix + name] = t.flatten(1) if name == "codes" and t.ndim == 3 else t
            if (t := given.get(prefix + name)) is not None and (why := self._unlike(name, t)):
                raise RuntimeError(f"{type(self).__name__}: {prefix}{name} {why}; the layer is unchanged")
        super()._load_from_state_dict(given, prefix, *args)

    def extra_repr(self) -> str:
        bits = 8 * (self.codes.numel() + self.scales.numel()) / max(self.out_features * self.in_features, 1)
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, dtype={self.dtype}, {bits:.4g} bits"


class MXFP4Experts(nn.Module):
    """The experts of a gpt-oss layer with their weights in MXFP4, frozen, and a trained LoRA over each: takes the place of transformers'
    GptOssExperts, which it computes as.

        [g, u] = x W1ᵀ + b1 + s · (x A1ᵀ) B1ᵀ, interleaved;  g = min(g, limit), u = clamp(u, ±limit)
        y = Σ over a row's experts: weight · ((u + 1) ⊙ g ⊙ sigmoid(alpha g)) W2ᵀ + b2 + s · (... A2ᵀ) B2ᵀ

    E experts, H features, N of the inner layer. x [T, H] in float32, float16 or bfloat16; router_indices [T, k] of integers below E (on
    CUDA, where values are not validated, another gives a row of NaN), negative for none; routing_weights [T, k]; y [T, H]. Each of the two layers is one ``ops.mx_linear_expand`` by expert, with S from
    ``ops.multi_lora_shrink`` (``ops.mx_linear`` with r = 0): on CUDA up to 16 E rows x k, and 1024, read nothing back, so that a CUDA graph
    replays them. Gradients are those of x, routing_weights, A and B.

    The state_dict has gpt-oss' own keys, so that its files load as they are: gate_up_proj_blocks uint8 [E, 2 N, G, 16],
    gate_up_proj_scales uint8 [E, 2 N, G], gate_up_proj_bias [E, 2 N], down_proj_blocks [E, H, G, 16], down_proj_scales [E, H, G],
    down_proj_bias [E, H]; and what trains, gate_up_lora_A [E, r, H], gate_up_lora_B [E, 2 N, r], down_lora_A [E, r, N], down_lora_B
    [E, H, r], of which B starts at 0.

    Args:
        num_experts, hidden_size, intermediate_size: E, H and N. Weights and biases are zeros, to be loaded.
        r: rank, 0 to 512; 0 has no adapter. lora_alpha: the scale is lora_alpha / r.
        alpha, limit: of the activation, as gpt-oss' config has them.
        dtype: of the biases. adapter_dtype: of A and B, float32 or x's.
    """

    _LAYERS = ("gate_up_proj", "down_proj")

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        r: int = 8,
        lora_alpha: float = 16.0,
        alpha: float = 1.702,
        limit: float = 7.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        adapter_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if type(r) is not int or not 0 <= r <= MAX_RANK:
            raise ValueError(f"MXFP4Experts: r must be a whole number in 0..{MAX_RANK}, got {r!r}")
        for what, given in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
            if given not in DTYPES:
                raise ValueError(f"MXFP4Experts: {what} must be float32, float16 or bfloat16, got {given!r}")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, F.lora_scaling(lora_alpha, r)
        self.alpha, self.limit = alpha, limit
        shapes = (hidden_size, 2 * intermediate_size), (intermediate_size, hidden_size)
        for name, (features, out) in zip(self._LAYERS, shapes, strict=True):
            shape = num_experts, out, -(-features // BLOCK)
            self.register_buffer(f"{name}_blocks", torch.zeros(*shape, BLOCK // 2, dtype=torch.uint8, device=device))
            self.register_buffer(f"{name}_scales", torch.zeros(*shape, dtype=torch.uint8, device=device))
            bias = torch.zeros(num_experts, out, dtype=dtype, device=device)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias, False))
            if r:
                like, layer = {"dtype": adapter_dtype, "device": device}, name.removesuffix("_proj")
                a, b = torch.empty(num_experts, r, features, **like), torch.zeros(num_experts, out, r, **like)
                if not a.is_meta:
                    a.uniform_(
                        -(bound := 1 / math.sqrt(features)), bound
                    )  # PEFT's kaiming_uniform_(a=√5) of each expert
                self.register_parameter(f"{layer}_lora_A", nn.Parameter(a))
                self.register_parameter(f"{layer}_lora_B", nn.Parameter(b))

    @classmethod
    def from_experts(cls, experts: nn.Module, rule: str = "even", **settings: Any) -> "MXFP4Experts":
        """Of transformers' GptOssExperts, dense: W is quantised by ``rule``, biases are copied. settings: r, lora_alpha, adapter_dtype."""
        if type(experts).__name__ != "GptOssExperts":
            raise TypeError(f"MXFP4Experts.from_experts: experts must be a GptOssExperts, got {type(experts).__name__}")
        weights = {name: getattr(experts, name).detach() for name in cls._LAYERS}  # [E, in, out]
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("MXFP4Experts.from_experts: weights must be finite, got inf or nan")
        of = next(iter(weights.values()))
        sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size
        act = {"alpha": experts.alpha, "limit": experts.limit}
        self = cls(*sizes, **act, **settings, device=of.device, dtype=of.dtype)
        with torch.no_grad():
            for name, w in weights.items():
                for blocks, scales, each in zip(*self._bytes(name), w, strict=True):
                    codes, found, _ = ops.mx_quantize(each.mT, rule)
                    blocks.copy_(codes.view_as(blocks)), scales.copy_(found)
                getattr(self, f"{name}_bias").copy_(getattr(experts, f"{name}_bias"))
        return self

    def _bytes(self, name: str) -> tuple[Tensor, Tensor]:
        return self._buffers[f"{name}_blocks"], self._buffers[f"{name}_scales"]

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """gate_up_proj [E, H, 2 N] and down_proj [E, N, H], dense, as GptOssExperts has them (views of [E, out, in])."""
        sizes = self.hidden_size, self.intermediate_size
        codes = [(blocks.flatten(-2), scales) for blocks, scales in map(self._bytes, self._LAYERS)]
        up, down = (ops.mx_dequantize(*each, n, dtype).mT for each, n in zip(codes, sizes, strict=True))
        return up, down

    def _linear(self, name: str, x: Tensor, experts: Tensor) -> Tensor:
        blocks, scales = self._bytes(name)
        packed = blocks.flatten(-2), scales, self._parameters[f"{name}_bias"].to(x.dtype)
        if not self.r:
            return ops.mx_linear(x, *packed, experts)
        a, b = (self._parameters[f"{name.removesuffix('_proj')}_lora_{f}"] for f in "AB")
        if a.dtype not in (x.dtype, torch.float32):
            a, b = a.float(), b.float()
        return ops.mx_linear_expand(x, *packed, self._shrink(x, a, experts), b, experts)

    def _shrink(self, x: Tensor, a: Tensor, experts: Tensor) -> Tensor:
        """S [..., r] = scaling · x A[expert]ᵀ: A [E, r, features] is a pool of multi-LoRA, where ranks come in whole pages."""
        count, r = self.num_experts, self.r
        ranks = r + -r % PAGE
        pool = (a if ranks == r else nn.functional.pad(a, (0, 0, 0, ranks - r))).flatten(0, 1)
        integers = {"dtype": torch.int32, "device": x.device}
        pages = torch.arange(count * ranks // PAGE, **integers).view(count, 1, -1)
        plan = ops.multi_lora_plan(experts.flatten(), count)
        scales = torch.full((experts.numel(),), self.scaling, device=x.device)
        s = ops.multi_lora_shrink(x, pool, pages, torch.full((count, 1), r, **integers), plan, scales)
        return s[..., 0, 0, :r]

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        (T, k), E = router_indices.shape, self.num_experts
        if router_indices.is_cpu and router_indices.numel() and (most := int(router_indices.max())) >= E:
            raise ValueError(f"MXFP4Experts: router_indices must be below {E}, got {most}")
        experts = router_indices.clamp(-1, E).to(torch.int32)
        both = self._linear("gate_up_proj", hidden_states[:, None].expand(T, k, self.hidden_size), experts)
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        y = self._linear("down_proj", (up + 1) * (gate * torch.sigmoid(gate * self.alpha)), experts)
        return (y * routing_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, kept in self._buffers.items():  # copy_ would take bytes of another dtype
            t = state_dict.get(prefix + name)
            if t is not None and (t.dtype != torch.uint8 or t.shape != kept.shape):
                must = f"must be uint8 {list(kept.shape)}, got {t.dtype} {list(t.shape)}"
                raise RuntimeError(f"MXFP4Experts: {prefix}{name} {must}; the layer is unchanged")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
        return f"{sizes}, r={self.r}, scaling={self.scaling:g}"
