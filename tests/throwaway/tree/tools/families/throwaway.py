# SPDX-License-Identifier: Apache-2.0
"""The throwaway family's kernel: its plan, and a call that launches it."""

from collections.abc import Iterator

from tools.families import Kernel, Shape, Timed, streams

TESTS: dict[str, str] = {}
KERNELS = {"throwaway": Kernel(streams(8), "x", again={"gain": "x"})}
SHAPES = [Shape(T=512, I=2048, O=2048, R=16)]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """Of 128 tokens at most, so that the traffic model runs every block."""
    import torch

    T, I = min(shape.T, 128), shape.I
    x, gain = torch.randn(T, I, device=device).to(dtype), torch.randn(I, device=device)
    yield Timed("throwaway", lambda: op.throwaway(x, gain), {"x": x, "y": x, "gain": gain}, T * I)
