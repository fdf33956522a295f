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
from torch import nn

from lrkern.nn import variants
from lrkern.nn.variants.adalora import orthogonality

RECORDED = Path(__file__).parents[1] / "recorded" / "variants"
CLOSE = 1e-5  # of the largest element: float32 beside float64


def read(name: str):
    """Tensors by key, and the settings of the recording."""
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["settings"])  # noqa: SIM118


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
    """names: ours by theirs. A value that is a function takes what looks up a tensor of theirs and gives ours of it, gradients too."""

    cls: str
    names: dict[str, str | Callable]
    settings: Callable[[dict], dict] = lambda s: {"r": s["r"], "lora_alpha": s["lora_alpha"]}
    frozen: dict[str, Callable] = field(default_factory=dict)


def same(*names: str) -> dict[str, str]:
    return {n: n for n in names}


ONE = {
    "lora_xs": Golden("LoRAXSLinear", {"lora_R": "R", **same("lora_A", "lora_B")}),
    "lora_sb": Golden("LoRASBLinear", {"lora_R": "R", **same("lora_A", "lora_B")}),
    "slora": Golden("SLoRALinear", same("lora_A", "lora_N", "lora_B")),
}


def theirs(t: dict, prefix: str, name: str | Callable):
    get = lambda n: t[prefix + n]
    return get(name) if isinstance(name, str) else name(get)


def made(name: str):
    """Our layer with their parameters, and the recording."""
    golden, (t, settings) = ONE[name], read(name)
    cls = getattr(variants, golden.cls, None)
    if cls is None:
        pytest.skip(f"no {golden.cls} yet")
    layer = cls.from_linear(linear(t["weight"], t["bias"]), **golden.settings(settings))
    mine = layer.coefficients()
    assert mine.keys() == golden.names.keys()
    with torch.no_grad():
        for ours, name_of_theirs in golden.names.items():
            value = theirs(t, "param.", name_of_theirs)
            assert mine[ours].shape == value.shape, ours
            mine[ours].copy_(value)
    return layer, t


@pytest.mark.parametrize("name", ONE)
def test_the_layer_computes_what_their_code_does(name):
    layer, t = made(name)
    x = t["x"].float().requires_grad_()
    y = layer(x)
    trained = {n: p for n, p in layer.coefficients().items() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], t["dy"].float())
    close(y, t["y"], "y")
    close(grads[0], t["grad.x"], "x")
    for ours, grad in zip(trained, grads[1:], strict=True):
        close(grad, theirs(t, "grad.", ONE[name].names[ours]), ours)
    assert trained, "nothing trains"


def test_lora_xs_starts_from_their_svd():
    """Their R [r, r] times ours' signs is ours, so each pair of vectors has to be theirs."""
    t, s = read("lora_xs")
    layer = variants.LoRAXSLinear.from_linear(linear(t["weight"], t["bias"]), **s)
    for k in range(s["r"]):
        pair = t["param.lora_B"][:, k, None] * t["param.lora_A"][k]
        close(layer.lora_B[:, k, None] * layer.lora_A[k], pair, f"rank {k}")
    close(layer.lora_B.norm(dim=0), t["param.lora_B"].norm(dim=0), "which factor has the singular values")


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
        layer, its = (
            variants.AdaLoRALinear.from_linear(getattr(mine, name), r=r, lora_alpha=alpha),
            getattr(model.base_model.model, name),
        )
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
    assert {"lora_xs", "slora"} <= {f.stem for f in files}
    for file in files:
        with safe_open(file, "pt") as f:
            about = f.metadata()
        row = next(r for r in text.splitlines() if r.startswith(f"| {file.stem} |"))
        repo = f"{about['repo']} @ {about['commit'][:7]}"
        assert repo in text and (repo in row or "| same |" in row) and f"| {about['what']} |" in row
        assert file.stat().st_size <= 20_000 and json.loads(about["settings"])
