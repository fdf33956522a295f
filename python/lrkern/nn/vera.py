# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a VeRA adapter whose projections are a seed."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from .basis import BasisLinear, share_seed
from .linear import LowRankLinear, Method, constant


class VeRALinear(BasisLinear, LowRankLinear):
    """y = x Wᵀ + bias + b ⊙ (B (d ⊙ (A dropout(x)))): VeRA (Kopiczko et al., arXiv 2310.11454) as PEFT defines it.

    Trained: vera_lambda_d [r], which starts at d_initial, and vera_lambda_b [out], which starts at 0: the layer starts as
    the base layer. A [r, in] is uniform on ±sqrt(6 / max_in) and B [out, r] on ±sqrt(6 / r), kaiming_uniform's bounds;
    other distributions are scaled to the same variance. There is no alpha: the scaling is 1.

    Layers with one seed, r and max_in share one pair as PEFT's do: A and B of a layer are the first columns and rows of
    those of a larger one. By default a layer has a pair of its own.

    Args:
        r: rank, as large as wanted: 256 is usual.
        d_initial: of lambda_d.
        max_in, max_out: the largest in and out features of the layers that share the pair; None means this layer's own.
            A's bound follows from max_in; B's does not depend on max_out.
        save_output: keep d ⊙ (A x) Bᵀ [T, out] for backward as PEFT does; False saves that memory for a GEMM more there.
        the rest: as BasisLinear.
    """

    METHODS: ClassVar = {"vera": Method({}, "VeRA, Kopiczko et al., arXiv 2310.11454")}
    METHOD = "vera"
    PEFT_TYPE = "VERA"
    PEFT_SHARES = ("r", "seed", "distribution", "dropout", "max_in")
    SETTINGS = ("r", "d_initial", "max_in", "max_out", "save_output", "dropout", "seed", "distribution")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 256,
        d_initial: float = 0.1,
        max_in: int | None = None,
        max_out: int | None = None,
        save_output: bool = True,
        dropout: float = 0.0,
        seed: int | torch.Generator | None = None,
        distribution: str = "uniform8",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._make(
            base,
            r=r,
            d_initial=d_initial,
            max_in=max_in,
            max_out=max_out,
            save_output=save_output,
            dropout=dropout,
            seed=seed,
            distribution=distribution,
            adapter_dtype=adapter_dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 256,
        d_initial: float = 0.1,
        max_in: int | None = None,
        max_out: int | None = None,
        save_output: bool = True,
        dropout: float = 0.0,
        seed: int | torch.Generator | None = None,
        distribution: str = "uniform8",
        adapter_dtype: torch.dtype | None = None,
    ) -> "VeRALinear":
        """Wraps an existing layer: its weight and bias are used as they are, not copied, and frozen."""
        return cls._wrap(
            linear,
            r=r,
            d_initial=d_initial,
            max_in=max_in,
            max_out=max_out,
            save_output=save_output,
            dropout=dropout,
            seed=seed,
            distribution=distribution,
            adapter_dtype=adapter_dtype,
        )

    def _set_up(self, base, r, d_initial, max_in, max_out, save_output, **common) -> None:
        self._whole("r", r, 1)
        self.max_in = self._whole("max_in", base.in_features if max_in is None else max_in, base.in_features)
        self.max_out = self._whole("max_out", base.out_features if max_out is None else max_out, base.out_features)
        self._finite("d_initial", d_initial)
        self._flag("save_output", save_output)
        like = self._adopt(base, r, **common)
        self.d_initial, self.save_output = d_initial, save_output
        self.vera_lambda_d = constant(d_initial, r, **like)
        self.vera_lambda_b = constant(0.0, base.out_features, **like)

    @classmethod
    def plan(cls, model, linears, settings):
        """One pair for all layers, as large as PEFT's: of the largest sizes."""
        largest = {f"max_{way}": max(getattr(m, f"{way}_features") for m in linears.values()) for way in ("in", "out")}
        given = {name: {k: v for k, v in s.items() if v is not None} for name, s in settings.items()}
        return share_seed({name: largest | s for name, s in given.items()})

    def projections(self) -> tuple[F.Basis, F.Basis]:
        """A [r, in] and Bᵀ [r, out]."""
        a, b = self.shared_pair()
        return a._replace(cols=self.in_features), b._replace(cols=self.out_features)

    def shared_pair(self) -> tuple[F.Basis, F.Basis]:
        bound_a, bound_b = ((2 / max(fan_in, 1)) ** 0.5 for fan_in in (self.max_in, self.r))
        return self._basis(self.r, self.max_in, bound_a, 0), self._basis(self.r, self.max_out, bound_b, 1)

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.vera_linear(x, weight, bias, *self._operands())

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        return F.vera_add(y, x, *self._operands())

    def _operands(self) -> tuple:
        vectors, act = (self.vera_lambda_d, self.vera_lambda_b), (self.dropout, self.training, self.save_output)
        return *vectors, *self.projections(), *act

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """diag(d) A [r, in] and diag(b) B [out, r] in float32: as a LoRA adapter of scaling 1."""
        d, b = self.vera_lambda_d.float(), self.vera_lambda_b.float()
        A, B = (p.fill(d) for p in self.projections())
        return d[:, None] * A, b[:, None] * B.mT, 1.0
