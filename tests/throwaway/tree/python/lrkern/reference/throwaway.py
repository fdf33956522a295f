# SPDX-License-Identifier: Apache-2.0
"""The throwaway family: its op, and its samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .registry import Draw, Family, Sample, register


def throwaway(x, gain):
    return (x * gain).to(x)


@dataclass(frozen=True)
class Case:
    name: str
    lead: tuple[int, ...]
    N: int
    pitch: int = 0


def large(T: int, I: int, O: int, R: int, fp32: bool) -> Case:
    return Case("large", (T,), I)


CASES = (
    Case("one_token", (1,), 5),
    Case("odd", (3, 7), 33),
    Case("pitch", (70,), 130, 140),
    Case("no_tokens", (0,), 4),
)
FAMILY = Family(name="throwaway", cases=CASES, large=large, seed=900, direct_sample="odd")
register = partial(register, family=FAMILY)


@register(throwaway, formula="y = g x", differentiable="x", casts="x")
def throwaway_samples(case: Case, draw: Draw) -> Iterator[Sample]:
    yield Sample(case.name, (draw(*case.lead, case.N, pitch=case.pitch), draw(case.N, dtype=torch.float32)))
