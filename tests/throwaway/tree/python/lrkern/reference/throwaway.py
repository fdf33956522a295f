# SPDX-License-Identifier: Apache-2.0
"""The throwaway family: its op, and its samples."""

from collections.abc import Iterator

import torch

from .registry import Draw, Family, Sample, register


def throwaway(x, gain):
    """y = g x"""
    return (x * gain).to(x)


class Layer:
    def __init__(self, draw: Draw, lead: tuple[int, ...], N: int, pitch: int = 0):
        self.x, self.gain = draw(*lead, N, pitch=pitch), draw(N, dtype=torch.float32)


CASES = {
    "one_token": dict(lead=(1,), N=5),
    "odd": dict(lead=(3, 7), N=33),
    "pitch": dict(lead=(70,), N=130, pitch=140),
    "no_tokens": dict(lead=(0,), N=4),
}


def large(T: int, I: int, O: int, R: int, fp32: bool) -> dict:
    return dict(lead=(T,), N=I)


FAMILY = Family(name="throwaway", layer=Layer, cases=CASES, large=large, seed=900, direct_sample="odd")


@register(throwaway, family=FAMILY, differentiable="x", casts="x")
def throwaway_samples(name: str, t: Layer) -> Iterator[Sample]:
    yield Sample(name, (t.x, t.gain))
