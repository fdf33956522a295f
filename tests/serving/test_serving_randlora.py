# SPDX-License-Identifier: Apache-2.0
"""RandLoRA in a pool: full rank, over bases that adapters of one key share; stock PEFT, one adapter at a time, is the oracle."""

import copy
import functools
import gc

import pytest
import torch
from alone import Alone, check_beams, files

from minilm import batch, bert, lora_config, one_thread, peft  # isort: skip  # noqa: F401
from test_serving import hidden, snapshot, tiny

import lrkern.files
from lrkern.nn import NOLALinear, RandLoRALinear
from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull
from lrkern.serving.kinds import bases

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")

LINEARS = ["query", "attention.output.dense", "intermediate.dense", "output.dense"]  # square, wide and narrow
CONFIGS = {  # by name: r1 and r2 share a pair; r3's is equal, drawn again from its key
    "r1": {}, "r2": {"randlora_alpha": 100}, "r3": {"save_projection": False}, "key": {"projection_prng_key": 8},
    "rank": {"r": 100}, "query": {"target_modules": ["query"]}, "sparse": {"sparse": True}, "lora": None,
}  # fmt: skip
WHO = ["r1", None, "lora", "r2", "r3", "r1", "query", "key"]


@functools.cache
def stock(name):
    torch.manual_seed(list(CONFIGS).index(name))
    if CONFIGS[name] is None:
        return peft.get_peft_model(bert(1), lora_config(r=20, target_modules=["query", "output.dense"])).eval()
    defaults = {"r": 64, "target_modules": LINEARS, "save_projection": True, "randlora_alpha": 64}
    return acts(peft.get_peft_model(bert(1), peft.RandLoraConfig(**defaults | CONFIGS[name])).eval())


ALONE = Alone(stock, CONFIGS)
full_pool, assert_rows = ALONE.pool, ALONE.check_rows


def acts(model, by=1.0):
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "randlora_lambda" in key:
                p.copy_(by * torch.randn(p.shape))
            if "randlora_gamma" in key:
                p.mul_(torch.randn(p.shape) / 3)
    return model


def stored(pool):
    gc.collect()
    return [s for kind in pool._kinds if isinstance(kind, bases.OverBases) for s in kind.stored]


def test_a_mixed_batch_is_stock_peft_one_adapter_at_a_time(tmp_path):
    model = bert(1)
    pool = full_pool(model, [])
    for name in CONFIGS:
        stock(name).save_pretrained(tmp_path / name)
        pool.load(name, tmp_path / name)
    assert [pool._adapters[n].size for n in ("r1", "rank", "query")] == [1, 1, 1] and len(stored(pool)) == 5
    who = ["rank", "lora", "sparse", None, "key", "key", "sparse", "rank"]
    with MultiLoraModel(model, pool) as served:
        got, more = hidden(served(**batch(8), adapters=WHO)), hidden(served(**batch(8), adapters=who))
        others = hidden(served(**batch(8), adapters=[n if n == "lora" else None for n in WHO]))
        every = hidden(served(**batch(8), adapters=["r2"] * 8))
    assert_rows(got, WHO, 2e-5)
    assert_rows(more, who, 2e-5)
    torch.testing.assert_close(every, ALONE.hidden("r2"), atol=2e-5, rtol=0)
    for row, name in enumerate(WHO):
        assert torch.equal(got[row], others[row]) == (name in ("lora", None)), "others' rows are as without it"
        assert name is None or (got[row] - ALONE.hidden(None)[row]).abs().max() > 0.02, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=str)
def test_sixteen_bit_models(dtype, pool_dtype):
    model = bert(1).to(dtype)
    inputs = batch(8) | {"inputs_embeds": batch(8)["inputs_embeds"].to(dtype)}
    with MultiLoraModel(model, full_pool(model, dtype=pool_dtype)) as served, torch.no_grad():
        got, base = hidden(served(**inputs, adapters=WHO)).float(), hidden(model(**inputs)).float()
    assert_rows(got, WHO, 2 * (base - ALONE.hidden(None)).abs().max().item())


def test_small_numbers_keep_their_digits_in_float16():
    """A gamma starts at 1 / 1536 and may be far below: lambda and gamma lie in the pool over powers of two."""
    config, tensors = files(stock("r1"))
    small = {k: t * (1e-6 if "gamma" in k else 1e6 if "lambda" in k else 1) for k, t in tensors.items()}
    model = bert(1)
    pool = AdapterPool(model, pages=4, dtype=torch.float16)
    pool.add("small", config, small)
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(8), adapters=["small"] * 8))
    torch.testing.assert_close(got, ALONE.hidden("r1"), atol=5e-3, rtol=0)


def test_several_of_a_request_and_scales():
    model = bert(1)
    who = [["r1", "r2"], ["r3", "r3"], ["lora", "key", "r1"], None]
    scales = [[0.5, 2.0], [1.0, -0.25], [1.0, 0.25, 0.75], None]
    with MultiLoraModel(model, full_pool(model)) as served:
        got = hidden(served(**batch(4), adapters=who, scales=scales))
    for row, (names, each) in enumerate(zip(who, scales, strict=True)):
        merged = bert(1)
        with torch.no_grad():
            for name, scale in zip(names or [], each or [], strict=True):
                for key, layer in stock(name).base_model.model.named_modules():
                    if hasattr(layer, "get_delta_weight"):
                        merged.get_submodule(key).weight += scale * layer.get_delta_weight("default")
            want = hidden(merged(**batch(4)))[row]
        torch.testing.assert_close(got[row], want, atol=3e-5, rtol=0)


@torch.no_grad()
def test_packed_rows_and_rows_with_nan():
    net = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 24)).eval()
    config = peft.RandLoraConfig(r=5, target_modules=["0", "2"], randlora_alpha=50)
    stocks, pool, x = {None: net}, AdapterPool(net, pages=4), torch.randn(60, 24)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        stocks[name] = acts(peft.get_peft_model(copy.deepcopy(net), config).eval())
        pool.add(name, *files(stocks[name]))
    who, lengths = ["a", None, "b", "b", "a"], [20, 3, 0, 30, 7]
    x[21] = torch.nan
    with MultiLoraModel(net, pool) as served:
        got = served(x, adapters=who, lengths=lengths)
    want = torch.cat([stocks[n](part) for n, part in zip(who, x.split(lengths), strict=True)])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, equal_nan=True)
    assert got.isnan().any(1).nonzero().tolist() == [[21]]


def test_generate_over_conv1d_with_beams():
    def adapter(seed):
        torch.manual_seed(seed)
        config = peft.RandLoraConfig(r=8, target_modules=["c_attn", "c_proj"], randlora_alpha=200, fan_in_fan_out=True)
        return acts(peft.get_peft_model(tiny("gpt2"), config).eval(), 8.0)

    stocks = {None: tiny("gpt2"), "a": adapter(1), "b": adapter(2)}
    check_beams(stocks, tiny("gpt2"), pages=2)


def test_adapters_come_and_go_and_a_pair_leaves_with_the_last():
    model = bert(1)
    pool = full_pool(model, [n for n in CONFIGS if n != "lora"], pages=1)
    with MultiLoraModel(model, pool) as served:
        for name in ("r1", "key", "r2", "rank", "query", "r3", "r1"):
            assert_rows(hidden(served(**batch(8), adapters=[name] * 7 + [None])), [name] * 7 + [None], 2e-5)
        with pytest.raises(PoolFull, match="2 adapters need 2 pages"):
            served(**batch(2), adapters=["r1", "r2"])
    for name, left in (("key", 4), ("r1", 4), ("r3", 4), ("r2", 3), ("rank", 2)):
        pool.remove(name)
        assert len(stored(pool)) == left, name
    pool.add("query", *files(stock("sparse")), replace=True)
    pool.remove("sparse")
    assert len(stored(pool)) == 1


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    {"r": 5, "seed": 3}, {"r": 40, "seed": 4, "randlora_alpha": 20.0}, {"r": 5, "seed": 3, "paper_pairing": True},
    {"r": 7, "seed": 5, "distribution": "ternary6"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(32, 48), (48, 32)], ids=str)
def test_lrkerns_own_files(tmp_path, settings, sizes):
    """Whose bases are a seed: nothing of a pair is stored. The same layers as PEFT's folder store it."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(*sizes), torch.nn.Tanh(), torch.nn.Linear(*sizes[::-1])).eval()
    ours = copy.deepcopy(net)
    for i in (0, 2):
        ours[i] = RandLoRALinear.from_linear(ours[i], **{"randlora_alpha": 10.0} | settings).eval()
        ours[i].randlora_lambda.copy_(torch.randn(ours[i].randlora_lambda.shape))
    pool, x = AdapterPool(net, pages=2), torch.randn(3, 7, sizes[0])
    lrkern.files.save(ours, tmp_path / "own", kind="own")
    pool.load("own", tmp_path / "own")
    assert not any(isinstance(p, torch.Tensor) for s in stored(pool) for p in s.pair)
    names = ["own"]
    if not settings.get("paper_pairing"):
        lrkern.files.save(ours, tmp_path / "peft", kind="peft")
        pool.load("peft", tmp_path / "peft")
        names.append("peft")
    with MultiLoraModel(net, pool) as served:
        for name in names:
            got = served(x, adapters=[name, None, name])
            assert torch.equal(got[1], net(x)[1]) and (got[0] - net(x)[0]).abs().max() > 0.02
            torch.testing.assert_close(got[::2], ours(x)[::2], atol=2e-5, rtol=1e-5)


def test_what_is_refused(tmp_path):
    pool, model = full_pool(bert(1), ["r1"], pages=1), bert(1)
    before = snapshot(pool)
    key = "base_model.model.encoder.layer.0.output.dense.randlora_"

    def damaged(change):
        config, tensors = files(stock("r2"))
        config, tensors = config.to_dict(), {k: t.clone() for k, t in tensors.items()}
        change(config, tensors)
        return config, tensors

    for change, message in (
        (lambda c, t: t[f"{key}B"].add_(1), "output.dense.randlora_B must be base_model.randlora_B, which all linears share"),
        (lambda c, t: t.pop(f"{key}gamma"), "lacks encoder.layer.0.output.dense.randlora_gamma"),
        (lambda c, t: t.update({f"{key}gamma": torch.ones(3, 4)}), r"gamma must have shape \[6, 384\], got \[3, 4\]"),
        (lambda c, t: t[f"{key}lambda"].fill_(torch.nan), "output.dense must have finite lambda and gamma"),
        (lambda c, t: t[f"{key}gamma"].fill_(torch.inf), "output.dense must have finite lambda and gamma"),
        (lambda c, t: t["base_model.randlora_A"].fill_(torch.inf), "randlora_A must be base_model.randlora_A"),
        (lambda c, t: [v.fill_(torch.inf) for k, v in t.items() if k.endswith("randlora_A")], "randlora_A must be finite"),
        (lambda c, t: c.update(r=65), r"lambda must have shape \[65, 6\]"),
        (lambda c, t: c.update(randlora_alpha="x"), "randlora_alpha must be a finite number, got 'x'"),
        (lambda c, t: c.update(bias="all"), "bias must be 'none'"),
        (lambda c, t: c.update(modules_to_save=["pooler"]), "lacks pooler.dense.weight, which modules_to_save says"),
    ):  # fmt: skip
        for name, replace in (("bad", False), ("r1", True)):
            with pytest.raises(ValueError, match=rf"adapter '{name}': .*{message}.*; the pool is unchanged"):
                pool.add(name, *damaged(change), replace=replace)
    one = peft.get_peft_model(model, peft.RandLoraConfig(r=4, target_modules=["query"]))
    with pytest.raises(ValueError, match="lambda and gamma need 6 pages, the pool has 1"):
        pool.add("thin", *files(one))
    huge = {"one.randlora_lambda": torch.ones(1 << 20, 1), "one.randlora_gamma": torch.ones(1, 16)}  # a pair of 100 MB
    config = {
        "peft_type": "RANDLORA",
        "r": 1 << 20,
        "randlora_alpha": 1,
        "projection_prng_key": 0,
        "save_projection": False,
    }
    plain = AdapterPool(torch.nn.ModuleDict({"one": torch.nn.Linear(16, 24)}).eval(), pages=1 << 16)
    with pytest.raises(ValueError, match="r must lie in 1..24 .* got 1048576"):
        plain.add("huge", config, {f"base_model.model.{k}": t for k, t in huge.items()})
    mixed = torch.nn.ModuleDict({"a": RandLoRALinear(8, 8, r=2), "b": NOLALinear(8, 8, r=2, k=2, l=2)})
    lrkern.files.save(mixed, tmp_path / "mixed", kind="own")
    plain = AdapterPool(torch.nn.ModuleDict({k: torch.nn.Linear(8, 8) for k in "ab"}).eval(), pages=1)
    with pytest.raises(ValueError, match="a must be .*, got RandLoRALinear, which has full rank"):
        plain.load("x", tmp_path / "mixed")
    assert snapshot(pool) == before and not plain.names and len(stored(pool)) == 1
