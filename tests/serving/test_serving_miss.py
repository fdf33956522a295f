# SPDX-License-Identifier: Apache-2.0
"""PEFT's MiSS adapters in a pool, beside LoRA and base rows: stock PEFT, one adapter at a time, is the oracle."""

import functools

import pytest
import torch

from minilm import batch, bert, lora_config, one_thread, peft  # isort: skip  # noqa: F401

from lrkern.serving import AdapterPool, MultiLoraModel

CONFIGS = {  # name: one MiniLM layer's adapter; in and out are 384 or 1536
    "lora": None,
    "miss": {"r": 16},
    "padded": {"r": 37, "init_weights": False, "target_modules": ["query", "output.dense", "intermediate.dense"]},
    "mini": {"r": 24, "init_weights": "mini", "mini_r": 12},
    "bat": {"r": 32, "init_weights": "bat"},
}


@functools.cache
def stock(name):
    torch.manual_seed(list(CONFIGS).index(name))
    config = CONFIGS[name]
    if config is None:
        config = lora_config()
    else:
        config = peft.MissConfig(**{"target_modules": ["query", "value", "dense"]} | config)
    model = peft.get_peft_model(bert(1), config).eval()
    for key, p in model.named_parameters():
        if "miss_block" in key:
            p.data.normal_(0, 0.02)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in CONFIGS:
        stock(name).save_pretrained(folder / name)
    return folder


def hidden(out):
    return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)


@torch.no_grad()
def alone(name):
    return hidden((bert(1) if name is None else stock(name))(**batch(6)))


@pytest.mark.parametrize("added", [False, True], ids=["load", "add"])
def test_a_mixed_batch_is_stock_peft_one_adapter_at_a_time(folders, added):
    model, who = bert(1), ["miss", None, "lora", "padded", "mini", "miss"]
    pool = AdapterPool(model, pages=8)
    for name in ("lora", "miss", "padded", "mini"):
        if added:
            pool.add(name, stock(name).peft_config["default"], peft.get_peft_model_state_dict(stock(name)))
        else:
            pool.load(name, folders / name)
    with MultiLoraModel(model, pool) as served:
        got = hidden(served(**batch(6), adapters=who))
        both = hidden(served(**batch(6), adapters=[["miss", "lora"]] * 6, scales=[[0.0, 1.0]] * 6))
    for row, name in enumerate(who):
        torch.testing.assert_close(got[row], alone(name)[row], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(got[row], alone(None)[row]) == (name is None)
        assert name is None or (got[row] - alone(None)[row]).abs().max() > 1e-2
    torch.testing.assert_close(both, alone("lora"), atol=1e-5, rtol=0)


def test_what_is_refused(folders):
    pool = AdapterPool(bert(1), pages=2, max_rank=32)
    pool.load("miss", folders / "miss")
    for name, text in (
        (
            "bat",
            "must be a layer of lrkern.nn.variants, MissLinear, .* got MissLinear, r=32, kind=bat, .* which has full rank and depends on W",
        ),
        ("padded", r"rank must lie in 1..32 \(the pool's max_rank\), got 37"),
    ):
        with pytest.raises(ValueError, match=rf"adapter '{name}': .*{text}.*; the pool is unchanged"):
            pool.load(name, folders / name)
    assert pool.names == ["miss"]
