# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer whose weight is in MXFP4: a base of 4.25 bits an element for adapters."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..limits import DTYPES
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
        """W [out, in], dense: exact in float32, and in bfloat16 but for scales of 2^126 and 2^127. dtype: the layer's where None."""
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
