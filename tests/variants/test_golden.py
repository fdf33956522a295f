# SPDX-License-Identifier: Apache-2.0
"""Variants beside what the papers' own code computes: recorded once, see tests/recorded/variants/README.md."""

import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lrkern.nn import variants
from lrkern.nn.variants.adalora import orthogonality

RECORDED = Path(__file__).parents[1] / "recorded" / "variants"
CLOSE = 1e-5  # of the largest element: float32 beside float64


def read(name: str):
    """Tensors by key, and the settings of the recording."""
    return load_file(RECORDED / f"{name}.safetensors"), about(name, "settings")


def about(name: str, key: str):
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as f:
        return json.loads(f.metadata()[key])


def close(got, want, what: str, allowed: float = CLOSE):
    assert got.shape == want.shape, what
    error, largest = (got.detach().double() - want.double()).abs().max(), want.abs().max()
    assert largest > 0 and error <= allowed * largest, f"{what}: {error / largest:.1e}"


def linear(weight, bias) -> nn.Linear:
    base = nn.Linear(*reversed(weight.shape))
    base.load_state_dict({"weight": weight, "bias": bias})
    return base


@dataclass
class Golden:
    """cls and settings of ours; names: its coefficients by their key, as the recording's. A function takes what looks up a tensor of the
    recording, parameter or gradient, and gives ours of it. given: coefficients that are under another key there. starts: ours before it
    is trained are the recording's."""

    cls: str
    names: dict[str, str | Callable]
    settings: Callable[[dict], dict] = lambda s: {"r": s["r"], "lora_alpha": s["lora_alpha"]}
    given: dict[str, str] = field(default_factory=dict)
    starts: bool = False


def same(*names: str) -> dict[str, str]:
    return {n: n for n in names}


def joined(name: str, dim: int, count: int = 3) -> Callable:
    """Of the ranks that a layer has at first and those of the reserve, which are separate there."""
    return lambda get: torch.cat([get(f"{name}.{k}") for k in range(count)], dim)


def stacked(name: str) -> Callable:
    """Of two blocks."""
    return lambda get: torch.stack([get(f"{name}.{k}.weight") for k in range(2)])


def hydra(kind: str) -> dict[str, str]:
    tail = "_bias" if kind == "bias" else ""
    return {
        f"{ours}_{ab}{tail}": f"hydra_mlp_{its}.{way}_proj.{kind}"
        for ours, its in (("parallel", "par"), ("sequential", "seq"))
        for ab, way in (("A", "down"), ("B", "up"))
    }


AB, XS = same("lora_A", "lora_B"), {"lora_R": "R", **same("lora_A", "lora_B")}
ANB = same("lora_A", "lora_N", "lora_B")
LORTA = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_H": "lora_C_h", "lora_M": "lora_C_m", "lora_L": "lora_C_l"}
ONE = {
    "lora_xs": Golden("LoRAXSLinear", XS),
    "lora_sb": Golden("LoRASBLinear", XS, lambda s: {"r": s["r"]}),
    "slora": Golden("SLoRALinear", ANB),
    "nlora": Golden("NLoRALinear", ANB, lambda s: s | {"init": "slice"}, starts=True),
    "inttune": Golden("IntTuneLinear", ANB, lambda s: s | {"init": "slice"}, starts=True),
    "lora2": Golden("LoRA2Linear", same(*(f"lora_{n}" for n in ("A", "E", "B", "aa", "bb"))), lambda s: s),
    "increlora": Golden(
        "IncreLoRALinear",
        {"lora_A": joined("lora_A", 0), "lora_E": "lora_E.0", "lora_B": joined("lora_B", 1)},
        lambda s: s,
    ),
    "sora": Golden("SoRALinear", {"lora_gate": lambda get: get("gate")[0], **AB}),
    "beamlora": Golden(
        "BeamLoRALinear",
        {"lora_gate": lambda get: get("lora_gate")[0], "lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        lambda s: {"r": s["r"], "lora_alpha": s["lora_alpha"], "tau": s["temperature"]},
    ),
    "loldu": Golden(
        "LoLDULinear",
        {"vector_z": "vector_z", "lora_A": "lora_A", "lora_B": lambda get: get("P") @ get("lora_B")},
        given={"start": "start.vector_z"},
    ),
    "melora": Golden("MELoRALinear", {"lora_A": stacked("lora_A"), "lora_B": stacked("lora_B")}, lambda s: s),
    "hydra": Golden("HydraLinear", hydra("weight"), lambda s: {"r": s["r"], "scaling": s["scale"]}),
    "hydra_bias": Golden(
        "HydraLinear",
        {**hydra("weight"), **hydra("bias")},
        lambda s: {"r": s["r"], "scaling": s["scale"], "branch_bias": True},
    ),
    "roselora": Golden("RoseLoRALinear", AB),
    "loraprune": Golden("LoRAPruneLinear", AB, given={"mask": "mask"}),
}


def theirs(t: dict, prefix: str, name: str | Callable):
    get = lambda n: t[prefix + n]
    return get(name) if isinstance(name, str) else name(get)


class Noted(dict):
    """A recording that notes which parameters are asked for."""

    def __init__(self, t: dict, asked: list[str]):
        super().__init__(t)
        self.asked = asked

    def __getitem__(self, key: str):
        self.asked.append(key.removeprefix("param."))
        return super().__getitem__(key)


def copy(layer, values: dict[str, torch.Tensor]):
    mine = layer.coefficients()
    with torch.no_grad():
        for name, value in values.items():
            assert mine[name].shape == value.shape, name
            mine[name].copy_(value)
    return layer


def made(name: str):
    """Our layer with their parameters, the recording and its settings."""
    golden, (t, s) = ONE[name], read(name)
    layer = getattr(variants, golden.cls).from_linear(linear(t["weight"], t["bias"]), **golden.settings(s))
    values = {ours: theirs(t, "param.", n) for ours, n in golden.names.items()}
    values |= {ours: t[key] for ours, key in golden.given.items()}
    left = layer.coefficients().keys() - values.keys()
    assert left <= {"mask_A", "mask_B"}, left  # which start as true
    if golden.starts:
        for ours, value in values.items():
            close(layer.get_parameter(ours), value, f"{ours} at first")
    return copy(layer, values), t, s


def passes(layer, x, dy):
    """y and the gradients of x and of what trains, by name."""
    x = x.float().requires_grad_()
    y = layer(x)
    trained = {n: p for n, p in layer.coefficients().items() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.float())
    return {"y": y, "x": grads[0]}, dict(zip(trained, grads[1:], strict=True))


@pytest.mark.parametrize("name", ONE)
def test_the_layer_computes_what_their_code_does(name):
    layer, t, _ = made(name)
    values, grads = passes(layer, t["x"], t["dy"])
    close(values["y"], t["y"], "y")
    close(values["x"], t["grad.x"], "x")
    assert grads, "nothing trains"
    for ours, grad in grads.items():
        close(grad, theirs(t, "grad.", ONE[name].names[ours]), ours)


RANDOM = {  # of what starts by itself: ours, its coefficients, settings
    **{n: (g.cls, g.names, g.settings) for n, g in ONE.items() if n not in ("lora_sb", "nlora", "inttune", "loldu")},
    "dylora": ("DyLoRALinear", AB, lambda s: s),
    "reslora_bs": ("ResLoRALinear", {n: f"0.{n}" for n in AB}, lambda s: {"r": s["r"]}),
    "lorta": (
        "LoRTALinear",
        LORTA,
        lambda s: {"r": s["r"], "heads": 3, "projections": 4, "layers": 2, "init_scale": 1.0},
    ),
    "lorta_fork": ("LoRTALinear", LORTA, lambda s: {"r": s["r"], "heads": 3, "projections": 4, "layers": 2}),
}


@pytest.mark.parametrize("name", RANDOM)
def test_parameters_start_with_the_deviation_of_theirs(name):
    cls, names, settings = RANDOM[name]
    (t, s), starts = read(name), about(name, "starts")
    sizes = (384, 384) if name.startswith("lorta") else (384, 256)
    how = settings(s | {"r": 16} if name != "melora" else s)
    torch.manual_seed(0)
    layer = getattr(variants, cls).from_linear(nn.Linear(*sizes), **how)
    seen = 0
    for ours, its in names.items():
        used = []
        theirs(Noted(t, used), "param.", its)
        p, want = layer.get_parameter(ours), [starts[n] for n in used if n in starts]
        if not p.requires_grad or not want:
            continue
        seen += 1
        want = sum(want) / len(want)
        few = 3 / p.numel() ** 0.5  # what the deviation of a sample may be off by, with theirs
        assert abs(p.std().item() - want) <= few * want, f"{ours}: {p.std().item():.3g}, theirs {want:.3g}"
    assert seen == sum(p.requires_grad for p in layer.coefficients().values())


def test_lora_xs_starts_from_their_svd():
    """Theirs up to a sign for each pair of vectors, which R takes up."""
    t, s = read("lora_xs")
    layer = variants.LoRAXSLinear.from_linear(linear(t["weight"], t["bias"]), **s)
    for k in range(s["r"]):
        pair = t["param.lora_B"][:, k, None] * t["param.lora_A"][k]
        close(layer.lora_B[:, k, None] * layer.lora_A[k], pair, f"rank {k}")
    close(layer.lora_B.norm(dim=0), t["param.lora_B"].norm(dim=0), "which factor has the singular values")


def test_lora_sb_starts_from_the_step_that_theirs_takes():
    """Theirs is a randomised SVD that is rounded to bfloat16."""
    t, s = read("lora_sb")
    layer = variants.LoRASBLinear.from_linear(linear(t["weight"], t["bias"]), r=s["r"])
    batches = [(t[f"batch{k}.input_ids"].float(), t[f"batch{k}.labels"].float()) for k in range(2)]
    variants.lora_sb_init(layer, batches, lambda model, batch: (model(batch[0]) * batch[1]).sum() / 2, s["lr"])
    for k in range(s["r"]):
        pair = t["param.lora_B"][:, k, None] * t["param.lora_A"][k]
        mine = layer.lora_B[:, k, None] * layer.lora_A[k]
        close(mine, pair, f"rank {k}", 1e-2)
    close(layer.lora_R, t["param.R"], "R", 1e-2)
    u, sigma, vh = torch.linalg.svd(t["direction"])
    close(layer.delta_weight(), (u[:, : s["r"]] * sigma[: s["r"]]) @ vh[: s["r"]], "the step at rank r")


def test_loldu_starts_as_theirs():
    layer, t, s = made("loldu")
    start = type(layer).from_linear(layer.base_layer, **ONE["loldu"].settings(s))
    close(start.lora_A, t["param.lora_A"], "U")
    close(start.lora_B, t["param.P"] @ t["param.lora_B"], "P L")
    close(start.vector_z, t["start.vector_z"], "d")
    close(start(t["x"]), t["start.y"], "y")


def test_increlora_scores_a_layer_as_theirs():
    layer, t, _ = made("increlora")
    close(layer.score(t["x"], t["dy"]) / t["weight"].numel() ** 0.5, t["score"], "score")


def test_increlora_grows_as_theirs():
    """Theirs draws the next reserve, with E = 1e-5, at the end as ours does."""
    layer, t, s = made("increlora")
    layer.grow(n := s["reserve"])
    names = {"lora_A": joined("lora_A", 0, 5), "lora_B": joined("lora_B", 1, 5), "lora_E": joined("lora_E", 0)}
    assert layer.r == s["r"] + n
    close(layer.lora_E[-n:], torch.cat([t[f"param.lora_E.{k}"] for k in (1, 2)]), "E of what it was granted")
    copy(layer, {ours: theirs(t, "grown.param.", name) for ours, name in names.items()})
    values, grads = passes(layer, t["x"], t["grown.dy"])
    close(values["y"], t["grown.y"], "y")
    close(values["x"], t["grown.grad.x"], "x")
    for ours, grad in grads.items():
        close(grad, theirs(t, "grown.grad.", names[ours]), ours)


def test_beamlora_replaces_ranks_as_theirs():
    """Theirs pairs weak and strong ranks at random; which it took is seen in A."""
    layer, t, _ = made("beamlora")
    after = t["replaced.lora_A.weight"].float()
    weak = t["pruned.0"][0].nonzero().flatten()
    strong = [next(j for j in range(layer.r) if torch.equal(layer.lora_A[j], after[i])) for i in weak]
    assert len(weak) and not {*strong} & {*weak.tolist()}
    copy(layer, {"lora_gate": t["gates.0"][0]})
    layer.replace(weak, strong)
    close(layer.lora_A, t["replaced.lora_A.weight"], "A")
    close(layer.lora_B, t["replaced.lora_B.weight"], "B")
    close(layer.lora_gate, t["replaced.lora_gate"][0], "gate")


def test_beamlora_importance_ranks_all_layers_as_theirs():
    """Which ranks theirs prunes of two layers at a top-p of 0.95: those that matter least, of both together."""
    layer, t, s = made("beamlora")
    importance = []
    for k in range(2):
        copy(layer, {"lora_gate": t[f"gates.{k}"][0]})
        importance.append(layer.importance())
    importance, pruned = torch.cat(importance), torch.cat([t[f"pruned.{k}"][0] for k in range(2)])
    kept = importance[~pruned].sum() / importance.sum()
    assert importance[pruned].max() < importance[~pruned].min()
    assert kept <= s["top_p"] < kept + importance[pruned].max() / importance.sum()


@pytest.mark.parametrize("name", ["hydra", "hydra_bias"])
def test_hydra_merges_as_theirs(name):
    layer, t, _ = made(name)
    layer.merge()
    close(layer.base_layer.weight, t["merged.weight"], "W")
    close(layer.base_layer.bias, t["merged.bias"], "bias")


@pytest.mark.parametrize("b", range(1, 5))
@pytest.mark.parametrize("how", ["prefix", "frozen"])
def test_dylora_of_each_prefix(b, how):
    t, s = read("dylora")
    layer = variants.DyLoRALinear.from_linear(linear(t["weight"], t["bias"]), **s, active=b, frozen=how == "frozen")
    values, grads = passes(copy(layer, {n: t[f"param.{n}"] for n in AB}), t["x"], t["dy"])
    close(values["y"], t[f"{how}{b}.y"], "y")
    close(values["x"], t[f"{how}{b}.grad.x"], "x")
    for n in AB:
        close(grads[n], t[f"{how}{b}.grad.{n}"], n)


def test_roselora_keeps_the_weights_that_theirs_keeps():
    layer, t, s = made("roselora")
    for step, tau in enumerate(s["taus"]):
        layer.zero_grad()
        layer(t["x"].float()).backward(t[f"step{step}.dy"].float())
        layer.observe(s["beta"])
        close(layer.sensitivity_A, t[f"step{step}.sensitivity_A"], "sensitivity of A")
        close(layer.sensitivity_B, t[f"step{step}.sensitivity_B"], "sensitivity of B")
        layer.prune(tau)
        for n in AB:
            want = t[f"step{step}.{n}"]
            assert torch.equal(layer.get_parameter(n) == 0, want == 0) and (want == 0).any()
            close(layer.get_parameter(n), want, n)


def test_loraprune_scores_as_theirs():
    layer, t, s = made("loraprune")
    layer(t["x"].float()).backward(t["dy"].float())
    head = layer.out_features // s["heads"]
    for name, how in {"rows": {}, "columns": {"side": "in"}, "heads": {"group": head}}.items():
        scores = layer.scores(**how)
        close(scores, t[f"raw.{name}"], name)
        close(scores / scores.norm(), t[f"score.{name}"], f"{name}, normalised")


@pytest.mark.parametrize("mode", ["is", "bs", "ms"])
def test_reslora_chains_of_three(mode):
    t, s = read(f"reslora_{mode}")
    cls, layers = variants.ResLoRALinear, {}
    for k in range(3):
        how = {"r": s["r"], "lora_alpha": s["lora_alpha"], "mode": mode, "pre": s["pre_num"]}
        base = linear(t[f"{k}.weight"], t[f"{k}.bias"])
        layers[f"{k}.lin"] = cls.from_linear(base, **how, before=min(k, s["pre_num"]))
    cls.connect(layers)
    xs, leaves, loss = [t[f"{k}.x"].float().requires_grad_() for k in range(3)], {}, 0.0
    for k, layer in enumerate(layers.values()):
        copy(layer, {n: t[f"param.{k}.{n}"] for n in AB})
        leaves |= {f"{k}.x": xs[k]} | {f"{k}.{n}": layer.get_parameter(n) for n in AB}
    for k, (layer, x) in enumerate(zip(layers.values(), xs, strict=True)):
        y = layer(x)
        if k or mode != "is":  # theirs gives the first of "is" 2 x
            close(y, t[f"{k}.y"], f"y of {k}")
        if k:
            loss = loss + (y * t[f"{k}.dy"].float()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert sum(key.startswith("grad.") for key in t) >= 7
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if f"grad.{name}" in t:
            close(grad, t[f"grad.{name}"], name)
        else:
            assert grad is None or not grad.any(), f"{name} {leaf.shape}"


def test_lorta_with_heads_on_the_input_is_their_fork_of_peft():
    t, s = read("lorta_fork")
    turn = lambda n, v: v.mT if n in AB else v
    how = {"projections": 4, "heads_on": "input"} | s
    layer = variants.LoRTALinear.from_linear(linear(t["weight"], t["bias"]), **how)
    copy(layer, {n: turn(n, t[f"param.{its}"]) for n, its in LORTA.items()})
    values, grads = passes(layer, t["x"], t["dy"])
    close(values["y"], t["y"], "y")
    close(values["x"], t["grad.x"], "x")
    for n, its in LORTA.items():
        close(grads[n], turn(n, t[f"grad.{its}"]), n)


@pytest.mark.parametrize("wrapped", ["qkv", "o"])
def test_lorta_of_a_layer_of_a_model(wrapped):
    """q, k and v are one linear there and three here; all share five factors."""
    t, s = read("lorta")
    at, cls = range(3) if wrapped == "qkv" else (3,), variants.LoRTALinear
    weights, biases = (t[f"{wrapped}.{n}"].chunk(len(at)) for n in ("weight", "bias"))
    layers = {}
    for m, weight, bias in zip(at, weights, biases, strict=True):
        how = {"projections": 4, "projection": m, "layers": s["layers"], "layer": s["layer"], "heads": s["heads"]}
        layers[f"{m}"] = cls.from_linear(linear(weight, bias), r=s["r"], lora_alpha=s["lora_alpha"], **how)
    cls.connect(layers)
    turn = lambda n, v: v.mT if n in AB else v
    first = copy(next(iter(layers.values())), {n: turn(n, t[f"param.{its}"]) for n, its in LORTA.items()})
    x = t[f"{wrapped}.x"].float().requires_grad_()
    y = torch.cat([layer(x) for layer in layers.values()], -1)
    grads = torch.autograd.grad(y, [x, *(first.get_parameter(n) for n in LORTA)], t[f"{wrapped}.dy"].float())
    close(y, t[f"{wrapped}.y"], "y")
    close(grads[0], t[f"{wrapped}.grad.x"], "x")
    for (n, its), grad in zip(LORTA.items(), grads[1:], strict=True):
        close(grad, turn(n, t[f"{wrapped}.grad.{its}"]), n)


def test_adalora_computes_what_peft_does():
    peft = pytest.importorskip("peft")
    t, s = read("slora")  # W, x and dy of any
    r, alpha = s["r"], s["lora_alpha"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.other = linear(t["weight"], t["bias"]), linear(t["weight"], t["bias"])

        def forward(self, x, dy):
            return types.SimpleNamespace(loss=((self.lin(x) + 2 * self.other(x)) * dy).sum())

    config = peft.AdaLoraConfig(
        init_r=r, target_r=2, lora_alpha=alpha, total_step=10, target_modules=["lin", "other"], orth_reg_weight=0.5
    )
    model, mine = peft.get_peft_model(Net(), config).double(), Net()
    pairs = []
    for k, name in enumerate(("lin", "other")):
        layer = variants.AdaLoRALinear.from_linear(getattr(mine, name), r=r, lora_alpha=alpha)
        its = getattr(model.base_model.model, name)
        setattr(mine, name, layer)
        for n, p in layer.coefficients().items():
            value = torch.randn(p.shape, generator=torch.Generator().manual_seed(k + len(pairs)))
            p.data, getattr(its, n)["default"].data = value, value.double()
            pairs.append((f"{name}.{n}", p, getattr(its, n)["default"]))
    x, dy = t["x"].clone().requires_grad_(), t["dy"]
    x32 = t["x"].float().requires_grad_()
    want, got = model.base_model(x=x, dy=dy).loss, mine(x32, dy.float()).loss + 0.5 * orthogonality(mine.modules())
    close(mine.lin(x32), model.base_model.model.lin(x), "y")
    close(got, want, "loss")
    want.backward()
    got.backward()
    close(x32.grad, x.grad, "x")
    assert len(pairs) == 6
    for name, p, its in pairs:
        close(p.grad, its.grad, name)


def test_the_recordings_say_where_they_are_from():
    files = sorted(RECORDED.glob("*.safetensors"))
    text = (RECORDED / "README.md").read_text()
    others = {"dylora", "lorta", "lorta_fork", "reslora_is", "reslora_bs", "reslora_ms"}
    assert {f.stem for f in files} == ONE.keys() | others, "one is not compared"
    for file in files:
        with safe_open(file, "pt") as f:
            made_of = f.metadata()
        row = next(r for r in text.splitlines() if r.startswith(f"| {file.stem} |"))
        repo = f"{made_of['repo']} @ {made_of['commit'][:7]}"
        assert repo in text and (repo in row or "| same |" in row) and f"| {made_of['what']} |" in row
        assert file.stat().st_size <= 20_000 and json.loads(made_of["settings"])
