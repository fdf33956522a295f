# SPDX-License-Identifier: Apache-2.0
"""DTensor: how each op may be sharded along one dimension of a device mesh. lrkern.ops imports this where it meets a DTensor.

A rule gives every tensor argument and every result a letter:

    R replicated     T sharded along a leading (token) dimension     L sharded along the last dimension
    0, 1 sharded along that dimension     P partial sums, to be added     . must be absent

tokens is data parallelism, column splits O, row splits I. tokens and row shift the indices that the dropout mask is made
of, so they hold without dropout only.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# op: its tensor arguments, the rules, and for each result the argument it depends on being given or true
_RULES = {
    "lora_linear": (
        "x weight bias a b seed base_scale",
        {"tokens": "TRRRRRR>T", "column": "R00R0R0>L", "row": "L1.1RRR>P"},
        ("x",),
    ),
    "lora_linear_fwd": (
        "x weight bias a b seed base_scale",
        {"tokens": "TRRRRRR>TTT", "column": "R00R0R0>LRL", "row": "L1.1RRR>PPP"},
        ("x", "x", "base_scale"),
    ),
    "lora_linear_bwd": (
        "dy x weight a b s seed base_scale base",
        {"tokens": "TTRRRTRRT>TPPPPP", "column": "LR0R0RR0L>P00P00", "row": "RL11RRRRR>L1R1RR"},
        ("need_dx", "need_dw", "need_dbias", "need_da", "need_db", "need_dbase_scale"),
    ),
    "lora_add": ("y x a b seed", {"tokens": "TTRRR>T", "column": "LRR0R>L"}, ("x",)),
    "lora_add_fwd": ("y x a b seed", {"tokens": "TTRRR>TT", "column": "LRR0R>LR"}, ("x", "x")),
    "lora_add_bwd": (
        "dy x a b s seed",
        {"tokens": "TTRRTR>TPP", "column": "LRR0RR>PP0"},
        ("need_dx", "need_da", "need_db"),
    ),
    "lora_shrink": ("x a seed", {"tokens": "TRR>T", "row": "L1R>P"}, ("x",)),
    "lora_shrink_bwd": ("ds x a seed", {"tokens": "TTRR>TP", "row": "RL1R>L1"}, ("need_dx", "need_da")),
    "linear_expand": ("x weight bias s b", {"tokens": "TRRTR>T", "column": "R00R0>L"}, ("s",)),
    "linear_expand_bwd": (
        "dy x weight s b",
        {"tokens": "TTRTR>TPPTP", "column": "LR0R0>P00P0"},
        ("need_dx", "need_dw", "need_dbias", "need_ds", "need_db"),
    ),
}


def _placement(letter: str, dim: int, last: int):
    return {"R": Replicate(), "P": Partial(), "T": Shard(dim), "L": Shard(last), "0": Shard(0), "1": Shard(1)}[letter]


def _register(name: str, tensors: list[str], rules: dict[str, str], results: tuple[str, ...]) -> None:
    op = getattr(torch.ops.lrkern, name).default
    arguments = [a.name for a in op._schema.arguments]

    def shardings(*args, **kwargs):
        given = dict(zip(arguments, args, strict=False)) | kwargs
        last = next(given[t] for t in tensors if t in ("x", "s", "dy", "ds", "y") and given.get(t) is not None).ndim - 1
        wanted = [bool(given.get(r)) if r.startswith("need") else given.get(r) is not None for r in results]

        def lists(letters_in: str, letters_out: str, dim: int):
            out = [_placement(c, dim, last) if w else None for c, w in zip(letters_out, wanted, strict=True)]
            of = dict(zip(tensors, letters_in, strict=True))
            ins = [_placement(of[n], dim, last) if n in of and given.get(n) is not None else None for n in given]
            return out, ins

        found = [lists("R" * len(tensors), "R" * len(results), 0)]
        for kind, rule in rules.items():
            letters_in, letters_out = rule.split(">")
            absent = all(given.get(t) is None for t, c in zip(tensors, letters_in, strict=True) if c == ".")
            if not absent or (kind != "column" and given.get("dropout_p")):
                continue
            found += [lists(letters_in, letters_out, dim) for dim in (range(last) if kind == "tokens" else (0,))]
        return found

    register_sharding(op)(shardings)


for _name, (_tensors, _rules, _results) in _RULES.items():
    _register(_name, _tensors.split(), _rules, _results)
