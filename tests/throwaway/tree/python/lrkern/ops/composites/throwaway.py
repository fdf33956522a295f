# SPDX-License-Identifier: Apache-2.0
"""The throwaway family in ATen's calls."""

from .common import composite


@composite("x:*N gain:N:f32")
def throwaway(x, gain):
    return (x.float() * gain).to(x.dtype)
