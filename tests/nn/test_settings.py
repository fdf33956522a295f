# SPDX-License-Identifier: Apache-2.0
"""Settings are checked when a layer is made, by type and value, with the class and the setting named, and nothing is changed."""

import inspect
import math
import re

import pytest
import torch
from layer_kinds import EACH, KINDS, drop
from torch import nn

from lrkern.nn import FusedLoRALinear, MissLinear, MoRALinear, NOLALinear, RandLoRALinear, S2FTLinear, VeRALinear

NUMBERS = [math.nan, math.inf, -math.inf, "1", None, True, 10**400, 1e39, [1.0], torch.tensor(1.0)]
CHANCES = [*NUMBERS[:6], -0.1, 1.1]
WHOLE = [8.0, True, "8", None, -1, math.nan, torch.tensor(8)]
FLAGS = ["false", 0, 1, None, 1.0]
WORDS = ["", "Kaiming", None, True, ["kaiming"], 3]
DTYPES = [torch.float64, torch.int8, torch.complex64, "float32", torch.float8_e4m3fn, 32, float]
SEEDED = {"seed": [-1, 2**63, 1.0, True, "1"], "dropout": CHANCES, "distribution": WORDS, "adapter_dtype": DTYPES}

WRONG = {
    FusedLoRALinear: {
        "r": [*WHOLE, 513], "lora_alpha": NUMBERS, "dropout": CHANCES, "use_rslora": FLAGS, "use_dora": FLAGS,
        "train_bias": FLAGS, "init": WORDS, "adapter_dtype": [*DTYPES, torch.bfloat16],
    },
    MissLinear: {
        "r": [*WHOLE, 0, 9], "kind": WORDS, "mini_r": [*WHOLE, 0, 3], "dropout": CHANCES, "adapter_dtype": DTYPES,
    },
    MoRALinear: {
        "r": [*WHOLE, 0], "mora_type": [0, 5, 7, 6.0, True, "6"], "dropout": CHANCES, "paper_rank": FLAGS, "adapter_dtype": DTYPES,
    },
    NOLALinear: SEEDED | {
        "r": [*WHOLE, 0, 513], "k": [*WHOLE, 0, 4097], "l": [*WHOLE, 0, 4097], "lora_alpha": NUMBERS, "normalize": FLAGS,
        "frozen_a": FLAGS,
    },
    VeRALinear: SEEDED | {
        "r": [*WHOLE, 0], "d_initial": NUMBERS, "max_in": [7, 8.0, True], "max_out": [7, 8.0, True], "save_output": FLAGS,
    },
    RandLoRALinear: SEEDED | {
        "r": [*WHOLE, 0], "randlora_alpha": NUMBERS, "paper_pairing": FLAGS, "save_output": FLAGS,
    },
}  # fmt: skip


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, wrong in WRONG.items() for name in wrong])
def test_a_wrong_setting_is_named_and_changes_nothing(cls, name):
    base = nn.Linear(8, 8)
    w = base.weight.clone()
    for value in WRONG[cls][name]:
        for make in (lambda **s: cls(8, 8, **s), lambda **s: cls.from_linear(base, **s)):
            with pytest.raises(ValueError, match=rf"^{cls.__name__}: {name} must .*, got "):
                make(**{name: value})
    assert base.weight.requires_grad and base.bias.requires_grad and torch.equal(base.weight, w)


def test_every_setting_is_tried():
    for cls, wrong in WRONG.items():
        assert {*cls.SETTINGS, "adapter_dtype"} <= wrong.keys() and cls.KINDS[cls.__name__] is cls


@pytest.mark.parametrize("cls", [*WRONG, S2FTLinear])
def test_signatures_name_every_setting(cls):
    """Both ways to a layer, by keyword, with a type and a default, so that editors and type checkers know them."""
    own = {*cls.SETTINGS, "adapter_dtype"} | ({"init"} if cls is FusedLoRALinear else set())
    ways = [inspect.signature(way).parameters for way in (cls, cls.from_linear)]
    for given in ways:
        assert all(p.kind is not p.VAR_KEYWORD and p.annotation is not p.empty for p in given.values())
    mine = [{name: (p.annotation, p.default) for name, p in given.items() if name in own} for given in ways]
    assert mine[0] == mine[1] and mine[0].keys() == own
    assert {*ways[0]} - own == {"in_features", "out_features", "bias", "device", "dtype"} and {*ways[1]} - own == {
        "linear"
    }
    layer = cls(8, 8)
    for name, (_, default) in mine[0].items():
        if name in cls.SETTINGS and default is not None:
            assert getattr(layer, name) == default
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument 'rank'"):
        cls(8, 8, rank=3)
    assert (cls is S2FTLinear or "dropout" in own) and not [
        name for name in own if "dropout" in name and name != "dropout"
    ], "one word for it"


@EACH
def test_repr_shows_shapes_and_seed(cls, settings):
    layer = cls(12, 8, dtype=torch.bfloat16, **settings)
    shown = re.sub(r"\s+", " ", repr(layer))
    assert "in_features=12, out_features=8" in shown
    for name, p in layer.coefficients().items():
        kind = "float32" if p.is_floating_point() else "bool"
        assert f"{list(p.shape)} {kind}" in shown.partition(name.split(".")[0])[2], name
    assert not hasattr(layer, "seed") or f"seed={layer.seed}," in shown


def test_a_pickle_with_the_old_word_for_dropout():
    layer = FusedLoRALinear(8, 4, r=2, dropout=0.5)
    state = layer.__dict__ | {"lora_dropout": layer.dropout}
    del state["dropout"]
    old = FusedLoRALinear.__new__(FusedLoRALinear)
    old.__setstate__(state)
    assert old.dropout == old.lora_dropout == 0.5 and "lora_dropout" not in old.__dict__


@pytest.mark.parametrize("cls", [NOLALinear, VeRALinear, RandLoRALinear])
def test_a_seed_drawn_from_torch(cls):
    """By who asks for it; nobody else's layer moves torch's generator, and a refused one draws nothing."""
    draw = lambda: cls.from_linear(nn.Linear(8, 8, device="meta"), r=2, seed=torch.default_generator).seed
    seeds = [(torch.manual_seed(seed), draw(), draw())[1:] for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4 and max(map(max, seeds)) > 2**53
    own = torch.Generator().manual_seed(1)
    assert cls(8, 8, r=2, seed=own).seed == seeds[0][0]
    before = torch.get_rng_state()
    base = nn.Linear(8, 8, device="meta")
    assert cls.from_linear(base, r=2).seed != cls.from_linear(base, r=2).seed
    for wrong in ({"distribution": "x"}, {"dropout": 2.0}, {"adapter_dtype": torch.float64}):
        with pytest.raises(ValueError):
            cls.from_linear(base, r=2, seed=torch.default_generator, **wrong)
    assert torch.equal(torch.get_rng_state(), before)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_base_of_another_dtype(cls, settings, dtype):
    base = nn.Linear(8, 8).to(dtype)
    with pytest.raises(ValueError, match=f"^{cls.__name__}: dtype of the base layer must be float32, .*, got {dtype}"):
        cls.from_linear(base, **settings)
    assert base.weight.requires_grad
    with pytest.raises(ValueError, match=f"^{cls.__name__}: dtype of the base layer must be"):
        cls(8, 8, dtype=torch.float64, **settings)


@EACH
def test_what_is_taken(cls, settings):
    for value in (0, 1, 0.5):
        for name, p in drop(cls, settings, value).items():
            assert getattr(cls(8, 8, **settings | {name: p}), name) == value
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        base = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
        layer = cls(8, 8, dtype=base, adapter_dtype=dtype, **settings)
        assert next(iter(layer.coefficients().values())).dtype == dtype


@pytest.mark.parametrize(("change", "text"), [
    ({"lora_alpha": 0}, "init='pissa' needs lora_alpha > 0, got 0"), ({"lora_alpha": -1.0}, "init='pissa' needs lora_alpha > 0"),
    ({"r": 7}, r"init='pissa' needs r <= min\(in, out\) = 6, got r=7"), ({"r": 7, "init": "olora"}, "init='olora' needs r <="),
    ({"r": 0, "use_dora": True}, "use_dora needs r >= 1"),
], ids=str)  # fmt: skip
def test_settings_that_do_not_go_together(change, text):
    base = nn.Linear(8, 6)
    w = base.weight.clone()
    with pytest.raises(ValueError, match=f"FusedLoRALinear: {text}"):
        FusedLoRALinear.from_linear(base, **{"r": 4, "init": "pissa"} | change)
    assert base.weight.requires_grad and torch.equal(base.weight, w)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_needs_a_w_of_numbers(init):
    base = nn.Linear(8, 6)
    with torch.no_grad():
        base.weight[2, 3] = math.nan
    for device, got in (("cpu", "inf or nan"), ("meta", r"none \(meta\)")):
        with pytest.raises(ValueError, match=f"init='{init}' needs a W of finite numbers, got {got}"):
            FusedLoRALinear.from_linear(base.to(device), r=2, init=init)
    assert base.weight.requires_grad


def test_a_base_layer_is_as_it_was_whatever_goes_wrong(monkeypatch):
    base = nn.Linear(8, 6)
    base.weight.requires_grad_(False)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FusedLoRALinear.from_linear(base, r=2, init="pissa")
    assert base.bias.requires_grad and not base.weight.requires_grad


def test_settings_make_the_layer_again():
    for cls, settings in KINDS.values():
        layer = cls(24, 20, **settings, **({"train_bias": True} if cls is FusedLoRALinear else {}))
        twin = cls.from_linear(nn.Linear(24, 20), **layer.settings)
        assert twin.settings == layer.settings and repr(twin) == repr(layer)
        trains = lambda m: [(n, p.shape) for n, p in m.named_parameters() if p.requires_grad]
        assert trains(twin) == trains(layer)
