# SPDX-License-Identifier: Apache-2.0
"""A kind of adapter is a class that makes itself known: the pool and the model serve it beside the others, unchanged."""

import pytest
import torch

from minilm import one_thread  # isort: skip  # noqa: F401
from test_serving import Echo, answer, coded
from test_serving_vera import vera

from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull
from lrkern.serving.kinds import kind as kinds


@pytest.fixture
def biases(monkeypatch):
    """y += scale · b, a row of B's pool for each adapter."""

    class Biases(dict):
        """Of linears."""

    class Batch:
        def __init__(self, kind, rows):
            self.kind, self.rows = kind, rows

        def acts(self, layer):
            return any(layer.index in adapter.host for row in self.rows for adapter, _ in row)

        def add(self, y, x, layer, along):
            (b_of,) = self.kind.views(layer)
            requests = along.spread(torch.arange(len(self.rows)), -1)
            for part, request in zip(y.view(-1, y.shape[-1]), requests.tolist(), strict=True):
                for adapter, scale in self.rows[request] if request >= 0 else ():
                    part += scale * b_of[adapter.cells[0]].flatten()
            return y

    class Bias(kinds.Kind):
        parts, per_page = Biases, 16

        def read(self, parts):
            own = {name: [self.pool._layers[name].mine(b, "column", 0)[None]] for name, b in parts.items()}
            return kinds.Adapter(self, self._host(own, 1, "biases"), 1, None)

        def views(self, layer):
            return (layer.b.unflatten(0, (-1, 1)),)

        def batch(self, rows):
            return Batch(self, rows)

    monkeypatch.setitem(kinds.FAMILIES, "BIAS", lambda config, tensors, linears: Biases(tensors))
    yield
    kinds.KINDS.remove(Bias)


def bias(value, **more):
    return {"peft_type": "BIAS"}, {"one": torch.full((24,), value), "two": torch.full((8,), value)} | more


def test_a_kind_of_its_own_in_one_batch_with_all_others(biases):
    model = Echo().eval()
    pool = AdapterPool(model, pages=5)  # lora 3, vera 1, all biases 1
    pool.add("lora", *coded(3, 7))
    pool.add("vera", *vera(16, 1, 3))
    for i in range(17):
        pool.add(f"b{i}", *bias(float(i)))
    with MultiLoraModel(model, pool) as served:
        who = ["b3", "lora", ["b5", "vera"], None, "vera", "b15"]
        scales = [2.0, 1.0, [0.5, 1.0], None, 1.0, 1.0]
        y = served(torch.ones(6, 1, 16), adapters=who, scales=scales)
        assert [row.unique().tolist() for row in y] == [[6], [answer(3, 7)], [2.5 + 768], [0], [768], [15]]
        pages = {pool._adapters[name].pages[0] for name in ("b3", "b5", "b15")}
        assert len(pages) == 1 and len(pool.resident) == 5
        with pytest.raises(PoolFull, match="19 adapters need 6 pages"):
            served(torch.ones(19, 1, 16), adapters=["lora", "vera", *(f"b{i}" for i in range(17))])
        with pytest.raises(ValueError, match="adapter 'bad': one must have finite biases"):
            pool.add("bad", *bias(1.0, one=torch.full((24,), torch.nan)))
    for name in pool.names:
        pool.remove(name)
    assert sorted(pool._free) == [0, 1, 2, 3, 4] and not any(kind.open for kind in pool._kinds)
