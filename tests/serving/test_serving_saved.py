# SPDX-License-Identifier: Apache-2.0
"""Adapters with whole copies of modules (modules_to_save): each row as PEFT gives it, one adapter at a time."""

import copy
import functools
import gc
import json
import threading
import weakref

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import _BART, _DECODER, V, tiny
from torch import nn

from minilm import one_thread  # isort: skip  # noqa: F401

from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")

T = transformers
_ENCODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=V)
MODELS = {
    "llama score": lambda n: T.LlamaForSequenceClassification(T.LlamaConfig(**_DECODER, num_labels=n)),
    "bert classifier": lambda n: T.BertForSequenceClassification(T.BertConfig(**_ENCODER, num_labels=n)),
    "bert tokens": lambda n: T.BertForTokenClassification(T.BertConfig(**_ENCODER, num_labels=n)),
    "roberta head": lambda n: T.RobertaForSequenceClassification(
        T.RobertaConfig(**_ENCODER, num_labels=n, pad_token_id=0, type_vocab_size=1, max_position_embeddings=64)
    ),
}
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "roberta": ["query", "dense"]}
OPTIONS = {"bert tokens": {"task_type": "TOKEN_CLS"}}


@functools.cache
def base(kind, labels=3):
    torch.manual_seed(0)
    if kind.endswith("lm"):
        return tiny(kind.removesuffix(" lm"))
    model = MODELS[kind](labels).eval()
    for p in model.parameters():
        if p.ndim == 2:
            p.data.mul_(5)  # so that what is different shows
    return model


def adapt(model, seed, **options):
    """Stock PEFT over a copy, every weight that trains random."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False} | options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, p in adapted.named_parameters():
        if "modules_to_save" in name:
            p.data.copy_(torch.randn(p.shape) * 0.5)
    return adapted


def adapted(kind, seed, labels=3, **options):
    options = {"task_type": "SEQ_CLS", "target_modules": TARGETS[kind.split()[0]]} | OPTIONS.get(kind, {}) | options
    return adapt(base(kind, labels), seed, **options)


def parts(model):
    return model.peft_config["default"], peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def ids(n, length=6):
    tokens = torch.randint(3, V, (n, length), generator=torch.Generator().manual_seed(n))
    tokens[:, -1] = 2  # what Bart's head looks for
    return tokens


def check(model, stocks, who, got, inputs):
    """Rows of got against each stock model, None the base, alone."""
    with torch.no_grad():
        plain = model(**inputs).logits
        for i, name in enumerate(who):
            want = plain[i] if name is None else stocks[name](**inputs).logits[i]
            torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert name is None or not torch.allclose(want, plain[i], atol=1e-2), f"{name} does nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_heads_of_classifiers_as_peft_writes_them(tmp_path, kind):
    stocks = {name: adapted(kind, seed) for seed, name in enumerate("abc")}
    for name, stock in stocks.items():
        stock.save_pretrained(tmp_path / name)
    torch.manual_seed(9)
    stocks["plain"] = adapt(base(kind), 9, target_modules=TARGETS[kind.split()[0]])  # no copy of its own
    model, who = copy.deepcopy(base(kind)), ["a", None, "c", "plain", "b", "a"]
    pool = AdapterPool(model, pages=8)
    for name in "abc":
        pool.load(name, tmp_path / name)
    pool.add("plain", *parts(stocks["plain"]))
    inputs = {"input_ids": ids(6)}
    with MultiLoraModel(model, pool) as served:
        for _ in range(2):  # the second call knows the path of the first
            got = served(**inputs, adapters=who).logits
            check(base(kind), stocks, who, got, inputs)
        alone = served(**inputs, adapters=["b"] * 6).logits
        check(base(kind), stocks, ["b"] * 6, alone, inputs)
        check(base(kind), stocks, ["plain", None] * 3, served(**inputs, adapters=["plain", None] * 3).logits, inputs)
        torch.testing.assert_close(got[4], alone[4], rtol=1e-6, atol=1e-6)
        with torch.no_grad(), served.base() as itself:
            assert torch.equal(itself(**inputs).logits, base(kind)(**inputs).logits)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_heads_and_norms_with_generate(saved, tied):
    torch.manual_seed(1)
    plain = T.LlamaForCausalLM(T.LlamaConfig(**_DECODER, tie_word_embeddings=tied)).eval()
    options = dict(target_modules=["q_proj", "down_proj"], modules_to_save=saved)
    stocks = {name: adapt(plain, seed, **options) for seed, name in enumerate("ab")}
    model, who = copy.deepcopy(plain), ["b", None, "a", "b"]
    pool = AdapterPool(model, pages=2)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    inputs = {"input_ids": ids(4), "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
    how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with MultiLoraModel(model, pool) as served:
        check(plain, stocks, who, served(**inputs, adapters=who).logits, inputs)
        sliced = served(**inputs, adapters=who, logits_to_keep=2).logits
        torch.testing.assert_close(sliced, served(**inputs, adapters=who).logits[:, -2:], rtol=1e-5, atol=1e-5)
        for more in ({}, {"num_beams": 3}):
            text = served.generate(**inputs, adapters=who, **how, **more)
            for i, name in enumerate(who):
                row = {key: t[i : i + 1] for key, t in inputs.items()}
                assert torch.equal(text[i : i + 1], (stocks.get(name) or plain).generate(**row, **how, **more)), name


def test_packed_rows_are_each_their_requests_own():
    plain = base("llama lm")
    stocks = {
        name: adapt(plain, seed, target_modules=["q_proj"], modules_to_save=["lm_head"])
        for seed, name in enumerate("ab")
    }
    model, who, lengths = copy.deepcopy(plain), ["a", None, "b"], [3, 2, 4]
    pool = AdapterPool(model, pages=2)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    packed, at = ids(1, 9), torch.cat([torch.arange(n) for n in lengths])[None]
    rows = {}
    handle = model.lm_head.register_forward_pre_hook(lambda m, args: rows.update(x=args[0]))
    with MultiLoraModel(model, pool) as served:
        got = served(input_ids=packed, position_ids=at, adapters=who, lengths=lengths).logits
    handle.remove()
    for name, x, logits in zip(who, rows["x"].split(lengths, 1), got.split(lengths, 1), strict=True):
        head = model.lm_head if name is None else stocks[name].base_model.model.lm_head.modules_to_save["default"]
        torch.testing.assert_close(logits, nn.functional.linear(x, head.weight), rtol=1e-6, atol=1e-6)


def test_another_adapter_may_adapt_what_one_has_a_copy_of():
    plain = base("llama score")
    stocks = {"copy": adapted("llama score", 1), "low rank": adapt(plain, 2, target_modules=["score", "q_proj"])}
    model, who = copy.deepcopy(plain), ["low rank", "copy", None]
    pool = AdapterPool(model, pages=4)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    with MultiLoraModel(model, pool) as served:
        inputs = {"input_ids": ids(3)}
        check(plain, stocks, who, served(**inputs, adapters=who).logits, inputs)
        with pytest.raises(
            ValueError, match=r"not adapt what another of the same request has of its own, score .*got score"
        ):
            served(**inputs, adapters=[["low rank", "copy"], None, None])


def test_several_adapters_a_request_and_scales():
    """A copy has no scale: that of its adapter is of the low-rank part."""
    plain = base("llama score")
    stocks = {"a": adapted("llama score", 1), "b": adapted("llama score", 2)}
    stocks["plain"] = adapt(plain, 3, target_modules=["q_proj"])
    model, inputs = copy.deepcopy(plain), {"input_ids": ids(2)}
    pool = AdapterPool(model, pages=4)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    both = copy.deepcopy(plain)
    with torch.no_grad():
        both.score.weight.copy_(stocks["a"].base_model.model.score.modules_to_save["default"].weight)
        for name, scale in (("a", 0.5), ("plain", 1.0)):
            for key, layer in stocks[name].base_model.model.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    both.get_submodule(key).weight += scale * layer.get_delta_weight("default")
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got = served(**inputs, adapters=[["a", "plain"], None], scales=[[0.5, 1.0], None]).logits
        torch.testing.assert_close(got[0], both(**inputs).logits[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"adapters must have one with a score of its own .* a request, got 2"):
            served(**inputs, adapters=[["a", "b"], None])


def test_heads_of_other_numbers_of_labels():
    """All requests of a call have one shape; the model's own head need not be it."""
    stocks = {
        "five": adapted("llama score", 1, 5),
        "five too": adapted("llama score", 2, 5),
        "three": adapted("llama score", 3),
    }
    model, inputs = copy.deepcopy(base("llama score")), {"input_ids": ids(3)}
    pool = AdapterPool(model, pages=4)
    for name, stock in stocks.items():
        pool.add(name, *parts(stock))
    with MultiLoraModel(model, pool) as served:
        who = ["five", "five too", "five"]
        got = served(**inputs, adapters=who).logits
        assert got.shape == (3, 5)
        with torch.no_grad():
            for i, name in enumerate(who):
                torch.testing.assert_close(got[i], stocks[name](**inputs).logits[i], rtol=1e-5, atol=1e-5)
        check(
            base("llama score"),
            stocks,
            ["three", None, "three"],
            served(**inputs, adapters=["three", None, "three"]).logits,
            inputs,
        )
        for other in ("three", None):
            ran = []
            handle = model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            with pytest.raises(ValueError, match="give score one number of features for all requests of a call, got"):
                served(**inputs, adapters=["five", other, "five"])
            handle.remove()
            assert not ran and all(a.users == 0 for a in pool._adapters.values())


def test_rows_that_a_model_gathers_by_values_are_one_adapters_or_refused():
    """Bart takes the last eos of each text, wherever it is."""
    config = T.BartConfig(**_BART, num_labels=3, pad_token_id=0, eos_token_id=2, max_position_embeddings=64)
    torch.manual_seed(0)
    plain = T.BartForSequenceClassification(config).eval()
    for p in plain.parameters():
        p.data.mul_(5 if p.ndim == 2 else 1)
    stock = adapt(plain, 1, target_modules=["q_proj"], modules_to_save=["classification_head"])
    model, inputs = copy.deepcopy(plain), {"input_ids": ids(3)}
    pool = AdapterPool(model, pages=1)
    pool.add("a", *parts(stock))
    with MultiLoraModel(model, pool) as served:
        check(plain, {"a": stock}, ["a"] * 3, served(**inputs, adapters=["a"] * 3).logits, inputs)
        with pytest.raises(
            ValueError, match=r"classification_head \(modules_to_save\) got .* after getitem; give all requests"
        ):
            served(**inputs, adapters=["a", None, "a"])


class Net(nn.Module):
    """Two requests' rows go into a head of the user's own."""

    def __init__(self, head):
        super().__init__()
        self.linear, self.head = nn.Linear(8, 8), head

    def forward(self, x):
        return self.head(self.linear(x))


class Mixing(nn.Linear):
    """Whose rows depend on others."""

    how = None

    def forward(self, x):
        return super().forward(self.how(x))


MIXED = {
    "mean": lambda x: x - x.mean(0),
    "attention": lambda x: (x @ x.mT).softmax(-1) @ x,
    "sum": lambda x: x / x.cumsum(0)[-1],
    "batch norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "turned": lambda x: x.flip(0),
}


def own_head(value, size=4, of="head", bias=True):
    tensors = {f"base_model.model.{of}.weight": torch.full((size, 8), value)}
    if bias:
        tensors[f"base_model.model.{of}.bias"] = torch.zeros(size)
    tensors["base_model.model.linear.lora_A.weight"] = torch.zeros(2, 8)
    tensors["base_model.model.linear.lora_B.weight"] = torch.zeros(8, 2)
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["linear"],
        "modules_to_save": ["head"],
    }, tensors


def net(head=None):
    torch.manual_seed(0)
    model = Net(head or nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(8)), model.linear.bias.zero_()
    return model


@pytest.mark.parametrize("how", MIXED)
def test_what_mixes_rows_is_refused_unless_all_are_one_adapters(how):
    model = net(Mixing(8, 4))
    model.head.how = MIXED[how]
    pool = AdapterPool(model, pages=4, targets=["linear"])
    pool.add("a", *own_head(1.0)), pool.add("b", *own_head(2.0))
    x = torch.randn(3, 8)
    with MultiLoraModel(model, pool) as served:
        with pytest.raises(
            ValueError,
            match=r"head \(modules_to_save\) must give each request what its own rows make, got something else after \w+",
        ):
            served(x, adapters=["a", None, "b"])
        want = MIXED[how](x).sum(1, keepdim=True).expand(3, 4)
        torch.testing.assert_close(served(x, adapters=["a"] * 3), want)


def test_what_was_refused_is_not_known_the_next_time():
    """Of torch's own modules a forward is followed once for inputs of a shape."""
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(8, 8))
    model.add_module("head", nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False)))
    pool = AdapterPool(model.eval(), pages=4, targets=["linear"])
    config, tensors = own_head(1.0, of="head.0")
    pool.add("a", config, tensors)
    with MultiLoraModel(model, pool) as served:
        for _ in range(3):
            with pytest.raises(ValueError, match="must give each request .* after batch_norm"):
                served(torch.ones(2, 8), adapters=["a", None])


def test_a_copy_that_the_device_has_no_memory_for_changes_nothing(monkeypatch):
    model = net()
    pool = AdapterPool(model, pages=2, targets=["linear"])
    pool.add("a", *own_head(1.0)), pool.add("b", *own_head(2.0))

    class Full:
        def to(self, *_, **__):
            raise torch.OutOfMemoryError

    with MultiLoraModel(model, pool) as served:
        x, state = torch.ones(2, 8), pool._adapters["b"].saved["head"].state
        with monkeypatch.context() as patch:
            patch.setitem(state, "bias", Full())
            with pytest.raises(torch.OutOfMemoryError):
                served(x, adapters=["a", "b"])
        assert list(pool._free) == [1] and pool.resident == ["a"] and all(a.users == 0 for a in pool._adapters.values())
        assert served(x, adapters=["a", "b"])[:, 0].tolist() == [8, 16]


def test_a_copy_of_what_is_split_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    pool = AdapterPool(net(), pages=1, targets=["linear"], parallel={"head": "column"})
    with pytest.raises(ValueError, match=r"head must not be split \(parallel\) where an adapter has a copy of it"):
        pool.add("a", *own_head(1.0, size=8))


def test_nan_of_one_copy_is_in_no_other_row():
    model = net()
    pool = AdapterPool(model, pages=4, targets=["linear"])
    pool.add("huge", *own_head(3e38)), pool.add("b", *own_head(2.0))
    x = torch.ones(3, 8)
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        y = served(x, adapters=["huge", "b", None])
        assert y[0].isinf().all() and (y[1] == 16).all() and torch.equal(y[2], model(x)[2])


def test_hooks_of_others_act_once():
    """Before ours and after, on the module and inside of it."""
    calls = []
    model = net(nn.Sequential(nn.Linear(8, 4)))
    model.head.register_forward_hook(lambda m, args, y: y + 1)
    model.head.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.head[0].register_forward_hook(lambda m, args, y: calls.append(1) or y * 3)
    pool = AdapterPool(model, pages=4, targets=["linear"])
    pool.add("a", *own_head(1.0, of="head.0"))
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        x = torch.ones(2, 8)
        served(x, adapters=["a", None])
        model.head.register_forward_hook(lambda m, args, y: y * 10)  # after ours
        y = served(x, adapters=["a", None])
        assert (y[0] == (16 * 3 + 1) * 10).all()
        with served.base():
            assert torch.equal(y[1], model(x)[1])


def test_a_copy_lies_on_the_device_while_its_adapter_does():
    model = net()
    pool = AdapterPool(model, pages=1, targets=["linear"])
    pool.add("a", *own_head(1.0)), pool.add("b", *own_head(2.0))
    x = torch.ones(1, 8)
    with MultiLoraModel(model, pool) as served:
        a, b = (pool._adapters[name] for name in "ab")
        assert not a.held and not b.held
        assert (served(x, adapters=["a"]) == 8).all() and a.held and not b.held
        assert (served(x, adapters=["b"]) == 16).all() and b.held and not a.held
        pool.pin("a")
        assert a.held and not b.held
        with pool._lease(["a"]):
            pool.remove("a")
            assert a.held, "a forward under way reads it"
        assert not a.held
        kept = weakref.ref(a.saved["head"].state["weight"])
        del a
        gc.collect()
        assert kept() is None


def test_threads_see_their_own_copies_and_the_base_its_own():
    model = net()
    pool = AdapterPool(model, pages=3, targets=["linear"])
    for i in range(4):
        pool.add(f"a{i}", *own_head(float(i)))
    x, errors, want = torch.ones(2, 8), [], model(torch.ones(2, 8)).detach()
    served = MultiLoraModel(model, pool)

    def work(thread):
        try:
            for step in range(100):
                if thread == 0:
                    with served.base() as plain, torch.no_grad():
                        assert torch.equal(plain(x), want)
                else:
                    i = (step + thread) % 4
                    y = served(x, adapters=[f"a{i}", None])
                    assert (y[0] == 8 * i).all() and torch.equal(y[1], want[1]), (thread, step)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_the_modules_own_dtype(dtype):
    """As PEFT loads it: the file's float32 is rounded to the head's dtype once."""
    plain = copy.deepcopy(base("llama score")).to(dtype)
    stock = adapt(plain, 1, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=True)  # adds nothing
    config, tensors = parts(stock)
    model, inputs = copy.deepcopy(plain), {"input_ids": ids(2)}
    pool = AdapterPool(model, pages=1)
    key = "base_model.model.score.weight"
    noise = torch.randn(tensors[key].shape)
    pool.add("a", config, tensors | {key: noise})
    peft.set_peft_model_state_dict(stock, tensors | {key: noise})
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        got = served(**inputs, adapters=["a", None]).logits
        assert torch.equal(got[0], stock(**inputs).logits[0]) and torch.equal(got[1], plain(**inputs).logits[1])


def changed(**values):
    return lambda c, t: c.update(values)


KEY = "base_model.model.score.weight"


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda c, t: t.pop(KEY), r"lacks score\.weight, which modules_to_save says it holds"),
    (lambda c, t: t.update({KEY: t[KEY][:, 1:].contiguous()}), r"score.weight must have shape \[3, 32\], got \[3, 31\]"),
    (lambda c, t: t.update({KEY: torch.ones(3)}), r"score.weight must have shape \[3, 32\], got \[3\]"),
    (lambda c, t: t[KEY].fill_(torch.inf), "score.weight must be finite in torch.float32"),
    (lambda c, t: t.update({"base_model.model.score.bias": torch.ones(3)}), r"score must hold \['weight'\], got bias"),
    (changed(modules_to_save=7), "modules_to_save must be a string or a list of strings, got 7"),
    (changed(modules_to_save=["nowhere"]), r"score.weight is a weight of the base"),
    (
        lambda c, t: [t.pop(KEY), c.update(modules_to_save=["nowhere"])],
        r"modules_to_save must name modules of this model, got \['nowhere'\]",
    ),
    (changed(ensure_weight_tying=True), "ensure_weight_tying must be off"),
    (changed(modules_to_save=["model.norm"]), r"score.weight is a weight of the base and must be this model's"),
    (changed(modules_to_save=None), r"score.weight is a weight of the base and must be this model's"),
    (changed(trainable_token_indices=[1]), "trainable_token_indices must be off"),
    (lambda c, t: t.update({"base_model.model.score.lora_A.weight": torch.ones(4, 32)}), r"score must hold \['weight'\], got lora_A.weight"),
])  # fmt: skip
def test_a_damaged_folder_leaves_the_pool_as_it_was(tmp_path, spoil, message):
    model = copy.deepcopy(base("llama score"))
    pool = AdapterPool(model, pages=4)
    adapted("llama score", 1).save_pretrained(tmp_path)
    pool.load("good", tmp_path)
    path, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    c, t = json.loads(settings.read_text()), load_file(path)
    spoil(c, t)
    settings.write_text(json.dumps(c))
    save_file(t, path)
    with MultiLoraModel(model, pool) as served:
        want = served(ids(2), adapters=["good", None]).logits
        for name, replace in (("bad", False), ("good", True)):
            with pytest.raises(ValueError, match=message) as refusal:
                pool.load(name, tmp_path, replace=replace)
            assert "the pool is unchanged" in str(refusal.value) and f"adapter '{name}'" in str(refusal.value)
        assert torch.equal(served(ids(2), adapters=["good", None]).logits, want) and pool.names == ["good"]


def test_modules_that_cannot_be_copied():
    twice = net()
    twice.again = twice.head
    for model, message in (
        (twice, "head of modules_to_save must stand at one place of the model, got head and again"),
        (net(nn.BatchNorm1d(8)), "head of modules_to_save must be of floats in the model, got num_batches_tracked"),
    ):
        config, tensors = own_head(1.0)
        tensors |= {f"base_model.model.head.{k}": t.float() for k, t in model.head.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            AdapterPool(model, pages=1, targets=["linear"]).add("a", config, tensors)
    model = net()
    model.head.forward = model.head.forward  # as offloading does
    pool = AdapterPool(model, pages=1, targets=["linear"])
    pool.add("a", *own_head(1.0))
    with MultiLoraModel(model, pool) as served, pytest.raises(ValueError, match="no forward of its own in Linear"):
        served(torch.ones(1, 8), adapters=["a"])


def test_vera_with_a_head_of_its_own():
    plain = base("llama score")
    torch.manual_seed(3)
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], task_type="SEQ_CLS")
    stock = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for name, p in stock.named_parameters():
        if "modules_to_save" in name or "vera_lambda" in name:
            p.data.copy_(torch.randn(p.shape))
    model, inputs = copy.deepcopy(plain), {"input_ids": ids(2)}
    pool = AdapterPool(model, pages=1)
    pool.add("vera", *parts(stock))
    with MultiLoraModel(model, pool) as served:
        check(plain, {"vera": stock}, ["vera", None], served(**inputs, adapters=["vera", None]).logits, inputs)
