# SPDX-License-Identifier: Apache-2.0
"""Own files of layers that know of one another: what they share is written once, and what ties them is there again."""

import json
import re

import pytest
import torch
from branch_models import KINDS, D, Stack, adapted, data, of_kind, shaken
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lrkern.convert import to_lora
from lrkern.files.own import load_adapter, read_layers, save_adapter
from lrkern.nn.variants import COLALinear, LoRTALinear, ResLoRALinear, RoseLoRALinear

SHARES = of_kind("lorta")
FIRST, SECOND = "blocks.0.proj", "blocks.1.proj"


def header_of(path):
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["lrkern"])


def rewritten(path, edit):
    header, tensors = header_of(path), load_file(path)
    edit(header, tensors)
    save_file(tensors, path, metadata={"lrkern": json.dumps(header)})


def trains(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_makes_the_model_again(tmp_path, kind, bits):
    """Into the base, and into the model that was adapted alike, which goes on with its parameters."""
    model, x, path = of_kind(kind), data(), tmp_path / "a"
    save_adapter(model, path, bits=bits)
    there = shaken(of_kind(kind), seed=9)
    pointers = [p.data_ptr() for p in trains(there)]
    for other in (Stack(), there):
        load_adapter(other, path)
        assert torch.equal(other(x), model(x)) if bits is None else (other(x) - model(x)).norm() < 0.1 * model(x).norm()
        assert [p.shape for p in trains(other)] == [p.shape for p in trains(model)]
        other(x).sum().backward()
        save_adapter(other, tmp_path / "again", bits=bits)
        assert bits or (tmp_path / "again").read_bytes() == path.read_bytes()
    assert [p.data_ptr() for p in trains(there)] == pointers


def test_what_is_shared_is_written_once(tmp_path):
    save_adapter(SHARES, tmp_path / "a")
    keys, shared = load_file(tmp_path / "a").keys(), header_of(tmp_path / "a")["shared"]
    assert sorted(keys) == [f"{FIRST}.lora_{key}" for key in "ABHLM"]
    assert shared == {f"blocks.{i}.proj.lora_{key}": f"{FIRST}.lora_{key}" for i in (1, 2, 3) for key in "ABHML"}
    save_adapter(of_kind("reslora_is"), tmp_path / "b")
    assert "shared" not in header_of(tmp_path / "b"), "other files are as they were"
    layers = read_layers(tmp_path / "a")
    assert (
        layers[SECOND].lora_A is layers[FIRST].lora_A
        and len({p for m in layers.values() for p in m.coefficients().values()}) == 5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_model_has_its_layers_already(tmp_path, kind):
    path, there, whole = tmp_path / "a", of_kind(kind), of_kind(kind)
    save_adapter(whole, path)
    there.blocks[2].proj = there.blocks[2].proj.base_layer
    parameters = trains(there)
    shaken(there, seed=9)
    load_adapter(there, path)
    assert torch.equal(there(data()), whole(data()))
    now = [*map(id, trains(there))]
    assert {*map(id, parameters)} <= {*now}, "the optimizer's"
    assert len(now) == len(trains(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_which_a_block_is_compiled(tmp_path, kind):
    whole, there = of_kind(kind), Stack()
    save_adapter(whole, tmp_path / "a")
    there.blocks[1] = torch.compile(there.blocks[1], backend="eager")
    load_adapter(there, tmp_path / "a")
    torch.testing.assert_close(there(data()), whole(data()))
    save_adapter(there, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    torch.compiler.reset()


BROKEN = {
    "a list": (lambda h, t: h.update(shared=[1]), "shared must be an object of keys"),
    "a number": (lambda h, t: h["shared"].update({f"{SECOND}.lora_A": 1}), "shared must be an object of keys"),
    "a tensor too": (lambda h, t: t.update({f"{SECOND}.lora_A": torch.ones(3, D)}), f"shared: {SECOND}.lora_A must be no tensor"),
    "of nothing": (lambda h, t: h["shared"].update({f"{SECOND}.lora_A": "no"}), f"shared: {SECOND}.lora_A must be that of a tensor"),
    "of another that is shared": (
        lambda h, t: h["shared"].update({f"{SECOND}.lora_A": "blocks.2.proj.lora_A"}),
        f"shared: {SECOND}.lora_A must be that of a tensor",
    ),
    "of another shape": (
        lambda h, t: h["shared"].update({f"{SECOND}.lora_A": f"{FIRST}.lora_H"}),
        rf"shared: {SECOND}.lora_A must be torch.float32 \[3, 12\], got torch.float32 \[3, 3\]",
    ),
    "of no layer": (lambda h, t: h["shared"].update({"blocks.9.proj.lora_A": f"{FIRST}.lora_A"}), "has blocks.9.proj.lora_A and 0 more"),
    "one less": (lambda h, t: h["shared"].pop(f"{SECOND}.lora_A"), f"lacks {SECOND}.lora_A"),
    "a value of its own": (
        lambda h, t: (h["shared"].pop(f"{SECOND}.lora_A"), t.update({f"{SECOND}.lora_A": torch.ones(3, D)})),
        f"{SECOND}.lora_A must be what all layers of its kind share",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_changes_nothing(tmp_path, name):
    edit, text = BROKEN[name]
    save_adapter(SHARES, tmp_path / "a")
    rewritten(tmp_path / "a", edit)
    for model in (Stack(), shaken(of_kind("lorta"), seed=9)):
        before, shown = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
        with pytest.raises(ValueError, match=f"load_adapter: .*{text}.*; the model is unchanged"):
            load_adapter(model, tmp_path / "a")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and str(model) == shown


def test_layers_that_are_not_tied_write_what_no_chain_has(tmp_path):
    """A layer that has lost those before it would compute something else without a word."""
    model = of_kind("reslora_bs")
    save_adapter(nn.ModuleDict({"proj": model.blocks[2].proj}), tmp_path / "a")
    with pytest.raises(ValueError, match="proj must have 2 layers before it, got 0"):
        read_layers(tmp_path / "a")
    apart = Stack()
    for i, block in enumerate(apart.blocks):
        block.proj = LoRTALinear.from_linear(block.proj, r=3, heads=3, layers=4, layer=i)
    save_adapter(apart, tmp_path / "b")
    with pytest.raises(ValueError, match="must be what all layers of its kind share, got other values"):
        load_adapter(Stack(), tmp_path / "b")


def test_block_shortcuts_and_the_tensor_become_lora(tmp_path):
    for kind, ranks in (("reslora_bs", [3, 6, 9, 9]), ("lorta", [3] * 4)):
        model = of_kind(kind)
        save_adapter(model, tmp_path / "a")
        for source in (model, read_layers(tmp_path / "a")):
            to_lora(source, tmp_path / kind)
            factors = load_file(tmp_path / kind / "adapter_model.safetensors")
            for i, (block, r) in enumerate(zip(model.blocks, ranks, strict=True)):
                a, b = (factors[f"base_model.model.blocks.{i}.proj.lora_{key}.weight"] for key in "AB")
                assert a.shape == (r, D)
                torch.testing.assert_close(b @ a, block.proj.delta_weight(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=re.escape("blocks.0.proj must be ") + ".*mode=is"):
        to_lora(of_kind("reslora_is"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_chain_of_cola_is_in_its_file(tmp_path):
    model, x = shaken(adapted(Stack(), COLALinear, r=2)), data()
    for block in model.blocks[:2]:
        block.proj.restart()
    shaken(model, seed=8)
    save_adapter(model, tmp_path / "a")
    other = Stack()
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x), model(x)) and [b.proj.links for b in other.blocks] == [1, 1, 0, 0]
    assert [p.shape for p in trains(other)] == [p.shape for p in trains(model)]
    with pytest.raises(ValueError, match="differs from the model's: {'links'"):
        load_adapter(adapted(Stack(), COLALinear, r=2), tmp_path / "a")


@pytest.mark.parametrize("bits", [None, 4])
def test_masks_are_kept_as_they_are(tmp_path, bits):
    model = shaken(adapted(Stack(), RoseLoRALinear, r=4))
    masks = {n: p for n, p in model.named_parameters() if p.dtype == torch.bool}
    assert masks
    with torch.no_grad():
        for p in masks.values():
            p.copy_(torch.rand(p.shape) < 0.5)
    save_adapter(model, tmp_path / "a", bits=bits)
    other = Stack()
    load_adapter(other, tmp_path / "a")
    for n, p in masks.items():
        assert other.get_parameter(n).dtype == torch.bool and torch.equal(other.get_parameter(n), p)
    assert ResLoRALinear not in map(type, other.modules())
