# SPDX-License-Identifier: Apache-2.0
"""LoRTA: the ΔW of all layers of a model as slices of one tensor of low rank."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linear import AdapterLinear, Method
from .place import place_of, refuse_places
from .rank import Variant, trained

_SHARED = ("lora_A", "lora_B", "lora_H", "lora_M", "lora_L")


class LoRTALinear(Variant):
    """y = x Wᵀ + bias + scaling · dropout(x) ΔWᵀ, ΔWᵀ of head h = A diag(H_h ⊙ M_m ⊙ L_l) B: LoRTA (Hounie et al., arXiv 2410.04060).

    Five factors of one CP tensor (features in, features of a head, heads, projections, layers) are shared by all layers of a model; m and
    l are a layer's place in it. lora_A [r, in], lora_B [out / heads, r], lora_H [heads, r], lora_M [projections, r] and
    lora_L [layers, r] train; scaling = lora_alpha / r. B starts as zero: the layer starts as the base layer. A is uniform on
    ±1 / sqrt(r), H, M and L on ±sqrt(6 / ((1 + 5 init_scale²) r)), as in the authors' code.

    heads_on: "output" cuts out_features into heads, as the paper and the authors' code for lit-gpt do. "input" cuts in_features, with
    lora_A [r, out]: ΔW is the transpose of what the paper has, which is what their fork of PEFT computes.

    ``plan`` finds layer, projection and heads from the names, by the first number in them, and from ``model.config``, where the setting
    heads is 0; ``connect`` makes all layers share one set of parameters, the first layer's. Layers of different sizes
    (grouped heads, an MLP beside attention) are refused. A layer by itself has a set of its own.
    """

    METHODS: ClassVar = {"lorta": Method({}, "LoRTA, Hounie et al., arXiv 2410.04060")}
    SETTINGS = (
        "r",
        "lora_alpha",
        "dropout",
        "heads",
        "projections",
        "layers",
        "projection",
        "layer",
        "heads_on",
        "init_scale",
    )

    def _set_up(
        self,
        base: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8.0,
        dropout: float = 0.0,
        heads: int = 0,
        projections: int = 1,
        layers: int = 1,
        projection: int = 0,
        layer: int = 0,
        heads_on: str = "output",
        init_scale: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, low in (("heads", heads, 0), ("projections", projections, 1), ("layers", layers, 1)):
            self._whole(name, value, low)
        self._whole("projection", projection, 0, projections - 1)
        self._whole("layer", layer, 0, layers - 1)
        self._one_of("heads_on", heads_on, ("input", "output"))
        self._finite("init_scale", init_scale)
        like = self._begin(base, r, lora_alpha, dropout, adapter_dtype)
        cut, other = base.out_features, base.in_features
        cut, other = (cut, other) if heads_on == "output" else (other, cut)
        heads = heads or 1
        self._fits("heads", heads, f"divide {heads_on} features, {cut}", cut % heads == 0)
        self.heads, self.projections, self.layers, self.projection, self.layer = (
            heads,
            projections,
            layers,
            projection,
            layer,
        )
        self.heads_on, self.init_scale = heads_on, float(init_scale)
        bound = math.sqrt(6 / ((1 + 5 * self.init_scale**2) * r))
        weights = lambda n: nn.init.uniform_(trained(n, r, **like), -bound, bound)
        self.lora_A, self.lora_B = trained(r, other, **like), trained(cut // heads, r, **like)
        nn.init.uniform_(
            self.lora_A, -(r**-0.5), r**-0.5
        )  # their A is [in, r], of which kaiming_uniform takes r for what comes in
        self.lora_H, self.lora_M, self.lora_L = weights(heads), weights(projections), weights(layers)

    @classmethod
    def plan(
        cls, model: nn.Module, linears: Mapping[str, nn.Module], settings: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """heads, and the place of each layer in the tensor; a ValueError names a layer of other sizes."""
        refuse_places("LoRTALinear", settings, "layers", "projections", "layer", "projection")
        places = {name: place_of(name) for name in settings}
        layer_of = {name: (p.before, p.index) for name, p in places.items()}
        projection_of = {name: (p.before, p.after) for name, p in places.items()}
        layers, projections = (list(dict.fromkeys(of.values())) for of in (layer_of, projection_of))
        first = next(iter(settings), "")
        config = getattr(model, "config", None)
        known = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0
        for name, given in settings.items():
            sizes = [(m.in_features, m.out_features) for m in (linears[first], linears[name])]
            if sizes[0] != sizes[1]:
                must = f"must have {first}'s sizes {list(sizes[0])}: one tensor is cut into all of them, so that grouped heads and an MLP do not fit"
                raise ValueError(f"LoRTALinear: {name} {must}; got {list(sizes[1])}, choose target_modules without it")
            if not given.get("heads") and not known:
                raise ValueError(
                    "LoRTALinear: heads must be given where model.config has no num_attention_heads, got none"
                )
        own = lambda name: {
            "heads": settings[name].get("heads") or known,
            "layers": len(layers),
            "projections": len(projections),
            "layer": layers.index(layer_of[name]),
            "projection": projections.index(projection_of[name]),
        }
        return {name: given | own(name) for name, given in settings.items()}

    @classmethod
    def connect(cls, layers: Mapping[str, AdapterLinear]) -> None:
        """All share the first one's parameters: the same objects, so that an optimizer and DDP see each once."""
        mine = {name: m for name, m in layers.items() if isinstance(m, LoRTALinear)}
        first = next(iter(mine.values()), None)
        alike = lambda m: {key: (list(p.shape), p.dtype, p.device) for key, p in m.coefficients().items()}
        for name, m in mine.items():
            if m.heads_on != first.heads_on or alike(m) != alike(first):
                must = f"must have coefficients like those of {next(iter(mine))} to share them, {alike(first)}"
                raise ValueError(f"LoRTALinear: {name} {must}, got {alike(m)}")
        for m in mine.values():
            for key in _SHARED:
                setattr(m, key, getattr(first, key))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in] and, of every head, B ⊙ H_h ⊙ M_m ⊙ L_l [out, r]; with heads on the input both transposed."""
        gates = self.lora_H * (self.lora_M[self.projection] * self.lora_L[self.layer])
        b = (gates[:, None] * self.lora_B).flatten(0, 1)
        return (self.lora_A, b, self.scaling) if self.heads_on == "output" else (b.mT, self.lora_A.mT, self.scaling)
