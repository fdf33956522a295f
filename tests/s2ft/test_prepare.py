# SPDX-License-Identifier: Apache-2.0
"""Whole models trained by slices: what trains is what a masked full fine-tune trains, and the way back is bit for bit."""

import copy
import re
from pathlib import Path

import pytest
import torch
from s2ft_models import assert_same_bits, batch, bits, logits, made
from torch import nn

from lrkern.nn import S2FTLinear
from lrkern.s2ft import (
    Chosen,
    Slice,
    extract,
    find,
    fuse,
    load,
    permute,
    prepare,
    release,
    reorder,
    save,
    select,
    switch,
    to_lora,
    unpermute,
)

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["llama-mha", "llama-gqa", "qwen2", "qwen3", "mistral", "bert"]
ALL = dict(o=0.5, v=0.5, down=0.3, up=0.3, generator=0)
ADAMW = dict(lr=1e-2, weight_decay=0.1)


def trained(model, steps=3, micro=1, **settings):
    """AdamW steps, each over ``micro`` batches whose gradients accumulate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW | settings)
    for step in range(steps):
        for part in range(micro):
            (model(**batch(step * 10 + part)).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def masked(model, selection, steps=3, micro=1):
    """Full fine-tuning of the same linears with dense gradients, of which all but the slices is put to 0, and weights beside the
    slices put back after each step, since weight decay moves them."""
    weights = {name: model.get_submodule(name).weight for name in selection}
    masks = {}
    model.requires_grad_(False)
    for name, (side, index) in selection.items():
        masks[name] = torch.zeros_like(weights[name], dtype=torch.bool)
        masks[name][(slice(None), index) if side == "input" else index] = True
        weights[name].requires_grad_(True)
    start = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), **ADAMW)
    for step in range(steps):
        for part in range(micro):
            (model(**batch(step * 10 + part)).loss / micro).backward()
        for name, w in weights.items():
            w.grad *= masks[name]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(torch.where(masks[name], w, start[name]))
    return model


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("copermute", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_trains_as_in_a_masked_full_fine_tune(kind, copermute, micro):
    """Same optimizer, with weight decay, same steps, gradients accumulated over 3 micro-batches too: the same weights to rounding,
    and all that is not of a slice bit for bit."""
    model, before = made(kind), bits(made(kind))
    selection = select(model, groups=True, **ALL)
    assert len(selection) == 8
    want = masked(made(kind), selection, micro=micro)
    done = prepare(model, selection, copermute=copermute)
    trained(model, micro=micro)
    release(model, done.record)
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, t in before.items():
        linear = name.removesuffix(".weight")
        if linear not in selection:
            assert torch.equal(now[name], t), name  # biases of the trained linears as well
            continue
        side, index = selection[linear]
        dim = 1 if side == "input" else 0
        rest = torch.ones(t.shape[dim], dtype=torch.bool)
        rest[index] = False
        assert torch.equal(
            now[name].index_select(dim, rest.nonzero().flatten()), t.index_select(dim, rest.nonzero().flatten())
        )
        slices = [x.index_select(dim, index) for x in (now[name], want.get_submodule(linear).weight, t)]
        assert (slices[0] - slices[2]).abs().max() > 1e-2
        # AdamW divides a gradient by its size: where it is near 0, its rounding shows. Seen: 1.1e-5, and 3e-8 as a mean.
        torch.testing.assert_close(slices[0], slices[1], rtol=0, atol=5e-5)
        assert (slices[0] - slices[1]).abs().mean() < 1e-7
    torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 47, 48])
def test_any_number_of_channels(n):
    """None, odd ones, all: of columns and of rows, scattered and brought together."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(n))
    at = "model.layers.1.mlp."
    selection = {f"{at}down_proj": ("input", order[:n]), f"{at}up_proj": ("output", order[48 - n :])}
    selection = {name: Chosen(side, index.sort().values) for name, (side, index) in selection.items()}
    want, before = made("llama-gqa"), bits(made("llama-gqa"))
    masked(want, selection)
    for copermute in (True, False):
        model = made("llama-gqa")
        done = prepare(model, selection, copermute=copermute)
        if n:
            trained(model)
        adapter = extract(model, done.record)
        assert {name: s.index.tolist() for name, s in adapter.items()} == {
            name: c.index.tolist() for name, c in selection.items()
        }
        release(model, done.record)
        for name in selection:
            w = model.get_submodule(name).weight
            torch.testing.assert_close(w, want.get_submodule(name).weight, rtol=0, atol=5e-5)
            assert torch.equal(w, before[f"{name}.weight"]) == (n == 0)


def test_report():
    model = made("llama-gqa")
    total = sum(p.numel() for p in model.parameters())
    done = prepare(model, **ALL)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains} == {f"{name}.slice" for name in done.layers}
    assert done.trainable == sum(p.numel() for p in trains.values()) == 2 * (32 * 16 + 8 * 32 + 32 * 16 + 16 * 32)
    assert done.total == total
    for name, (side, index) in done.layers.items():
        layer = model.get_submodule(name)
        assert type(layer) is S2FTLinear
        assert (layer.side, layer.columns.tolist()) == (side, index.tolist())
        assert (index.diff() == 1).all()  # co-permuted
    text = str(done).splitlines()
    assert text[0] == f"{done.trainable} of {total} parameters train"
    assert text[1] == "model.layers.0.self_attn.o_proj: 16 channels, input"
    assert len(text) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_changes_no_output(kind):
    model, before = made(kind), bits(made(kind))
    y = logits(model)
    done = prepare(model, example=batch(), **ALL)
    torch.testing.assert_close(logits(model), y, rtol=0, atol=1e-5)
    release(model, done.record)
    assert_same_bits(model, before)


@pytest.mark.parametrize("copermute", [True, False])
@pytest.mark.parametrize("kind", ["llama-gqa", "bert"])
def test_the_adapter_is_of_the_ordinary_checkpoint(kind, copermute, tmp_path):
    """Extracted, written, read, switched into the model as it was: the trained model. As a LoRA folder for stock PEFT too."""
    import peft

    model = made(kind)
    done = prepare(model, copermute=copermute, **ALL)
    trained(model)
    adapter = extract(model, done.record)
    y = logits(model)
    fresh = made(kind)
    before = bits(fresh)
    save(adapter, tmp_path / "a")
    switch(fresh, load(tmp_path / "a"))
    torch.testing.assert_close(logits(fresh), y, rtol=0, atol=1e-5)
    assert (logits(fresh) - logits(made(kind))).abs().max() > 1e-2
    switch(fresh, None)
    assert_same_bits(fresh, before)
    to_lora(adapter, tmp_path / "lora")
    stock = peft.PeftModel.from_pretrained(made(kind), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(stock), y, rtol=0, atol=1e-5)
    release(model, done.record)
    torch.testing.assert_close(logits(model), y, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="model must hold S2FTLinear layers"):
        extract(model)


def test_adapters_of_two_trainings_fuse():
    """Of two selections, co-permuted each in its own way: their sum in the ordinary order acts as both changes of W."""
    models, adapters = [], []
    for seed in (1, 2):
        model = made("llama-gqa")
        done = prepare(model, **ALL | {"generator": seed})
        trained(model)
        adapters.append(extract(model, done.record))
        release(model, done.record)
        models.append(model)
    base, fused = made("llama-gqa"), made("llama-gqa")
    switch(fused, fuse(adapters, [0.5, 2.0]))
    for name, t in base.state_dict().items():
        one, two = (m.state_dict()[name] for m in models)
        torch.testing.assert_close(fused.state_dict()[name], t + 0.5 * (one - t) + 2 * (two - t), rtol=0, atol=1e-6)


def test_bias_stays_and_acts():
    """Of a trained linear: frozen, permuted with its rows, and in the output."""
    model = made("llama-mha")
    name = "model.layers.0.self_attn.v_proj"
    bias = model.get_submodule(name).bias.detach().clone()
    done = prepare(model, v=0.5, generator=0)
    layer = model.get_submodule(name)
    assert torch.equal(layer.base_layer.bias, bias[done.record.channels(name, "output")])
    x = torch.randn(2, 32)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    trained(model)
    assert layer.base_layer.bias.grad is None
    release(model, done.record)
    assert torch.equal(model.get_submodule(name).bias, bias)


def test_sixteen_bits():
    """float32 slices over a bf16 model: W is what they round to, and the rest of it as it was."""
    model = made("llama-gqa").bfloat16()
    before = bits(model)
    done = prepare(model, **ALL)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model, lr=1e-4)
    adapter = extract(model, done.record)
    release(model, done.record)
    for name, s in adapter.items():
        w, was = model.get_submodule(name).weight, before[f"{name}.weight"]
        want = (was.index_select(s.dim, s.index).float() + s.change).bfloat16()
        off = (w.index_select(s.dim, s.index).float() - want.float()).abs()
        assert (off <= want.float().abs() * 2**-7).all() and (
            off > 0
        ).float().mean() < 0.01  # slice is start + change but for fp32
        mask = torch.ones(w.shape[s.dim], dtype=torch.bool)
        mask[s.index] = False
        rest = mask.nonzero().flatten()
        assert torch.equal(w.index_select(s.dim, rest), was.index_select(s.dim, rest))


def test_given_selections():
    model = made("llama-gqa")
    name = "model.layers.1.mlp.down_proj"
    done = prepare(model, {name: Chosen("input", torch.tensor([3, 40]))})
    assert done.layers[name].index.tolist() == [0, 1]
    assert len(done.record.orders) == 1
    release(model, done.record)
    done = prepare(model, {name: Chosen("input", torch.tensor([3, 40]))}, copermute=False)
    assert done.record is None
    assert model.get_submodule(name).index == "3,40"


def test_modes_are_kept():
    model = made("llama-gqa").train()
    model.model.layers[0].mlp.eval()
    done = prepare(model, **ALL)
    release(model, done.record)
    assert model.model.layers[1].mlp.down_proj.training
    assert not model.model.layers[0].mlp.down_proj.training


@pytest.mark.parametrize("copermute", [True, False])
def test_prepare_refuses(copermute):
    """With weights, order, flags and modules as they were."""
    name = "model.layers.1.mlp.down_proj"
    some = {name: Chosen("input", torch.tensor([3, 40]))}

    def tie(model):
        model.model.layers[0].mlp.down_proj.weight = model.get_submodule(name).weight

    for selection, how, change, text in [
        (some, dict(o=0.5), None, "selection must be given alone or not, got o beside it"),
        (None, dict(o=2.0), None, "o must be a number"),
        (None, dict(heads=0.5), None, "unexpected keyword"),
        (some | {"x": Chosen("input", torch.tensor([0]))}, {}, None, "x must be a linear of the model"),
        ({name: Chosen("input", torch.tensor([48]))}, {}, None, "index"),
        (some, dict(adapter_dtype=torch.float16), None, "adapter_dtype"),
        (some, dict(adapter_dtype=torch.float64), None, "adapter_dtype"),
        (some, {}, tie, "must stand at one place of the model"),
    ]:
        model = made("llama-gqa")
        for p in [*model.parameters()][::2]:
            p.requires_grad_(False)
        if change:
            change(model)
        before, flags = bits(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises((ValueError, TypeError), match=text):
            prepare(model, selection, copermute=copermute, **how)
        assert_same_bits(model, before)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any(isinstance(m, S2FTLinear) for m in model.modules())


def test_release_refuses():
    """Merged or disabled layers and a wrong record: everything stays in its place."""
    model = made("llama-gqa")
    done = prepare(model, **ALL)
    trained(model)
    layer = model.model.layers[0].mlp.down_proj
    part, order = done.record.orders[0]
    wrong = type(done.record)(((part, order[:-1]), *done.record.orders[1:]))
    y = logits(model)
    with pytest.raises(ValueError, match="each of 0..3 once"):
        release(model, wrong)
    layer.merge()
    with pytest.raises(ValueError, match="got one that is merged"):
        release(model, done.record)
    layer.unmerge()
    layer.disable_adapter()
    with pytest.raises(ValueError, match="got one that is disabled"):
        release(model, done.record)
    layer.enable_adapter()
    for call in (lambda: unpermute(model, done.record), lambda: reorder(model, done.record.orders)):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError):
        permute(model, done.layers)
    assert torch.equal(logits(model), y)
    release(model, done.record)
    torch.testing.assert_close(logits(model), y, rtol=0, atol=1e-5)
    assert len(find(model)) == 4


@pytest.mark.parametrize("who", ["s2ft", "lrkern", "peft"])
def test_linears_below_adapters_are_not_the_models(who):
    """Columns that S2FTLinear counts, or W beside factors, must not move under them."""
    import peft

    from lrkern.nn import FusedLoRALinear

    model = made("llama-gqa")
    if who == "s2ft":
        prepare(model, o=0.5, down=0.3, generator=0)
    elif who == "lrkern":
        for layer in model.model.layers:
            layer.mlp.down_proj = FusedLoRALinear.from_linear(layer.mlp.down_proj, r=2)
            layer.self_attn.o_proj = FusedLoRALinear.from_linear(layer.self_attn.o_proj, r=2)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    before = bits(model)
    for call in (lambda: find(model), lambda: select(model, down=0.5), lambda: prepare(model, o=0.5)):
        with pytest.raises(ValueError):
            call()
    name = next(name for name, m in model.named_modules() if name.endswith("down_proj.base_layer"))
    s = Slice("input", torch.tensor([1]), torch.ones(32, 1), 48)
    with pytest.raises(ValueError, match="without hooks, parametrizations or adapters"):
        switch(model, {name: s})
    assert_same_bits(model, before)


def test_copies_train_apart():
    model = made("llama-gqa")
    done = prepare(model, **ALL)
    other = copy.deepcopy(model)
    y = logits(model)
    trained(other)
    assert torch.equal(logits(model), y)
    assert not torch.equal(logits(other), y)
    assert extract(model, done.record).keys() == done.layers.keys()
    assert not any(s.change.any() for s in extract(model).values())


@pytest.mark.parametrize("how", ["data_parallel", "fsdp2"])
def test_two_processes(in_two_processes, how):
    assert in_two_processes("s2ft_workers.py")[how] is None


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    """docs/s2ft.md runs as it stands."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "s2ft.md").read_text(), re.S)
    assert len(code) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code[0], "docs/s2ft.md", "exec"), {})
    assert (tmp_path / "task.safetensors").exists()
