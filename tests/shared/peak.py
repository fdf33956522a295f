# SPDX-License-Identifier: Apache-2.0
"""What a call holds in memory beside what it was given."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """``most``: the most bytes that storages made inside held at once. For calls under no_grad, which keep a tensor alive only where Python
    does."""

    def __init__(self):
        super().__init__()
        self.holders, self.given, self.now, self.most = {}, set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        self.given |= {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))} - self.holders.keys()
        result = func(*args, **(kwargs or {}))
        for t in tensors(result):
            key, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            if key in self.given or not size:
                continue
            if key not in self.holders:
                self.holders[key] = 0
                self.now += size
            self.holders[key] += 1
            weakref.finalize(t, self._dropped, key, size)
        self.most = max(self.most, self.now)
        return result

    def _dropped(self, key, size):
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size
