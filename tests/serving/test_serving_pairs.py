# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811
"""VeRA adapters of many pairs of projections in one pool: whose pair it is, and how long it is there."""

import gc
import weakref

import pytest
import torch

from test_serving_vera import (  # isort: skip  # noqa: F401
    CONFIGS, OTHERS, alone, answers, batch, bert, folders, full_pool, hidden, one_thread, pairs, vera,
)  # fmt: skip
from test_serving import Echo

from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull
from lrkern.serving.kinds import vectors

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")


def test_pairs_of_other_keys_ranks_and_targets_in_one_batch(folders):
    model = bert(1)
    pool = full_pool(model, folders, [*CONFIGS, *OTHERS, "lora"], pages=8)
    assert [over.r for over in pairs(pool)] == [24, 16, 24, 24, 24], "v1 to v4 have one, and each of the others"
    assert [over.pair[0].shape[1] for over in pairs(pool)] == [1536, 1536, 384, 384, 1536]
    who = ["v1", "r16", "query", "inside", "key 8", None, "lora", "v3"]
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(8), adapters=who))
        again = hidden(served(**batch(8), adapters=[None, "r16", *[None] * 6]))
        both = hidden(served(**batch(2), adapters=[["key 8", "v1"], ["v1", "key 8"]]))
        turned = hidden(served(**batch(2), adapters=[["v1", "key 8"], ["key 8", "v1"]]))
    for row, name in enumerate(who):
        torch.testing.assert_close(got[row], alone(name)[row], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert (got[row] - alone(None)[row]).abs().max() > (0.05 if name else -1)
    assert torch.equal(again[1], got[1]), "a row does not depend on the others"
    assert torch.equal(both, turned)


def test_a_batch_of_two_pairs_is_a_round_for_each(folders, monkeypatch):
    calls, project = [], vectors.project
    monkeypatch.setattr(vectors, "project", lambda x, p, **kw: calls.append(tuple(x.shape)) or project(x, p, **kw))
    model = bert(1)
    with MultiLoraModel(model, full_pool(model, folders, ["v1", "v2", "r16"])) as served:
        served(**batch(8), adapters=["v1", "r16", "v2", "v1", None, "r16", "v2", None])
    assert sorted(shape[0] for shape in calls) == [2] * 12 + [4] * 12, "of the 6 linears"


@pytest.mark.parametrize("how", ["remove", "replace", "in use"])
def test_a_pair_leaves_with_its_last_adapter(how):
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)
    served = MultiLoraModel(model, pool)
    for name, value in (("a", 1), ("b", 2)):
        pool.add(name, *vera(4, 1, value))
    pool.add("other", *vera(4, 1, 3, A=torch.full((4, 16), 2.0)))
    assert answers(served, ["a", "other"]) == [64, 384]
    first, other = map(weakref.ref, pairs(pool))
    tensors = [weakref.ref(p) for p in first().pairs[0]]
    pool.remove("a")
    assert first() and answers(served, ["b", "other"]) == [128, 384]
    if how == "in use":
        with pool._lease(["b"]):
            pool.remove("b")
            assert first(), "the forward under way reads it"
    elif how == "replace":
        pool.add("b", *vera(4, 1, 5, A=torch.full((4, 16), 2.0)), replace=True)  # over the other one from now on
        assert answers(served, ["b"]) == [640]
    else:
        pool.remove("b")
    gc.collect()
    assert not first() and not any(t() for t in tensors) and pairs(pool) == [other()]
    assert answers(served, ["other"]) == [384] and len(pool._free) == 1
    pool.add("again", *vera(4, 1, 7))
    assert answers(served, ["again", "other"]) == [448, 384]


def test_each_pair_has_pages_of_its_own():
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)
    served = MultiLoraModel(model, pool)
    for r in (4, 16, 33):  # 16, 16 and 4 a page
        for i in range(2):
            pool.add(f"r{r} {i}", *vera(r, 1, i + 1))
    assert answers(served, ["r4 0", "r33 1", "r4 1"]) == [64, 1056, 128] and not pool._free
    assert answers(served, ["r16 0", "r16 1", "r33 0"]) == [256, 512, 528], "the least recently used pair's page went"
    assert sorted(pool.resident) == ["r16 0", "r16 1", "r33 0"]
    with pytest.raises(PoolFull, match="3 adapters need 3 pages"):
        answers(served, ["r4 0", "r16 0", "r33 0"])
    pool.pin("r33 1")
    assert answers(served, ["r4 1", "r33 1"]) == [128, 1056]
    with pytest.raises(PoolFull, match="pinning 'r4 0' needs 1 pages more, 2 of 2 are pinned"):
        pool.pin("r16 0"), pool.pin("r4 0")
    pool.add("r33 1", *vera(16, 1, 9), replace=True)  # the pin goes on, over another pair
    assert answers(served, ["r33 1", "r16 0", "r4 0"]) == [2304, 256, 64]


def test_a_refused_adapter_leaves_no_pair_behind():
    pool = AdapterPool(Echo().eval(), pages=1, max_adapters=1)
    pool.add("a", *vera(4, 1, 1))
    with pytest.raises(PoolFull):
        pool.add("b", *vera(8, 1, 1))
    config, tensors = vera(8, 1, 1)
    with pytest.raises(ValueError, match="must have finite vectors"):
        pool.add("b", config, tensors | {"base_model.model.one.vera_lambda_b": torch.full((24,), torch.nan)})
    gc.collect()
    assert [over.r for over in pairs(pool)] == [4]
