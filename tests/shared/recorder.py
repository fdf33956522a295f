# SPDX-License-Identifier: Apache-2.0
"""A library below the wrappers that sees on which device its ops are called."""

from typing import Any

from torch import Tensor


class Recorder:
    def __init__(self, library: Any, kind: str):
        self.library, self.kind, self.seen = library, kind, False

    def __getattr__(self, name: str) -> Any:
        packet = getattr(self.library, name)
        called = self.watched(packet)
        called.default = self.watched(packet.default)
        return called

    def watched(self, op: Any) -> Any:
        def call(*args, **kwargs):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            self.seen |= any(t.device.type == self.kind for t in tensors)
            return op(*args, **kwargs)

        return call
