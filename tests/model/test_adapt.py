# SPDX-License-Identifier: Apache-2.0
"""lrkern.adapt: where the layers go, beside PEFT; what it says; what it refuses, and that nothing has changed then."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from door_models import LINEARS, Net, X, given, same, state
from torch import nn

import lrkern
from lrkern.nn import FusedLoRALinear, QuartetLinear, VeRALinear
from lrkern.nn.linear import AdapterLinear

pytest.importorskip("peft")
import peft
from tiny_models import tiny

# ---------------------------------------------------------------------------------------------------- where

# Not of Mixtral, whose experts PEFT adapts beside the linears.
MODELS = ["bert", "gpt2", "llama", "llava", "opt", "qwen2_moe", "t5"]
RULES = {
    "all": {"target_modules": "all-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "query", "wi"]},
    "names": {"target_modules": ["q_proj", "c_attn", "query", "q", "gate", "lm_head"]},
    "regex": {"target_modules": r".*\.(?:layers?|h|block)\.1\..*(?:_proj|query|c_attn|\.q)", "exclude_modules": r".*k_proj"},
    "layers": {"target_modules": ["v_proj", "value", "c_proj"], "layers_to_transform": [1]},
    "pattern": {
        "target_modules": ["v_proj", "value", "c_proj"], "layers_to_transform": 0, "layers_pattern": ["layers", "layer", "h"]
    },
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "query", "value", "c_attn"],
        "rank_pattern": {"v_proj": 3, r".*\.1\.self_attn\.q_proj": 5, "^h.0.attn.c_attn": 2},
        "alpha_pattern": {"q_proj": 7, "value": 9},
    },
}  # fmt: skip


def of_peft(kind, rules):
    """Name, r and lora_alpha of the linears that stock PEFT adapts."""
    model = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=4, lora_alpha=8, **rules))
    found = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n.removeprefix("base_model.model."): (m.r["default"], m.lora_alpha["default"]) for n, m in found.items()}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_linears_as_peft(kind, rules):
    model, rules = tiny(kind), copy.deepcopy(rules)
    try:
        want = of_peft(kind, rules)
    except ValueError:
        with pytest.raises(ValueError, match="^lrkern.adapt: .*; the model is unchanged$"):
            lrkern.adapt(model, "lora", r=4, lora_alpha=8, **rules)
        return
    names = [n for n, m in model.named_modules()]
    for key in ("rank_pattern", "alpha_pattern"):  # of other models' layers, which are refused here
        if key in rules:
            hits = lambda p: any(peft.utils.other.get_pattern_key([p], n) == p for n in want)
            rules[key] = {p: v for p, v in rules[key].items() if hits(p)}
    report = lrkern.adapt(model, "lora", r=4, lora_alpha=8, **rules)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}
    assert {n: (m.r, m.lora_alpha) for n, m in layers.items()} == want
    assert set(report.layers) == set(want) and [n for n in names if n in want] == list(report.layers)


def test_conv1d():
    model, ids = tiny("gpt2"), torch.randint(3, 90, (2, 5))
    with torch.no_grad():
        y = model(ids).logits
        lrkern.adapt(model, "vera", r=8)
        layer = model.transformer.h[0].attn.c_attn
        assert isinstance(layer, VeRALinear) and (layer.in_features, layer.out_features) == (32, 96)
        torch.testing.assert_close(model(ids).logits, y)


def test_a_model_that_asks_a_linear_for_its_dtype():
    model, ids = tiny("t5"), torch.randint(3, 90, (2, 5))
    with torch.no_grad():
        y = model(input_ids=ids, decoder_input_ids=ids).logits
        assert len(lrkern.adapt(model, "lora", r=2).layers) == 16
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, y)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(input_ids=ids, decoder_input_ids=ids).logits, y)
    torch.compiler.reset()


def test_quantised_linears():
    packed = QuartetLinear(32, 32).eval()
    made = lrkern.nn.MXFP4Linear.from_linear(nn.Linear(32, 64))
    model = nn.Sequential(made, nn.Linear(64, 32))
    report = lrkern.adapt(model, "lora", r=2)
    assert list(report.layers) == ["0", "1"] and model[0].base_layer is made and packed is not made
    model = nn.Sequential(made, nn.Linear(64, 32))
    with pytest.raises(ValueError, match="0 must be a linear with a plain weight, for NOLALinear, got MXFP4Linear"):
        lrkern.adapt(model, "nola", r=2)
    assert type(model[1]) is nn.Linear and model[1].weight.requires_grad


def test_a_vera_shares_its_pair_and_is_pefts(tmp_path):
    net = Net()
    lrkern.adapt(net, "vera", r=8, modules_to_save=["head"])
    layers = [net.get_submodule(name) for name in LINEARS]
    assert len({m.seed for m in layers}) == 1 and {(m.max_in, m.max_out) for m in layers} == {(24, 24)}
    lrkern.convert.to_peft(net, tmp_path)
    again = peft.PeftModel.from_pretrained(Net().eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(X), net.eval()(X))
    other = Net()
    lrkern.adapt(other, "randlora", r=6, seed=torch.Generator().manual_seed(3))
    assert len({other.get_submodule(name).seed for name in LINEARS}) == 1


def test_modes_and_devices_stay():
    net = Net().train()
    net.x.eval()
    lrkern.adapt(net, "lora", r=2)
    assert net.l.training and not net.x["l"].training


# ---------------------------------------------------------------------------------------------------- modules_to_save


def test_modules_to_save_train_and_keep_what_they_had():
    net, base = Net().to(torch.bfloat16), Net().to(torch.bfloat16)
    had = dict(net.head.named_parameters())
    report = lrkern.adapt(net, "lora", r=2, modules_to_save=["head"])
    now = dict(net.head.named_parameters())
    assert all(p.requires_grad and p is not had[n] and torch.equal(p, had[n]) for n, p in now.items())
    assert all(p.dtype == torch.bfloat16 for p in now.values()) and not any(p.requires_grad for p in had.values())
    assert report.modules_to_save == {"head": sum(p.numel() for p in now.values())} and list(report.layers) == LINEARS
    assert net.state_dict().keys() - base.state_dict().keys() == {
        f"{n}.{k}" for n in LINEARS for k in ("lora_A.weight", "lora_B.weight", "base_layer.weight", "base_layer.bias")
    } - {"x.m.l.base_layer.bias"}
    x = X.to(torch.bfloat16)
    loss = net.train()(x).float().square().sum()  # BatchNorm's buffers move
    loss.backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1).step()
    moved, base = net.eval()(x), base.eval()
    assert not torch.equal(moved, base(x))
    net.float(), base.float()  # what was kept goes along
    with lrkern.disable(net), torch.no_grad():
        assert torch.equal(net(X), base(X))
    again = copy.deepcopy(net)
    with lrkern.disable(again), torch.no_grad():
        assert torch.equal(again(X), base(X))


@torch.no_grad()
def test_a_module_that_keeps_its_weights_twice():
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)).eval()
    x, base = torch.randn(5, 4), copy.deepcopy(net)
    lrkern.adapt(net, "lora", r=2, modules_to_save=["1"])
    net[1].weight_ih_l0.mul_(2)
    assert not torch.equal(net(x)[0], base(x)[0])
    with lrkern.disable(net):
        assert torch.equal(net(x)[0], base(x)[0])
    assert not torch.equal(net(x)[0], base(x)[0])


def test_a_tied_head_that_is_saved_leaves_the_embeddings():
    model = tiny("bart")
    assert model.lm_head.weight is model.model.shared.weight
    lrkern.adapt(model, "lora", r=2, modules_to_save=["lm_head"])
    assert model.lm_head.weight is not model.model.shared.weight and model.lm_head.weight.requires_grad
    assert not model.model.shared.weight.requires_grad and torch.equal(model.lm_head.weight, model.model.shared.weight)


def test_a_model_in_a_pickle_keeps_what_it_had():
    net = Net().eval()
    lrkern.adapt(net, "lora", r=2, modules_to_save=["head"])
    net.head[1].weight.data.add_(1)
    again = pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        assert torch.equal(again(X), net(X))
        with lrkern.disable(again):
            assert torch.equal(again(X), Net().eval()(X))


def test_it_needs_no_peft():
    code = "import sys, torch, lrkern; lrkern.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), 'lora', r=2)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'peft' not in sys.modules"], check=True, timeout=120)


# ---------------------------------------------------------------------------------------------------- what it says


def test_the_report():
    net = Net()
    report = lrkern.adapt(net, "lora", r=2, modules_to_save=["head"])
    trains = 2 * (24 + 16) * 3 + 16 * 2 + 16 * 5 + 5
    total = trains + sum(p.numel() for p in Net().parameters()) - 117
    assert (report.trainable, report.total) == (trains, total) and report.percent == 100 * trains / total
    assert str(report) == (
        f"lrkern: lora, {trains} of {total:,} parameters train ({report.percent:.3g}%)\n"
        "  3 layers: l, x.l, x.m.l\n  1 modules to save: head"
    )
    assert report._repr_html_().count("<tr>") == 3 and "<td>x.l" not in report._repr_html_()
    model = tiny("llama")
    assert "14 layers: model.layers.0.self_attn.q_proj, " in str(lrkern.adapt(model, "lora"))


def test_the_table_of_methods():
    table = lrkern.methods()
    assert {"lora", "dora", "nola", "vera", "randlora", "mora", "miss", "bone", "s2ft", "adalora"} <= set(table)
    assert list(table) == sorted(table) and table["dora"].fixed == {"use_dora": True}
    assert table["bone"].settings == {"r": 8, "adapter_dtype": None} and "arXiv 2402.09353" in table["dora"].paper
    text, html = str(table), table._repr_html_()
    for name, about in table.items():
        assert f"{name}\n  {about.paper}\n" in text and html.count(f"<td>{name}</td>") == 1
        assert about.settings.keys() >= set(about.layer.SETTINGS) - about.fixed.keys(), name


# ---------------------------------------------------------------------------------------------------- refusals


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.again = self.x["l"]


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def compiled_in_place():
    net = Net()
    net.x.compile(backend="eager")
    return net


def with_a_part(part):
    net = Net()
    net.part = part
    return net


NANS = nn.Linear(3, 2)
nn.init.constant_(NANS.weight, float("nan"))
REFUSED = {
    "unknown method": (Net, "lorra", {}, r"method must be one of adalora, .*vera, got 'lorra'"),
    "no method": (Net, None, {}, r"method must be one of adalora, .*, got None"),
    "twice": (lambda: with_a_part(FusedLoRALinear(3, 4)), "lora", {}, "adapted already, got one with a FusedLoRALinear at part"),
    "the layer": (lambda: FusedLoRALinear(3, 4), "lora", {}, "adapted already, got one with a FusedLoRALinear at its top"),
    "PEFT's": (
        lambda: peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["l"])), "lora", {}, "must not be PEFT's .* it is a Peft"
    ),
    "PEFT's inside": (
        lambda: Wrapped(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["l"]), Net())), "lora", {},
        "must not be PEFT's .* inner.l is a Linear",
    ),
    "compiled": (lambda: Wrapped(torch.compile(Net(), backend="eager")), "lora", {}, "compiled yet, got one: inner is compiled"),
    "compiled in place": (compiled_in_place, "lora", {}, "compiled yet, got one: x is compiled"),
    "wrapped": (lambda: nn.DataParallel(Net()), "lora", {}, "wrapped yet, got one: it is a DataParallel"),
    "nothing": (Net, "lora", {"target_modules": ["q_proj"]}, r"mean a linear .*, got \['q_proj'\], which means none of 4"),
    "nothing left": (Net, "lora", {"exclude_modules": "l|x.*|head.*"}, "mean a linear of the model that is not excluded"),
    "nothing unsaved": (Net, "lora", {"modules_to_save": ["l", "head", "x"]}, "not excluded or saved whole"),
    "no linears": (lambda: nn.Sequential(nn.Tanh()), "lora", {}, "which means none of 0"),
    "a linear": (lambda: nn.Linear(3, 2), "lora", {}, "which means none of 0"),
    "none": (Net, "lora", {"target_modules": None}, "target_modules must be names, a regex or 'all-linear', got None"),
    "no names": (Net, "lora", {"target_modules": [3]}, "target_modules must be a string or a list of strings"),
    "no regex": (Net, "lora", {"target_modules": "(l"}, "target_modules is no regex"),
    "not a linear": (Net, "lora", {"target_modules": ["l", "head"]}, "must mean linears, got .* which means Sequential at head"),
    "layers of a regex": (Net, "lora", {"target_modules": "l", "layers_to_transform": 1}, "layers_to_transform must be absent"),
    "layers of all": (Net, "lora", {"layers_to_transform": 1}, "layers_to_transform must be absent where"),
    "idle rank": (Net, "lora", {"rank_pattern": {"q_proj": 3}}, "rank_pattern must be of layers that are adapted, got 'q_proj'"),
    "odd rank": (Net, "lora", {"rank_pattern": {"l": 2.5}}, "rank_pattern must be an object of whole numbers by regex"),
    "large rank": (Net, "lora", {"rank_pattern": {"x.m.l": 513}}, r"x\.m\.l: FusedLoRALinear: r must be .*, got 513"),
    "no rank": (Net, "s2ft", {"rank_pattern": {"l": 2}}, "rank_pattern must be left out for 's2ft', which has no such setting"),
    "no alpha": (Net, "miss", {"alpha_pattern": {"l": 2}}, "alpha_pattern must be left out for 'miss'"),
    "at two places": (Tied, "lora", {}, "x.l must stand at one place of the model, got again too"),
    "no module to save": (Net, "lora", {"modules_to_save": ["score"]}, "modules_to_save must be ends of names .*, got 'score'"),
    "empty name": (Net, "lora", {"modules_to_save": [""]}, "modules_to_save must be ends of names .*, got ''"),
    "module of nothing": (lambda: with_a_part(nn.Tanh()), "lora", {"modules_to_save": ["part"]}, "part of modules_to_save must have parameters, got Tanh"),
    "module of codes": (
        lambda: with_a_part(lrkern.nn.MXFP4Linear.from_linear(nn.Linear(32, 32))), "lora", {"modules_to_save": ["part"]},
        "part of modules_to_save must keep its weights as floats",
    ),
    "a bad setting": (Net, "lora", {"r": -1}, "l: FusedLoRALinear: r must be a whole number in 0..512, got -1"),
    "a seed": (Net, "vera", {"seed": "one"}, "l: VeRALinear: seed must be a whole number"),
    "the fifth": (Net, "bone", {"r": 4}, r"head.1: MissLinear: r must divide in = 16 and out = 5"),
    "float64": (lambda: with_a_part(nn.Linear(3, 2, dtype=torch.float64)), "lora", {}, "part: .*dtype of the base layer"),
    "nothing trains": (Net, "s2ft", {}, r"index of l must name the features that train \(lrkern.s2ft.prepare"),
    "a W of nan": (lambda: with_a_part(NANS), "lora", {"init": "pissa", "r": 2}, "init='pissa' needs a W of finite numbers"),
    "a large r": (lambda: with_a_part(nn.Linear(3, 2)), "lora", {"init": "olora", "r": 3}, r"init='olora' needs r <= min\(in, out\) = 2"),
    "tied": (lambda: tiny("bart"), "s2ft", {"index": "0-3", "target_modules": ["lm_head"]}, "W must be of one module, .* tied"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_model_as_it_was(case):
    make, method, settings, why = REFUSED[case]
    model = make()
    model.train()
    first = next(model.parameters(), torch.empty(0))
    first.requires_grad_(False)
    kinds, values = [type(m) for m in model.modules()], state(model)
    trains, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=f"^lrkern.adapt: .*{why}"):
        lrkern.adapt(model, method, **settings)
    assert kinds == [type(m) for m in model.modules()] and modes == [m.training for m in model.modules()]
    assert trains == [p.requires_grad for p in model.parameters()]
    now = state(model)
    assert now.keys() == values.keys() and all(torch.equal(now[k].nan_to_num(7), values[k].nan_to_num(7)) for k in now)


def test_unknown_settings_and_models():
    with pytest.raises(
        TypeError, match="^lrkern.adapt: settings of 'lora' must be of adapter_dtype, .*, use_rslora, got 'rank'$"
    ):
        lrkern.adapt(Net(), "lora", rank=3)
    with pytest.raises(TypeError, match="settings of 'dora' must be .*, got 'use_dora'"):
        lrkern.adapt(Net(), "dora", use_dora=False)
    with pytest.raises(TypeError, match="^lrkern.adapt: model must be an nn.Module, got None$"):
        lrkern.adapt(None, "lora")


def test_a_layer_that_does_not_connect_leaves_the_model(monkeypatch):
    net, before = Net(), Net()
    kinds, head = [type(m) for m in net.modules()], net.head[1].weight

    def connect(cls, layers):
        assert list(layers) == LINEARS and all(net.get_submodule(n) is m for n, m in layers.items())
        raise ValueError("the layers do not follow one another")

    monkeypatch.setattr(lrkern.nn.NOLALinear, "connect", classmethod(connect))
    with pytest.raises(
        ValueError, match="^lrkern.adapt: the layers do not follow one another; the model is unchanged$"
    ):
        lrkern.adapt(net, "nola", modules_to_save="head", **given("nola"))
    assert kinds == [type(m) for m in net.modules()] and net.head[1].weight is head
    assert same(state(net), state(before)) and all(p.requires_grad for p in net.parameters())
    lrkern.adapt(net, "lora", modules_to_save="head")
