# SPDX-License-Identifier: Apache-2.0
"""What a pool and a served model can do, all of it together: every kind of adapter while memory grows, shrinks and is taken back,
over models that are compiled or copied."""

import copy
import functools
import pickle
import re
import threading

import numpy
import peft
import pytest
import torch
import transformers
from test_memory import X, random_adapter
from test_serving import Echo
from test_serving_vera import vera
from tiny_models import V, tiny

from minilm import one_thread  # isort: skip  # noqa: F401

import lrkern.files
from lrkern.nn import RandLoRALinear
from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = functools.partial(peft.LoraConfig, target_modules=TARGETS, init_lora_weights=False)
CONFIGS = {
    "lora": LORA(r=20),
    "dora": LORA(r=16, use_dora=True),
    "lora_bias": LORA(r=4, lora_bias=True),
    "biases": LORA(r=4, bias="lora_only"),
    "randlora": peft.RandLoraConfig(r=1, randlora_alpha=20, target_modules=TARGETS, save_projection=True),
    "vera": peft.VeraConfig(r=24, target_modules=TARGETS, save_projection=True),
    "another pair": peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=5),
    "same pair": peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=5),
    "embedding": LORA(r=4, target_modules=["q_proj", "embed_tokens"]),
    "head": LORA(r=4, modules_to_save=["lm_head"]),
}
PAGES = {
    "lora": 2,
    "dora": 2,
    "randlora": 2,
    "lora_bias": 1,
    "biases": 1,
    "embedding": 1,
    "head": 1,
}  # of VeRA one a pair
NEEDED = sum(PAGES.values()) + 2
ALL = [*CONFIGS, None, ["dora", "vera", "another pair", "randlora", "biases"]]


def small():
    model = tiny("qwen2")  # whose q_proj and v_proj have biases
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


@functools.cache
def stock(name):
    """Stock PEFT, every weight of which acts."""
    torch.manual_seed(list(CONFIGS).index(name))
    model = peft.get_peft_model(small(), copy.deepcopy(CONFIGS[name])).eval()
    acts = ("vera_lambda", "randlora_lambda", "modules_to_save", "lora_B.default.bias", "base_layer.bias")
    for key, p in model.named_parameters():
        if "magnitude" in key:
            p.data *= torch.rand_like(p) + 0.5
        elif p.requires_grad and any(word in key for word in acts):
            p.data.copy_(torch.randn(p.shape))
    return model


@functools.cache
def parts(name):
    model = stock(name)
    return model.peft_config["default"], peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def filled(model, names=CONFIGS, **options):
    pool = AdapterPool(model, **{"pages": 40, "targets": [*TARGETS, "embed_tokens"]} | options)
    for name in names:
        pool.add(name, *parts(name))
    return pool


def ids(n):
    return torch.randint(3, V, (n, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def alone(name, x):
    return (small() if name is None else stock(name))(x).logits


def assert_rows(got, who, x):
    base = alone(None, x)
    for i, name in enumerate(who):
        want = alone(name, x)[i]
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert name is None or not torch.allclose(want, base[i], atol=1e-2), f"{name} does nothing"


def taken(pool):
    """Pages that have memory; every page has one owner, or none, or those that share it."""
    (rows,) = {len(t) for layer in pool._layers.values() for t in (layer.a, layer.b)}
    residents, kinds = [*pool._resident], {}
    cells = [(a.kind, cell) for a in residents for cell in a.cells]
    assert len(cells) == len(set(cells)), "a cell of two"
    for a in residents:
        for page in a.pages:
            assert kinds.setdefault(page, a.kind) is a.kind, "a page of two kinds"
    assert sorted([*kinds, *pool._free]) == list(range(pool.pages)) and max(kinds, default=-1) < max(rows // 16, 1)
    assert pool.statistics().bytes == rows // 16 * pool.page_bytes
    assert all(bool(a.held) == bool(a.saved) for a in residents)
    return rows // 16


# ---- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_while_memory_grows_and_shrinks(dtype):
    """The same bits as of a pool that has all of its memory from the start."""
    model, other = small().to(dtype), small().to(dtype)
    pool, whole = filled(model), filled(other)
    whole.grow()
    assert (taken(pool), taken(whole)) == (0, 40)
    x, each = ids(len(ALL)), [[name] * len(ALL) for name in CONFIGS]
    with MultiLoraModel(model, pool) as served, MultiLoraModel(other, whole) as fixed:
        want = {name: fixed(x, adapters=who).logits for name, who in zip(CONFIGS, each, strict=True)}
        mixed = fixed(x, adapters=ALL).logits

        def same(names=CONFIGS):
            for name in names:
                assert torch.equal(served(x, adapters=[name] * len(ALL)).logits, want[name]), name
            assert torch.equal(served(x, adapters=ALL).logits, mixed)
            taken(pool)

        sizes = []
        for name in CONFIGS:
            assert torch.equal(served(x, adapters=[name] * len(ALL)).logits, want[name]), name
            sizes.append(taken(pool))
        assert sizes == [2, 4, 8, 8, 8, 16, 16, 16, 16, 16]
        same()
        if dtype is torch.float32:
            assert_rows(mixed[: len(CONFIGS) + 1], ALL[:-1], x)
        pool.grow()
        assert taken(pool) == 40
        same()
        pool.shrink()
        assert taken(pool) == NEEDED and len(pool.resident) == len(CONFIGS)
        same()
        for most in (5, 3, 1, 0):
            pool.shrink(most)
            assert taken(pool) <= most
            same(reversed(CONFIGS))
        for name in ("lora", "dora", "vera"):  # what lies behind them moves
            pool.remove(name)
        uploads = pool.statistics().uploads
        pool.shrink()
        assert taken(pool) == NEEDED - 5 and pool.statistics().uploads > uploads
        assert {*pool.resident} == {*CONFIGS} - {"lora", "dora", "vera"}
        for name in pool.names:
            assert torch.equal(served(x, adapters=[name] * len(ALL)).logits, want[name]), name
        for name in ("vera", "dora", "lora"):
            pool.add(name, *parts(name))
            assert torch.equal(served(x, adapters=[name] * len(ALL)).logits, want[name]), name
        got = served(x, adapters=ALL).logits
        assert torch.equal(got[:-1], mixed[:-1]), "the last has two pairs, of which the newer is added last"
        taken(pool)


def test_every_kind_where_few_fit():
    """Each comes in place of another."""
    model, other = small(), small()
    pool, whole = filled(model, pages=2), filled(other)
    x = ids(2)
    with MultiLoraModel(model, pool) as served, MultiLoraModel(other, whole) as fixed:
        for name in [*CONFIGS, *reversed(CONFIGS), *list(CONFIGS)[::3], *list(CONFIGS)[1::3]]:
            who = [name, None]
            assert torch.equal(served(x, adapters=who).logits, fixed(x, adapters=who).logits), name
            assert taken(pool) <= 2 and name in pool.resident
    assert pool.statistics().evictions > 20


def test_every_kind_in_a_forward_while_the_pool_changes():
    model, other = small(), small()
    pool, whole = filled(model), filled(other)
    inside, go_on, result, x = threading.Event(), threading.Event(), [], ids(len(ALL))

    def wait(*_):
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(60)

    with MultiLoraModel(model, pool) as served, MultiLoraModel(other, whole) as fixed:
        want = fixed(x, adapters=ALL).logits
        thread = threading.Thread(target=lambda: result.append(served(x, adapters=ALL).logits))
        hook = model.model.layers[0].mlp.register_forward_pre_hook(wait)
        thread.start()
        assert inside.wait(60)
        pool.shrink(0)
        assert taken(pool) == NEEDED, "all are in use"
        for name in ("head", "vera", "randlora", "dora"):
            pool.remove(name)
            pool.add(name, *parts(name))
        pool.grow()
        pool.shrink()
        go_on.set()
        thread.join(60)
        hook.remove()
        assert torch.equal(result[0], want)
        assert torch.equal(served(x, adapters=ALL).logits, want)
    pool.shrink(0)
    assert taken(pool) == 0


def test_shrinking_brings_together_what_shares_pages():
    """Of a pair's adapters one a page is left, before an adapter of factors."""
    model = Echo().eval()
    pool = AdapterPool(model, pages=8)
    served = MultiLoraModel(model, pool)
    for value in range(1, 5):
        pool.add(f"v{value}", *vera(128, 2, value))
    pool.add("lora", *random_adapter(0, 5))
    who = [f"v{value}" for value in range(1, 5)]
    want = {name: served(X, adapters=[name, None]) for name in [*who, "lora"]}
    assert next(iter(pool._resident)).kind.per_page == 2 and pool._adapters["lora"].pages == [2]
    for name in ("v2", "v4"):
        pool.remove(name)
    pool.shrink(2)
    assert taken(pool) == 2 and {*pool.resident} == {"v1", "v3", "lora"} and not pool.statistics().evictions
    uploads = pool.statistics().uploads
    pool.shrink()
    assert pool.statistics().uploads == uploads, "nothing has to move"
    for name in ("v1", "v3", "lora"):
        assert torch.equal(served(X, adapters=[name, None]), want[name])


def test_statistics_of_every_kind():
    model = small()
    pool = filled(model)
    ranks = {name: config.r for name, config in CONFIGS.items()}
    of = lambda key: {name: getattr(a, key) for name, a in pool.statistics().adapters.items()}
    assert of("rank") == ranks and of("pages") == {name: PAGES.get(name, 1) for name in CONFIGS}
    with MultiLoraModel(model, pool) as served:
        served(ids(len(ALL)), adapters=ALL)
        s = pool.statistics()
        assert (s.hits, s.uploads, s.evictions, s.free_pages) == (0, 10, 0, 40 - NEEDED), "same pair, same page"
        assert set(of("hits").values()) == {0} and set(of("uploads").values()) == {1}
        served(ids(2), adapters=["head", ["same pair", "dora"]])
        assert of("hits") == {name: int(name in ("head", "same pair", "dora")) for name in CONFIGS}
        pool.shrink(1)
        s = pool.statistics()
        assert (
            s.evictions == 10 - len(pool.resident)
            and s.free_pages == 40 - sum({**PAGES, "vera": 1}.get(n, 1) for n in pool.resident)
            and taken(pool) <= 1
        )
        served(ids(2), adapters=["another pair", "vera"])
        s = pool.statistics()
        assert sum(of("uploads").values()) == s.uploads and sum(of("hits").values()) == s.hits == 3
        pool.add("vera", *parts("vera"), replace=True)
        assert pool.statistics().adapters["vera"].uploads == 0 and pool.statistics().uploads == s.uploads


def test_the_rank_of_bases_of_several_ranks(tmp_path):
    model = Echo().eval()
    for name, r in (("one", 6), ("two", 3)):
        layer = RandLoRALinear.from_linear(getattr(model, name), r=r, randlora_alpha=4.0)
        setattr(model, name, layer)
    lrkern.files.save(model, tmp_path / "x.safetensors", kind="own")
    pool = AdapterPool(Echo().eval(), pages=2, max_rank=2)
    pool.load("x", tmp_path / "x.safetensors")
    assert pool.statistics().adapters["x"].rank == 6


# ---- limits and scales


def test_rank_limits_by_layer_are_of_factors():
    """Two rows more for DoRA or biases are no ranks; RandLoRA and VeRA have none."""
    model = small()
    limits = {"q_proj": 20, "v_proj": 16, "down_proj": 16, "embed_tokens": 4}
    names = [name for name in CONFIGS if name != "lora"]
    pool = filled(model, names, max_rank=limits)
    assert pool.statistics().adapters["dora"].pages == 2
    with pytest.raises(ValueError, match="v_proj must have a rank of at most 16 .*got 20; the pool is unchanged"):
        pool.add("lora", *parts("lora"))
    who, x = [*names, None], ids(len(names) + 1)
    with MultiLoraModel(model, pool) as served:
        assert_rows(served(x, adapters=who).logits, who, x)
    tight = filled(small(), [], max_rank=limits | {"q_proj": 15})
    with pytest.raises(ValueError, match="q_proj must have a rank of at most 15 .*got 16"):
        tight.add("dora", *parts("dora"))
    with pytest.raises(ValueError, match="embed_tokens must have a rank of at most 3 .*got 4"):
        filled(small(), ["embedding"], max_rank=limits | {"embed_tokens": 3})
    for name in ("vera", "another pair", "randlora"):
        tight.add(name, *parts(name))


@pytest.mark.parametrize("kind", [list, numpy.array, torch.tensor], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["dora", "biases"])
def test_scales_of_what_has_none(name, kind):
    model = small()
    pool, x, who = filled(model), ids(3), ["lora", name, None]
    with MultiLoraModel(model, pool) as served:
        want = served(x, adapters=who).logits
        assert torch.equal(served(x, adapters=who, scales=kind([1.0, 1.0, 1.0])).logits, want)
        assert torch.equal(served(x, adapters=[name] * 3, scales=kind([1.0] * 3)[0]).logits[1], want[1])
        half = served(x, adapters=who, scales=kind([0.5, 1.0, 7.0])).logits
        assert torch.equal(half[1:], want[1:]) and not torch.equal(half[0], want[0])
        pool.shrink(0)
        before = pool.statistics()
        for scales in (kind([1.0, 2.0, 1.0]), kind([2.0])[0], [1.0, kind([2.0]), 1.0]):
            with pytest.raises(ValueError, match=rf"scales must be 1 for '{name}' .*, got 2.0"):
                served(x, adapters=who, scales=scales)
        assert pool.statistics() == before and not pool.resident and taken(pool) == 0
        assert torch.equal(served(x, adapters=who).logits, want)


# ---- models that are compiled, copied, given back


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def children(model):
    """As wrappers, some in others."""
    layer = model.model.layers[0]
    layer.self_attn.q_proj = torch.compile(layer.self_attn.q_proj, backend="eager")
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    model.model.layers[0] = torch.compile(layer, backend="eager")
    model.model.embed_tokens = torch.compile(model.model.embed_tokens, backend="eager")
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    return model


def children_in_place(model):
    for m in (model.model.layers[0], model.model.embed_tokens, model.lm_head):
        m.compile(backend="eager")
    return model


KEYS = {
    "as they are": lambda key: key,
    "_orig_mod in front": lambda key: f"_orig_mod.{key}",
    "_orig_mod within": lambda key: key.replace("layers.0.", "layers.0._orig_mod.").replace("mlp.", "mlp._orig_mod."),
    "of an adapter": lambda key: re.sub(
        r"(\b[a-z]+_(embedding_|lambda_|magnitude_)?(A|B|b|d|gamma|lambda|vector))\b", r"\1.default", key
    ),
}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("way", "keys"),
    [(whole, "of an adapter"), (in_place, "_orig_mod in front"), (children_in_place, "_orig_mod within")]
    + [(children, keys) for keys in KEYS],
)
def test_every_kind_over_compiled_models(fresh_compiler, way, keys):
    """A pool reads and serves them as where nothing is compiled, and the base stays compiled."""
    model, who = small(), ALL[:-1]
    call, x = way(model), ids(len(who))
    pool = filled(call, [])
    for name in CONFIGS:
        config, tensors = parts(name)
        pool.add(name, config, {KEYS[keys](key): t for key, t in tensors.items()})
    with MultiLoraModel(call, pool) as served:
        for _ in range(2):
            assert_rows(served(x, adapters=who).logits, who, x)
        other = copy.deepcopy(call)
    for each in (call, other):
        with torch.no_grad():
            torch.testing.assert_close(each(x).logits, alone(None, x), rtol=1e-5, atol=1e-5)


def test_compiled_after_adapters_were_added(fresh_compiler):
    """And adapters added after that."""
    model, who = small(), ["head", "dora", "embedding", None, "biases"]
    pool, x = filled(model, who[:2]), ids(5)
    with MultiLoraModel(model, pool) as served:
        assert_rows(served(x, adapters=["head", "dora"] * 2 + [None]).logits, ["head", "dora"] * 2 + [None], x)
        children(model)
        for name in ("embedding", "biases"):
            pool.add(name, *parts(name))
        assert_rows(served(x, adapters=who).logits, who, x)


def roberta():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=V)
    config = transformers.RobertaConfig(**sizes, pad_token_id=0, type_vocab_size=1, max_position_embeddings=64)
    return transformers.RobertaForSequenceClassification(config).eval()


def compiled_method(m):
    m.forward = torch.compile(m.forward, backend="eager")


def compiled_class(m):
    own = type(m)
    m.__class__ = type(own.__name__, (own,), {"forward": torch.compile(own.forward, backend="eager")})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["classifier", "classifier.dense"])
@pytest.mark.parametrize("way", ["wrapped", "in place", "method", "class"])
def test_copies_of_modules_of_which_parts_are_compiled(fresh_compiler, way, part, when):
    """What is compiled is of the model's own weights, not of a copy's."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    want = peft.get_peft_model(roberta(), config).eval()
    for key, p in want.named_parameters():
        if "modules_to_save" in key:
            p.data.copy_(torch.randn(p.shape))
    model, x = roberta(), ids(2)

    def change():
        owner, _, name = part.rpartition(".")
        owner, m = model.get_submodule(owner), model.get_submodule(part)
        if way == "wrapped":
            setattr(owner, name, torch.compile(m, backend="eager"))
        elif way == "in place":
            m.compile(backend="eager")
        else:
            (compiled_method if way == "method" else compiled_class)(m)

    with torch.no_grad():
        base = model(x).logits
        if when == "before":
            change()
        pool = AdapterPool(model, pages=2)
        pool.add("head", config, peft.get_peft_model_state_dict(want))
        with MultiLoraModel(model, pool) as served:
            if when == "after":
                change()
            for who in (["head", None], ["head", "head"]):
                if (way, part) == (
                    "method",
                    "classifier.dense",
                ):  # torch wraps what it has of its own before it compiles it
                    with pytest.raises(ValueError, match=r"no forward of its own in Linear, .*compiled by itself\?"):
                        served(x, adapters=who)
                    continue
                got = served(x, adapters=who).logits
                for i, name in enumerate(who):
                    torch.testing.assert_close(got[i], want(x).logits[i] if name else base[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x).logits, base, rtol=1e-5, atol=1e-5)


def snapshot(model):
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()}
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"]
)
def test_copies_after_every_kind_has_run_and_the_model_given_back(duplicate):
    """The hooks of modules that adapters have copies of come with the first call."""
    model, x = small(), ids(len(ALL))
    before, base = snapshot(model), alone(None, x)
    pool = filled(model)
    served = MultiLoraModel(model, pool)
    want = served(x, adapters=ALL).logits
    assert len(model.lm_head._forward_hooks) == 1
    other = duplicate(model)
    after = snapshot(other)
    assert {n: sorted(v) for n, v in after.items()} == {n: sorted(v) for n, v in before.items()}
    for name, values in after.items():
        assert not any(values[kind] for kind in values if "hooks" in kind), name
    with torch.no_grad():
        assert torch.equal(other(x).logits, base)
    with MultiLoraModel(other, filled(other)) as again:
        assert torch.equal(again(x, adapters=ALL).logits, want)
    assert torch.equal(served(x, adapters=ALL).logits, want)
    served.close()
    for name, values in snapshot(model).items():
        assert values.keys() == before[name].keys()
        for key, value in values.items():
            assert value == before[name][key] if not isinstance(value, dict) else [*value] == [*before[name][key]], key
    with torch.no_grad():
        assert torch.equal(model(x).logits, base)
