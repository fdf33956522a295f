# SPDX-License-Identifier: Apache-2.0
"""DTensor: how each op may be sharded along one dimension of a device mesh. dispatch imports this where it meets a DTensor.

The rules are the ops' own (``Op.shards``). A rule gives every tensor argument and every result a letter, as in "TRR>T":

    R replicated     T sharded along a leading (token) dimension     L sharded along the last dimension
    0, 1 sharded along that dimension     P partial sums, to be added     . must be absent

tokens is data parallelism along any leading dimension, batch along the first one where it divides evenly (a result that has all
leading dimensions as one is then sharded so too), column splits O, row splits I. tokens, batch and row shift the indices that
the dropout mask is made of, so they hold without dropout only.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .dispatch import FAKES, OPS, Op, is_tensor, schema_of


def _placement(letter: str, dim: int, last: int):
    return {"R": Replicate(), "P": Partial(), "T": Shard(dim), "L": Shard(last), "0": Shard(0), "1": Shard(1)}[letter]


def _made(name: str, given: list) -> list[bool]:
    """Which results the op gives for these: one may depend on a flag, or be there for a gradient alone."""
    meta = lambda t: torch.empty(t.shape, dtype=t.tensor_meta.dtype, device="meta") if hasattr(t, "tensor_meta") else t
    out = FAKES[name](*map(meta, given))
    return [isinstance(t, Tensor) for t in (out if isinstance(out, tuple | list) else [out])]


def _register(op: Op, suffix: str, rules: dict[str, str]) -> None:
    overload, schema = getattr(torch.ops.lrkern, op.name + suffix).default, schema_of(op.name + suffix)
    arguments = [a.name for a in schema.arguments]
    tensors = [a.name for a in schema.arguments if is_tensor(a)]

    def shardings(*args, **kwargs):
        given = dict(zip(arguments, args, strict=False)) | kwargs
        rows = next(given[t] for t in tensors if t in ("x", "s", "h", "dy", "ds", "y") and given.get(t) is not None)
        last = op.leading(**given) if op.leading else rows.ndim - 1
        wanted, even = (
            _made(op.name + suffix, list(given.values())),
            rows.ndim and rows.shape[0] % rows.mesh.size() == 0,
        )

        def lists(letters_in: str, letters_out: str, dim: int):
            out = [_placement(c, dim, last) if w else None for c, w in zip(letters_out, wanted, strict=True)]
            of = dict(zip(tensors, letters_in, strict=True))
            ins = [_placement(of[n], dim, last) if n in of and given.get(n) is not None else None for n in given]
            return out, ins

        found = [lists("R" * len(tensors), "R" * len(wanted), 0)]
        for kind, rule in rules.items():
            letters_in, letters_out = rule.split(">")
            absent = all(given.get(t) is None for t, c in zip(tensors, letters_in, strict=True) if c == ".")
            if not absent or (kind != "column" and given.get("dropout_p")) or (kind == "batch" and not even):
                continue
            found += [lists(letters_in, letters_out, dim) for dim in (range(last) if kind == "tokens" else (0,))]
        return found

    register_sharding(overload)(shardings)


for _op in OPS.values():
    for _suffix, _rules in _op.shards.items():
        _register(_op, _suffix, _rules)
