# SPDX-License-Identifier: Apache-2.0
"""Models that are compiled, moved by accelerate, saved or copied, below a pool and a served model."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from tiny_models import V, adapt, parts, tiny
from torch import nn

from lrkern.serving import AdapterPool, MultiLoraModel
from lrkern.serving.below import Eager

TARGETS = ["q_proj", "down_proj"]
WHO = ["a", None, "b"]
GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)


def small():
    model = tiny("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1  # what compiles, compiles soon
    return model


@pytest.fixture(scope="module")
def stock():
    model = small()
    return {None: model} | {name: adapt(model, seed, TARGETS) for seed, name in enumerate("ab")}


@pytest.fixture
def ids():
    return torch.randint(3, V, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def pool_of(model, stock, **options):
    pool = AdapterPool(model, **{"pages": 4, "targets": TARGETS} | options)
    for name in "ab":
        pool.add(name, *parts(stock[name]))
    return pool


@torch.no_grad()
def assert_served(served, stock, ids, whole=True):
    """Each request by itself, by stock PEFT; a mixed batch, one that wants the same, and tokens."""
    for who in (["b"] * 3, WHO, WHO):
        got = served(ids, adapters=who).logits
        for row, name in enumerate(who):
            torch.testing.assert_close(got[row], stock[name](ids[row : row + 1]).logits[0], atol=1e-5, rtol=0)
    if whole:
        tokens = served.generate(ids, adapters=WHO, **GREEDY)
        for row, name in enumerate(WHO):
            assert torch.equal(tokens[row : row + 1], stock[name].generate(ids[row : row + 1], **GREEDY))


# ---- torch.compile


def wrapped(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def layer_by_layer(model, **options):
    for layer in model.model.layers:
        layer.compile(**options)
    return model


def layers_wrapped(model, **options):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, **options)
    return model


def one_method(model, **options):
    """As a model's own code may have it."""
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, **options)
    return model


def one_class(model, **options):
    class Compiled(type(model.model.layers[0].mlp)):
        pass

    Compiled.forward = torch.compile(Compiled.forward, **options)
    model.model.layers[0].mlp.__class__ = Compiled
    return model


def overridden(model, **options):
    """A compiled method that a subclass has in a way of its own."""
    own = type(model.model.layers[0].mlp)

    class Compiled(own):
        forward = torch.compile(lambda self, x: x * 0, **options)

    class Derived(Compiled):
        forward = own.forward

    model.model.layers[0].mlp.__class__ = Derived
    return model


def linear_wrapped(model, **options):
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.compile(attention.q_proj, **options)
    return model


WAYS = [wrapped, in_place, layer_by_layer, layers_wrapped, linear_wrapped, one_method, one_class, overridden]


@pytest.mark.parametrize(
    ("way", "when"),
    [
        *((way, "before") for way in WAYS),
        (layers_wrapped, "after"),
        pytest.param(in_place, "after, and run", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model(stock, ids, way, when):
    """Code compiled before there were hooks would answer as the base, and does not ask."""
    model = call = small()
    with torch.no_grad():
        base = model(ids).logits
        if when == "before":
            call = way(model, backend="eager")
            call(ids)
    pool = pool_of(call, stock)
    assert pool.layers[0] == "model.layers.0.self_attn.q_proj", "as adapters name it"
    with MultiLoraModel(call, pool) as served, torch.no_grad():
        if when != "before":
            call = way(model, backend="eager")
        if when == "after, and run":
            torch.testing.assert_close(call(ids).logits, base, atol=1e-5, rtol=0)
        assert_served(served, stock, ids)
        torch.testing.assert_close(served(ids).logits, base, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(call(ids).logits, base, atol=1e-5, rtol=0)


def test_another_model_of_the_class_was_compiled_and_run(stock, ids):
    """The code compiled for it fits this one, but for the hooks."""
    other = small()
    other.compile(backend="eager")
    model = small()
    with MultiLoraModel(model, pool_of(model, stock)) as served, torch.no_grad():
        other(ids)
        model.compile(backend="eager")
        assert_served(served, stock, ids)


def test_generate_compiles_for_the_base_alone(stock, ids):
    """transformers compiles steps over a static cache by itself, and keeps what it compiled."""
    model = small()
    compiled = transformers.CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    config = transformers.GenerationConfig(
        **GREEDY, pad_token_id=0, eos_token_id=2, cache_implementation="static", compile_config=compiled
    )
    want = model.generate(ids, generation_config=config)
    assert hasattr(model, "_compiled_call"), "it did"
    with MultiLoraModel(model, pool_of(model, stock)) as served:
        for how in (dict(generation_config=config), dict(generation_config=config, disable_compile=False)):
            tokens = served.generate(ids, adapters=WHO, **how)
            for row, name in enumerate(WHO):
                assert torch.equal(tokens[row : row + 1], stock[name].generate(ids[row : row + 1], **GREEDY))
        assert torch.equal(served.generate(ids, generation_config=config), want)


def test_who_calls_it_is_compiled(stock, ids):
    model = small()
    with MultiLoraModel(model, pool_of(model, stock)) as served, torch.no_grad():
        best = torch.compile(lambda ids: served(ids * 1, adapters=WHO).logits.argmax(-1), backend="eager")
        for _ in range(2):
            for row, name in enumerate(WHO):
                want = stock[name](ids[row : row + 1]).logits.argmax(-1)[0]
                assert torch.equal(best(ids)[row], want)


@torch.no_grad()
def test_calls_of_the_base_stay_compiled(stock, ids):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = small()
    call = torch.compile(model, backend=backend)
    call(ids)
    count = len(compiled)
    assert count
    served = [MultiLoraModel(call, pool_of(call, stock)) for _ in range(2)]
    for each in served:
        assert_served(each, stock, ids, whole=False)
        each(ids)
    call(ids)
    assert len(compiled) == count
    served.pop(0).close()
    assert_served(served[0], stock, ids, whole=False)
    served.pop().close()
    assert type(vars(call)["forward"]).__module__ != "lrkern.serving.below", "as torch.compile made it"


@pytest.mark.parametrize("way", [in_place, one_method, one_class])
def test_compiled_parts_are_given_back(stock, ids, way):
    model = small()
    with torch.no_grad():
        way(model, backend="eager")(ids)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    served = MultiLoraModel(model, pool_of(model, stock))
    served(ids, adapters=WHO)
    other = copy.deepcopy(model) if way is not one_method else None  # whose compiled method is a local function
    served.close()
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys() and all(vars(m)[k] is v for k, v in before[name].items())
    if other is not None:
        assert not any(isinstance(v, Eager) for m in other.modules() for v in vars(m).values())
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("way", [wrapped, in_place])
def test_inductor(stock, ids, way):
    model = small()
    call = way(model)
    with torch.no_grad():
        call(ids)
    with MultiLoraModel(call, pool_of(call, stock)) as served:
        assert_served(served, stock, ids)
        torch.testing.assert_close(served(ids).logits, stock[None](ids).logits, atol=1e-5, rtol=0)


# ---- accelerate


@pytest.mark.parametrize("way", [None, one_method, one_class, pytest.param(in_place, marks=pytest.mark.slow)])
def test_a_model_with_accelerates_hooks_on_one_device(stock, ids, way):
    accelerate = pytest.importorskip("accelerate")
    model = small()
    if way is not None:
        way(model, backend="eager")
    model = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    model(ids)
    assert any(hasattr(m, "_hf_hook") for m in model.modules())
    with MultiLoraModel(model, pool_of(model, stock)) as served:
        assert_served(served, stock, ids)


def offloaded(accelerate, tmp_path):
    return accelerate.cpu_offload(tiny("llama"), execution_device="cpu")


def offloaded_to_disk(accelerate, tmp_path):
    return accelerate.disk_offload(tiny("llama"), tmp_path, execution_device="cpu")


def partly_offloaded(accelerate, tmp_path):
    places = {"model.layers.1": "disk", "model.layers.0": "cpu", "model.embed_tokens": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(tiny("llama"), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


def offloaded_whole(accelerate, tmp_path):
    model, _ = accelerate.cpu_offload_with_hook(tiny("llama"), execution_device=torch.device("cuda", 0))
    return model


@pytest.mark.parametrize(
    ("offload", "got"),
    [
        (offloaded, "model.embed_tokens offloaded by accelerate"),
        (offloaded_to_disk, "model.embed_tokens offloaded by accelerate"),
        (partly_offloaded, "model.layers.1.self_attn.q_proj offloaded by accelerate"),
        (offloaded_whole, "the model on cpu, which accelerate runs on cuda:0"),
    ],
)
def test_an_offloaded_model_is_refused(tmp_path, offload, got):
    accelerate = pytest.importorskip("accelerate")
    model = offload(accelerate, tmp_path)
    with pytest.raises(ValueError, match=f"model must be whole on one device: load it without offloading.*got {got}"):
        AdapterPool(model, pages=1)


def test_a_model_of_two_devices_is_refused():
    model = tiny("llama")
    model.model.layers[1].to("meta")
    got = r"got model.embed_tokens.weight on cpu and model.layers.1.self_attn.q_proj.weight on meta"
    with pytest.raises(ValueError, match=f"model must be whole on one device: .*device_map=.*{got}"):
        AdapterPool(model, pages=1)
    with pytest.raises(ValueError, match=r"got model.embed_tokens.weight on meta"):
        AdapterPool(model.to("meta"), pages=1)
    with pytest.raises(ValueError, match=r"got no weights|name linears"):
        AdapterPool(nn.ReLU(), pages=1)


# ---- what it shows, and copies of the model


def test_what_is_shown(stock):
    model = small().bfloat16()
    with MultiLoraModel(model, pool_of(model, stock, dtype=torch.float32)) as served:
        assert served.config is model.config and served.generation_config is model.generation_config
        assert served.device == torch.device("cpu") and served.dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float16)).eval()
    with MultiLoraModel(model, AdapterPool(model, pages=1)) as served:
        assert served.device == torch.device("cpu") and served.dtype == torch.float16
        with pytest.raises(AttributeError, match="config"):
            _ = served.config


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_by_torch])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_copy_is_the_model_alone(kind, duplicate):
    model = tiny(kind)
    model.register_forward_hook(foreign, with_kwargs=True)
    model.activation = torch.tanh  # a function in C
    ids = {"input_ids": torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))}
    ids |= {"decoder_input_ids": ids["input_ids"]} if kind == "t5" else {}
    name = "a"
    stock = adapt(tiny(kind), 0, ["q_proj", "q"])
    pool = AdapterPool(model, pages=2, targets=["q_proj", "q"])
    pool.add(name, *parts(stock))
    with MultiLoraModel(model, pool) as served, torch.no_grad():
        want = served(**ids).logits
        other = duplicate(model)
        assert other is not model and torch.equal(other(**ids).logits, want)
        hooks = [hook for m in other.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert hooks == [foreign], "who hung it there is not us"
        for m in other.modules():
            assert "__reduce_ex__" not in vars(m) and m._forward_hooks_with_kwargs.keys() <= m._forward_hooks.keys()
            assert not m._forward_pre_hooks_with_kwargs and not m._forward_hooks_always_called
        own = AdapterPool(other, pages=2, targets=["q_proj", "q"])
        own.add(name, *parts(stock))
        with MultiLoraModel(other, own) as again:
            got = again(**ids, adapters=["a", None]).logits
        assert torch.equal(got, served(**ids, adapters=["a", None]).logits) and not torch.equal(got, want)
    torch.testing.assert_close(got[:1], stock(**{k: v[:1] for k, v in ids.items()}).logits, atol=1e-5, rtol=0)


def foreign(module, args, kwargs, y):
    return None


def test_the_base_is_saved(stock, ids, tmp_path):
    model = small()
    keys = list(model.state_dict())
    with MultiLoraModel(model, pool_of(model, stock)) as served:
        served(ids, adapters=WHO)
        served.model.save_pretrained(tmp_path)
        assert list(served.model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)
