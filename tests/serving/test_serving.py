# SPDX-License-Identifier: Apache-2.0
"""lrkern.serving against stock PEFT, one adapter at a time, on MiniLM and tiny decoders."""

import copy
import functools
import os
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from minilm import adapted, batch, bert, lora_config, one_thread, peft, transformers  # isort: skip  # noqa: F401

import lrkern.serving
from lrkern.serving import AdapterPool, Factors, MultiLoraModel, PoolFull, UnknownAdapter

CONFIGS = {  # name: one MiniLM layer's adapter
    "r8": {},
    "r40": {"r": 40, "lora_alpha": 7, "use_rslora": True},
    "mixed": {"r": 4, "rank_pattern": {"query": 17, "pooler.dense": 2}, "alpha_pattern": {"key": 30}},
    "qv": {"r": 16, "target_modules": ["query", "value"]},
    "deep": {"r": 3, "target_modules": r".*(intermediate|output)\.dense"},
}


@functools.cache
def stock(name: str) -> peft.PeftModel:
    torch.manual_seed(list(CONFIGS).index(name))
    return peft.get_peft_model(bert(1), lora_config(**CONFIGS[name])).eval()


def parts(name):
    """What PEFT would write to the two files."""
    return stock(name).peft_config["default"], peft.get_peft_model_state_dict(stock(name))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in CONFIGS:
        stock(name).save_pretrained(folder / name)
    return folder


def full_pool(model, folders, **options):
    pool = AdapterPool(model, **{"pages": 16} | options)
    for name in CONFIGS:
        pool.load(name, folders / name)
    return pool


def hidden(out):
    return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)


@torch.no_grad()
def alone(name):
    """The batch by one stock adapter, or by the base."""
    model = bert(1) if name is None else stock(name)
    return hidden(model(**batch(8)))


def assert_rows(got, who, atol=1e-5):
    for row, name in enumerate(who):
        torch.testing.assert_close(got[row], alone(name)[row], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- a batch --------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_is_stock_peft_one_adapter_at_a_time(folders):
    model = bert(1)
    who = ["r40", None, "r8", "mixed", "deep", "qv", "r8", None]
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        got = hidden(served(**batch(8), adapters=who))
    assert_rows(got, who)
    base = alone(None)
    for row, name in enumerate(who):
        assert torch.equal(got[row], base[row]) == (name is None)


def test_base_alone_is_the_base_bit_for_bit(folders, monkeypatch):
    model = bert(1)
    want = alone(None)
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        monkeypatch.setattr(lrkern.ops, "multi_lora_shrink", lambda *_: pytest.fail("the base needs no adapter op"))
        for adapters in (None, [None] * 8, [[]] * 8):
            assert torch.equal(hidden(served(**batch(8), adapters=adapters)), want)
        assert torch.equal(hidden(model(**batch(8))), want), "called directly, the model is the base"


def test_close_leaves_the_model_as_it_was(folders):
    model = bert(1)
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    served = MultiLoraModel(model, full_pool(model, folders))
    served(**batch(8), adapters=["r8"] * 8)
    served.close()
    served.close()
    for name, m in model.named_modules():
        kind, attributes = before[name]
        assert type(m) is kind and vars(m).keys() == attributes.keys()
        assert all(vars(m)[k] is v for k, v in attributes.items()) and not m._forward_hooks
    assert torch.equal(hidden(model(**batch(8))), alone(None))
    with pytest.raises(RuntimeError, match="closed"):
        served(**batch(8), adapters=["r8"] * 8)


def weighted(**scales):
    """Stock PEFT with adapters of several names on at once, each adapter's scale multiplied."""
    model = copy.deepcopy(stock(next(iter(scales))))
    names = ["default"]
    for name in list(scales)[1:]:
        config, tensors = parts(name)
        model.add_adapter(name, config)
        peft.set_peft_model_state_dict(model, tensors, name)
        names.append(name)
    model.base_model.set_adapter(names)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for name, scale in zip(names, scales.values(), strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= scale
    with torch.no_grad():
        return hidden(model.eval()(**batch(8)))


def test_several_adapters_and_scales(folders):
    model = bert(1)
    who = [["r8", "r40"], "mixed", None, ["r40", "qv", "deep"], "r8", ["r8", "mixed"], "qv", []]
    scales = [[0.5, 2.0], -1.5, None, 0.75, 0, None, 1, 3.0]
    with MultiLoraModel(model, full_pool(model, folders)) as served:
        got = hidden(served(**batch(8), adapters=who, scales=scales))
    want = [
        weighted(r8=0.5, r40=2.0), weighted(mixed=-1.5), alone(None), weighted(r40=0.75, qv=0.75, deep=0.75),
        alone(None), weighted(r8=1, mixed=1), alone("qv"), alone(None),
    ]  # fmt: skip
    for row in range(8):
        torch.testing.assert_close(got[row], want[row][row], atol=1e-5, rtol=0)
    assert torch.equal(got[2], want[2][2]) and torch.equal(got[7], want[7][7])


def test_scales_of_any_kind(folders):
    """A number for all, or one a request, of Python, numpy or torch."""
    model = bert(1)
    who, half = ["r8", ["r40", "qv"], None, "r8"], [0.5, 1.5, None, 2]
    with MultiLoraModel(model, full_pool(model, folders)) as served:

        def run(scales):
            return hidden(served(**batch(4), adapters=who, scales=scales))

        want = run([0.5, [0.5, 0.5], None, 0.5])
        for one in (
            0.5,
            np.float32(0.5),
            np.float64(0.5),
            np.array(0.5),
            torch.tensor(0.5),
            torch.tensor(0.5).bfloat16(),
        ):
            assert torch.equal(run(one), want), repr(one)
        assert torch.equal(run(2), run([2, [2, 2], 2, 2])) and torch.equal(run(np.int64(2)), run(2))
        want = run([0.5, [1.5, 1.5], None, 2.0])
        assert not torch.equal(want, run(0.5))
        given = [0.5, 1.5, 7.0, 2.0]
        for each in (
            half,
            tuple(half),
            np.array(given),
            np.array(given, np.float16),
            torch.tensor(given),
            list(np.array(given)),
        ):
            assert torch.equal(run(each), want), repr(each)
        assert torch.equal(run([torch.tensor(0.5), torch.tensor([1.5, 1.5]), np.array([]), np.array([2])]), want)
        assert torch.equal(run([0.5, (np.float32(1.5), torch.tensor(1.5)), [], [2]]), want)
        assert torch.equal(run([None] * 4), run(1)) and torch.equal(run(None), run(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=str)
def test_sixteen_bit_models(folders, dtype, pool_dtype):
    """As near to the truth as the base model of this dtype is to its own."""
    model, who = bert(1).to(dtype), ["r40", None, "r8", "mixed", "deep", "qv", "r8", None]
    pool = full_pool(model, folders, dtype=pool_dtype)
    assert pool.dtype == (pool_dtype or dtype)
    inputs = batch(8) | {"inputs_embeds": batch(8)["inputs_embeds"].to(dtype)}
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got, base = hidden(served(**inputs, adapters=who)).float(), hidden(model(**inputs)).float()
    bound = (base - alone(None)).abs().max()
    assert bound < 0.2
    assert_rows(got, who, atol=2 * bound.item())


def test_autocast(folders):
    model, who = bert(1), ["r40", None, "r8", "mixed", "deep", "qv", "r8", None]
    with MultiLoraModel(model, full_pool(model, folders)) as served, torch.autocast("cpu", torch.bfloat16):
        assert_rows(hidden(served(**batch(8), adapters=who)).float(), who, atol=0.15)


class Doubling(nn.Module):
    """A base layer of another kind, such as a quantised one, that answers with a view."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

    def forward(self, x):
        y = self.linear(x)
        return torch.stack([y, y], -1)[..., 0]


def test_a_base_layer_of_any_kind(folders):
    model = bert(1)
    attention = model.encoder.layer[0].attention.self
    attention.query = Doubling(attention.query)
    with MultiLoraModel(model, full_pool(model, folders, targets=r".*(query|key|value|dense)")) as served:
        assert_rows(hidden(served(**batch(8), adapters=["r8"] * 8)), ["r8"] * 8)


# ---- generate -------------------------------------------------------------------------------------------------------

TINY = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=97, decoder_start_token_id=0
    ),
}  # fmt: skip
AUTO = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration"}


@functools.cache
def _tiny(kind):
    torch.manual_seed(0)
    return getattr(transformers, AUTO[kind])(TINY[kind]()).eval()


def tiny(kind):
    return copy.deepcopy(_tiny(kind))


def tiny_adapter(kind, seed):
    torch.manual_seed(seed)
    config = lora_config(r=4 * seed, lora_alpha=40 * seed)
    return peft.get_peft_model(tiny(kind), config).eval()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kind", TINY)
def test_generate_with_a_mixed_batch(kind, how):
    model = tiny(kind)
    pool = AdapterPool(model, pages=4)
    stocks = {None: tiny(kind)} | {f"a{seed}": tiny_adapter(kind, seed) for seed in (1, 5)}
    for name in ("a1", "a5"):
        pool.add(name, stocks[name].peft_config["default"], peft.get_peft_model_state_dict(stocks[name]))
    who = ["a5", None, "a1", "a5"]
    ids = torch.randint(3, 97, (4, 5), generator=torch.Generator().manual_seed(1))
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False) | how
    with MultiLoraModel(model, pool) as served:
        got = served.generate(input_ids=ids, adapters=who, **options).unflatten(0, (4, -1))
    each = {name: m.generate(input_ids=ids, **options).unflatten(0, (4, -1)) for name, m in stocks.items()}
    assert not torch.equal(each["a1"], each["a5"]) and not torch.equal(each["a1"], each[None])
    for row, name in enumerate(who):
        assert torch.equal(got[row], each[name][row]), (row, name)


def test_generate_sees_one_state():
    model, a, b = tiny("llama"), tiny_adapter("llama", 1), tiny_adapter("llama", 2)
    pool = AdapterPool(model, pages=2)
    tensors = {key: peft.get_peft_model_state_dict(m) for key, m in (("a", a), ("b", b))}
    pool.add("x", a.peft_config["default"], tensors["a"])
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    steps = []

    class Streamer:
        put = lambda self, _: (
            steps.append(len(steps))
            or (len(steps) == 3 and pool.add("x", b.peft_config["default"], tensors["b"], replace=True))
        )
        end = lambda self: None

    with MultiLoraModel(model, pool) as served:
        got = served.generate(ids[:1], adapters=["x"], streamer=Streamer(), **options)
        assert len(steps) > 4
        assert torch.equal(got, a.generate(ids[:1], **options)), "the adapter of when it began"
        assert torch.equal(served.generate(ids, adapters=["x"] * 2, **options), b.generate(ids, **options))


# ---- the device's pages ---------------------------------------------------------------------------------------------


def test_least_recently_used_leave_and_come_back(folders):
    model = bert(1)
    pool = full_pool(model, folders, pages=4)  # r40 takes 3 pages, mixed 2, the others 1
    assert pool.resident == []
    with MultiLoraModel(model, pool) as served:

        def run(*who):
            assert_rows(hidden(served(**batch(len(who)), adapters=list(who))), who)
            return set(pool.resident)

        def assert_rows(got, who):
            for row, name in enumerate(who):
                want = (bert(1) if name is None else stock(name))(**batch(len(who)))
                torch.testing.assert_close(got[row], hidden(want)[row].detach(), atol=1e-5, rtol=0)

        assert run("r40", "r8") == {"r40", "r8"}
        assert run("r40", None) == {"r40", "r8"}
        assert run("qv", "r40") == {"r40", "qv"}, "r8 was used before r40"
        assert run("mixed", "qv") == {"mixed", "qv"}
        assert run("deep") == {"mixed", "qv", "deep"}
        assert run("r40", "r8") == {"r40", "r8"}
        for _ in range(3):
            for name in CONFIGS:
                run(name, None)


def test_budget_is_bytes():
    model = bert(1)
    pool = AdapterPool(model, pages=3)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert pool.page_bytes == 16 * 4 * sum(m.in_features + m.out_features for m in linears)
    pool.grow()
    assert sum(t.nbytes for layer in pool._layers.values() for t in (layer.a, layer.b)) == 3 * pool.page_bytes
    assert AdapterPool(model, budget=3 * pool.page_bytes + 5).pages == 3
    assert AdapterPool(model, budget=pool.page_bytes, targets=["query"], dtype=torch.bfloat16).pages > 1
    with pytest.raises(ValueError, match=f"{pool.page_bytes} bytes"):
        AdapterPool(model, budget=pool.page_bytes - 1)


def snapshot(pool):
    with pool._changed:
        pages = {name: (id(a), a.pages, a.users, a in pool._reserved) for name, a in pool._adapters.items()}
        return pages, sorted(pool._free), pool._pages(pool._reserved), [a.size for a in pool._resident]


def test_a_batch_that_does_not_fit_changes_nothing(folders):
    model = bert(1)
    pool = full_pool(model, folders, pages=4)
    with MultiLoraModel(model, pool) as served:
        served(**batch(1), adapters=["mixed"])
        before = snapshot(pool)
        with pytest.raises(PoolFull, match=r"2 adapters need 5 pages \(\d+ bytes\), the pool has 4 \(\d+ bytes\)"):
            served(**batch(2), adapters=["mixed", "r40"])
        assert snapshot(pool) == before
        pool.pin("qv")
        with pytest.raises(PoolFull, match="need 4 pages .* 1 of them pinned by others"):
            served(**batch(2), adapters=["r8", "r40"])
        served(**batch(2), adapters=["qv", "r40"])
        assert set(pool.resident) == {"qv", "r40"}
        pool.unpin("qv")
        served(**batch(2), adapters=["r8", "r40"])
        assert set(pool.resident) == {"r8", "r40"}


def test_pins_are_kept_and_counted(folders):
    model = bert(1)
    pool = full_pool(model, folders, pages=4)
    pool.pin("mixed")
    pool.pin("mixed")
    assert pool.resident == ["mixed"]
    with pytest.raises(PoolFull, match="pinning 'r40' needs 3 pages more, 2 of 4 are pinned"):
        pool.pin("r40")
    with MultiLoraModel(model, pool) as served:
        for name in ("r8", "qv", "deep", "r8"):
            served(**batch(1), adapters=[name])
        assert "mixed" in pool.resident
    before = snapshot(pool)
    pool.pin("qv")
    with pytest.raises(PoolFull, match="pinning 'qv'"):
        pool.load("qv", folders / "r40", replace=True)
    pool.unpin("qv")
    assert snapshot(pool)[2] == before[2] == 2
    pool.load("mixed", folders / "r40", replace=True)
    assert "mixed" in pool.resident and pool._pages(pool._reserved) == 3
    pool.remove("mixed")
    assert not pool._reserved
    pool.pin("r40")


def test_pages_hold_zeros_past_the_rank_and_no_page_has_two_owners(folders):
    model = bert(1)
    pool = full_pool(model, folders, pages=8)
    with MultiLoraModel(model, pool) as served:
        served(**batch(4), adapters=["r40", "r8", "mixed", "qv"])
    pages = [page for a in pool._adapters.values() for page in a.pages or ()]
    assert len(set(pages)) == len(pages) == 7 and not set(pages) & set(pool._free)
    r8 = pool._adapters["r8"].pages[0]
    assert all(not layer.a[16 * r8 + 8 : 16 * r8 + 16].any() for layer in pool._layers.values())


# ---- changes while serving ------------------------------------------------------------------------------------------


def test_replace_and_remove_while_a_forward_runs(folders):
    """The forward under way ends with what it began with, even where every page is wanted by others."""
    model = bert(1)
    pool = full_pool(model, folders, pages=3)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_):
        if threading.current_thread().name == "slow":
            inside.set()
            go_on.wait(30)

    gate = model.encoder.layer[0].attention.output.register_forward_pre_hook(pause)
    results = {}
    with MultiLoraModel(model, pool) as served:

        def run(key, who):
            results[key] = hidden(served(**batch(2), adapters=who))

        slow = threading.Thread(target=run, args=("old", ["r8", "qv"]), name="slow")
        slow.start()
        assert inside.wait(30)
        pool.load("r8", folders / "deep", replace=True)
        pool.remove("qv")
        assert "qv" not in pool and len(pool) == 4
        waiting = threading.Thread(target=run, args=("wide", ["r40", None]), name="waiting")
        waiting.start()  # 3 pages: two are the slow forward's
        run("new", ["r8", None])
        waiting.join(0.2)
        assert waiting.is_alive()
        with pytest.raises(UnknownAdapter, match="'qv'"):
            served(**batch(2), adapters=["r8", "qv"])
        go_on.set()
        slow.join(30)
        waiting.join(30)
    gate.remove()
    with torch.no_grad():
        want = {name: hidden(stock(name)(**batch(2))) for name in ("r8", "qv", "deep", "r40")}
    for key, row, name in (("old", 0, "r8"), ("old", 1, "qv"), ("new", 0, "deep"), ("wide", 0, "r40")):
        torch.testing.assert_close(results[key][row], want[name][row], atol=1e-5, rtol=0)
    assert sorted([*pool._free, *(p for a in pool._adapters.values() for p in a.pages or ())]) == [0, 1, 2]


class Echo(nn.Module):
    """Two linears of zeros: what comes out is the adapter's alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), nn.Linear(16, 8)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return torch.cat([self.one(x), self.two(x)], -1)


RANKS = 4, 16, 20, 33


def answer(number, version):
    return RANKS[number % 4] * (1000 * number + version)  # every rank has its share; exact in fp32


def coded(number, version):
    """An adapter that answers ones with answer(number, version) in every column; its rank goes with the number."""
    r, tensors = RANKS[number % 4], {}
    for name, out in (("one", 24), ("two", 8)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.full((r, 16), (1000 * number + version) / 16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(out, r)
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["one", "two"]}, tensors


def test_eight_threads(capsys):
    """No torn adapter, none lost, none back from the dead: each thread changes its own names and asks for anyone's."""
    operations = 100_000 if os.environ.get("LRK_TEST_FULL") else 2_000
    threads, names = 8, 6
    model = Echo().eval()
    pool = AdapterPool(model, pages=40)
    served, x = MultiLoraModel(model, pool), torch.ones(3, 1, 16)
    mine = [{} for _ in range(threads)]  # name: version
    errors, served_count = [], [0] * threads

    def work(thread):
        torch.set_num_threads(1)
        rng = random.Random(thread)
        for version in range(operations // threads):
            number = thread * names + rng.randrange(names)
            name, known = f"n{number}", mine[thread]
            what = rng.random()
            if what < 0.2:
                pool.add(name, *coded(number, version % 1000), replace=name in known)
                known[name] = version % 1000
            elif what < 0.3 and name in known:
                del known[name]
                pool.remove(name)
            elif what < 0.35 and name in known:
                pool.pin(name)
                pool.unpin(name)
            else:
                other = rng.randrange(threads * names)
                try:
                    y = served(x, adapters=[f"n{other}", None, name])
                except UnknownAdapter as error:
                    assert name not in known or repr(name) not in str(error)
                    continue
                served_count[thread] += 1
                assert not y[1].any()
                for row, who in ((0, other), (2, number)):
                    assert len(y[row].unique()) == 1, f"torn: {y[row]}"
                    assert y[row, 0, 0].item() / RANKS[who % 4] // 1000 == who
                assert y[2, 0, 0].item() == answer(number, known[name]), "its own last version"

    def guarded(thread):
        try:
            work(thread)
        except BaseException as error:
            errors.append((thread, error))

    workers = [threading.Thread(target=guarded, args=(i,)) for i in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not errors, errors[0]
    expected = {name: version for known in mine for name, version in known.items()}
    assert set(pool.names) == set(expected)
    for name, version in expected.items():
        y = served(torch.ones(1, 1, 16), adapters=[name])
        assert (y == answer(int(name[1:]), version)).all()
    assert sum(served_count) > operations / 8
    for name in pool.names:
        pool.remove(name)
    assert sorted(pool._free) == list(range(40)) and not pool._resident and not pool._reserved


# ---- tensor parallelism ---------------------------------------------------------------------------------------------

CHECKS = (
    "column_and_row_parallel",
    "vectors_column_and_row_parallel",
    "magnitudes_and_biases_parallel",
    "eviction_is_the_same_on_every_rank",
    "a_shard_of_an_adapter_is_refused",
)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_tensor_parallel(in_two_processes, check):
    results = in_two_processes("serving_workers.py")
    assert set(results) == set(CHECKS)
    assert results[check] is None, results[check]


# ---- families -------------------------------------------------------------------------------------------------------


def test_another_family_registers(monkeypatch):
    """One hook says how a config and tensors become factors; all checks after it are the pool's."""
    family = lambda config, tensors, linears: {
        name: Factors(tensors["a"], torch.full((O, 2), config["fill"]), 0.5) for name, (I, O) in linears.items()
    }
    monkeypatch.setitem(lrkern.serving.FAMILIES, "SHARED_A", family)
    model = Echo().eval()
    pool = AdapterPool(model, pages=4)
    pool.add("lora", *coded(3, 7))
    pool.add("shared", {"peft_type": "SHARED_A", "fill": 2.0}, {"a": torch.ones(2, 16)})
    with MultiLoraModel(model, pool) as served:
        y = served(torch.ones(3, 1, 16), adapters=["shared", "lora", None])
    assert (y[0] == 0.5 * 2 * 2 * 16).all() and (y[1] == answer(3, 7)).all() and not y[2].any()
    for bad, fill in ((torch.ones(2, 15), 2.0), (torch.full((2, 16), float("nan")), 2.0), (torch.ones(65, 16), 2.0)):
        with pytest.raises(ValueError, match="adapter 'bad'"):
            pool.add("bad", {"peft_type": "SHARED_A", "fill": fill}, {"a": bad})
    assert pool.names == ["lora", "shared"]
