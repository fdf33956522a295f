# SPDX-License-Identifier: Apache-2.0
"""Biases that adapters bring, in a pool: PEFT's bias="lora_only" and "all", and lora_bias; stock PEFT alone is the oracle."""

import functools

import pytest
import torch
from alone import Alone, files

from minilm import batch, bert, lora_config, one_thread, peft, with_magnitudes  # isort: skip  # noqa: F401
from test_serving import hidden, snapshot

from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore:.*`lora_bias=True` was passed:UserWarning")

QV = {"target_modules": ["query", "value"]}
CONFIGS = {  # by name, one MiniLM layer's adapter
    "only": {"bias": "lora_only"},
    "some": {"bias": "lora_only", "r": 15} | QV,  # two rows more are a page more
    "all": {"bias": "all"} | QV,  # biases of linears without factors too
    "of_b": {"lora_bias": True},
    "both": {"lora_bias": True, "bias": "lora_only", "r": 20, "use_rslora": True},
    "dora": {"use_dora": True, "bias": "lora_only"},
    "plain": {"bias": "all"},  # and none of them is another
    "lora": {"r": 3},
}
WHO = ["only", None, "all", "some", "of_b", "lora", "dora", "both"]


def trained(model, norms=False):
    """The model with other biases in the linears, and in the norms."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") and p.requires_grad and ("lora_B" in name or norms or "Norm" not in name):
                p += 0.3 * torch.randn(p.shape)
    return model


@functools.cache
def stock(name):
    torch.manual_seed(list(CONFIGS).index(name))
    model = peft.get_peft_model(bert(1), lora_config(**CONFIGS[name])).eval()
    if name == "dora":
        with_magnitudes(model)
    return model if name == "plain" else trained(model)


ALONE = Alone(stock, CONFIGS)
full_pool, assert_rows = ALONE.pool, ALONE.check_rows


def test_a_mixed_batch_is_stock_peft_one_adapter_at_a_time(tmp_path):
    model = bert(1)
    pool = full_pool(model, [])
    for name in CONFIGS:
        stock(name).save_pretrained(tmp_path / name)
        pool.load(name, tmp_path / name)
    assert [pool._adapters[name].size for name in ("only", "some", "plain")] == [1, 2, 1]
    who = ["plain", "lora", "all", None, "all", "of_b", "dora", "plain"]
    with MultiLoraModel(model, pool) as served:
        got, more = hidden(served(**batch(8), adapters=WHO)), hidden(served(**batch(8), adapters=who))
        others = hidden(served(**batch(8), adapters=[n if n == "lora" else None for n in WHO]))
    assert_rows(got, WHO, 1e-5)
    assert_rows(more, who, 1e-5)
    for row, name in enumerate(WHO):
        assert torch.equal(got[row], others[row]) == (name in ("lora", None)), "no row depends on its neighbours"
    weights = {k: t for k, t in files(stock("only"))[1].items() if "bias" not in k}
    bare = AdapterPool(model, pages=4)
    bare.add("x", files(stock("only"))[0], weights)
    with MultiLoraModel(model, bare) as served:
        without = hidden(served(**batch(8), adapters=["x"] * 8))
    assert (without - ALONE.hidden("only")).abs().max() > 0.1, "biases act"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models(dtype):
    model = bert(1).to(dtype)
    inputs = batch(8) | {"inputs_embeds": batch(8)["inputs_embeds"].to(dtype)}
    with MultiLoraModel(model, full_pool(model)) as served, torch.no_grad():
        got, base = hidden(served(**inputs, adapters=WHO)).float(), hidden(model(**inputs)).float()
    assert_rows(got, WHO, 2 * (base - ALONE.hidden(None)).abs().max().item())


def test_several_of_a_request_and_scales():
    """A bias of lora_B is part of what a scale scales, one in place of the model's is not: that is refused."""
    model = bert(1)
    who, scales = (
        [["of_b", "lora"], ["only", "all"], "of_b", ["dora", "some", "of_b"]],
        [[-1.5, 2.0], None, 0.0, [1, 1, 0.5]],
    )
    pool = full_pool(model, pages=32)
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(4), adapters=who, scales=scales))
        before = snapshot(pool)
        for name in ("only", "all", "both"):
            with pytest.raises(ValueError, match=f"scales must be 1 for '{name}' .biases in place .*, got 0.5"):
                served(**batch(4), adapters=["lora", name, None, None], scales=[2.0, 0.5, None, None])
        assert snapshot(pool) == before
        served(**batch(4), adapters=["plain"] * 4, scales=[0.5] * 4)
    for row, (names, each) in enumerate(zip(who, scales, strict=True)):
        names = [names] if isinstance(names, str) else names
        each = [each] if isinstance(each, float) else each or [1.0] * len(names)
        sum_of, plain = bert(1), bert(1)
        with torch.no_grad():
            for name, scale in zip(names, each, strict=True):
                one = peft.get_peft_model(bert(1), files(stock(name))[0])
                peft.set_peft_model_state_dict(one, files(stock(name))[1])
                for key, m in one.merge_and_unload().named_modules():
                    if isinstance(m, torch.nn.Linear):
                        mine, base = sum_of.get_submodule(key), plain.get_submodule(key)
                        mine.weight += scale * (m.weight - base.weight)
                        mine.bias += scale * (m.bias - base.bias)
            want = hidden(sum_of(**batch(4)))[row]
        torch.testing.assert_close(got[row], want, atol=3e-5, rtol=0)


def test_lora_bias_over_linears_without_bias():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False)).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["0"], init_lora_weights=False)
    base = net[0].weight.clone()
    one = trained(peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False)), config).eval())
    one.base_model.model[0].base_layer.weight.data = base
    pool, x = AdapterPool(net, pages=1), torch.randn(3, 16)
    pool.add("x", *files(one))
    with MultiLoraModel(net, pool) as served, torch.no_grad():
        torch.testing.assert_close(served(x, adapters=["x"] * 3), one(x), atol=1e-5, rtol=0)
        got = served(x, adapters=["x", None, "x"], scales=[2, None, 0])
        torch.testing.assert_close(
            got, torch.stack([2 * one(x)[0] - net(x)[0], net(x)[1], net(x)[2]]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_biases_of_what_an_adapter_has_copies_of(tmp_path, options):
    """Norms whose biases train may be copies, and so may a linear's: those are no biases in place of the model's."""
    torch.manual_seed(9)
    config = lora_config(bias="all", modules_to_save=["LayerNorm", "pooler"], **QV | options)
    one = trained(peft.get_peft_model(bert(1), config).eval(), norms=True)
    one.save_pretrained(tmp_path)
    model = bert(1)
    pool = full_pool(model, ["of_b"])
    pool.load("x", tmp_path)
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got, want = hidden(served(**batch(8), adapters=["x", None, "of_b", "x"] * 2)), hidden(one(**batch(8)))
    torch.testing.assert_close(got[::4], want[::4], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[2::4], ALONE.hidden("of_b")[2::4], atol=1e-5, rtol=0)
    assert torch.equal(got[1::4], ALONE.hidden(None)[1::4])
    config, tensors = files(one)
    key = "base_model.model.embeddings.LayerNorm.modules_to_save.bias"
    with pytest.raises(ValueError, match=f"{key} must be the copy's bias once more, got another"):
        pool.add("y", config, tensors | {key: tensors[key] + 1})


def first(tensors, end):
    return next(k for k in tensors if k.endswith(end))


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("all", lambda c, t: t[first(t, "output.LayerNorm.bias")].add_(1), r"LayerNorm\.bias must be the model's, got another: .*bias='lora_only'"),
    ("all", lambda c, t: t.update({"base_model.model.nobody.bias": torch.ones(3)}), "nobody.bias must be one of the model's"),
    ("all", lambda c, t: t.update({"other.bias": torch.ones(3)}), "other.bias must begin with base_model.model."),
    ("only", lambda c, t: t.update({"base_model.model.pooler.dense.bias": torch.ones(384)}), "must hold one bias of pooler.dense, got two"),
    ("only", lambda c, t: t.update({first(t, "query.base_layer.bias"): torch.ones(3)}), r"query.bias must have shape \[384\], got \[3\]"),
    ("only", lambda c, t: t[first(t, "query.base_layer.bias")].fill_(torch.nan), "query must have finite factors"),
    ("only", lambda c, t: c.update(bias="none"), "query.base_layer.bias is a weight of the base and must be this model's, got other values"),
    ("only", lambda c, t: c.update(bias="vera_only"), "bias must be 'none', 'all' or 'lora_only', got 'vera_only'"),
    ("of_b", lambda c, t: t.pop(first(t, "lora_B.bias")), "lacks .*lora_B.bias"),
    ("of_b", lambda c, t: t.update({first(t, "query.lora_B.bias"): torch.ones(3)}), r"query.lora_B.bias must have shape \[384\], got \[3\]"),
    ("of_b", lambda c, t: c.update(lora_bias=False), "must hold lora_A.weight and lora_B.weight of linears, got .*lora_B.bias"),
])  # fmt: skip
def test_what_is_refused(name, damage, message):
    pool = full_pool(bert(1), ["lora"])
    config, tensors = files(stock(name))
    config, tensors, before = config.to_dict(), {k: t.clone() for k, t in tensors.items()}, snapshot(pool)
    damage(config, tensors)
    for adapter, replace in (("bad", False), ("lora", True)):
        with pytest.raises(ValueError, match=rf"adapter '{adapter}': .*{message}.*; the pool is unchanged"):
            pool.add(adapter, config, tensors, replace=replace)
    assert snapshot(pool) == before


def test_biases_of_linears_outside_the_targets():
    model = bert(1)
    pool = AdapterPool(model, pages=4, targets=["query", "value"])
    pool.add("same", *files(stock("some")))
    with pytest.raises(
        ValueError, match=r"key\.bias must be the model's, got another: .*the pool's targets .*name it there"
    ):
        pool.add("x", *files(stock("all")))
    assert pool.names == ["same"]
