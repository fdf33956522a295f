# SPDX-License-Identifier: Apache-2.0
"""A library below the wrappers that sees on which device its ops are called, and which."""

from collections import Counter
from typing import Any

from torch import Tensor


class Recorder:
    def __init__(self, library: Any, kind: str):
        self.library, self.kind, self.seen = library, kind, False
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        packet = getattr(self.library, name)
        called = self.watched(name, packet)
        called.default = self.watched(name, packet.default)
        return called

    def watched(self, name: str, op: Any) -> Any:
        def call(*args, **kwargs):
            self.calls[name] += 1
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            self.seen |= any(t.device.type == self.kind for t in tensors)
            return op(*args, **kwargs)

        return call
