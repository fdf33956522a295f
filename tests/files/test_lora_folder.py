# SPDX-License-Identifier: Apache-2.0
"""Folders of FusedLoRALinear: inits that change W, trained biases, names, and what is refused on either side."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import peft
from fresh_loader import Net
from layer_kinds import shake
from safetensors.torch import load_file, save_file

from lrkern import files
from lrkern.files.lora_config import MORE
from lrkern.nn import FusedLoRALinear, NOLALinear, RandLoRALinear, VeRALinear
from lrkern.peft import load_adapter, save_adapter
from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore")
KEYS = ["base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight"]
X = torch.randn(7, 24, generator=torch.Generator().manual_seed(4))
changing = pytest.mark.parametrize("init", ["pissa", "olora"])


def base(dtype=torch.float32):
    return Net(3, dtype).requires_grad_(False)


def fused(places=("l",), **settings):
    """Over the base, with coefficients that act."""
    net = base(settings.pop("dtype", torch.float32))
    for name in places:
        parent, _, child = name.rpartition(".")
        layer = FusedLoRALinear.from_linear(net.get_submodule(name), **{"r": 4, "lora_alpha": 6} | settings)
        setattr(net.get_submodule(parent), child, layer.eval())
    return net


def acting(net, seed=5):
    for m in net.modules():
        if isinstance(m, FusedLoRALinear):
            shake(m, seed)
            if m.train_bias:
                nn.init.normal_(m.base_layer.bias)
    return net


@torch.no_grad()
def by_peft(folder, x=X, dtype=torch.float32):
    return peft.PeftModel.from_pretrained(base(dtype), str(folder))(x.to(dtype))


def config_of(folder, **change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps(config))
    return config


def tensors_of(folder, change=None):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if change:
        change(tensors)
        save_file(tensors, path)
    return tensors


def same(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def unchanged(net, folder, text):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=rf"lrkern.peft.load_adapter: .*: {text}.*; the model is unchanged"):
        load_adapter(net, folder)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def not_saved(net, folder, text):
    with pytest.raises(ValueError, match=f"lrkern.peft.save_adapter: {text}"):
        save_adapter(net, folder)
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------- inits that change W


@changing
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_an_init_that_changes_w_is_saved_over_the_w_there_was(tmp_path, init, settings, steps):
    net = fused(init=init, **settings)
    assert list(net.l.state_dict())[:4] == KEYS and (net.l.base_layer.weight - base().l.weight).abs().max() > 0.1
    acting(net) if steps else net
    save_adapter(net, tmp_path)
    config = config_of(tmp_path)
    assert config["r"] == 8 and config["init_lora_weights"] is True
    want, plain = net(X), fused(r=8, lora_alpha=config["lora_alpha"], **settings)
    assert plain.l.scaling == pytest.approx(net.l.scaling)
    load_adapter(plain, tmp_path)
    again = fused(init=init, **settings)
    load_adapter(again, tmp_path)
    same(by_peft(tmp_path), want)
    same(plain(X), want)
    assert torch.equal(again(X), want) and torch.equal(again.l.lora_B.weight, net.l.lora_B.weight)
    if not settings.get("use_dora"):
        pool, model = AdapterPool(base(), pages=4), base()
        pool.load("a", tmp_path)
        same(MultiLoraModel(model, pool)(X, adapters=["a"] * 7), want)
    if not steps:
        same(want, base()(X))


@changing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_16_bit_w_up_to_its_rounding(tmp_path, init, dtype):
    """W - s B₀ A₀ in 16 bit is only in the layer: what the folder gives differs by that rounding and no more."""
    net = acting(fused(init=init, dtype=dtype))
    save_adapter(net, tmp_path)
    layer, w = net.l, base(dtype).l.weight.float()
    a, b = (tensors_of(tmp_path)[f"base_model.model.l.lora_{x}.weight"] for x in "AB")
    assert a.dtype == torch.float32
    off = w + layer.scaling * b @ a - (layer.base_layer.weight.float() + layer.delta_weight())
    assert 0 < off.abs().max() <= torch.finfo(dtype).eps / 2 * w.abs().max() * 2
    same(by_peft(tmp_path, dtype=dtype).float(), net(X.to(dtype)).float(), 3e-2)


@changing
def test_copies_pickles_and_casts_keep_what_was_taken(tmp_path, init):
    net = acting(fused(init=init))
    want, file = net(X), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)]
    for i, twin in enumerate(twins):
        save_adapter(twin, tmp_path / str(i))
        same(by_peft(tmp_path / str(i)), want)
    net.l.lora_A.to(torch.bfloat16)
    net.l.lora_B.to(torch.bfloat16)
    save_adapter(net, tmp_path / "cast")
    a, b = (tensors_of(tmp_path / "cast")[f"base_model.model.l.lora_{x}.weight"] for x in "AB")
    want = net.l.base_layer.weight + net.l.delta_weight()
    same(base().l.weight + net.l.scaling * b @ a, want)  # A₀ and B₀ are float32 still


def test_a_scaling_that_was_written(tmp_path):
    for i, init in enumerate(("kaiming", "pissa")):
        net = acting(fused(init=init))
        net.l.scaling *= 3
        save_adapter(net, tmp_path / str(i))
        same(by_peft(tmp_path / str(i)), net(X), 1e-4)


@changing
def test_a_state_dict_of_another_w(tmp_path, init):
    """Then what was taken out of W is not known. Whose W it is is in the metadata of a state_dict."""
    net, text = acting(fused(init=init)), f"l was made with init='{init}', which changed W: another W was loaded since"
    state, file = net.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    written = torch.load(file, weights_only=True)
    bare = dict(state)  # as a safetensors file has it
    for loaded in (state, written):
        for other in (fused(), fused(init="olora" if init == "pissa" else "pissa")):
            other.load_state_dict(loaded)
            assert torch.equal(other(X), net(X))
            not_saved(other, tmp_path / "x", text)
    # The same layer over the same W takes its state back; so do coefficients alone.
    for loaded in (state, written, bare, {k: v for k, v in bare.items() if "lora" in k}):
        again = fused(init=init)
        again.load_state_dict(loaded, strict=False)
        assert torch.equal(again(X), net(X))
        save_adapter(again, tmp_path / "again")
        same(by_peft(tmp_path / "again"), net(X))
    lost = fused(init=init)
    lost.load_state_dict({k: v * 1.5 for k, v in bare.items()})
    not_saved(lost, tmp_path / "x", text)
    save_adapter(fused(), tmp_path / "plain")
    unchanged(lost, tmp_path / "plain", "l must have r=8, .*init=")
    # A whole W comes back with the state of a layer whose init leaves it alone.
    whole = acting(fused())
    lost.load_state_dict(whole.state_dict())
    save_adapter(lost, tmp_path / "whole")
    same(by_peft(tmp_path / "whole"), whole(X))


def test_a_rank_too_large_to_double(tmp_path):
    net = nn.ModuleDict({"l": FusedLoRALinear(300, 260, r=257, init="olora")})
    not_saved(net, tmp_path / "x", "l was made with init='olora', .* has rank 514, at most 512")


@changing
def test_what_a_layer_whose_w_is_changed_takes(tmp_path, init):
    save_adapter(acting(fused()), tmp_path / "plain")
    unchanged(
        fused(init=init), tmp_path / "plain", rf"l must have r=8, scaling=1.5 \(twice its own: init='{init}'\), got r=4"
    )
    save_adapter(acting(fused(r=8, lora_alpha=12)), tmp_path / "eight")
    unchanged(
        fused(init=init), tmp_path / "eight", f"l must have in its second half what the init took .* init='{init}'"
    )


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica"])
def test_a_folder_that_peft_did_not_convert(tmp_path, name):
    """By one rule for load_adapter and the pool."""
    save_adapter(acting(fused()), tmp_path)
    config_of(tmp_path, init_lora_weights=name)
    text = f"init_lora_weights must leave the base weights as they are, got '{name}'"
    for init in ("kaiming", "pissa"):
        unchanged(fused(init=init), tmp_path, text)
    with pytest.raises(ValueError, match=text):
        AdapterPool(base(), pages=4).load("a", tmp_path)


def test_a_stock_pissa_folder(tmp_path):
    stock = peft.get_peft_model(
        base(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["l"], init_lora_weights="pissa")
    )
    stock.save_pretrained(str(tmp_path))
    unchanged(fused(["l", "x.l", "x.head.l"]), tmp_path, "init_lora_weights must leave")


# ---------------------------------------------------------------------------------------------------- biases


@pytest.mark.parametrize("others", ["trained", "frozen"])
def test_trained_biases_are_pefts_lora_only(tmp_path, others):
    net = fused(["x.head.l"])
    for name in ("l", "x.l"):
        parent, _, child = name.rpartition(".")
        train = others == "trained" or name == "l"
        layer = FusedLoRALinear.from_linear(net.get_submodule(name), r=4, lora_alpha=6, train_bias=train)
        setattr(net.get_submodule(parent), child, layer.eval())
    acting(net)
    save_adapter(net, tmp_path)
    stock = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert config_of(tmp_path)["bias"] == "lora_only"
    assert tensors_of(tmp_path).keys() == peft.get_peft_model_state_dict(stock).keys(), "keys as PEFT writes them"
    same(stock(X), net(X))
    stock.save_pretrained(str(tmp_path / "theirs"))
    for folder in (tmp_path, tmp_path / "theirs"):
        there = copy.deepcopy(net)
        for p in there.parameters():
            p.data.add_(1.0 if p.requires_grad else 0.0)
        load_adapter(there, folder)
        assert torch.equal(there(X), net(X))
    model = base()
    pool = AdapterPool(model, pages=4)
    pool.load("a", tmp_path)
    with MultiLoraModel(model, pool) as served:
        same(served(X, adapters=["a"] * len(X)), net(X))


def test_biases_that_do_not_fit(tmp_path):
    save_adapter(acting(fused(train_bias=True)), tmp_path / "trained")
    save_adapter(acting(fused()), tmp_path / "frozen")
    unchanged(
        fused(), tmp_path / "trained", "base_model.model.l.base_layer.bias must be the model's, where it does not train"
    )
    unchanged(fused(train_bias=True), tmp_path / "frozen", "lacks base_model.model.l.base_layer.bias")
    not_saved(nn.ModuleDict({"l": FusedLoRALinear(4, 4, r=2), "m": FusedLoRALinear(4, 4, r=0, train_bias=True)}),
              tmp_path / "x", "m must have a rank above 0 or no train_bias")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- names and ranks


@pytest.mark.parametrize("places", [["l"], ["x.l"], ["l", "x.head.l"], ["l", "x.l", "x.head.l"]], ids=str)
def test_a_folder_hits_its_layers_and_no_other(tmp_path, places):
    """PEFT takes a name, and a key of the patterns, for the end of a longer one too."""
    net = fused()
    net.l = base().l
    for i, name in enumerate(places):
        parent, _, child = name.rpartition(".")
        layer = FusedLoRALinear.from_linear(net.get_submodule(name), r=i + 2, lora_alpha=3 * i + 1)
        setattr(net.get_submodule(parent), child, layer.eval())
    acting(net)
    save_adapter(net, tmp_path)
    stock = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    hit = {n: m for n, m in stock.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert sorted(hit) == sorted(places)
    for name, m in hit.items():
        ours = net.get_submodule(name)
        assert m.r["default"] == ours.r and m.scaling["default"] == pytest.approx(ours.scaling)
    same(stock(X), net(X))
    pool = AdapterPool(base(), pages=4)
    pool.load("a", tmp_path)
    same(MultiLoraModel(base(), pool)(X, adapters=["a"] * 7), net(X))


@pytest.mark.parametrize("cls", [VeRALinear, RandLoRALinear])
def test_pefts_own_methods_hit_their_layers_and_no_other(tmp_path, cls):
    net = base()
    net.l = shake(cls.from_linear(net.l, r=4)).eval()
    files.save(net, tmp_path, kind="peft")
    stock = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    hit = [
        n for n, m in stock.base_model.model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    assert hit == ["l"]
    same(stock(X), net(X), 1e-4)


def test_layers_of_rank_0_are_left_out(tmp_path):
    """PEFT has no rank 0."""
    net = fused(["l", "x.l"])
    net.x["l"] = FusedLoRALinear.from_linear(base().x["l"], r=0).eval()
    acting(net)
    save_adapter(net, tmp_path)
    same(by_peft(tmp_path), net(X))
    load_adapter(net, tmp_path)
    not_saved(
        nn.ModuleDict({"l": FusedLoRALinear(4, 4, r=0)}), tmp_path / "x", "a layer must have a rank above 0, got 1 of"
    )


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("one", "other", "text"), [
    ({"dropout": 0.1}, {"dropout": 0.2}, "one PEFT folder has one lora_dropout for all layers, got 0.1 and 0.2"),
    ({"use_rslora": True}, {}, "one PEFT folder has one use_rslora for all layers, got both"),
    ({}, {"use_dora": True}, "one PEFT folder has one use_dora for all layers, got both"),
], ids=str)  # fmt: skip
def test_what_one_folder_cannot_hold(tmp_path, one, other, text):
    net = nn.ModuleDict({"a": FusedLoRALinear(4, 4, r=2, **one), "b": FusedLoRALinear(4, 4, r=2, **other)})
    not_saved(net, tmp_path / "x", text)


def test_what_is_not_finite_or_has_no_name(tmp_path):
    net = fused(init="pissa")
    net.l.lora_B.weight.data[0, 0] = torch.inf
    not_saved(net, tmp_path / "x", "base_model.model.l.lora_B.weight must be finite")
    with pytest.raises(ValueError, match="model must hold its layers by name, got a layer"):
        save_adapter(FusedLoRALinear(4, 4, r=2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("key", MORE)
def test_what_is_more_than_lora(tmp_path, key):
    """aLoRA, for one, has the same tensors and means something else."""
    save_adapter(acting(fused()), tmp_path)
    config_of(tmp_path, **{key: True if key.startswith(("use_", "lora_bias")) else ["x"]})
    unchanged(fused(), tmp_path, f"{key} must be off, got|must be LoRA or DoRA, .*{key}=")


def test_dora_without_its_magnitude_is_no_lora(tmp_path):
    save_adapter(acting(fused()), tmp_path)
    config_of(tmp_path, use_dora=True)
    unchanged(fused(), tmp_path, "l must have use_dora=False, got True")


def test_numbers_that_the_layers_dtype_does_not_hold(tmp_path):
    net = fused(dtype=torch.float16)
    net.l.lora_B.weight.data[0, 0] = 1e6
    save_adapter(net, tmp_path)
    unchanged(
        fused(dtype=torch.float16, adapter_dtype=torch.float16),
        tmp_path,
        "base_model.model.l.lora_B.weight in torch.float16",
    )
    vera = nn.ModuleDict({"l": VeRALinear(4, 4, r=2)})
    vera["l"].vera_lambda_b.data[0] = 1e6
    files.save(vera, tmp_path / "own")
    there = nn.ModuleDict({"l": VeRALinear(4, 4, r=2, dtype=torch.float16, adapter_dtype=torch.float16)})
    seed = there["l"].seed
    with pytest.raises(ValueError, match="l.vera_lambda_b must be finite in the model's torch.float16, got inf"):
        files.load(there, tmp_path / "own")
    assert there["l"].seed == seed


class MyVeRA(VeRALinear):
    pass


def test_an_own_file_refuses_what_it_cannot_make_again(tmp_path):
    for layer, change, text in (
        (NOLALinear(4, 4, r=2, k=3, l=3), {"scaling": 7.0}, "l.scaling must be 2.0, which its settings give, got 7.0"),
        (
            NOLALinear(4, 4, r=2, k=3, l=3),
            {"lora_alpha": 8.0},
            "l.scaling must be 4.0, which its settings give, got 2.0",
        ),
        (RandLoRALinear(4, 4, r=2), {"n": 3}, "l.n must be 2"),
        (VeRALinear(4, 4, r=2), {"dropout": 3.0}, r"VeRALinear: dropout must lie in \[0, 1\]"),
        (
            MyVeRA(4, 4, r=2),
            {},
            "l must be a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear, VeRALinear or RandLoRALinear, got MyVeRA, a subclass",
        ),
    ):
        for key, value in change.items():
            setattr(layer, key, value)
        with pytest.raises(ValueError, match=text):
            files.save(nn.ModuleDict({"l": layer}), tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_the_door_does_not_drop_half_of_a_model(tmp_path):
    net = nn.ModuleDict({"a": FusedLoRALinear(4, 4, r=2), "b": VeRALinear(4, 4, r=2)})
    for kind in (None, "own", "peft", "lora"):
        with pytest.raises(ValueError, match="model must have FusedLoRALinear layers or others, got both"):
            files.save(net, tmp_path / "x", kind)
    assert not (tmp_path / "x").exists()


def test_a_layer_at_two_places(tmp_path):
    """A file has it under one name, and is loaded at one place. What holds it may have two names."""
    for cls, kinds in ((FusedLoRALinear, (None, "peft")), (VeRALinear, (None, "peft", "lora"))):
        layer = cls(4, 4, r=2)
        twice = nn.ModuleDict({"a": layer, "m": nn.ModuleDict({"b": layer})})
        for kind in kinds:
            with pytest.raises(ValueError, match="a must stand at one place of the model, got m.b too"):
                files.save(twice, tmp_path / "x", kind)
            assert not (tmp_path / "x").exists()
        inner = nn.ModuleDict({"l": cls(4, 4, r=2)})
        files.save(nn.ModuleDict({"one": inner, "two": inner}), tmp_path / cls.__name__)
