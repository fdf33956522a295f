# SPDX-License-Identifier: Apache-2.0
"""S2FT adapters apart from a model: fused, written and read, as a LoRA folder, and switched into weights and out again."""

import copy
import json
import math
import pickle

import peft
import pytest
import torch
from s2ft_models import assert_same_bits, batch, bits, logits, made
from safetensors.torch import load_file, save_file

from lrkern.s2ft import Slice, fuse, load, save, select, switch, to_lora


def adapter(model, seed, dtype=torch.float32, **how):
    """Random changes that show, of a random selection."""
    gen, found = torch.Generator().manual_seed(seed), {}
    for name, (side, index) in select(model, **how or dict(o=0.5, v=0.5, down=0.3, up=0.3), generator=seed).items():
        O, I = model.get_submodule(name).weight.shape
        shape, channels = ((O, len(index)), I) if side == "input" else ((len(index), I), O)
        found[name] = Slice(side, index, (0.2 * torch.randn(shape, generator=gen)).to(dtype).float(), channels)
    return found


def added(model, *adapters, weights=None):
    """A copy with the dense sums in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for w, one in zip(weights or [1.0] * len(adapters), adapters, strict=True):
            for name, s in one.items():
                delta = torch.zeros(s.shape)
                delta[(slice(None), s.index) if s.side == "input" else s.index] = s.change
                model.get_submodule(name).weight += w * delta
    return model


def same(one, two):
    assert one.keys() == two.keys()
    for name, s in one.items():
        assert (s.side, s.channels) == (two[name].side, two[name].channels)
        assert torch.equal(s.index, two[name].index) and torch.equal(s.change, two[name].change)


DOWN, O = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"


# ---- fuse


def test_fuse_overlapping():
    """Over the union of the indices, sums where both are."""
    model = made("llama-gqa")
    one, two, three = (adapter(model, seed) for seed in (1, 2, 3))
    assert any(torch.isin(one[n].index, two[n].index).any() for n in one)
    weights = [0.5, -1.5, 2.0]
    fused = fuse([one, two, three], weights)
    for name, s in fused.items():
        want = sorted({*one[name].index.tolist(), *two[name].index.tolist(), *three[name].index.tolist()})
        assert s.index.tolist() == want
    got, want = added(model, fused), added(model, one, two, three, weights=weights)
    for name in fused:
        torch.testing.assert_close(got.get_submodule(name).weight, want.get_submodule(name).weight, rtol=0, atol=1e-6)
    assert (logits(got) - logits(model)).abs().max() > 0.01


def test_fuse_disjoint():
    """Slices that do not overlap are kept bit for bit, in any order of the adapters, and of linears that one alone has."""
    model = made("llama-gqa")
    whole = adapter(model, 1, o=1.0, down=1.0, up=1.0)
    part = lambda s, at: s._replace(
        index=s.index[at], change=s.change.index_select(s.dim, torch.arange(s.channels)[at])
    )
    even, odd = ({n: part(s, slice(i, None, 2)) for n, s in whole.items()} for i in (0, 1))
    same(fuse([even, odd]), whole)
    same(fuse([odd, even]), whole)
    first = {n: s for n, s in whole.items() if ".0." in n}
    second = {n: s for n, s in whole.items() if ".1." in n}
    same(fuse([second, first]), {n: whole[n] for n in (*second, *first)})
    same(fuse([whole]), whole)
    assert fuse([{}]) == {}


def test_fuse_refuses():
    model = made("llama-gqa")
    one = adapter(model, 1)
    s = one[DOWN]
    rows = {DOWN: Slice("output", torch.tensor([0]), torch.zeros(1, 48), 32)}
    wide = {DOWN: s._replace(channels=49)}
    huge = {DOWN: s._replace(change=s.change * 0 + 3e38)}
    for adapters, weights, text in [
        ([], None, "one at least"),
        ([one, one], [1.0], "2 finite numbers"),
        ([one], [float("inf")], "1 finite numbers"),
        ([one], ["1"], "1 finite numbers"),
        ([one, rows], None, rf"{DOWN} must be sliced on one side of one size, input of \[32, 48\], got output"),
        ([one, wide], None, r"got input of \[32, 49\]"),
        ([huge, huge], None, "change of .* must be finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            fuse(adapters, weights)


WRONG = {
    "side": (lambda s: s._replace(side="in"), "side of .* must be input or output"),
    "order": (lambda s: s._replace(index=s.index.flip(0)), "must ascend"),
    "double": (lambda s: s._replace(index=s.index * 0), "distinct"),
    "beyond": (lambda s: s._replace(index=s.index + 40), r"0\.\.47"),
    "negative": (lambda s: s._replace(index=s.index - 48), r"0\.\.47"),
    "fractions": (lambda s: s._replace(index=s.index.float()), "whole numbers"),
    "dtype": (lambda s: s._replace(change=s.change.bfloat16()), "must be float32"),
    "shape": (lambda s: s._replace(change=s.change[:, 1:]), r"must be float32 \[O, 16\], got .*\[32, 15\]"),
    "nan": (lambda s: s._replace(change=s.change * float("nan")), "must be finite"),
    "channels": (lambda s: s._replace(channels=48.0), "channels of .* must be a whole number"),
    "kind": (lambda s: tuple(s), "slices by name"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_adapters(what, tmp_path):
    """By every door, before anything is changed or written."""
    model = made("llama-gqa")
    change, text = WRONG[what]
    wrong = adapter(model, 0)
    wrong[DOWN] = change(wrong[DOWN])
    before = bits(model)
    for door in (lambda: fuse([wrong]), lambda: save(wrong, tmp_path / "a"), lambda: to_lora(wrong, tmp_path / "b")):
        with pytest.raises(ValueError, match=text):
            door()
    with pytest.raises(ValueError, match=text):
        switch(model, wrong)
    assert_same_bits(model, before)
    assert not [*tmp_path.iterdir()]


# ---- files


def test_file(tmp_path):
    one = adapter(made("llama-gqa"), 0) | {
        "none": Slice("output", torch.tensor([], dtype=torch.int64), torch.zeros(0, 5), 7)
    }
    save(one, tmp_path / "a.safetensors")
    read = load(tmp_path / "a.safetensors")
    same(read, one)
    file = load_file(tmp_path / "a.safetensors")
    assert file[f"{DOWN}.index"].dtype == torch.int32
    assert torch.equal(file[f"{DOWN}.change"], one[DOWN].change)
    save(one, tmp_path / "a.safetensors")  # over the file that was read
    same(read, one)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def header(tensors, **changes):
    layers = {DOWN: ["input", 48]}
    return {"lrkern": json.dumps({"format": 1, "kind": "s2ft", "layers": layers} | changes)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, h: (t, {}), "must be a file of lrkern.s2ft.save's"),
        (lambda t, h: (t, {"lrkern": "{"}), "must be JSON"),
        (lambda t, h: (t, header(t, kind="own")), "must be a file of lrkern.s2ft.save's"),
        (lambda t, h: (t, header(t, format=2)), "format must be 1, got 2"),
        (lambda t, h: (t, header(t, format=True)), "format must be 1, got True"),
        (lambda t, h: (t, header(t, layers=[])), "must be a file of lrkern.s2ft.save's"),
        (lambda t, h: (t, header(t, layers={DOWN: ["input"]})), r"must be \[side, channels\]"),
        (lambda t, h: (t, header(t, layers={DOWN: ["input", 48.0]})), r"must be \[side, channels\]"),
        (lambda t, h: (t, header(t, layers={DOWN: ["input", 4]})), r"0\.\.3"),
        (lambda t, h: (t, header(t, layers={DOWN: [["input"], 48]})), "side of .* must be input or output"),
        (lambda t, h: (t, header(t, layers={DOWN: ["output", 48]})), r"must be float32 \[16, I\]"),
        (lambda t, h: (t, header(t, layers={})), "which is of no linear"),
        (lambda t, h: (t, header(t, layers={DOWN: ["input", 48], "x": ["input", 1]})), "lacks x.index"),
        (lambda t, h: (t | {"more": torch.zeros(1)}, h), "has more, which is of no linear"),
        (lambda t, h: (t | {f"{DOWN}.index": t[f"{DOWN}.index"].long()}, h), "index must be int32"),
        (lambda t, h: (t | {f"{DOWN}.index": t[f"{DOWN}.index"].flip(0).contiguous()}, h), "must ascend"),
        (lambda t, h: (t | {f"{DOWN}.change": t[f"{DOWN}.change"].half()}, h), "must be float32"),
        (lambda t, h: (t | {f"{DOWN}.change": t[f"{DOWN}.change"] * math.inf}, h), "must be finite"),
    ],
)
def test_files_of_anybody(change, text, tmp_path):
    one = {DOWN: adapter(made("llama-gqa"), 0)[DOWN]}
    save(one, tmp_path / "a")
    tensors = load_file(tmp_path / "a")
    tensors, metadata = change(tensors, header(tensors))
    save_file(tensors, tmp_path / "b", metadata=metadata)
    with pytest.raises(ValueError, match=f"lrkern.s2ft.load: .*b: .*{text}"):
        load(tmp_path / "b")


def test_no_file(tmp_path):
    (tmp_path / "short").write_bytes(b"x")
    for name, text in [
        ("nothing", "No such file"),
        (".", "must be a file, got a folder"),
        ("short", "must be safetensors"),
    ]:
        with pytest.raises(ValueError, match=text):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="lrkern.s2ft.save: must be a path"):
        save({}, 3)


# ---- a LoRA folder


@pytest.mark.parametrize("kind", ["llama-gqa", "bert"])
def test_to_lora_is_what_peft_computes(kind, tmp_path):
    model = made(kind)
    one = adapter(model, 5)
    to_lora(one, tmp_path)
    stock = peft.PeftModel.from_pretrained(made(kind), tmp_path).eval()
    sides = {name: s.side for name, s in one.items()}
    assert {*sides.values()} == {"input", "output"}
    assert stock.peft_config["default"].r == max(len(s.index) for s in one.values())
    switch(model, one)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    assert (logits(model) - logits(made(kind))).abs().max() > 0.01
    merged = stock.merge_and_unload()  # the product with ones and zeros is exact, and so is one sum
    for name in one:
        assert torch.equal(merged.get_submodule(name).weight, model.get_submodule(name).weight)


def test_to_lora_refuses(tmp_path):
    wide = Slice("input", torch.arange(513), torch.zeros(2, 513), 600)
    with pytest.raises(
        ValueError, match="a must have at most 512 channels, the highest rank that LoRA kernels take, got 513"
    ):
        to_lora({"a": wide}, tmp_path / "x")
    with pytest.raises(ValueError, match="must have a channel, got none"):
        to_lora({}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    most = wide._replace(index=wide.index[:512], change=wide.change[:, :512])
    to_lora({"a": most}, tmp_path / "x")


# ---- switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype):
    """Bit for bit, whichever adapters come between; each acts as alone."""
    model = made("llama-gqa").to(dtype)
    before = bits(model)
    one, two = adapter(model, 1), adapter(model, 2, o=0.5, down=0.7)
    for now in (one, two, one, None, two, two, None, None):
        switch(model, now)
        want = before if now is None else None
        if now is not None:
            alone = made("llama-gqa").to(dtype)
            for name, s in now.items():
                w = alone.get_submodule(name).weight.detach()
                new = (w.index_select(s.dim, s.index).float() + s.change).to(dtype)
                w.index_copy_(s.dim, s.index, new)
            want = bits(alone)
            assert not torch.equal(want[f"{DOWN}.weight"], before[f"{DOWN}.weight"])
        assert_same_bits(model, want)


def test_copies_keep_what_was_there():
    """deepcopy, pickle and submodules."""
    model = made("llama-gqa")
    before, one = bits(model), adapter(model, 1)
    switch(model, one)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        switch(other, None)
        assert_same_bits(other, before)
    switch(model.model.layers[0], None)
    switch(model.model.layers[1], None)
    assert_same_bits(model, before)
    one[DOWN].change.zero_()  # the caller's own
    switch(model, one)
    one[DOWN].change.add_(1)
    switch(model, None)
    assert_same_bits(model, before)


def test_switch_refuses():
    """And leaves the adapter that is in."""
    model = made("llama-gqa")
    one = adapter(model, 1)
    switch(model, one)
    now, s = bits(model), one[DOWN]
    for wrong, text in [
        ({"x": s}, "x must be a linear of the model"),
        ({"model": s}, "model must be a plain nn.Linear"),
        ({"lm_head": s}, r"lm_head must have a weight of shape \[32, 48\], got \[61, 32\]"),
        ([s], "slices by name"),
    ]:
        with pytest.raises(ValueError, match=text):
            switch(model, wrong)
        assert_same_bits(model, now)
    model.get_submodule(DOWN).register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=f"{DOWN} must be a plain nn.Linear"):
        switch(model, one)


def test_switch_refuses_what_overflows():
    """In the second of two linears, over an adapter that is in: that one stays, and can be taken out."""
    model = made("llama-gqa")
    with torch.no_grad():
        model.get_submodule(DOWN).weight.fill_(3e38)
    one, before = adapter(model, 1), bits(model)
    huge = {O: one[O], DOWN: one[DOWN]._replace(change=one[DOWN].change * 0 + 3e38)}
    switch(model, {name: one[name] for name in one if name != DOWN})
    held = bits(model)
    with pytest.raises(ValueError, match=f"weight of {DOWN} must stay finite"):
        switch(model, huge)
    assert_same_bits(model, held)
    switch(model, None)
    assert_same_bits(model, before)


@pytest.mark.parametrize("change", ["write", "load", "cast"])
def test_whoever_wrote_since(change):
    """What was kept is not the weight's any more: refused, not written over."""
    model = made("llama-gqa")
    before, one = bits(model), adapter(model, 1)
    switch(model, one)
    if change == "write":
        with torch.no_grad():
            model.get_submodule(DOWN).weight[:, one[DOWN].index[0]] += 1
    elif change == "load":
        model.load_state_dict(before)
    else:
        model.bfloat16()
    now = bits(model)
    with pytest.raises(ValueError, match="must have the values that the last switch left in it"):
        switch(model, None)
    assert_same_bits(model, now)


def test_tied_weights():
    model = made("llama-gqa")
    one = adapter(model, 1)
    model.model.layers[0].mlp.down_proj.weight = model.get_submodule(DOWN).weight
    with pytest.raises(ValueError, match="must stand at one place of the model"):
        switch(model, one)


def test_a_switched_model_serves(tmp_path):
    """Its own state_dict, and generate, have the adapter in them."""
    model = made("llama-gqa")
    one = adapter(model, 1)
    ids = batch()["input_ids"]
    want = added(model, one)
    switch(model, one)
    torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=1e-5)
    plain = made("llama-gqa")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
