# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA: every row of a batch has adapters of its own (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

Letters: T rows (x flattened), K slots a row, A adapters, L slices of one x (q, k, v), M pages of 16 ranks, R = 16 M, P rows
of a pool. Factors lie rank-major in pools: a_pool [P, I] holds rows of A, b_pool [P, O] rows of Bᵀ, of the activations'
dtype or float32. pages int32 [A, L, M]: page m of an adapter and slice is the pool's rows 16 pages[a, l, m] and the 15 after
it; ranks int32 [A, L] says how many of its rows count. A page belongs to one adapter. plan is what multi_lora_plan made of
index int32 [T, K] (or [T]), an adapter per row and slot, negative for none: made once, it serves all layers of a batch.
scales float32 [T, K] (or [T]); dropout_p float32 [A], one probability an adapter; seed int64 [1]. S has the pools' dtype, but
is float32 beside float16 pools, whose range scales · S leaves; a float16 S is taken there too.

All of this stays on the device: nothing is read back, so a captured CUDA graph replays with other adapters, ranks, scales
and rows. A row or page that does not exist is refused on the CPU; on CUDA, where values are not validated, that row is NaN and no other.
The adapter part is batch-invariant: a row alone and the row in any batch give the same bits.
"""

from torch import Tensor

from ..limits import PAGE, plan_length
from .composites import multi_lora as composites
from .dispatch import Op, like_contiguous, s_dtype


def _plans(index, adapters):
    if not 0 <= adapters <= 2**30:
        raise RuntimeError(f"lrkern::multi_lora_plan: adapters must lie in [0, 2^30], got {adapters}")
    slots = index.shape[1] if index.dim() == 2 else 1
    return index.new_empty((slots, plan_length(index.shape[0], adapters)))


_plan = Op("multi_lora_plan", composites.multi_lora_plan, results=_plans)


def multi_lora_plan(index: Tensor, adapters: int) -> Tensor:
    """The rows of a batch sorted by adapter, int32 [K, plan length]; its layout is csrc/multi_lora.h's.

    index int32 [T, K] or [T]: an adapter below ``adapters``, or negative for none.
    """
    return _plan(index, adapters)


def _s(x, a_pool, pages, plan, **_):
    sizes = *x.shape[:-1], plan.shape[0], pages.shape[1], PAGE * pages.shape[2]
    return a_pool.new_empty(sizes, dtype=s_dtype(a_pool.dtype))


def _weigh(ds, scales):
    return (ds * scales.reshape(*ds.shape[:-2], 1, 1)).to(ds.dtype)


# Autocast casts no pool: to cast thousands of adapters at every call would cost more than it saves. A float32 pool serves
# any activations.
_shrink = Op(
    "multi_lora_shrink",
    composites.multi_lora_shrink,
    results=_s,
    trains="x a_pool",
    weigh=("scales", _weigh),
    refuses="scales dropout_p",
    casts="x",
)


def multi_lora_shrink(
    x: Tensor,
    a_pool: Tensor,
    pages: Tensor,
    ranks: Tensor,
    plan: Tensor,
    scales: Tensor | None = None,
    dropout_p: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """S [..., K, L, R] = scales[t, k] · D(x[t]) A[index[t, k], l]ᵀ; zeros where a slot or an adapter has no rank.

    x [..., I]. Differentiable in x and a_pool. All slices in one pass over x.
    """
    return _shrink(x, a_pool, pages, ranks, plan, scales, dropout_p, seed)


_expand = Op(
    "multi_lora_expand",
    composites.multi_lora_expand,
    results=lambda y, **_: like_contiguous(y),
    trains="s b_pool",
    passes="y",
)


def multi_lora_expand(
    y: Tensor, s: Tensor, b_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, slice: int = 0
) -> Tensor:
    """y[t] + Σₖ S[t, k, slice] B[index[t, k], slice]ᵀ as a new tensor, beside a base layer of any kind that gave y [..., O].

    Slots are summed in order in fp32 and rounded once. Differentiable in y, s and b_pool.
    """
    return _expand(y, s, b_pool, pages, ranks, plan, slice)


_expand_into = Op("multi_lora_expand_", composites.multi_lora_expand_, instead="multi_lora_expand")


def multi_lora_expand_(
    y: Tensor, s: Tensor, b_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, slice: int = 0
) -> None:
    """The same in place. Not differentiable: raises where gradients are recorded and an argument requires one."""
    _expand_into(y, s, b_pool, pages, ranks, plan, slice)


_embedding = Op(
    "multi_lora_embedding",
    composites.multi_lora_embedding,
    results=lambda ids, **given: _s(ids.unsqueeze(-1), **given),
    trains="a_pool",
    weigh=("scales", _weigh),
    refuses="scales",
)


def multi_lora_embedding(
    ids: Tensor, a_pool: Tensor, pages: Tensor, ranks: Tensor, plan: Tensor, scales: Tensor | None = None
) -> Tensor:
    """S [..., K, L, R] = scales[t, k] · A[index[t, k], l][:, ids[t]]: multi_lora_shrink of one-hot rows, for an embedding.

    ids int64 [...], below V; a_pool [P, V]. Then multi_lora_expand into the rows that the base table gave. Differentiable in
    a_pool, with a dense gradient [P, V].
    """
    return _embedding(ids, a_pool, pages, ranks, plan, scales)


def _layer_results(x, weight, **given):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _s(x, **given)


_linear = Op(
    "multi_lora_linear",
    composites.multi_lora_linear,
    results=_layer_results,
    trains="x weight bias a_pool b_pool",
    refuses="scales dropout_p",
    casts="x weight bias",
)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_pool: Tensor,
    b_pool: Tensor,
    pages: Tensor,
    ranks: Tensor,
    plan: Tensor,
    scales: Tensor | None = None,
    dropout_p: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y[t] = x[t] Wᵀ + bias + Σₖ scales[t, k] (D(x[t]) A[index[t, k]]ᵀ) B[index[t, k]]ᵀ, one slice.

    x [..., I]; weight [O, I]; bias [O] or None. Differentiable in x, weight, bias, a_pool and b_pool: several adapters train
    in one batch, gradients of pool rows without an adapter in it are zeros. Saves x, S and the metadata. The base product
    is ATen's linear, so y is rounded twice.
    """
    return _linear(x, weight, bias, a_pool, b_pool, pages, ranks, plan, scales, dropout_p, seed)
