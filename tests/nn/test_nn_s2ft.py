# SPDX-License-Identifier: Apache-2.0
"""S2FTLinear: one W that holds what was trained, whatever is asked of the layer in between."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import lrkern.files
from lrkern.nn import S2FTLinear

I, O = 40, 24
sides = pytest.mark.parametrize("side", ["input", "output"])


def made(side="input", index="3-9,12", dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    return S2FTLinear.from_linear(nn.Linear(I, O).to(dtype), index=index, side=side, **settings)


def shaken(layer, by=0.1):
    with torch.no_grad():
        layer.slice += by * torch.randn(layer.slice.shape, generator=torch.Generator().manual_seed(3)).to(layer.slice)
    return layer


def dense(layer):
    """W with the slice in it, apart from the layer."""
    w = layer.base_layer.weight.detach().clone()
    return w.index_copy(layer._dim, layer.columns.long(), layer.slice.detach().to(w.dtype))


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_disable_merge(side, dtype):
    layer, x = made(side, dtype=dtype), torch.randn(5, I).to(dtype)
    was = layer.base_layer.weight.clone()
    base = layer(x)
    assert torch.equal(base, nn.functional.linear(x, was, layer.base_layer.bias))
    shaken(layer)
    want = nn.functional.linear(x, dense(layer), layer.base_layer.bias)
    assert torch.equal(layer(x), want) and not torch.equal(want, base)
    layer.disable_adapter()
    assert torch.equal(layer(x), base) and torch.equal(layer.base_layer.weight, was)
    layer.enable_adapter()
    layer.eval().merge()
    assert torch.equal(layer.base_layer.weight, dense(layer)) and torch.equal(layer(x), want)
    for refused in (layer.state_dict, layer.merge, layer.disable_adapter):
        with pytest.raises(RuntimeError, match="S2FTLinear"):
            refused()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, was) and torch.equal(layer(x), want)
    assert (was.float() + layer.delta_weight() - dense(layer).float()).abs().max() <= (
        2e-6 if dtype == torch.float32 else 2e-2
    )
    a, b, scale = layer.factors()
    assert torch.equal(scale * b @ a, layer.delta_weight())


@sides
def test_training_it_is_training_the_masked_w(side):
    """The same optimizer with weight decay, the same steps: what moves, moves as W would, and nothing else does."""
    layer = made(side, index=[0, 1, 2, 3, 20])
    full = copy.deepcopy(layer.base_layer)
    mask = torch.zeros_like(full.weight).index_fill_(layer._dim, layer.columns.long(), 1.0)
    full.weight.requires_grad_(True)
    adam = lambda p: torch.optim.AdamW([p], lr=3e-2, weight_decay=0.3)
    ours, theirs = adam(layer.slice), adam(full.weight)
    g = torch.Generator().manual_seed(1)
    for _ in range(6):
        for opt in (ours, theirs):
            opt.zero_grad()
        for _ in range(3):  # micro-batches
            x, t = torch.randn(4, 7, I, generator=g), torch.randn(4, 7, O, generator=g)
            for each in (layer, full):
                (each(x) - t).square().mean().backward()
        full.weight.grad *= mask
        was = full.weight.detach().clone()
        ours.step(), theirs.step()
        with torch.no_grad():
            full.weight.copy_(torch.where(mask.bool(), full.weight, was))  # decay without a mask
    layer.sync()
    torch.testing.assert_close(layer.base_layer.weight, full.weight, rtol=1e-5, atol=1e-6)
    assert layer.base_layer.weight.grad is None and layer.start.grad is None


@sides
def test_gradients_between_two_states(side):
    """A reference forward without the adapter in between, as preference training makes it: backward is of the layer as it was."""
    layer, x = shaken(made(side)), torch.randn(6, I, requires_grad=True)
    y = layer(x)
    layer.disable_adapter()
    with torch.no_grad():
        layer(x)
    layer.enable_adapter()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(6, O) @ dense(layer))


@sides
def test_under_autocast(side):
    """The cast copy of W gets the slice; W itself has it when its owner asks."""
    layer, x = shaken(made(side)), torch.randn(6, I)
    was = layer.base_layer.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    low = [t.bfloat16() for t in (x, dense(layer), layer.base_layer.bias)]
    assert torch.equal(y, nn.functional.linear(*low))
    y.float().sum().backward()
    assert layer.slice.grad.dtype == torch.float32 and torch.equal(layer.base_layer.weight, was)
    assert torch.equal(layer.state_dict()["base_layer.weight"], dense(layer))


@sides
def test_over_a_base_layer_with_hooks(side):
    layer, plain = shaken(made(side)), shaken(made(side))
    seen = []
    layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(1) or y * 2)
    x, other = torch.randn(6, I, requires_grad=True), None
    other = x.detach().clone().requires_grad_()
    y, z = layer(x), plain(other) * 2
    torch.testing.assert_close(y, z)
    y.square().sum().backward(), z.square().sum().backward()
    assert seen
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.slice.grad * 2, plain.slice.grad)  # beside the hook, as every adapter's part


def test_a_weight_made_of_others_is_refused():
    for change in (
        lambda m: prune.l1_unstructured(m, "weight", 0.3),
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    ):
        layer = made()
        change(layer.base_layer)
        with pytest.raises(RuntimeError, match="must have a base layer with a weight of its own to write to"):
            layer(torch.randn(2, I))


@pytest.mark.parametrize(("index", "text"), [
    ("0-3,7", "0-3,7"), ([0, 1, 2, 3, 7], "0-3,7"), (torch.tensor([5, 6]), "5-6"), ("", ""), ([], ""), (range(40), "0-39"), ("4", "4"),
], ids=str)  # fmt: skip
def test_how_an_index_may_be_given(index, text):
    layer = made(index=index)
    assert layer.index == text and layer.settings == {"index": text, "side": "input"}
    again = made(**{k: v for k, v in layer.settings.items()})
    assert torch.equal(again.columns, layer.columns) and again.r == layer.r
    assert torch.equal(
        layer(torch.ones(2, I)), nn.functional.linear(torch.ones(2, I), layer.base_layer.weight, layer.base_layer.bias)
    )


@pytest.mark.parametrize(
    "index",
    [
        [3, 3],
        [4, 2],
        [-1],
        [40],
        "0-40",
        "3-1",
        "a",
        "1,,2",
        [0.5],
        torch.tensor([0.5]),
        torch.eye(2).long(),
        None,
        True,
        "99999999999",
    ],
    ids=str,
)
def test_an_index_that_is_refused(index):
    base = nn.Linear(I, O)
    with pytest.raises(
        ValueError, match=r"^S2FTLinear: index must be distinct whole numbers .* below the 40 input features, got "
    ):
        S2FTLinear.from_linear(base, index=index)
    assert base.weight.requires_grad


@pytest.mark.parametrize(("settings", "text"), [
    ({"side": "rows"}, r"side must be one of \['input', 'output'\], got 'rows'"), ({"side": 1}, "side must be one of"),
    ({"adapter_dtype": torch.float64}, "adapter_dtype must be"), ({"adapter_dtype": torch.bfloat16}, "adapter_dtype must be float32 or the dtype of the base"),
], ids=str)  # fmt: skip
def test_settings_that_are_refused(settings, text):
    base = nn.Linear(I, O)
    with pytest.raises(ValueError, match=f"^S2FTLinear: {text}"):
        S2FTLinear.from_linear(base, index="0-3", **settings)
    assert base.weight.requires_grad


@sides
def test_state_dicts_copies_and_pickles(side):
    layer, x = shaken(made(side)), torch.randn(4, I)
    y = layer(x)
    shaken(layer, 0.3)  # a step after the last forward: the state has it
    state = layer.state_dict()
    assert torch.equal(state["base_layer.weight"], dense(layer)) and set(state) == {
        "slice",
        "start",
        "columns",
        "base_layer.weight",
        "base_layer.bias",
    }
    file = io.BytesIO()
    torch.save(state, file)
    other = made(side, seed=4)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x)) and not torch.equal(again(x), y)
        again.disable_adapter()
        layer.disable_adapter()
        assert torch.equal(again(x), layer(x))
        layer.enable_adapter()
    elsewhere = made(side, index="4-10,12")
    was = elsewhere.slice.detach().clone()
    with pytest.raises(RuntimeError, match="columns must be '4-10,12', got '3-9,12'; the layer is unchanged"):
        elsewhere.load_state_dict(state)
    assert torch.equal(elsewhere.slice, was)


@sides
def test_its_file_restores_the_bits_and_knows_its_base(side, tmp_path):
    model = nn.Sequential(shaken(made(side, dtype=torch.bfloat16)), nn.Linear(O, 3).bfloat16())
    x = torch.randn(4, I).bfloat16()
    want = model(x)
    lrkern.files.save(model, tmp_path / "s2ft.safetensors")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(I, O).bfloat16(), copy.deepcopy(model[1]))
    lrkern.files.load(plain, tmp_path / "s2ft.safetensors")
    assert torch.equal(plain(x), want) and plain[0].slice.requires_grad and not plain[0].start.requires_grad
    again = nn.Sequential(made(side, dtype=torch.bfloat16), copy.deepcopy(model[1]))
    lrkern.files.load(again, tmp_path / "s2ft.safetensors")
    assert torch.equal(again(x), want)
    for other in (nn.Linear(I, O).bfloat16(), made(side, dtype=torch.bfloat16, seed=8)):
        strange = nn.Sequential(other, copy.deepcopy(model[1]))
        with pytest.raises(
            ValueError,
            match="must be of the model's base, got a slice of W that is not the one it was trained from; the model is unch",
        ):
            lrkern.files.load(strange, tmp_path / "s2ft.safetensors")
    with pytest.raises(ValueError, match="bits must be None for S2FTLinear .0., whose values are those of W, got 8"):
        lrkern.files.save(model, tmp_path / "q.safetensors", bits=8)


def test_memory_of_a_step_follows_the_slice():
    layer, x = made(index="0-3").requires_grad_(True), torch.randn(64, I, requires_grad=True)
    layer.base_layer.requires_grad_(False)
    layer.start.requires_grad_(False)
    saved = []
    own = {p.data_ptr() for p in layer.parameters()} | {layer.columns.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 64 * 4 * 4
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 4 * O
