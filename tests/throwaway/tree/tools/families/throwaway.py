# SPDX-License-Identifier: Apache-2.0
"""The throwaway family's kernel: its plan, and a call that launches it."""

from collections.abc import Iterator

from tools.families import Kernel, Timed, streams

TESTS: dict[str, str] = {}
KERNELS = {"throwaway": Kernel(streams(8), "x")}


def timed(op, device: str, dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    import torch

    x, gain = torch.randn(T, N, device=device).to(dtype), torch.randn(N, device=device)
    yield Timed("throwaway", lambda: op.throwaway(x, gain), [x, x], T * N)
