# SPDX-License-Identifier: Apache-2.0
"""The pool's memory grows up to its ceiling and shrinks, under forwards too; what it says about itself."""

import dataclasses
import json
import threading

import pytest
import torch
from test_serving import Echo, answer, coded
from test_serving_vera import vera

import lrkern.serving.memory
from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))


def random_adapter(number, rank):
    g, tensors = torch.Generator().manual_seed(number), {}
    for name, out in (("one", 24), ("two", 8)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 16, generator=g)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["one", "two"]}, tensors


def filled(pages=16, ranks=(5,) * 8, dtype=torch.float32):
    """Adapters n0, n1, ... of these ranks, of which none is on the device."""
    model = Echo().eval().to(dtype)
    pool = AdapterPool(model, pages=pages)
    for number, rank in enumerate(ranks):
        pool.add(f"n{number}", *random_adapter(number, rank))
    return MultiLoraModel(model, pool), pool


def taken(pool):
    """Pages that have memory."""
    (rows,) = {len(t) for layer in pool._layers.values() for t in (layer.a, layer.b)}
    assert rows % 16 == 0 and pool.statistics().bytes == rows // 16 * pool.page_bytes
    return rows // 16


def each_page_once(pool):
    """Every page with one owner, those without memory with none."""
    owned = [page for a in pool._adapters.values() for page in a.pages or ()]
    assert sorted([*owned, *pool._free]) == list(range(pool.pages)) and max(owned, default=-1) < max(taken(pool), 1)


# ---- growing and shrinking


def test_memory_is_taken_as_adapters_need_it():
    served, pool = filled(pages=11, ranks=(5, 5, 5, 40, 5, 5, 5, 5, 5))
    assert taken(pool) == 0 and pool.pages == 11 and pool.statistics().budget == 11 * pool.page_bytes
    sizes = []
    for number in range(9):
        served(X, adapters=[f"n{number}"] * 2)
        sizes.append(taken(pool))
        each_page_once(pool)
    assert sizes == [1, 2, 4, 8, 8, 8, 11, 11, 11], "twofold, and no more than the ceiling"
    assert not pool.statistics().evictions and not pool._free
    pool.add("more", *random_adapter(9, 5))
    served(X, adapters=["more"] * 2)
    assert taken(pool) == 11 and "n0" not in pool.resident and pool.statistics().evictions == 1


def test_a_ceiling_nobody_reaches():
    model = Echo().eval()
    pool = AdapterPool(model, budget=2**62)
    pool.add("n0", *random_adapter(0, 40))
    MultiLoraModel(model, pool)(X, adapters=["n0", None])
    assert taken(pool) == 3 and pool.pages == 2**62 // pool.page_bytes == pool.statistics().free_pages + 3
    pool.shrink(0)
    assert taken(pool) == 0
    with pytest.raises(RuntimeError, match="memory|storage size|overflow"):
        pool.grow()
    assert taken(pool) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_before_and_after(dtype):
    served, pool = filled(ranks=(5, 40, 17, 3, 33, 64), dtype=dtype)
    fixed_served, fixed = filled(ranks=(5, 40, 17, 3, 33, 64), dtype=dtype)
    fixed.grow()
    assert taken(fixed) == 16
    who, x = ([["n1", "n0"], "n1"], ["n2", None], ["n4", ["n3", "n5"]], ["n1", "n2"]), X.to(dtype)
    want = [fixed_served(x, adapters=each) for each in who]
    assert all(torch.equal(served(x, adapters=each), y) for each, y in zip(who, want, strict=True))
    for change in (pool.grow, lambda: pool.shrink(3), pool.shrink, lambda: pool.shrink(0), lambda: pool.grow(5)):
        change()
        assert all(torch.equal(served(x, adapters=each), y) for each, y in zip(who, want, strict=True))
        each_page_once(pool)


def test_shrinking_moves_what_stays():
    served, pool = filled(ranks=(5,) * 8)
    want = {name: served(X, adapters=[name] * 2) for name in pool.names}
    assert taken(pool) == 8
    for name in ("n0", "n1", "n2", "n4", "n6"):
        pool.remove(name)
    for name in ("n5", "n7", "n3"):
        served(X, adapters=[name] * 2)
    pool.shrink(6)
    assert taken(pool) == 6 and len(pool.resident) == 3, "room for more stays"
    pool.shrink()
    assert taken(pool) == 3 and {pool._adapters[n].pages[0] for n in pool.names} == {0, 1, 2}
    each_page_once(pool)
    assert [a for a in pool._resident] == [pool._adapters[n] for n in ("n5", "n7", "n3")], "who was used when"
    assert pool.statistics().evictions == 0
    pool.shrink(2)
    assert taken(pool) == 2 and pool.resident == ["n3", "n7"] and pool.statistics().evictions == 1
    for name in pool.names:
        assert torch.equal(served(X, adapters=[name] * 2), want[name])
    pool.pin("n5")
    pool.shrink(0)
    assert pool.resident == ["n5"] and taken(pool) == 1
    pool.unpin("n5")
    pool.shrink(0)
    assert pool.resident == [] and taken(pool) == 0
    assert torch.equal(served(X, adapters=["n5"] * 2), want["n5"])
    for wrong in (-1, 17, True, 2.0):
        for method in (pool.grow, pool.shrink):
            with pytest.raises(ValueError, match="pages must lie in 0..16"):
                method(wrong)
    pool.shrink()
    pool.grow(5)
    pool.grow(2)
    assert taken(pool) == 5, "growing gives nothing back"


def held(served, who, layer="two"):
    """A forward in a thread of its own that waits before its second linear; what lets it end and gives its result."""
    inside, go_on, result = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(60)

    hook = getattr(served.model, layer).register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: result.append(served(X, adapters=who)))
    thread.start()
    assert inside.wait(60)

    def end():
        go_on.set()
        thread.join(60)
        hook.remove()
        return result[0]

    return end


def test_under_forwards_that_run():
    """They end with what they began with, while the pools move and others come and go."""
    served, pool = filled(ranks=(5, 5, 40, 5, 5))
    want = {name: served(X, adapters=[name, None]) for name in pool.names}
    pool.shrink(0)
    served(X, adapters=["n0", None])
    served(X, adapters=["n1", None])
    end = held(served, ["n1", None])
    assert taken(pool) == 2
    served(X, adapters=["n2", None])
    assert taken(pool) == 5
    pool.shrink(0)
    assert pool.resident == ["n1"] and taken(pool) == 2 and pool._adapters["n1"].pages == [1], "in use where it is"
    pool.remove("n1")
    served(X, adapters=["n3", None])
    pool.shrink()
    assert taken(pool) == 2 and pool.resident == ["n3"]
    pool.grow()
    assert torch.equal(end(), want["n1"])
    pool.shrink()
    assert taken(pool) == 1
    assert all(torch.equal(served(X, adapters=[name, None]), want[name]) for name in pool.names)
    each_page_once(pool)


def test_threads():
    """Forwards, and who grows, shrinks, asks and looks through the names, all at once."""
    model = Echo().eval()
    pool = AdapterPool(model, pages=12)
    served, errors, stop = MultiLoraModel(model, pool), [], threading.Event()
    for number in range(8):
        pool.add(f"n{number}", *coded(number, 7))

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=run)

    def forwards(first):
        torch.set_num_threads(1)
        for i in range(150):
            number = (first + 3 * i) % 8
            y = served(torch.ones(2, 1, 16), adapters=[f"n{number}", None])
            assert (y[0] == answer(number, 7)).all() and not y[1].any()

    def changes():
        turn = 0
        while not stop.is_set():
            turn += 1
            change, to = ((pool.grow, None), (pool.shrink, None), (pool.shrink, turn % 5), (pool.grow, turn % 12))[
                turn % 4
            ]
            change(to)
            pool.add(f"extra{turn % 3}", *coded(turn % 4, turn % 1000), replace=True)

    def asks():
        while not stop.is_set():
            s = pool.statistics()
            used = sum(a.pages for a in s.adapters.values() if a.resident)
            assert used <= s.pages - s.free_pages and s.bytes <= s.budget
            assert {f"n{i}" for i in range(8)} <= {*pool} and len(pool) >= 8
            assert sum(a.hits for a in s.adapters.values()) <= s.hits

    workers, others = [guarded(lambda i=i: forwards(i)) for i in range(3)], [guarded(changes), guarded(asks)]
    for thread in (*workers, *others):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert not errors, errors[0]
    for name in pool:
        pool.remove(name)
    pool.shrink()
    assert taken(pool) == 0 and sorted(pool._free) == list(range(12))


def test_where_memory_runs_out(monkeypatch):
    """The call says so, and the pool goes on with what it has."""
    served, pool = filled(ranks=(5, 5, 5))
    want = [served(X, adapters=[f"n{i}"] * 2) for i in range(2)]
    second, resize = list(pool._layers.values())[1], lrkern.serving.memory.resize

    class Full:
        def __init__(self, t):
            self.t, self.shape = t, t.shape

        def __len__(self):
            return len(self.t)

        def new_empty(self, *_):
            raise torch.OutOfMemoryError("no more")

    def failing(layers, *args):
        first, a = next(iter(layers)), second.a
        second.a = Full(a)
        try:
            resize([first, second], *args)
        finally:
            second.a = a

    monkeypatch.setattr("lrkern.serving.pool.resize", failing)
    with pytest.raises(torch.OutOfMemoryError):
        served(X, adapters=["n2"] * 2)
    assert pool.resident == ["n0", "n1"] and all(a.users == 0 for a in pool._adapters.values())
    assert [len(layer.b) for layer in pool._layers.values()] == [64, 32]
    assert all(torch.equal(served(X, adapters=[f"n{i}"] * 2), y) for i, y in enumerate(want))
    monkeypatch.undo()
    pool.shrink()
    assert taken(pool) == 2
    assert served(X, adapters=["n2"] * 2).any() and taken(pool) == 4


def test_the_peak_is_the_new_size_and_one_old_tensor(monkeypatch):
    served, pool = filled(ranks=(5,) * 4)
    for number in range(4):
        served(X, adapters=[f"n{number}"] * 2)
    held, empty = [], torch.Tensor.new_empty

    def new_empty(t, *size):
        held.append(sum(t.nbytes for layer in pool._layers.values() for t in (layer.a, layer.b)))
        new = empty(t, *size)
        held[-1] += new.nbytes
        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    pool.grow()
    largest = 4 * 16 * 24 * 4  # B of one, in fp32
    assert len(held) == 4 and max(held) <= 16 * pool.page_bytes + largest


# ---- CUDA graphs


def test_a_captured_graph_pins_the_pools(monkeypatch):
    """Replays read the addresses and pages that were captured."""
    served, pool = filled(pages=6, ranks=(5, 5, 5, 40))
    served(X, adapters=["n3", "n2"])
    pool.shrink(0)
    served(X, adapters=["n0", "n1"])
    assert taken(pool) == 2
    want = served(X, adapters=["n1", None])
    monkeypatch.setattr("lrkern.serving.pool.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"'n2' must be on the device before .* call pool\.pin\(\)"):
        served(X, adapters=["n2", None])
    assert not pool._captured
    served(X, adapters=["n1", None])
    monkeypatch.undo()
    where = [(t.data_ptr(), t.clone()) for layer in pool._layers.values() for t in (layer.a, layer.b)]
    page = pool._adapters["n1"].pages[0]
    for method in (pool.grow, pool.shrink):
        with pytest.raises(PoolFull, match=r"must stay at 2 pages \(of 6: .*call pool\.grow\(\) before the capture\)"):
            method()
    pool.grow(1)  # as it is
    with pytest.raises(
        PoolFull, match=r"need 3 pages .* the pool has 2 .*a CUDA graph was captured.* 1 of them pinned by others"
    ):
        served(X, adapters=["n3", None])
    with pytest.raises(PoolFull, match="pinning 'n3' needs 3 pages more, 1 of 2 are pinned .*CUDA graph"):
        pool.pin("n3")
    assert not pool._reserved
    served(X, adapters=["n2", None])
    assert set(pool.resident) == {"n1", "n2"} and pool.statistics().free_pages == 0
    pool.add("n1", *random_adapter(9, 5), replace=True)
    new = served(X, adapters=["n1", None])
    assert not torch.equal(new, want) and pool.resident == ["n1"]
    pool.remove("n1")
    served(X, adapters=["n0", None])
    after = [t for layer in pool._layers.values() for t in (layer.a, layer.b)]
    for (address, before), t in zip(where, after, strict=True):
        assert t.data_ptr() == address
        assert torch.equal(t[16 * page :][:16], before[16 * page :][:16]), "what was captured, though it is removed"


def test_all_memory_before_a_capture(monkeypatch):
    served, pool = filled(pages=6, ranks=(5, 5, 40))
    pool.grow()
    pool.pin("n0")
    with monkeypatch.context() as patch:
        patch.setattr("lrkern.serving.pool.capturing", lambda device: True)
        served(X, adapters=["n0", None])
    pool.grow()
    served(X, adapters=["n1", "n2"])
    assert set(pool.resident) == {"n0", "n1", "n2"} and pool.statistics().free_pages == 1


# ---- what it says


def test_statistics():
    served, pool = filled(pages=4, ranks=(5, 40, 17))
    s = pool.statistics()
    assert (s.pages, s.free_pages, s.bytes, s.budget) == (4, 4, 0, 4 * pool.page_bytes)
    assert (s.hits, s.uploads, s.evictions) == (0, 0, 0) and list(s.adapters) == ["n0", "n1", "n2"]
    assert {name: (a.rank, a.pages) for name, a in s.adapters.items()} == {"n0": (5, 1), "n1": (40, 3), "n2": (17, 2)}
    served(X, adapters=[["n0", "n1"], "n0"])
    served(X, adapters=["n0", None])
    pool.pin("n0")
    served(X, adapters=["n2", None])
    end = held(served, ["n2", "n0"])
    s = pool.statistics()
    end()
    assert (s.pages, s.free_pages, s.bytes) == (4, 1, 4 * pool.page_bytes)
    assert (s.hits, s.uploads, s.evictions) == (4, 3, 1), "n1 left for n2"
    flags = {name: (a.resident, a.pinned, a.users, a.hits, a.uploads) for name, a in s.adapters.items()}
    assert flags == {"n0": (True, True, 1, 3, 1), "n1": (False, False, 0, 0, 1), "n2": (True, False, 1, 1, 1)}
    assert s == dataclasses.replace(s), "a copy, not a view"
    served(X, adapters=["n2", None])
    assert s.hits == 4 and pool.statistics().hits == 5
    pool.add("n2", *random_adapter(7, 3), replace=True)
    pool.remove("n1")
    after = pool.statistics()
    assert after.evictions == 1 and list(after.adapters) == ["n0", "n2"] and after.free_pages == 3
    assert after.adapters["n2"] == dataclasses.replace(
        s.adapters["n2"], rank=3, pages=1, resident=False, users=0, hits=0, uploads=0
    )
    assert json.loads(json.dumps(dataclasses.asdict(after)))["adapters"]["n0"]["pinned"] is True


def test_vectors_share_their_pages():
    """They move together with the page, beside factors."""
    model = Echo().eval()
    pool = AdapterPool(model, pages=8)
    served = MultiLoraModel(model, pool)
    for i in range(40):
        pool.add(f"v{i}", *vera(16, 1, i))
    pool.add("n", *random_adapter(0, 20))
    want = [served(X, adapters=["n", f"v{i}"]) for i in (0, 20, 39)]
    served(X, adapters=[[f"v{i}" for i in range(40)], "n"])
    s = pool.statistics()
    assert (s.free_pages, taken(pool)) == (3, 6) and len(pool.resident) == 41
    assert s.adapters["v3"].pages == 1 and s.adapters["v3"].rank == 16 and s.adapters["n"].pages == 2
    for i in range(40):
        if i not in (0, 20, 39):
            pool.remove(f"v{i}")
    pool.shrink()
    assert taken(pool) == 3 and len(pool.resident) == 4 and not pool.statistics().evictions
    assert all(torch.equal(served(X, adapters=["n", f"v{i}"]), y) for i, y in zip((0, 20, 39), want, strict=True))
