# SPDX-License-Identifier: Apache-2.0
"""DoRA in a pool, beside LoRA, VeRA and base rows: stock PEFT, one adapter at a time, is the oracle."""

import functools

import pytest
import torch
from alone import Alone, check_beams, files

from minilm import batch, bert, lora_config, one_thread, peft, with_magnitudes  # isort: skip  # noqa: F401
from test_serving import Doubling, hidden, snapshot, tiny

import lrkern.serving
from lrkern.nn import MXFP4Linear
from lrkern.serving import AdapterPool, MultiLoraModel

CONFIGS = {  # by name, one MiniLM layer's adapter
    "dora": {"use_dora": True},
    "wide": {"use_dora": True, "r": 32, "lora_alpha": 7, "use_rslora": True},
    "mixed": {"use_dora": True, "r": 4, "rank_pattern": {"query": 17}, "alpha_pattern": {"key": 30}},
    "qv": {"use_dora": True, "r": 15, "target_modules": ["query", "value"]},
    "lora": {"r": 20},
    "vera": None,
}
WHO = ["dora", None, "lora", "wide", "vera", "mixed", "qv", "dora"]


@functools.cache
def stock(name):
    torch.manual_seed(list(CONFIGS).index(name))
    if CONFIGS[name] is not None:
        model = peft.get_peft_model(bert(1), lora_config(**CONFIGS[name]))
        return (with_magnitudes(model) if "use_dora" in CONFIGS[name] else model).eval()
    model = peft.get_peft_model(bert(1), peft.VeraConfig(r=24, target_modules=["query", "dense"]))
    for key, p in model.named_parameters():
        if "vera_lambda" in key:
            p.data.normal_(0, 0.3)
    return model.eval()


ALONE = Alone(stock, CONFIGS)
full_pool, assert_rows = ALONE.pool, ALONE.check_rows


def test_a_batch_of_dora_and_others_is_stock_peft_one_adapter_at_a_time(tmp_path):
    model = bert(1)
    pool = full_pool(model, [])
    for name in CONFIGS:
        stock(name).save_pretrained(tmp_path / name)
        pool.load(name, tmp_path / name)
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(8), adapters=WHO))
        others = [None if (CONFIGS.get(name) or {}).get("use_dora") else name for name in WHO]
        without = hidden(served(**batch(8), adapters=others))
        every = hidden(served(**batch(8), adapters=["mixed"] * 8))
    assert_rows(got, WHO, 1e-5)
    torch.testing.assert_close(every, ALONE.hidden("mixed"), atol=1e-5, rtol=0)
    for row, name in enumerate(WHO):
        assert torch.equal(got[row], without[row]) == (name == others[row]), "no row depends on its neighbours"
        assert name is None or (got[row] - ALONE.hidden(None)[row]).abs().max() > 0.05, name
    with torch.no_grad():
        as_lora = AdapterPool(bert(1), pages=8)
        config, tensors = files(stock("dora"))
        as_lora.add("x", config.to_dict() | {"use_dora": False}, {k: t for k, t in tensors.items() if "magn" not in k})
        plain = hidden(MultiLoraModel(as_lora._model, as_lora)(**batch(8), adapters=["x"] * 8))
    assert (plain - ALONE.hidden("dora")).abs().max() > 0.1, "magnitudes act"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=str)
def test_sixteen_bit_models(dtype, pool_dtype):
    model = bert(1).to(dtype)
    inputs = batch(8) | {"inputs_embeds": batch(8)["inputs_embeds"].to(dtype)}
    with MultiLoraModel(model, full_pool(model, dtype=pool_dtype)) as served, torch.no_grad():
        got, base = hidden(served(**inputs, adapters=WHO)).float(), hidden(model(**inputs)).float()
    assert_rows(got, WHO, 2 * (base - ALONE.hidden(None)).abs().max().item())


def test_autocast():
    model = bert(1)
    with MultiLoraModel(model, full_pool(model)) as served, torch.autocast("cpu", torch.bfloat16):
        assert_rows(hidden(served(**batch(8), adapters=WHO)).float(), WHO, 0.15)


@functools.cache
def merged(name):
    one = peft.get_peft_model(bert(1), files(stock(name))[0])
    peft.set_peft_model_state_dict(one, files(stock(name))[1])
    return one.eval().merge_and_unload()


def merged_differences(parts):
    """The base with the sum of what each adapter, merged by PEFT, changes in W."""
    model, base = bert(1), bert(1)
    with torch.no_grad():
        for name in parts:
            for key, m in merged(name).named_modules():
                if isinstance(m, torch.nn.Linear):
                    model.get_submodule(key).weight += m.weight - base.get_submodule(key).weight
        return hidden(model(**batch(8)))


def test_what_several_adapters_of_a_request_add_is_of_the_base():
    model, who = bert(1), [["dora", "lora"], ["lora", "vera", "wide"], ["dora", "mixed"], "dora", None, "vera", ["qv", "dora"], []]  # fmt: skip
    scales = [None] * 8
    with MultiLoraModel(model, full_pool(model, pages=32)) as served:
        got = hidden(served(**batch(8), adapters=who, scales=scales))
    for row, names in enumerate(who):
        names = [names] if isinstance(names, str) else names or []
        torch.testing.assert_close(got[row], merged_differences(names)[row], atol=3e-5, rtol=0)


def test_a_scale_that_has_no_meaning_is_refused_and_changes_nothing():
    """PEFT's set_scale changes the norm too: of a request it is not known which is meant."""
    model = bert(1)
    pool = full_pool(model)
    with MultiLoraModel(model, pool) as served:
        want = hidden(served(**batch(2), adapters=["dora", "lora"], scales=[1.0, 0.5]))
        before = snapshot(pool)
        for scale in (0.5, 0.0):
            with pytest.raises(ValueError, match=rf"scales must be 1 for 'wide' \(DoRA, .*lora_alpha\), got {scale}"):
                served(**batch(2), adapters=[["lora", "wide"], None], scales=[[0.5, scale], None])
        assert snapshot(pool) == before
        assert torch.equal(hidden(served(**batch(2), adapters=["dora", "lora"], scales=[1.0, 0.5])), want)
    config, tensors = files(stock("dora"))  # the way out
    pool.add("half", config.to_dict() | {"lora_alpha": 6}, tensors)
    scaled = peft.get_peft_model(bert(1), config)
    peft.set_peft_model_state_dict(scaled, tensors)
    for m in scaled.modules():
        if isinstance(m, peft.tuners.lora.LoraLayer):
            m.set_scale("default", 0.5)
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got, want = hidden(served(**batch(2), adapters=["half"] * 2)), hidden(scaled.eval()(**batch(2)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_rows_with_nan_are_nobody_elses():
    model, inputs = bert(1), batch(4)
    inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()
    with MultiLoraModel(model, full_pool(model)) as served:
        want = hidden(served(**inputs, adapters=["lora", "dora", "wide", None]))
        inputs["inputs_embeds"][1] = torch.nan
        got = hidden(served(**inputs, adapters=["lora", "dora", "wide", None]))
    assert got[1].isnan().all()
    for row in (0, 2, 3):
        assert torch.equal(got[row], want[row])


class Packs(torch.nn.Module):
    """Two linears over rows, packed or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def of_packs(seed, **config):
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ["up", "down"], "use_dora": True, "init_lora_weights": False}
    model = peft.get_peft_model(Packs(), peft.LoraConfig(**defaults | config)).eval()
    return with_magnitudes(model) if model.peft_config["default"].use_dora else model


@torch.no_grad()
@pytest.mark.parametrize("targets", [["up", "down"], ["up"], ["down"]], ids=str)
def test_packed_rows(targets):
    """Whose a row is is told by an index, of layers with and without a bias."""
    model, stocks = (
        Packs().eval(),
        {n: of_packs(s, use_dora=n != "l", target_modules=targets) for s, n in enumerate("abl")},
    )
    pool, x = AdapterPool(model, pages=8), torch.randn(9, 32)
    for name, one in stocks.items():
        pool.add(name, *files(one))
    who, lengths = ["a", None, "l", "b", ["a", "l"]], [2, 1, 3, 0, 3]
    with MultiLoraModel(model, pool) as served:
        got = served(x, adapters=who, lengths=lengths)
    want = [stocks["a"](x[:2]), model(x[2:3]), stocks["l"](x[3:6])]
    torch.testing.assert_close(got[:6], torch.cat(want), atol=1e-5, rtol=0)
    if targets == ["up"]:
        y = sum(stocks[n].base_model.model.up(x[6:]) for n in "al") - model.up(x[6:])
        torch.testing.assert_close(got[6:], model.down(torch.tanh(y)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_the_model_says_are_whose():
    """Gathered in another order, some of nobody's: of DoRA, biases and RandLoRA."""

    class Gathers(Packs):
        order = torch.tensor([5, 0, 3, 2, 4, 1])
        nobodys = torch.tensor([False, False, True, False, False, False])

        def forward(self, x):
            mine, flat = served.requests(x), x.flatten(0, 1)
            with served.rows(torch.where(self.nobodys, -1, mine[self.order])):
                return super().forward(flat[self.order])

    stocks = {"d": of_packs(1, bias="lora_only"), "l": of_packs(2, use_dora=False)}
    for p in stocks["d"].base_model.model.up.base_layer.bias, stocks["l"].base_model.model.up.lora_B["default"].weight:
        p += 0.5 * torch.randn(p.shape)
    config = peft.RandLoraConfig(r=6, randlora_alpha=90, target_modules=["up", "down"], save_projection=True)
    stocks["r"] = peft.get_peft_model(Packs(), config).eval()
    for key, p in stocks["r"].named_parameters():
        if "randlora_lambda" in key:
            p.copy_(torch.randn(p.shape))
    model, x, who = Gathers().eval(), torch.randn(3, 2, 32), ["d", "r", "l"]
    pool = AdapterPool(model, pages=8)
    for name, one in stocks.items():
        pool.add(name, *files(one))
    with MultiLoraModel(model, pool) as served:
        got = served(x, adapters=who)
    flat, plain = x.flatten(0, 1), Packs().eval()
    for y, row, nobody in zip(got, Gathers.order.tolist(), Gathers.nobodys.tolist(), strict=True):
        one = plain if nobody else stocks[who[row // 2]]
        torch.testing.assert_close(y, one(flat[row : row + 1])[0], atol=1e-5, rtol=1e-5)
        assert nobody or (y - plain(flat[row])).abs().max() > 0.02


def test_generate_over_conv1d_with_beams():
    def adapter(seed):
        torch.manual_seed(seed)
        config = lora_config(r=4 * seed, lora_alpha=8, use_dora=True, fan_in_fan_out=True)
        return with_magnitudes(peft.get_peft_model(tiny("gpt2"), config).eval())

    stocks = {None: tiny("gpt2"), "a": adapter(1), "b": adapter(5)}
    check_beams(stocks, tiny("gpt2"), pages=4)


def test_adapters_come_and_go_and_take_two_rows_more():
    model = bert(1)
    pool = full_pool(model, pages=3)
    assert [pool._adapters[name].size for name in ("dora", "wide", "mixed", "qv")] == [1, 3, 2, 2]
    with MultiLoraModel(model, pool) as served:
        for name in ("wide", "dora", "lora", "mixed", "qv", "wide", "lora", "dora"):
            got = hidden(served(**batch(8), adapters=[name] * 7 + [None]))
            assert_rows(got, [name] * 7 + [None], 1e-5)
        with pytest.raises(lrkern.serving.PoolFull, match="2 adapters need 4 pages"):
            served(**batch(2), adapters=["wide", "dora"])


@torch.no_grad()
def test_over_a_quantised_base():
    """The norm is that of the weight which the layer computes with."""

    def packed():
        model = Packs()
        dense = Packs()
        for name in ("up", "down"):
            setattr(model, name, MXFP4Linear.from_linear(getattr(model, name)))
            getattr(dense, name).weight.copy_(getattr(model, name).dequantize())
        return model.eval(), dense.eval()

    model, dense = packed()
    one = peft.get_peft_model(dense, peft.LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False))  # fmt: skip
    one, x = with_magnitudes(one.eval()), torch.randn(3, 5, 32)
    pool = AdapterPool(model, pages=1)
    pool.add("d", *files(one))
    with MultiLoraModel(model, pool) as served:
        got = served(x, adapters=["d", None, "d"])
        assert torch.equal(got[1], model(x)[1])
    torch.testing.assert_close(got[::2], one(x)[::2], atol=2e-5, rtol=0)


def spoil(**change):
    def damage(config, tensors):
        key = next(k for k in tensors if k.endswith("up.lora_magnitude_vector"))
        tensors[key] = change["of"](tensors[key])

    return damage


@pytest.mark.parametrize(("damage", "message"), [
    (lambda c, t: t.pop(next(k for k in t if "magnitude" in k)), r"lacks .*lora_magnitude_vector"),
    (spoil(of=lambda t: t[1:]), r"up.lora_magnitude_vector must have shape \[48\], got \[47\]"),
    (spoil(of=lambda t: t * torch.nan), "up must have finite magnitudes, and rows .* got 48 that"),
    (lambda c, t: c.update(use_dora=False), "must hold lora_A.weight and lora_B.weight of linears, got .*magnitude"),
    (lambda c, t: c.update(lora_bias=True), "lora_bias must be off with use_dora"),
    (lambda c, t: [t[k].zero_() for k in t if "lora_B" in k], "up must have finite magnitudes, .* got 1 that"),
])  # fmt: skip
def test_what_is_refused(damage, message):
    model = Packs().eval()
    model.up.weight.data[7] = 0  # such a row has no norm where B's is zero too
    pool = AdapterPool(model, pages=2)
    config, tensors = files(of_packs(1))
    config, tensors = config.to_dict(), {k: t.clone() for k, t in tensors.items()}
    pool.add("good", config, tensors)
    damage(config, tensors)
    before = snapshot(pool)
    for name, replace in (("bad", False), ("good", True)):
        with pytest.raises(ValueError, match=rf"adapter '{name}': .*{message}.*; the pool is unchanged"):
            pool.add(name, config, tensors, replace=replace)
    assert snapshot(pool) == before


def test_both_spellings_of_a_magnitude():
    model, (config, tensors) = Packs().eval(), files(of_packs(1))
    pool, x = AdapterPool(model, pages=2), torch.randn(2, 3, 32)
    assert any(k.endswith("lora_magnitude_vector") for k in tensors)
    pool.add("a", config, tensors)
    pool.add("b", config, {k + ".weight" * k.endswith("vector"): t for k, t in tensors.items()})
    with MultiLoraModel(model, pool) as served:
        a, b = served(x[:1].repeat(2, 1, 1), adapters=["a", "b"])
    assert torch.equal(a, b)


def test_a_base_that_shows_no_weight_is_refused():
    model = Packs().eval()
    model.up = Doubling(model.up)
    with pytest.raises(ValueError, match="up must have a weight and a bias for DoRA, got Doubling"):
        AdapterPool(model, pages=2, targets=["up", "down"]).add("x", *files(of_packs(1)))
