# SPDX-License-Identifier: Apache-2.0
"""LoRA of embeddings and of the head: each row as PEFT gives it, one adapter at a time."""

import copy
import functools

import peft
import pytest
import torch
import transformers as T
from tiny_models import _DECODER, V, tiny
from torch import nn

from minilm import one_thread  # isort: skip  # noqa: F401

from lrkern.serving import AdapterPool, MultiLoraModel
from lrkern.serving.kinds.embeddings import embeddings

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning", "ignore:Setting `save_embedding_layers:UserWarning"
)
GEMMA = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
MODELS = {  # and the targets that have embeddings and head
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**_DECODER)), ["embed_tokens", "lm_head", "q_proj"]),
    "llama tied": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**_DECODER, tie_word_embeddings=True)), ["embed_tokens", "down_proj"],
    ),
    "gemma": (lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**_DECODER, **GEMMA)), ["embed_tokens", "v_proj"]),
    "gpt2": (lambda: tiny("gpt2"), ["wte", "c_attn"]),
    "opt": (lambda: tiny("opt"), ["embed_tokens", "fc1"]),
    "embedding alone": (lambda: tiny("llama"), ["embed_tokens"]),
    "head alone": (lambda: tiny("llama"), ["lm_head"]),
}  # fmt: skip


@functools.cache
def base(kind):
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def adapt(kind, seed, targets=None, **options):
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "init_lora_weights": False} | options)
    config.target_modules = targets or MODELS[kind][1]
    return peft.get_peft_model(copy.deepcopy(base(kind)), config).eval()


def parts(model):
    return model.peft_config["default"], peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def served_by(kind, stocks, targets=None, **options):
    model = copy.deepcopy(base(kind))
    pool = AdapterPool(model, **{"pages": 8, "targets": targets or MODELS[kind][1]} | options)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    return MultiLoraModel(model, pool)


def ids(n, length=6):
    return torch.randint(3, V, (n, length), generator=torch.Generator().manual_seed(n))


def check(kind, stocks, who, got, inputs, tolerance=1e-5):
    with torch.no_grad():
        plain = base(kind)(**inputs).logits
        for i, name in enumerate(who):
            want = plain[i] if name is None else stocks[name](**inputs).logits[i]
            torch.testing.assert_close(got[i], want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
            assert name is None or not torch.allclose(want, plain[i], atol=1e-2), f"{name} does nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixed_batch_is_stock_peft_one_adapter_at_a_time(kind):
    stocks = {
        "a": adapt(kind, 1),
        "b": adapt(kind, 2, r=20, use_rslora=True, rank_pattern={"embed_tokens": 3, "wte": 17}),
    }
    who = ["a", None, "b", "a", None, "b"]
    inputs = {"input_ids": ids(6), "attention_mask": torch.ones(6, 6, dtype=torch.int64)}
    with served_by(kind, stocks) as served:
        for _ in range(2):  # the second call knows the path of the first
            got = served(**inputs, adapters=who).logits
            check(kind, stocks, who, got, inputs)
        assert torch.equal(got[1], base(kind)(**inputs).logits[1])
        check(kind, stocks, ["b"] * 6, served(**inputs, adapters=["b"] * 6).logits, inputs)
        last = served(**inputs, adapters=who, logits_to_keep=2).logits
        torch.testing.assert_close(last, got[:, -2:], rtol=1e-5, atol=1e-5)
        how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
        for more in ({}, {"num_beams": 3}):
            text = served.generate(**inputs, adapters=who, **how, **more)
            for i, name in enumerate(who):
                row = {key: t[i : i + 1] for key, t in inputs.items()}
                assert torch.equal(text[i : i + 1], (stocks.get(name) or base(kind)).generate(**row, **how, **more)), (
                    name
                )


def test_several_adapters_and_scales():
    """Over token ids alone: a row of the table, and what each adapter adds to it."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(V, 8)

        def forward(self, tokens):
            return self.table(tokens)

    torch.manual_seed(0)
    model, tokens = Table().eval(), ids(3)
    pool, deltas = AdapterPool(model, pages=4, targets=["table"]), {}
    for name, r in (("a", 2), ("b", 19)):
        A, B = torch.randn(r, V), torch.randn(8, r)
        tensors = {"base_model.model.table.lora_embedding_A": A, "base_model.model.table.lora_embedding_B": B}
        pool.add(name, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["table"]}, tensors)
        deltas[name] = 2.0 * (B @ A).T
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got = served(tokens, adapters=[["a", "b"], None, "b"], scales=[[0.5, -1.0], None, 3.0])
        want = model.table(tokens)
        assert torch.equal(got[1], want[1])
        want[0] += 0.5 * deltas["a"][tokens[0]] - deltas["b"][tokens[0]]
        want[2] += 3.0 * deltas["b"][tokens[2]]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        packed = served(tokens.view(1, -1), adapters=["b", None, "a"], lengths=[3, 5, 10])[0]
        owner = ["b"] * 3 + [None] * 5 + ["a"] * 10
        for token, name, y in zip(tokens.flatten(), owner, packed, strict=True):
            row = model.table.weight[token] + (0 if name is None else deltas[name][token])
            torch.testing.assert_close(y, row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [3.3, torch.tensor(3.3), torch.tensor([2])], ids=str)
def test_the_scale_of_an_embedding_is_what_peft_takes(own):
    model = nn.Sequential(nn.Embedding(V, 8)).bfloat16()
    model[0].embed_scale = own
    stock = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    factors, rest = embeddings(stock.peft_config["default"].to_dict(), parts(stock)[1], model, ())
    assert factors["0"].scale == 2 * float(stock.base_model.model[0]._get_embed_scale()) and not rest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    """As near to float32 as the model itself is, times two."""
    kind, who, inputs = "gemma", ["a", None, "a"], {"input_ids": ids(3)}
    stock = adapt(kind, 1)
    model = copy.deepcopy(base(kind)).to(dtype)
    pool = AdapterPool(model, pages=2, targets=MODELS[kind][1])
    pool.add("a", *parts(stock))
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got, plain = served(**inputs, adapters=who).logits.float(), model(**inputs).logits.float()
        want, right = stock(**inputs).logits, base(kind)(**inputs).logits
        assert (got[[0, 2]] - want[[0, 2]]).abs().max() <= 2 * (
            plain - right
        ).abs().max() * want.abs().max() / right.abs().max()
        assert torch.equal(got[1], plain[1])


def test_only_pools_whose_targets_name_an_embedding_have_room_for_it(monkeypatch):
    kind = "llama"
    model = copy.deepcopy(base(kind))
    plain, named = AdapterPool(model, pages=1), AdapterPool(model, pages=1, targets=r".*(_proj|embed_tokens)")
    assert "model.embed_tokens" not in plain.layers and "lm_head" not in plain.layers
    assert named.page_bytes - plain.page_bytes == 16 * 4 * (V + 32)
    where = r"model\.embed_tokens is not among the pool's targets; .*targets=\[\.\.\., 'model\.embed_tokens'\]"
    with pytest.raises(ValueError, match=where):
        plain.add("a", *parts(adapt(kind, 1, ["embed_tokens", "q_proj"])))
    named.add("a", *parts(adapt(kind, 1, ["embed_tokens", "q_proj"])))
    with pytest.raises(ValueError, match=r"lm_head is not among the pool's targets"):
        named.add("b", *parts(adapt(kind, 1, ["lm_head"])))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    with pytest.raises(ValueError, match="parallel must not split embeddings, got model.embed_tokens"):
        AdapterPool(model, pages=1, targets=["embed_tokens"], parallel={"embed_tokens": "row"})


def test_other_kinds_in_the_same_batch(tmp_path):
    kind = "llama"
    torch.manual_seed(4)
    vera = peft.get_peft_model(copy.deepcopy(base(kind)), peft.VeraConfig(r=8, target_modules=["q_proj"])).eval()
    for name, p in vera.named_parameters():
        if "vera_lambda" in name:
            p.data.copy_(torch.randn(p.shape))
    stocks = {"a": adapt(kind, 1), "vera": vera, "lora": adapt(kind, 2, ["down_proj"])}
    stocks["saved"] = adapt(kind, 3, ["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    stocks["saved"].base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    who = ["a", "vera", None, "lora", "saved"]
    inputs = {"input_ids": ids(5)}
    with served_by(kind, stocks, ["embed_tokens", "lm_head", "q_proj", "down_proj"]) as served:
        check(kind, stocks, who, served(**inputs, adapters=who).logits, inputs)


def changed(**values):
    return lambda c, t: c.update(values)


A, B = (f"base_model.model.model.embed_tokens.lora_embedding_{x}" for x in "AB")


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda c, t: t.pop(A), "lacks model.embed_tokens.lora_embedding_A"),
    (lambda c, t: [t.pop(A), t.pop(B)], "lora_embedding_A and lora_embedding_B .*, got none"),
    (lambda c, t: t.update({A: t[A].mT.contiguous()}), rf"embed_tokens.lora_embedding_A must have shape \[4, {V}\]"),
    (lambda c, t: t.update({B: t[B][1:].contiguous()}), r"embed_tokens.lora_embedding_B must have shape \[32, 4\], got \[31, 4\]"),
    (lambda c, t: t[A].fill_(torch.nan), "model.embed_tokens must have finite factors"),
    (lambda c, t: t.update({A.replace("model.embed_tokens", "wte"): t.pop(A)}), "must be of this model's linears, got model.wte|got wte"),
    (changed(target_modules=["q_proj", "lm_head"]), "must hold what target_modules=.* names and no more, got model.embed_tokens"),
    (changed(use_dora=True), "use_dora must be off"),
    (changed(ensure_weight_tying=True), "ensure_weight_tying must be off"),
    (changed(bias="all"), "bias must be 'none'"),
    (changed(lora_alpha=None), "lora_alpha of model.embed_tokens must be a finite number"),
    (changed(r=5), r"must have shape \[5, "),
])  # fmt: skip
def test_a_damaged_folder_leaves_the_pool_as_it_was(spoil, message):
    stock = adapt("llama", 1)
    with served_by("llama", {"good": stock}) as served:
        config, tensors = parts(stock)
        config = config.to_dict()
        spoil(config, tensors := dict(tensors))
        want = served(ids(2), adapters=["good", None]).logits
        for name, replace in (("bad", False), ("good", True)):
            with pytest.raises(ValueError, match=message) as refusal:
                served.pool.add(name, config, tensors, replace=replace)
            assert "the pool is unchanged" in str(refusal.value)
        assert torch.equal(served(ids(2), adapters=["good", None]).logits, want) and served.pool.names == ["good"]


def test_an_embedding_at_two_places_is_refused():
    """PEFT puts its layer in one of them, and the other stays the base's."""
    model = copy.deepcopy(base("llama"))
    config, tensors = parts(adapt("llama", 1, ["embed_tokens"]))
    model.again = model.model.embed_tokens
    with pytest.raises(
        ValueError, match="embed_tokens must stand at one place of the model, got model.embed_tokens and again"
    ):
        AdapterPool(model, pages=1, targets=["embed_tokens"]).add("a", config, tensors)


def test_positions_are_nobodys():
    """The same rows serve all requests: so one adapter for all of them, or a refusal."""
    stock = adapt("gpt2", 1, ["wpe"])
    with served_by("gpt2", {"a": stock}, ["wpe"]) as served:
        inputs = {"input_ids": ids(3)}
        check("gpt2", {"a": stock}, ["a"] * 3, served(**inputs, adapters=["a"] * 3).logits, inputs)
        with pytest.raises(ValueError, match="transformer.wpe got x .* rows do not tell which of the 3 requests"):
            served(**inputs, adapters=["a", None, "a"])
