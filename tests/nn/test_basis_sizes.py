# SPDX-License-Identifier: Apache-2.0
"""Random bases at the sizes of layers: features 8 to 4097, up to 1024 bases, ranks up to 1024 (NOLA's are LoRA's: up to 512). The
layers' y, gradients and merged weights against their explicit formulas in float64, the ops against the registry's. Cases hold
every pair of the values below; on the emulator they are as large as on the CPU."""

import copy

import pytest
import torch
from grid import all_pairs
from op_checks import check_forward, check_gradient
from test_nn_basis import assert_close, delta64, made, trainable

from lrkern.limits import MAX_RANK
from lrkern.nn import NOLALinear, RandLoRALinear, VeRALinear
from lrkern.ops.basis import DISTRIBUTIONS
from lrkern.ops.dispatch import use_library
from lrkern.reference import OPS, Draw
from tests.conftest import FULL

if not FULL:
    pytest.skip("LRK_TEST_FULL=1 tries layers of all sizes", allow_module_level=True)

FEATURES = [8, 33, 2048, 4097]
BASES = [1, 3, 64, 1024]
SHAPE = {"I": FEATURES, "O": FEATURES, "T": [1, 3, 40]}  # up to 16 tokens U stays in registers
KIND = {"distribution": ["uniform8", "ternary6"]}
LAYERS = {
    NOLALinear: SHAPE | {"k": BASES, "l": BASES, "r": [1, 8, 16, MAX_RANK], "frozen_a": [True, False], "normalize": [True, False]},
    VeRALinear: SHAPE | {"r": [1, 16, 256, 1024], "save_output": [False, True]} | KIND,
    RandLoRALinear: SHAPE | {"r": [7, 32, 1000], "paper_pairing": [False, True]} | KIND,
}  # fmt: skip
OF_OPS = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "distribution": sorted(DISTRIBUTIONS.values()),
    "T": [1, 40],
    "Q": [1, 16, 256, 1024],
    "C": FEATURES,
    "R": [1, 16, 1024],
    "K": BASES,
    "scales": [False, True],
    "far": [False, True],
}


def name_of(case):
    return "-".join(f"{k}{str(v).removeprefix('torch.')}" for k, v in case.items())


def elements(cls, case):
    """How many numbers the explicit formula is made of, as far as the case is given."""
    I, O, r, k, l = (case.get(n, 1) for n in ("I", "O", "r", "k", "l"))
    if cls is NOLALinear:
        return r * (k * I + l * O)
    if cls is VeRALinear:
        return r * (I + O)
    return I * O * (-(-min(I, O) // r) if case.get("paper_pairing") else 1)


LARGEST = 1024 * 16 * (4097 + 4097)
CASES = [
    pytest.param(cls, case, id=f"{cls.__name__}-{name_of(case)}")
    for cls, axes in LAYERS.items()
    for case in all_pairs(axes, lambda case, cls=cls: elements(cls, case) <= LARGEST)
]


@pytest.mark.parametrize(("cls", "case"), CASES)
def test_layers_are_the_formulas(cls, case, device):
    settings = dict(case)
    I, O, T = (settings.pop(n) for n in ("I", "O", "T"))
    host = made(cls, settings, I, O, bias=T == 3, seed=11)
    layer, x, dy = copy.deepcopy(host).to(device), torch.randn(T, I), torch.randn(T, O)
    ours = x.to(device).requires_grad_()
    y = layer(ours)
    got = [y, *torch.autograd.grad(y, [ours, *trainable(layer).values()], dy.to(device)), layer.delta_weight()]
    layer.eval().merge()
    got.append(layer(x.to(device)))

    exact = lambda t: t.detach().to(device, torch.float64)
    p = {name: exact(t).requires_grad_() for name, t in trainable(host).items()}
    wide, bias = exact(x).requires_grad_(), host.base_layer.bias
    with use_library(torch.ops.lrkern):  # its elements are those of docs/rng.md: test_rng.py
        delta = delta64(host, p)
    truth = wide @ (exact(host.base_layer.weight) + delta).T + (0 if bias is None else exact(bias))
    want = [truth, *torch.autograd.grad(truth, [wide, *p.values()], exact(dy)), delta, truth]
    for g, w in zip(got, want, strict=True):
        assert_close(g.detach(), w.detach(), 1e-5)


def few(case):
    """The reference holds a basis whole."""
    return max(case.get("Q", 1), case.get("R", 1) * case.get("K", 1)) * case.get("C", 1) <= 2**23


@pytest.mark.parametrize("case", list(all_pairs(OF_OPS, few)), ids=name_of)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.family.name == "basis"], ids=lambda op: op.name)
def test_ops_at_sizes_of_layers(op, case, device):
    keywords = {n: v for n, v in case.items() if n not in ("dtype", "T", "K")}
    keywords |= {"method": 2, "lead": (case["T"],), "segments": ([case["C"]], [case["K"]], [0.5])}
    dtype = case["dtype"]
    for s in op.samples_of("sizes", op.family.layer(Draw(device, dtype), **keywords)):
        # Seen beyond 2 x: 1.7 ulps of 8 elements. In place, for many tokens, ATen's GEMM begins its sum of 1,024 terms at y and
        # rounds at y's magnitude in each step: 12.6.
        ulps = 16 if op.mutates else 4
        check_forward(op, s, dtype, ulps)
        if op.differentiable:
            check_gradient(op, s, dtype, ulps)
