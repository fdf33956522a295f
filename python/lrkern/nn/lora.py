# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a LoRA adapter whose low-rank part runs in lrkern's kernels."""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..caches import DoraNorm
from ..limits import MAX_RANK
from .linear import LowRankLinear, Method, shape_repr
from .plain import offers, packed, plain_linear

Init = Callable[["FusedLoRALinear"], None]


class Initial(NamedTuple):
    """scale · B A, which an init took out of W."""

    a: Tensor
    b: Tensor
    scale: float


class Factor(nn.Module):
    """Holds one factor, so that its key reads as PEFT's files have it: lora_A.weight, lora_B.weight."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, cols, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return shape_repr(self.weight)


class Magnitude(nn.Module):
    """DoRA's magnitude [out], keyed as PEFT has it: lora_magnitude_vector.weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    extra_repr = Factor.extra_repr


class FusedLoRALinear(LowRankLinear):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, LoRA (Hu et al., arXiv 2106.09685) as PEFT defines it.

    A [r, in], B [out, r]; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2312.03732). With
    use_dora ``functional.dora_linear`` (arXiv 2402.09353) and its magnitude [out], which starts as the row norms.
    W stays frozen; the rest trains. Keys of the state_dict: base_layer.weight, base_layer.bias, lora_A.weight,
    lora_B.weight, lora_magnitude_vector.weight.

    A base layer may keep W packed: bitsandbytes' Linear4bit and Linear8bitLt, torchao's weights, MXFP4Linear, and any module with
    in_features, out_features and a forward of its own that has no ``weight`` of floats, as GPTQ, AWQ and HQQ have them. Its own forward
    and backward run, and the adapter adds to y (``functional.lora_add``; MXFP4Linear does both in one accumulator).
    Not there: use_dora, the inits that change W, and ``merge``.

    The inits "pissa" and "olora" change W. A PEFT folder of such a layer holds a plain LoRA over the W that was there before,
    for which the layer keeps the factors it started with (in ``initial``, on the CPU, not in the state_dict; copies and
    pickles have them). A state_dict with another W makes them useless: the layer then computes as ever, and a folder of it
    is refused. Whose W it is goes in the metadata of state_dicts, which safetensors files do not hold: without it, W is taken
    as it was before where the layer's own init leaves W alone.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        r: rank, 0 to 512; 0 is the base layer alone.
        lora_alpha, use_rslora, use_dora: as peft.LoraConfig. dropout: its lora_dropout.
        train_bias: the base bias trains too (PEFT's bias="lora_only").
        init: "kaiming" (PEFT's default: A uniform, B zero), "gaussian" (A normal / r, B zero), "pissa" (arXiv
            2404.02948) or "olora" (arXiv 2406.01775); the last two take their factors out of W, of a plain nn.Linear.
        adapter_dtype: of A and B, float32, or the dtype of W; any of the three over a packed W. None means float32, as in PEFT.
    """

    METHODS: ClassVar = {
        "lora": Method({"use_dora": False}, "LoRA, Hu et al., arXiv 2106.09685"),
        "dora": Method({"use_dora": True}, "DoRA, Liu et al., arXiv 2402.09353"),
    }
    SETTINGS = ("r", "lora_alpha", "dropout", "use_rslora", "use_dora", "train_bias")
    PEFT_TYPE = "LORA"
    PACKED = True
    _SUM = "W + scaling B A"
    # Of layers in pickles of 0.1, which did not have these.
    train_bias, init, initial = False, "kaiming", None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 16,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        train_bias: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(base, r, lora_alpha, dropout, use_rslora, use_dora, train_bias, init, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 16,
        lora_alpha: float = 32.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        train_bias: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype | None = None,
    ) -> "FusedLoRALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen. TypeError for what is no linear."""
        settings = r, lora_alpha, dropout, use_rslora, use_dora, train_bias, init, adapter_dtype
        return cls._wrap(linear, *settings)

    def _set_up(self, base, r, lora_alpha, dropout, use_rslora, use_dora, train_bias, init, adapter_dtype):
        self._whole("r", r, 0, MAX_RANK)
        self._finite("lora_alpha", lora_alpha)
        self._probability("dropout", dropout)
        for name, flag in (("use_rslora", use_rslora), ("use_dora", use_dora), ("train_bias", train_bias)):
            self._flag(name, flag)
        self._one_of("init", init, INITS)
        if use_dora and not r:
            raise ValueError("FusedLoRALinear: use_dora needs r >= 1, got r=0")
        in_pack = packed(base)
        if use_dora and in_pack:
            raise ValueError(
                f"FusedLoRALinear: use_dora needs a W of floats, got {type(base).__name__}; lrkern.peft runs PEFT's DoRA over such layers"
            )
        if train_bias and base._parameters.get("bias") is None:
            raise ValueError("FusedLoRALinear: train_bias needs a layer with a bias that is a parameter, got none")
        if init in CHANGE_W and r:
            self._changes_w(init, base, r, lora_alpha)
        if not in_pack and adapter_dtype not in (None, torch.float32, base.weight.dtype):
            must = f"must be float32 or the base layer's dtype, {base.weight.dtype}"
            raise ValueError(f"FusedLoRALinear: adapter_dtype {must}, got {adapter_dtype!r}")
        like = self._adopt(base, r, adapter_dtype)
        if train_bias:
            base.bias.requires_grad_()
        self.lora_A = Factor(r, base.in_features, **like)
        self.lora_B = Factor(base.out_features, r, **like)
        self.lora_alpha, self.dropout, self.use_rslora = lora_alpha, float(dropout), use_rslora
        self.use_dora, self.scaling = use_dora, F.lora_scaling(lora_alpha, r, use_rslora)
        self.train_bias, self.init = train_bias, init
        if r:
            with torch.no_grad():
                INITS[init](self)
        if use_dora:
            self.lora_magnitude_vector = Magnitude(self._norm().to(like["dtype"]))
            self._cached_norm = DoraNorm()

    @classmethod
    def plan(cls, model, linears, settings):
        """Asks what the inits that change W need of every layer before the first W is changed. train_bias is of those layers that have a
        bias, as PEFT's "lora_only" is, where any has."""
        for name, s in settings.items():
            if s.get("init") in CHANGE_W and (r := s.get("r", 16)):
                cls._changes_w(s["init"], linears[name], r, s.get("lora_alpha", 32.0))
        without = {name for name, m in linears.items() if m._parameters.get("bias") is None}
        if without < linears.keys():
            settings = {
                n: s | ({"train_bias": False} if n in without and s.get("train_bias") is True else {})
                for n, s in settings.items()
            }
        return settings

    @staticmethod
    def _changes_w(init: str, base: nn.Linear, r: int, lora_alpha: float) -> None:
        must, most = f"FusedLoRALinear: init={init!r} needs", min(base.in_features, base.out_features)
        if plain_linear(base)[0] is None:
            raise ValueError(f"{must} a plain nn.Linear, whose W it changes, got {type(base).__name__} with more to it")
        if r > most:
            raise ValueError(f"{must} r <= min(in, out) = {most}, got r={r}")
        if init == "pissa" and lora_alpha <= 0:
            raise ValueError(f"{must} lora_alpha > 0, got {lora_alpha!r}")
        if base.weight.is_meta or not base.weight.isfinite().all():
            raise ValueError(
                f"{must} a W of finite numbers, got {'none (meta)' if base.weight.is_meta else 'inf or nan'}"
            )

    @property
    def lora_dropout(self) -> float:
        """dropout, as PEFT's configs and folders call it."""
        return self.dropout

    def __setstate__(self, state: dict) -> None:
        if "lora_dropout" in state:  # a pickle of 0.1
            state["dropout"] = state.pop("lora_dropout")
        super().__setstate__(state)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A.weight, self.lora_B.weight, self.scaling

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.use_dora:
            return super()._adapted(x, weight, bias)
        (a, b, scale), p = self.factors(), self.dropout
        norm, magnitude = self._cached_norm(weight, a, b, scale, self.training), self.lora_magnitude_vector.weight
        return F.dora_linear(x, weight, bias, a, b, magnitude, scale, p, self.training, norm)

    def _over(self, base: nn.Module, x: Tensor) -> Tensor:
        together, (a, b, scale) = offers(base, "with_low_rank"), self.factors()
        if together is None or a.dtype not in (x.dtype, torch.float32):
            return super()._over(base, x)
        return F.lora_into(together, x, a, b, scale, self.dropout, self.training)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.use_dora:
            return super()._beside(y, x)
        base, (a, b, scale), p = self.base_layer, self.factors(), self.dropout
        g = self.lora_magnitude_vector.weight / self._cached_norm(base.weight, a, b, scale, self.training)
        if self.training and p:
            x = torch.dropout(x, p, True)
            product = nn.functional.linear(x, base.weight.to(x.dtype))
        else:
            product = y if base.bias is None else y - base.bias
        return F.dora_add(y, x, product, a, b, g, scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What ``merge`` adds to W [out, in], in float32: scaling · B A, or for DoRA g ⊙ (W + scaling · B A) - W."""
        low_rank = super().delta_weight()
        if not self.use_dora:
            return low_rank
        w = self.base_layer.weight.float()
        if self.merged:
            return w - (self._as_merged or self)._unmerged_weight(w)
        return self._gain() * (w + low_rank) - w

    def _norm(self) -> Tensor:
        return F.dora_norm(self.base_layer.weight, *self.factors())

    def _gain(self) -> Tensor | float:
        return (self.lora_magnitude_vector.weight / self._norm())[:, None] if self.use_dora else 1.0

    def _merged_weight(self, w: Tensor) -> Tensor:
        self._merged_gain = self._gain()
        if self.use_dora and not (self._merged_gain != 0).all():  # no unmerge would find W again
            raise ValueError("FusedLoRALinear.merge: lora_magnitude_vector must not be 0 anywhere; W is unchanged")
        return self._merged_gain * (w + super().delta_weight())

    def _unmerged_weight(self, w: Tensor) -> Tensor:
        return w / self._merged_gain - super().delta_weight()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", {}).get(prefix[:-1]):
            metadata["init"] = self.init

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        w, init = state_dict.get(prefix + "base_layer.weight"), local_metadata.get("init", self.init)
        if w is None or not {init, self.init} & CHANGE_W.keys():
            return
        now = self.base_layer.weight
        stays = init == self.init and w.shape == now.shape and torch.equal(w.to(now), now)
        if not stays:  # else the initial factors do too
            self.init, self.initial = init, None

    def train(self, mode: bool = True) -> "FusedLoRALinear":
        if self.use_dora:
            self._cached_norm.clear()
        return super().train(mode)

    def _settings_repr(self) -> str:
        text = f", r={self.r}, scaling={self.scaling:g}"
        text += f", dropout={self.dropout:g}" if self.dropout else ""
        return text + (", dora" if self.use_dora else "")


def _from_base(layer: FusedLoRALinear, a: Tensor, b: Tensor) -> None:
    """Sets the factors and takes what they add out of W, so that the layer computes what it did before."""
    layer.lora_A.weight.copy_(a)
    layer.lora_B.weight.copy_(b)
    layer._write(layer.base_layer.weight.float() - LowRankLinear.delta_weight(layer), "init")
    a, b, scale = layer.factors()
    layer.initial = Initial(*(t.detach().to("cpu", copy=True) for t in (a, b)), scale)


def _pissa(layer: FusedLoRALinear) -> None:
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.float(), full_matrices=False)
    root = (s[: layer.r] / layer.scaling).sqrt()
    _from_base(layer, root[:, None] * vh[: layer.r], u[:, : layer.r] * root)


def _olora(layer: FusedLoRALinear) -> None:
    q, r = torch.linalg.qr(layer.base_layer.weight.float())
    _from_base(layer, r[: layer.r], q[:, : layer.r])


CHANGE_W: dict[str, Init] = {"pissa": _pissa, "olora": _olora}
INITS: dict[str, Init] = {
    "kaiming": lambda layer: nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5)),
    "gaussian": lambda layer: nn.init.normal_(layer.lora_A.weight, std=1 / layer.r),
} | CHANGE_W
