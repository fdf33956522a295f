# SPDX-License-Identifier: Apache-2.0
"""PEFT's mixed batches, adapter_names=, on a patched model: PEFT's results, and the bits of one adapter at a time."""

import copy
import pickle
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

from minilm import adapted, batch, bert, forward, lora_config, lora_layers, one_thread, outcome, peft  # isort: skip  # noqa: F401

import lrkern.peft
from lrkern.peft.lora import FusedLora

WHO = ["b", "__base__", "a", "c", "b"]


def mixed(layers=1, also=()):
    """Three adapters of other ranks, scales and layers; also: configs of further ones."""
    torch.manual_seed(1)
    model = peft.get_peft_model(bert(layers), lora_config(r=4), adapter_name="a")
    for name, config in (("b", {"r": 33, "use_rslora": True}), ("c", {"target_modules": ["query", "dense"]}), *also):
        model.add_adapter(name, lora_config(**config))
    return model.eval()


def pair(**options):
    stock, ours = mixed(**options), mixed(**options)
    lrkern.peft.patch(ours)
    return stock, ours


def run(model, who=WHO, grad=False, rows=None):
    with torch.set_grad_enabled(grad):
        return forward(model, **batch(rows or len(who)), adapter_names=who)


@contextmanager
def mixed_calls():
    """A layer each that took the names itself and had one of the adapters."""
    calls, taken = [], FusedLora._mixed

    def counting(layer, x, names, adapters):
        calls.extend([1] * bool(adapters))
        return taken(layer, x, names, adapters)

    with mock.patch.object(FusedLora, "_mixed", counting):
        yield calls


def same(stock, ours, layers=7, tol=1e-5, **kwargs):
    want = run(stock, **kwargs)
    with mixed_calls() as calls:
        got = run(ours, **kwargs)
    assert len(calls) == layers
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=tol, rtol=0)


def test_a_mixed_batch_is_pefts():
    stock, ours = pair()
    for who in (WHO, WHO[::-1], ["a"] * 5, ["c", "a", "c", "__base__", "b"], tuple(WHO)):
        same(stock, ours, who=who)
    same(stock, ours, who=["__base__"] * 3, layers=0)
    same(stock, ours, who=["__base__", "c"], layers=5)
    assert torch.equal(run(ours, ["__base__"] * 3), run(stock, ["__base__"] * 3))


def test_base_rows_keep_every_bit():
    stock, ours = pair()
    assert torch.equal(run(ours)[10:20], run(stock)[10:20]), "row 1 is the base's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_rows_are_those_of_one_active_adapter(grad, dtype):
    """As PEFT's own test of mixed batches asks, but every bit: of the same batch with this adapter active, or disabled."""
    _, ours = (m.to(dtype) for m in pair(layers=2))
    rows = lambda y: y[: 10 * len(WHO)].unflatten(0, (len(WHO), 10)), lambda y: y[10 * len(WHO) :]
    with mixed_calls() as calls:
        got = run(ours, grad=grad)
    assert len(calls) == 13 and got.requires_grad == grad
    for name in {*WHO}:
        at = [i for i, n in enumerate(WHO) if n == name]
        if name == "__base__":
            with ours.disable_adapter():
                alone = run(ours, None, grad, rows=len(WHO))
        else:
            ours.set_adapter(name)
            alone = run(ours, None, grad, rows=len(WHO))
        for part in rows:
            assert torch.equal(part(got)[at], part(alone)[at]), name


def test_what_changes_a_factor_is_seen():
    stock, ours = pair()
    same(stock, ours)
    changes = (
        lambda layer: layer.lora_A["a"].weight.mul_(1.5),
        lambda layer: layer.lora_B["b"].weight.data.mul_(0.5),
        lambda layer: layer._modules["lora_A"]["a"].weight.data[0].add_(0.5),  # which no counter and no property sees
        lambda layer: layer.scaling.__setitem__("b", 0.3),
        lambda layer: setattr(layer.lora_A["c"], "weight", nn.Parameter(layer.lora_A["c"].weight * 2))
        if "c" in layer.lora_A else None,
    )  # fmt: skip
    for change in changes:
        for model in (stock, ours):
            with torch.no_grad():
                for layer in lora_layers(model).values():
                    change(layer)
        same(stock, ours)
    for model in (stock, ours):
        model.delete_adapter("a")
    same(stock, ours, who=["b", "c"])
    for model in (stock, ours):
        torch.manual_seed(9)
        model.add_adapter("a", lora_config(r=20))
        model.eval()
    same(stock, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", ["float32", "model's", "both"])
def test_sixteen_bit(dtype, factors):
    stock, ours = (m.to(dtype) for m in pair())
    for model in (stock, ours):
        for i, layer in enumerate(lora_layers(model).values()):
            if factors == "float32" or (factors == "both" and i % 2):
                for name in layer.lora_A:
                    if factors == "float32" or name != "b":
                        layer.lora_A[name].float(), layer.lora_B[name].float()
    same(stock, ours, tol=0.05 if dtype == torch.float16 else 0.3)


def test_autocast():
    stock, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        same(stock, ours, tol=0.2)


def test_where_peft_must_run_its_own_code():
    """DoRA among the names, hooks inside, lists of another length: PEFT's bits, or PEFT's error."""
    stock, ours = pair(also=[("dora", {"use_dora": True})])
    with mixed_calls() as calls:
        for kwargs in (
            dict(who=["a", "dora"]), dict(who=["a", "nobody"]), dict(who=[], rows=2), dict(who=["a"], rows=2), dict(who="a"),
        ):  # fmt: skip
            want, got = (outcome(lambda m, k=kwargs: run(m, **k), m) for m in (stock, ours))
            assert want == got if isinstance(want, type) else torch.equal(want, got), kwargs
        hooks = [layer.lora_A["a"].register_forward_hook(lambda m, x, y: 2 * y)
                 for m in (stock, ours) for layer in lora_layers(m).values()]  # fmt: skip
        assert torch.equal(run(stock), run(ours))
        assert not calls
    for hook in hooks:
        hook.remove()
    same(stock, ours)


def test_frozen_adapters_record_what_the_base_needs():
    """With adapters frozen, gradients of the rest still flow through the mixed batch, as PEFT's do."""
    stock, ours = pair()
    grads = []
    for model in (stock, ours):
        model.requires_grad_(False)
        bias = model.base_model.model.encoder.layer[0].output.dense.base_layer.bias.requires_grad_()
        run(model, grad=True).square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_copies_and_unpatch():
    stock, ours = pair()
    same(stock, ours)
    small = len(pickle.dumps(mixed()))
    assert len(pickle.dumps(ours)) < small + 20000
    same(stock, copy.deepcopy(ours))
    same(stock, pickle.loads(pickle.dumps(ours)))
    lrkern.peft.unpatch(ours)
    assert not any(key.startswith("_lrkern") for m in ours.modules() for key in vars(m))
    assert torch.equal(run(ours), run(stock))


def test_generate_with_beams():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora_config(lora_alpha=80), "a")
        model.add_adapter("b", lora_config(r=20, lora_alpha=200))
        return model.eval()

    stock, ours = make(), make()
    lrkern.peft.patch(ours)
    ids = torch.randint(3, 97, (3, 5), generator=torch.Generator().manual_seed(1))
    for how in ({}, {"num_beams": 3}):
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False) | how
        with mixed_calls() as calls:
            got = ours.generate(input_ids=ids, adapter_names=["b", "__base__", "a"], **options)
        assert calls
        assert torch.equal(got, stock.generate(input_ids=ids, adapter_names=["b", "__base__", "a"], **options))
