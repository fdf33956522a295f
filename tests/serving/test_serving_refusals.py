# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811
"""What lrkern.serving refuses: nothing changes, and every other request goes on."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from test_serving import (  # isort: skip  # noqa: F401
    Echo, adapted, alone, batch, bert, coded, folders, full_pool, hidden, nn, one_thread, snapshot, stock,
)  # fmt: skip

from lrkern.serving import AdapterPool, MultiLoraModel, PoolFull, UnknownAdapter


def edit_config(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors, sorted(tensors))
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def poke(value, dtype=None):
    def change(tensors, keys):
        tensors[keys[3]] = tensors[keys[3]].to(dtype or torch.float32)
        tensors[keys[3]][1, 1] = value

    return edit_tensors(change)


def cut(folder, name="adapter_model.safetensors", keep=0.5):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])


def pickled(folder, name="adapter_model.bin"):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / name)


DAMAGES = {
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "must hold adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "cannot be read"),
    "pickled": (pickled, "pickle files such as adapter_model.bin are not read"),
    "pickled by another name": (lambda f: pickled(f, "adapter_model.safetensors"), "cannot be read"),
    "half a file": (cut, "cannot be read"),
    "an empty file": (lambda f: cut(f, keep=0), "cannot be read"),
    "all but the end": (lambda f: cut(f, keep=0.999), "cannot be read"),
    "half a config": (lambda f: cut(f, "adapter_config.json"), "cannot be read"),
    "a config of a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "must hold an object, got list"),
    "nan": (poke(float("nan")), "must have finite factors"),
    "inf": (poke(float("inf")), "must have finite factors"),
    "too large for the pool": (poke(1e39, torch.float64), "must have finite factors in torch.float32"),
    "integers": (poke(1, torch.int32), "must be float64, float32, float16, bfloat16 or float8, got torch.int32"),
    "a layer lost": (edit_tensors(lambda t, k: [t.pop(k[0]), t.pop(k[1])]), "lacks"),
    "an A lost": (edit_tensors(lambda t, k: t.pop(k[0])), r"lacks .*lora_A"),
    "a B lost": (edit_tensors(lambda t, k: t.pop(k[1])), r"lacks .*lora_B"),
    "no tensors": (edit_tensors(lambda t, k: t.clear()), "got none"),
    "one too many": (edit_tensors(lambda t, k: t.update(x=torch.ones(2))), "got x"),
    "of another model": (
        edit_tensors(lambda t, k: t.update({k[0].replace("layer.0", "layer.9"): t[k[0]].clone()})),
        r"this model's linears, got encoder.layer.9",
    ),
    "a layer that the config does not name": (
        edit_config(target_modules=["query"]),
        r"must hold what target_modules=\['query'\] names and no more, got encoder.layer.0.attention.output.dense",
    ),
    "another rank": (edit_config(r=9), r"must have shape \[9, \d+\], got \[8"),
    "a wrong shape": (edit_tensors(lambda t, k: t.update({k[0]: t[k[0]][:, 1:].contiguous()})), "must have shape"),
    "r missing": (edit_config(r=None), "r of .* must be a whole number, got None"),
    "alpha a word": (edit_config(lora_alpha="x"), r"lora_alpha must be a finite number \(in float32\), got 'x'"),
    "alpha nan": (edit_config(lora_alpha=float("nan")), r"lora_alpha must be a finite number \(in float32\), got nan"),
    "patterns a list": (edit_config(rank_pattern=[1]), "rank_pattern must be an object"),
    "a broken regex": (edit_config(target_modules="(("), r"target_modules is no regex: .*, got '\(\('"),
    "another family": (
        edit_config(peft_type="IA3"),
        r"peft_type must be one of \['ADALORA', 'LORA', 'MISS', 'MORA', 'RANDLORA', 'VERA'\], got 'IA3'",
    ),
    "dora": (edit_config(use_dora=True), "lacks .*lora_magnitude_vector"),
    "bias": (edit_config(bias="some"), "bias must be 'none', 'all' or 'lora_only', got 'some'"),
    "lora_bias": (edit_config(lora_bias=True), "lacks .*lora_B.bias"),
    "modules_to_save": (
        edit_config(modules_to_save=["pooler"]),
        "lacks pooler.dense.weight, which modules_to_save says",
    ),
    "alora": (edit_config(alora_invocation_tokens=[1]), "alora_invocation_tokens must be off"),
    "pissa": (edit_config(init_lora_weights="pissa_niter_4"), "init_lora_weights must leave the base"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_leaves_the_pool_as_it_was(folders, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    model = bert(1)
    pool = AdapterPool(model, pages=6)
    pool.load("good", folders / "r8")
    stock("r8").save_pretrained(tmp_path / "bad")
    spoil(tmp_path / "bad")
    with MultiLoraModel(model, pool) as served:
        before = hidden(served(**batch(2), adapters=["good", None])), snapshot(pool)
        for name, replace in (("bad", False), ("good", True)):
            with pytest.raises(ValueError, match=message) as refusal:
                pool.load(name, tmp_path / "bad", replace=replace)
            assert f"lrkern.serving: adapter '{name}'" in str(refusal.value) and "unchanged" in str(refusal.value)
            assert str(tmp_path / "bad") in str(refusal.value)
        assert snapshot(pool) == before[1] and pool.names == ["good"]
        assert torch.equal(hidden(served(**batch(2), adapters=["good", None])), before[0])


@pytest.mark.parametrize(("options", "name", "message"), [
    ({"max_rank": 39}, "r40", r"rank must lie in 1..39 \(the pool's max_rank\), got 40"),
    ({"max_rank": {"query": 40, "*": 39}}, "r40", "must have a rank of at most 39 .the pool's max_rank there., got 40"),
    ({"max_rank": {"self.query": 17, "key": 3, "*": 16}}, "mixed", "self.key must have a rank of at most 3"),
    ({"max_rank": {"*": 40, "attention.self.query": 16}}, "mixed", "self.query must have a rank of at most 16"),
    ({"pages": 2}, "r40", "rank 40 needs 3 pages, the pool has 2"),
    ({"targets": ["query", "value"]}, "r8", "is not among the pool's targets"),
], ids=["max_rank", "of others", "of keys", "of queries", "pages", "targets"])  # fmt: skip
def test_an_adapter_that_does_not_fit_the_pool(folders, options, name, message):
    pool = AdapterPool(bert(1), **{"pages": 8} | options)
    with pytest.raises(ValueError, match=message):
        pool.load(name, folders / name)
    assert not len(pool) and sorted(pool._free) == list(range(pool.pages))
    pool.load("qv", folders / "qv")


def test_names(folders):
    pool = AdapterPool(bert(1), pages=8, max_adapters=2)
    pool.load("a", folders / "r8")
    with pytest.raises(ValueError, match="name must be new .* got 'a'"):
        pool.load("a", folders / "r8")
    for method in (pool.remove, pool.pin, pool.unpin):
        with pytest.raises(UnknownAdapter, match="'b'"):
            method("b")
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name must be a string"):
            pool.load(name, folders / "r8")
    pool.load("b", folders / "qv", replace=True)  # a new name, too
    for replace in (False, True):
        with pytest.raises(PoolFull, match="max_adapters is 2"):
            pool.load("c", folders / "qv", replace=replace)
    assert pool.names == ["a", "b"] and len(pool) == 2 and "a" in pool and "c" not in pool
    pool.remove("a")
    pool.load("c", folders / "qv")


@pytest.mark.parametrize(("call", "message"), [
    (dict(adapters=["r8", "who"]), "adapter must be one of the pool's 5, got 'who'"),
    (dict(adapters=["r8"]), "adapters must have one entry for each of the 2 requests, got 1"),
    (dict(adapters="r8"), "adapters must be a list"),
    (dict(adapters=["r8", 3]), "adapters must be names"),
    (dict(adapters=["r8", ["r8", None]]), "adapters must be names"),
    (dict(scales=[1.0, 1.0]), "scales must come with adapters"),
    (dict(adapters=["r8", None], scales=[1.0]), "scales must be a number or 2 of them"),
    (dict(adapters=["r8", None], scales=torch.ones(3)), "scales must be a number or 2 of them"),
    (dict(adapters=["r8", None], scales=True), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=[True, 1]), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=torch.tensor([True, False])), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=np.bool_(True)), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=float("nan")), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=np.array([1, np.inf])), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=torch.tensor([torch.nan, 1])), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=[1e39, 1]), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=[1, float("nan")]), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=["1", 1]), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales="12"), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales={"r8": 2.0}), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=2j), "scales must be finite numbers"),
    (dict(adapters=["r8", None], scales=[float("nan"), 1]), "scales must be finite"),
    (dict(adapters=[["r8", "qv"], None], scales=[[1.0], None]), "scales must be finite numbers, one or 2"),
], ids=str)  # fmt: skip
def test_a_refused_batch_runs_nothing(folders, call, message):
    model = bert(1)
    pool = full_pool(model, folders)
    with MultiLoraModel(model, pool) as served:
        served(**batch(2), adapters=["r8", None])
        before, ran = snapshot(pool), []
        handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match=re.escape(message)):
            served(**batch(2), **call)
        assert not ran and snapshot(pool) == before
        handle.remove()
        served(**batch(2), adapters=["r8", None])


def test_an_error_inside_the_model_gives_the_pages_back(folders):
    model = bert(1)
    pool = full_pool(model, folders)
    with MultiLoraModel(model, pool) as served:
        handle = model.pooler.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served(**batch(2), adapters=["r8", None])
        handle.remove()
        assert all(a.users == 0 for a in pool._adapters.values())
        assert torch.equal(hidden(model(**batch(8))), alone(None)), "no batch is left behind"


def test_models_and_pools_that_do_not_go_together(folders):
    model = bert(1)
    for wrong, message in (
        (dict(pages=1, budget=1), "not both"),
        (dict(), "not both"),
        (dict(pages=0), "pages must be a whole number above 0, got 0"),
        (dict(budget=1), "hold a page"),
        (dict(pages=1, max_rank=513), "max_rank must lie in 1..512"),
        (dict(pages=1, max_rank=True), "max_rank must lie in 1..512"),
        (dict(pages=1, max_rank={}), "max_rank must lie in 1..512"),
        (dict(pages=1, max_rank={"query": 0, "*": 8}), "max_rank must lie in 1..512"),
        (dict(pages=1, max_rank={3: 8, "*": 8}), "max_rank must say ranks by name"),
        (dict(pages=1, max_rank={"query": 8}), r'max_rank must name every target \(or "\*"\), got none for encoder'),
        (dict(pages=1, max_rank={"quary": 8, "*": 8}), r"max_rank must name targets, got \['quary'\]"),
        (dict(pages=1, dtype=torch.float64), "dtype must be"),
        (dict(pages=1, targets=["nothing"]), "targets must name linears"),
        (dict(pages=1, parallel={"query": "both"}), "parallel must say column or row"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterPool(model, **wrong)
    with pytest.raises(ValueError, match="model must be without PEFT layers"):
        AdapterPool(adapted(1), pages=1)
    with pytest.raises(ValueError, match=r"model must have a linear encoder\.layer\.1"):
        MultiLoraModel(model, AdapterPool(bert(2), pages=1))
    pool = full_pool(model, folders)
    with MultiLoraModel(model.train(), pool) as served, pytest.raises(ValueError, match="must be in eval mode"):
        served(**batch(2), adapters=["r8", None])
