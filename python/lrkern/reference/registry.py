# SPDX-License-Identifier: Apache-2.0
"""What is known of an op, once: tests, benchmarks and GPU tools read it from the registry ``OPS``.

The truth is the function called on float64 tensors; called on the samples' own dtypes it is the same-dtype PyTorch
expression that the tolerance (testing.py) compares with. A family is a module of this package that registers its ops.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Tensors drawn on the CPU in fp32 from one seed, then moved: every device and dtype sees the same numbers."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, pitch: int = 0, std: float = 1.0) -> Tensor:
        """pitch > 0: a view of rows that many elements apart, NaN between them, off 16-byte alignment when odd."""
        t = torch.randn(*shape, generator=self.generator) * std
        t = t.to(self.device, dtype or self.dtype)
        if not pitch:
            return t
        wide = torch.full((*shape[:-1], pitch), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., : shape[-1]] = t
        return wide[..., : shape[-1]]

    def seed(self) -> Tensor:
        return torch.randint(2**63 - 1, (1,), generator=self.generator).to(self.device)


@dataclass
class Sample:
    """reads_back: what reads numbers back from a GPU, so that no CUDA graph holds it: "backward", "always", or "". ulps: the
    least that the tolerance of its gradients has (testing.py), where more was seen."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    reads_back: str = ""
    ulps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the ops of a module share: ``layer`` makes, of a Draw and the keywords of a case, the tensors that samples are made of."""

    name: str
    layer: Callable[..., Any]
    cases: dict[str, dict[str, Any]]  # by name, with which the names of its samples begin
    large: Callable[
        [int, int, int, int, bool], dict[str, Any]
    ]  # (T, I, O, R, fp32 factors) -> the case of such a layer
    seed: int  # of the first case's tensors; the others count up
    direct_sample: str  # has every argument that may take a gradient


@dataclass(frozen=True, kw_only=True)
class Op:
    """differentiable: the arguments with a gradient. casts: those that autocast casts where all are float32. products: the matrix
    products it consists of, in letters: "TIO" is x [T, I] times W [O, I]."""

    name: str
    family: Family
    truth: Callable[..., Any]
    samples_of: Callable[[str, Any], Iterator[Sample]]
    differentiable: tuple[str, ...] = ()
    twice_differentiable: bool = False
    mutates: str | None = None
    casts: tuple[str, ...] = ()
    products: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """The docstring of the truth."""
        return self.truth.__doc__

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.truth).parameters)

    def samples(self, device: str | torch.device, dtype: torch.dtype, of: str | None = None) -> Iterator[Sample]:
        """All of them, or those of cases that the name of a sample may come from."""
        for i, (name, case) in enumerate(self.family.cases.items()):
            if of is None or of.startswith(name):
                yield from self.samples_of(name, self.family.layer(Draw(device, dtype, self.family.seed + i), **case))

    def sample(self, name: str, device: str | torch.device, dtype: torch.dtype) -> Sample:
        return next(s for s in self.samples(device, dtype, name) if s.name == name)

    def large(self, *sizes: Any, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> Sample:
        """Of the family's large case, without dropout or other options."""
        layer = self.family.layer(Draw(device, dtype, seed), **self.family.large(*sizes))
        return list(self.samples_of("large", layer))[-1]

    def named(self, sample: Sample) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.parameters, sample.args, strict=False)) | sample.kwargs

    def leaves(self, sample: Sample, *only: str) -> list[Any]:
        """sample.args, not copied: pitches stay. All float tensors with a gradient (or only those) require one."""
        wanted = only or self.differentiable
        return [
            a.detach().requires_grad_(n in wanted) if isinstance(a, Tensor) and a.is_floating_point() else a
            for n, a in zip(self.parameters, sample.args, strict=False)
        ]


OPS: dict[str, Op] = {}


def register(truth: Callable[..., Any], family: Family, mutates: str | None = None, **facts: Any):
    """Above the function that makes an op's samples of a layer. Names in facts are separated by spaces."""
    facts = {k: tuple(v.split()) if isinstance(v, str) else v for k, v in facts.items()}
    name = truth.__name__

    def add_samples(samples_of: Callable[[str, Any], Iterator[Sample]]):
        OPS[name] = Op(name=name, family=family, truth=truth, samples_of=samples_of, mutates=mutates, **facts)
        return samples_of

    return add_samples
