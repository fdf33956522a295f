# SPDX-License-Identifier: Apache-2.0
"""WeLore's ranks beside the authors' code and a count by hand, its ratio, and what trains."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lrkern import compress
from lrkern.nn import FactorizedLinear

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "compress.json").read_text())["welore"]
HALF = 0.4999  # the authors' rule


def with_spectrum(s, i, o, seed, bias=True):
    g = torch.Generator().manual_seed(seed)
    s = torch.as_tensor(s, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, len(s), generator=g, dtype=torch.float64))[0] for n in (o, i))
    linear = nn.Linear(i, o, bias)
    linear.weight.data = ((u * s) @ v.T).float()
    return linear


def model(seed=0):
    """Layers that differ in how fast their singular values fall, and one of equal ones, which rounding alone tells apart."""
    falls = {"steep": 3.0, "even": 0.5, "wide": 4.0}
    net = nn.ModuleDict({"norm": nn.LayerNorm(16), "flat": with_spectrum(torch.ones(16), 16, 16, 9)})
    for n, (name, fall) in enumerate(falls.items()):
        o = 40 if name == "wide" else 16
        net[name] = with_spectrum(torch.exp(-fall * torch.linspace(0, 1, 16)), 16, o, seed + n, bias=name != "even")
    return net


def spectra(net):
    found = {}
    for name, m in net.items():
        if isinstance(m, nn.Linear):
            s = torch.linalg.svdvals(m.weight.detach())
            found[name] = (s - s[-1]) / (s[0] - s[-1])
    return found


@pytest.mark.parametrize("tau", sorted(RECORDED["ranks"]))
def test_ranks_are_those_of_the_authors_code(tau):
    net = nn.ModuleDict({str(n): with_spectrum(s, len(s), 7, n) for n, s in enumerate(RECORDED["spectra"])})
    report = compress.welore(net, tau=float(tau), min_reduction=0)
    assert [layer.rank for layer in report.layers.values()] == RECORDED["ranks"][tau]


@pytest.mark.parametrize("tau", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("min_reduction", [None, HALF])
def test_each_layer_has_its_count_and_the_nearest_weight(tau, min_reduction):
    net = model()
    want = spectra(net)
    weights = {name: net[name].weight.detach().double() for name in want}
    biases = {name: net[name].bias for name in want}
    report = compress.welore(net, tau=tau, min_reduction=min_reduction)
    assert report.tau == tau and list(report.layers) == ["flat", "steep", "even", "wide"]
    for name, s in want.items():
        k, (o, i) = int((s >= tau).sum()) if name != "flat" else 16, weights[name].shape
        low = k * (i + o) < i * o if min_reduction is None else (16 - k) / 16 > HALF
        assert report.layers[name].rank == (k if low else None), name
        assert type(net[name]) is (FactorizedLinear if low else nn.Linear)
        if low:
            u, sigma, vh = torch.linalg.svd(weights[name], full_matrices=False)
            torch.testing.assert_close(net[name].product().double(), (u[:, :k] * sigma[:k]) @ vh[:k], atol=1e-5, rtol=0)
            torch.testing.assert_close(net[name].bias, biases[name])
    assert (report.layers["wide"].rank is not None) or tau < 0.2


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.6])
def test_the_ratio_is_met_by_the_smallest_tau(ratio):
    net = model()
    want = spectra(net)
    report = compress.welore(net, ratio)
    assert report.reduction >= ratio
    below = sorted(float(s) for name, values in want.items() if name != "flat" for s in values if s < report.tau - 1e-6)
    less = compress.welore(model(), tau=below[-1])
    assert less.reduction < ratio
    again = compress.welore(model(), tau=report.tau)
    assert again.layers == report.layers
    assert compress.welore(model(), report.reduction).tau == report.tau, "reached is enough"


def test_low_rank_components_alone_train():
    net = model()
    report = compress.welore(net, 0.4)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    low = [name for name, layer in report.layers.items() if layer.rank is not None]
    assert 0 < len(low) < 4
    assert sorted(trained) == sorted(f"{n}.{p}" for n in low for p, _ in net[n].named_parameters())
    net = model()
    report = compress.welore(net, 0.4, freeze=False)
    dense = [name for name, layer in report.layers.items() if layer.rank is None]
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert sorted(frozen) == sorted(f"{n}.{p}" for n in dense for p, _ in net[n].named_parameters())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_are_decomposed_in_float32(low):
    net, wide = model().to(low), model().to(low).float()
    assert compress.welore(net, 0.4).layers == compress.welore(wide, 0.4).layers
    assert net["steep"].A.dtype == low and torch.equal(net["steep"].A, wide["steep"].A.to(low))


WRONG = {
    "none": ({}, "one of ratio and tau must be given, got None and None"),
    "both": ({"ratio": 0.5, "tau": 0.1}, "one of ratio and tau must be given"),
    "ratio": ({"ratio": 50}, r"ratio must be a number in 0\.\.1, got 50"),
    "nan": ({"tau": float("nan")}, r"tau must be a number in 0\.\.1, got nan"),
    "flag": ({"ratio": True}, "ratio must be a number"),
    "rule": ({"ratio": 0.5, "min_reduction": -1}, r"min_reduction must be a number in 0\.\.1, got -1"),
    "much": ({"ratio": 0.75}, r"ratio must be at most 0\.7031 for these layers, got 0\.75"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused(kind):
    how, text = WRONG[kind]
    net = model()
    modules = dict(net.named_modules())
    with pytest.raises(ValueError, match=f"^lrkern.compress.welore: {text}"):
        compress.welore(net, **how)
    assert dict(net.named_modules()) == modules and all(p.requires_grad for p in net.parameters())
