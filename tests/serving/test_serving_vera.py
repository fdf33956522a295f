# SPDX-License-Identifier: Apache-2.0
"""VeRA in lrkern.serving: adapters of vectors over pairs of projections, beside LoRA and the base."""

import functools
import json
import os
import random
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilm import batch, bert, lora_config, one_thread, peft  # isort: skip  # noqa: F401
from test_serving import Echo, hidden, tiny

import lrkern.functional as F
import lrkern.serving
from lrkern.files.own import save_adapter
from lrkern.nn import MoRALinear, NOLALinear, VeRALinear
from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull, Shared, Vectors

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")

LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
CONFIGS = {  # by name, the seed of the vectors and how the projections come
    "v1": {}, "v2": {}, "v3": {"save_projection": False}, "v4": {"save_projection": False},
}  # fmt: skip


def vera_config(**options):
    return peft.VeraConfig(**{"r": 24, "target_modules": LINEARS, "projection_prng_key": 7} | options)


OTHERS = {  # than the pair of those above
    "r16": {"r": 16, "save_projection": False},  # drawn again
    "query": {"target_modules": ["query"]},  # of [384, 384] alone: of other sizes
    "inside": {"target_modules": [*LINEARS[:4], "intermediate.dense"]},  # all but the widest I
    "key 8": {"projection_prng_key": 8},
}  # fmt: skip


@functools.cache
def stock(name):
    if name == "lora":
        torch.manual_seed(5)
        return peft.get_peft_model(bert(1), lora_config(r=20, target_modules=["query", "output.dense"])).eval()
    model = peft.get_peft_model(bert(1), vera_config(**(CONFIGS | OTHERS)[name])).eval()
    torch.manual_seed([*CONFIGS, *OTHERS].index(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "vera_lambda" in key:
                p.copy_(torch.randn(p.shape) * (0.5 if "lambda_d" in key else 0.2))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in (*CONFIGS, *OTHERS, "lora"):
        stock(name).save_pretrained(folder / name)
    return folder


def full_pool(model, folders, names=(*CONFIGS, "lora"), **options):
    pool = AdapterPool(model, **{"pages": 4} | options)
    for name in names:
        pool.load(name, folders / name)
    return pool


def pairs(pool):
    """What the pool has of each pair, in the order they came in."""
    (vectors,) = (kind for kind in pool._kinds if kind.parts is Shared)
    return sorted(vectors.over, key=lambda over: over.order)


def opened(pool):
    """Pages with room for more."""
    return [page for over in pairs(pool) for page in over.open]


@torch.no_grad()
def alone(name):
    model = bert(1) if name is None else stock(name)
    return hidden(model(**batch(8)))


def test_a_batch_of_every_family_is_stock_peft_one_adapter_at_a_time(folders):
    model = bert(1)
    who = ["v1", None, "lora", "v2", "v3", "v1", None, "v4"]
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        got = hidden(served(**batch(8), adapters=who))
        again = hidden(served(**batch(8), adapters=[None, None, "lora", *[None] * 5]))
    assert set(lrkern.serving.FAMILIES) == {"LORA", "RANDLORA", "VERA"}
    for row, name in enumerate(who):
        torch.testing.assert_close(got[row], alone(name)[row], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert (got[row] - alone(None)[row]).abs().max() > (0.05 if name else -1)
        assert torch.equal(got[row], alone(None)[row]) == (name is None)
    assert torch.equal(again[2], got[2]), "a row does not depend on the others"


def test_many_adapters_are_one_pair_of_gemms(folders, monkeypatch):
    calls, project = [], lrkern.serving.kinds.vectors.project
    monkeypatch.setattr(
        lrkern.serving.kinds.vectors, "project", lambda x, p, **kw: calls.append(tuple(x.shape)) or project(x, p, **kw)
    )
    monkeypatch.setattr(lrkern.ops, "multi_lora_shrink", lambda *_: pytest.fail("no adapter of factors"))
    model = bert(1)
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        served(**batch(8), adapters=["v1", "v2", "v3", "v4"] * 2)
        assert len(calls) == 2 * 6 and {shape[0] for shape in calls} == {8}, "of the 6 linears"
        calls.clear()
        served(**batch(8), adapters=["v1", None, None, "v2", *[None] * 4])
        assert len(calls) == 2 * 6 and {shape[0] for shape in calls} == {2}, "rows of others are left out"


def test_several_adapters_a_request_and_scales(folders):
    model = bert(1)
    who, scales = [["v1", "v2"], ["v3"], ["lora", "v1", "v1"], None], [[0.5, 2.0], [-1.5], [1.0, 0.25, 0.75], None]
    inputs = batch(4)
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        got = hidden(served(**inputs, adapters=who, scales=scales))

    def by_weights(parts):
        merged = bert(1)
        with torch.no_grad():
            for name, scale in parts:
                for key, layer in stock(name).base_model.model.named_modules():
                    if hasattr(layer, "get_delta_weight"):
                        merged.get_submodule(key).weight += scale * layer.get_delta_weight("default")
            return hidden(merged(**inputs))

    for row, (names, each) in enumerate(zip(who, scales, strict=True)):
        want = by_weights(zip(names or [], each or [], strict=True))
        torch.testing.assert_close(got[row], want[row], atol=2e-5, rtol=0)


@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=str)
def test_sixteen_bit_models(folders, pool_dtype):
    model, who = bert(1).bfloat16(), ["v1", None, "lora", "v2", "v3", "v1", None, "v4"]
    inputs = batch(8) | {"inputs_embeds": batch(8)["inputs_embeds"].bfloat16()}
    with MultiLoraModel(model, full_pool(model, folders, dtype=pool_dtype)) as served, torch.no_grad():
        got, base = hidden(served(**inputs, adapters=who)).float(), hidden(model(**inputs)).float()
    bound = 2 * (base - alone(None)).abs().max()
    for row, name in enumerate(who):
        assert (got[row] - alone(name)[row]).abs().max() < bound, name


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generate(how):
    def adapter(seed):
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            model = peft.get_peft_model(tiny("gpt2"), peft.VeraConfig(r=8, target_modules=["c_attn", "c_proj"])).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "vera_lambda" in key:
                    p.copy_(torch.randn(p.shape))
        return model

    stocks, model = {None: tiny("gpt2"), "a": adapter(1), "b": adapter(2)}, tiny("gpt2")
    pool = AdapterPool(model, pages=1)
    for name in ("a", "b"):
        pool.add(name, stocks[name].peft_config["default"], peft.get_peft_model_state_dict(stocks[name]))
    who = ["b", None, "a", "b"]
    ids = torch.randint(3, 97, (4, 5), generator=torch.Generator().manual_seed(1))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False) | how
    with MultiLoraModel(model, pool) as served:
        got = served.generate(input_ids=ids, adapters=who, **options).unflatten(0, (4, -1))
    each = {name: m.generate(input_ids=ids, **options).unflatten(0, (4, -1)) for name, m in stocks.items()}
    assert not torch.equal(each["a"], each["b"]) and not torch.equal(each["a"], each[None])
    for row, name in enumerate(who):
        assert torch.equal(got[row], each[name][row]), (row, name)


# ---- who is on the device -------------------------------------------------------------------------------------------


def vera(r, d, b, key=0, A=None, B=None, targets=("one", "two")):
    """Of Echo's linears [16, 24] and [16, 8]: config and tensors, with ones for projections."""
    tensors = {"base_model.vera_A": torch.ones(r, 16) if A is None else A,
               "base_model.vera_B": torch.ones(24, r) if B is None else B}  # fmt: skip
    for name, out in (("one", 24), ("two", 8)):
        if name in targets:
            tensors[f"base_model.model.{name}.vera_lambda_d"] = torch.full((r,), float(d))
            tensors[f"base_model.model.{name}.vera_lambda_b"] = torch.full((out,), float(b))
    settings = {"peft_type": "VERA", "r": r, "projection_prng_key": key, "save_projection": True}
    return settings | {"target_modules": list(targets)}, tensors


def lora(r, value):
    tensors = {}
    for name, out in (("one", 24), ("two", 8)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.full((r, 16), value / r / 16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(out, r)
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["one", "two"]}, tensors


def answers(served, names):
    """What each adapter answers ones with, one value in all columns."""
    y = served(torch.ones(len(names), 1, 16), adapters=list(names))
    assert all(len(row.unique()) == 1 for row in y), "torn"
    return y[:, 0, 0].tolist()


@pytest.mark.parametrize(("r", "per_page"), [(16, 16), (17, 8), (32, 8), (33, 4), (256, 1)])
def test_a_page_holds_as_many_as_have_room(r, per_page):
    model = Echo().eval()
    pool = AdapterPool(model, pages=3)
    served = MultiLoraModel(model, pool)
    for i in range(3 * per_page + 1):
        pool.add(f"v{i}", *vera(r, 1, i))
    names = [f"v{i}" for i in range(3 * per_page)]
    assert answers(served, names) == [16.0 * r * i for i in range(3 * per_page)]
    assert sorted(pool.resident) == sorted(names) and not pool._free and not opened(pool)
    assert answers(served, [f"v{3 * per_page}"]) == [16.0 * r * 3 * per_page]
    assert "v0" not in pool.resident and "v1" in pool.resident, "the least recently used one left"
    with pytest.raises(PoolFull, match=f"{3 * per_page + 1} adapters need 4 pages"):
        answers(served, [*names, f"v{3 * per_page}"])
    with pytest.raises(ValueError, match=r"rank must lie in 1..256"):
        AdapterPool(model, pages=1).add("wide", *vera(257, 1, 1))


def test_a_layer_left_out():
    """What else lies in the pool there does not matter."""
    model = Echo().eval()
    pool = AdapterPool(model, pages=1)
    pool.add("both", *vera(4, 1, 2))
    pool.add("one", *vera(4, 1, 3, targets=["one"], A=torch.ones(4, 16), B=torch.ones(24, 4)))
    pool.grow()
    for layer in pool._layers.values():
        layer.a.fill_(torch.nan), layer.b.fill_(torch.nan)
    with MultiLoraModel(model, pool) as served:
        y = served(torch.ones(3, 2, 16), adapters=["one", None, "both"])
    assert (y[0, :, :24] == 192).all() and not y[0, :, 24:].any() and not y[1].any() and (y[2] == 128).all()


def test_what_was_added_is_the_pools_own():
    model = Echo().eval()
    pool, parts = AdapterPool(model, pages=1), vera(4, 1, 2)
    pool.add("a", *parts)
    for tensor in parts[1].values():
        tensor.zero_()
    with MultiLoraModel(model, pool) as served:
        assert answers(served, ["a"]) == [128]
    pool.add("b", *vera(4, 1, 3))


def test_one_bad_adapter_leaves_other_rows_alone():
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)
    for name, b in (("good", 1.0), ("huge", 1e38)):
        pool.add(name, *vera(4, 1, b))
    with MultiLoraModel(model, pool) as served:
        y = served(torch.ones(4, 1, 16), adapters=["good", "huge", None, "good"])
    assert y[1].isinf().all() and (y[[0, 3]] == 64).all() and not y[2].any()


def test_pins_replace_remove_and_eviction():
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)  # 16 vectors a page
    served = MultiLoraModel(model, pool)
    for i in range(33):
        pool.add(f"v{i}", *vera(16, 1, i))
    pool.add("l", *lora(16, 7))
    pool.pin("v3")
    assert pool.resident == ["v3"] and pool._pages(pool._reserved) == 1
    assert answers(served, ["v3", "l", *(f"v{i}" for i in range(4, 19))]) == [
        256 * 3.0,
        7,
        *(256.0 * i for i in range(4, 19)),
    ]
    assert "v3" in pool.resident
    with pytest.raises(PoolFull, match="need 2 pages .* 1 of them pinned by others"):
        answers(served, ["l", *(f"v{i}" for i in range(4, 20))])
    pool.add("v3", *vera(16, 1, 50), replace=True)
    assert "v3" in pool.resident and answers(served, ["v3", "l"]) == [256 * 50.0, 7]
    pool.add("big", *lora(32, 9))
    with pytest.raises(PoolFull, match="need 2 pages .* 1 of them pinned by others"):
        answers(served, ["big"])
    with pytest.raises(PoolFull, match="pinning 'big' needs 2 pages more, 1 of 2 are pinned"):
        pool.pin("big")
    pool.unpin("v3")
    assert answers(served, ["big"]) == [9] and pool.resident == ["big"]
    pool.add("big", *vera(16, 2, 1), replace=True)  # another family under the same name
    assert answers(served, ["big", "v3"]) == [512, 256 * 50.0]
    for name in pool.names:
        pool.remove(name)
    assert sorted(pool._free) == [0, 1] and not opened(pool) and not pool._resident and not pool._reserved


def test_pinned_vectors_on_several_pages_move_together():
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)
    served = MultiLoraModel(model, pool)
    for i in range(32):
        pool.add(f"v{i}", *vera(16, 1, i))
    answers(served, [f"v{i}" for i in range(32)])
    pool.pin("v0"), pool.pin("v31")
    pool.add("l", *lora(16, 7))
    assert {pool._adapters[name].pages[0] for name in ("v0", "v31")} == {0, 1}
    assert answers(served, ["l"]) == [7]
    assert sorted(pool.resident) == ["l", "v0", "v31"]
    assert answers(served, ["v31", "l", "v0"]) == [256 * 31.0, 7, 0]


def test_what_is_in_use_is_not_moved():
    """A forward holds the second page: the batch waits for it, and nothing has left meanwhile."""
    model = Echo().eval()
    pool = AdapterPool(model, pages=2)
    served = MultiLoraModel(model, pool)
    for i in range(17):
        pool.add(f"v{i}", *vera(16, 1, i))
    pool.add("big", *lora(32, 9))
    answers(served, [f"v{i}" for i in range(17)])
    with pool._lease(["v16"]):
        cells, done = pool._adapters["v16"].cells, []
        thread = threading.Thread(target=lambda: done.append(answers(served, ["big"])))
        thread.start()
        thread.join(0.2)
        assert not done and len(pool.resident) == 17 and pool._adapters["v16"].cells == cells
    thread.join()
    assert done == [[9]] and pool.resident == ["big"]


def test_eight_threads():
    """No torn adapter, none lost: each thread changes its own names and asks for anyone's, of both families."""
    operations, threads, names = 100_000 if os.environ.get("LRK_TEST_FULL") else 2_000, 8, 6
    model = Echo().eval()
    pool = AdapterPool(model, pages=12)
    served, errors = MultiLoraModel(model, pool), []

    def made(number, version):
        value = 1000 * number + version
        if number % 3 == 0:
            return lora(16 + number, value), float(value)
        r = 33 if version % 4 else 20  # now and then a pair comes, and leaves
        return vera(r, 1, value), r * 16.0 * value

    def work(thread):
        torch.set_num_threads(1)
        rng, mine = random.Random(thread), {}
        for version in range(operations // threads):
            number = thread * names + rng.randrange(names)
            name, what = f"n{number}", rng.random()
            if what < 0.2:
                parts, value = made(number, version % 1000)
                pool.add(name, *parts, replace=name in mine)
                mine[name] = value
            elif what < 0.3 and name in mine:
                del mine[name]
                pool.remove(name)
            elif what < 0.35 and name in mine:
                try:
                    pool.pin(name)
                except PoolFull:
                    continue
                pool.unpin(name)
            else:
                known = rng.sample(sorted(mine), min(3, len(mine)))
                if known:
                    try:
                        got = answers(served, known)
                    except PoolFull:
                        continue
                    torch.testing.assert_close(got, [mine[n] for n in known], rtol=1e-6, atol=0)

    def guarded(thread):
        try:
            work(thread)
        except BaseException as error:
            errors.append((thread, error))

    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(300)
    assert not errors, errors[0]
    assert not any(w.is_alive() for w in workers)
    for name in pool.names:
        pool.remove(name)
    assert (
        sorted(pool._free) == list(range(12))
        and not opened(pool)
        and not pool._resident
        and not pool._reserved
        and not pairs(pool)
    )


def test_a_pair_over_a_basis_is_never_stored(monkeypatch):
    """A family of lrkern's own: the projections exist as a seed alone."""
    A, B = (F.Basis(3, "vera", 8, n, 8, 0.5, tensor=t) for t, n in enumerate((16, 24)))
    family = lambda config, tensors, linears: Shared(
        A._replace(seed=config["seed"]), B, {name: Vectors(tensors["d"], tensors[name]) for name in linears}
    )
    monkeypatch.setitem(lrkern.serving.FAMILIES, "OWN", family)
    torch.manual_seed(0)
    model = Echo().eval()
    pool, x = AdapterPool(model, pages=1), torch.randn(3, 5, 16)
    parts = [{"d": torch.randn(8), "one": torch.randn(24), "two": torch.randn(8)} for _ in range(2)]
    for i, tensors in enumerate(parts):
        pool.add(f"a{i}", {"peft_type": "OWN", "seed": 3}, tensors)
    assert len(pairs(pool)) == 1
    with MultiLoraModel(model, pool) as served:
        y = served(x, adapters=["a1", None, "a0"])
    assert not y[1].any() and not any(
        isinstance(p, torch.Tensor) for over in pairs(pool) for pair in over.pairs for p in pair
    )
    for row, tensors in ((0, parts[1]), (2, parts[0])):
        want = torch.cat([
            F.vera_linear(x[row], m.weight, m.bias, tensors["d"], tensors[n], A, B._replace(cols=m.out_features))
            for n, m in (("one", model.one), ("two", model.two))
        ], -1)  # fmt: skip
        torch.testing.assert_close(y[row], want, atol=1e-5, rtol=1e-5)


def changed(**values):
    return lambda c, t: c.update(values)


@pytest.mark.parametrize(("spoil", "message"), [
    (changed(bias="vera_only"), "bias must be 'none'"),
    (changed(modules_to_save=["pooler"]), "lacks pooler.dense.weight, which modules_to_save says"),
    (changed(r="x"), "r must be a whole number"),
    (changed(target_modules=["query"]), "must hold what target_modules="),
    (lambda c, t: t.pop("base_model.vera_B"), "lacks base_model.vera_B"),
    (lambda c, t: [t.pop("base_model.vera_A"), t.pop("base_model.vera_B")], "lacks base_model.vera_A"),
    (lambda c, t: t["base_model.vera_A"].fill_(torch.inf), "base_model.vera_A must be finite"),
    (lambda c, t: t.pop(next(k for k in t if "lambda_d" in k)), r"lacks .*vera_lambda_d"),
    (lambda c, t: t.update({next(k for k in t if "lambda_d" in k): torch.ones(23)}), r"must have shape \[24\], got \[23\]"),
    (lambda c, t: t[next(k for k in t if "lambda_b" in k)].fill_(torch.nan), "must have finite vectors"),
    (lambda c, t: t.update(x=torch.ones(2)), "must hold vera_lambda_d and vera_lambda_b of linears, got x"),
    (lambda c, t: [t.pop(k) for k in list(t) if "lambda" in k], "got none"),
])  # fmt: skip
def test_a_damaged_folder_leaves_the_pool_as_it_was(folders, tmp_path, spoil, message):
    model = bert(1)
    pool = full_pool(model, folders, ["v1", "lora"])
    stock("v2").save_pretrained(tmp_path)
    path, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    c, t = json.loads(settings.read_text()), load_file(path)
    spoil(c, t)
    settings.write_text(json.dumps(c))
    save_file(t, path)
    with MultiLoraModel(model, pool) as served:
        want = hidden(served(**batch(2), adapters=["v1", "lora"]))
        for name, replace in (("bad", False), ("v1", True)):
            with pytest.raises(ValueError, match=message) as refusal:
                pool.load(name, tmp_path, replace=replace)
            assert "the pool is unchanged" in str(refusal.value)
        assert torch.equal(hidden(served(**batch(2), adapters=["v1", "lora"])), want)


# ---- lrkern's own files


def own_file(path, values, kinds, **settings):
    """A model whose linears are lrkern's layers over random bases, and its file."""
    model, g = bert(1), torch.Generator().manual_seed(values)
    for name, linear in list(model.named_modules()):
        if not name.endswith(("query", "output.dense")):
            continue
        parent, _, child = name.rpartition(".")
        layer = kinds.from_linear(linear, **settings).eval()
        for p in layer.parameters():
            if p.requires_grad:
                p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
        setattr(model.get_submodule(parent), child, layer)
    save_adapter(model, path)
    return model


def test_a_batch_of_nola_vera_lora_and_the_base_is_each_alone(folders, tmp_path):
    shared = {"seed": 11, "r": 24, "max_in": 1536, "max_out": 1536}
    own = {
        "nola": own_file(tmp_path / "nola", 1, NOLALinear, r=20, k=9, l=7),
        "vera_a": own_file(tmp_path / "vera_a", 2, VeRALinear, **shared),
        "vera_b": own_file(tmp_path / "vera_b", 3, VeRALinear, **shared),
        "vera_apart": own_file(tmp_path / "vera_apart", 4, VeRALinear, r=5),  # a pair for each layer
    }
    model = bert(1)
    pool = full_pool(model, folders, ("lora",), pages=8)
    for name in own:
        pool.load(name, tmp_path / name)
    who = ["vera_a", None, "nola", "lora", "vera_b", "vera_apart", "vera_a", "nola"]
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(8), adapters=who))
    ((a, _),) = (over.pair for over in pairs(pool))
    assert isinstance(a, F.Basis) and (a.seed, a.cols) == (11, 1536)
    for row, name in enumerate(who):
        with torch.no_grad():
            want = hidden(own[name](**batch(8)))[row] if name in own else alone(name)[row]
        torch.testing.assert_close(got[row], want, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert (got[row] - alone(None)[row]).abs().max() > (0.01 if name else -1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "full rank",
            "must be a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear or VeRALinear, got MoRALinear, .* which has full rank",
        ),
        ("truncated", "cannot be read"),
        ("other model", "has 0, which the model does not"),
        ("rank", r"rank must lie in 1\.\.64"),
    ],
)
def test_own_files_that_do_not_fit_change_nothing(tmp_path, how, message):
    path, model = tmp_path / "adapter", bert(1)
    pool = AdapterPool(model, pages=8)
    if how == "full rank":
        own_file(path, 1, MoRALinear, r=8, mora_type=6)
    elif how == "rank":
        own_file(path, 1, NOLALinear, r=65, k=2, l=2)
    elif how == "other model":
        save_adapter(torch.nn.Sequential(NOLALinear(4, 4, r=2, k=2, l=2)), path)
    else:
        own_file(path, 1, VeRALinear, r=24, seed=3, max_in=1536, max_out=1536)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    before = pool.names, pool.resident
    with pytest.raises(ValueError, match=message):
        pool.load("x", path)
    assert (pool.names, pool.resident) == before
