# SPDX-License-Identifier: Apache-2.0
"""lrkern.nn's layers on CUDA, and over its kernels emulated, beside the same layers on the CPU, which test_nn*.py hold to their
formulas. Seeds of dropout inside a captured graph."""

import copy

import pytest
import torch
from layer_kinds import EACH, KINDS, drop, shake

import lrkern.ops

ON_KERNELS = pytest.mark.parametrize("device", ["emulated", "cuda"], indirect=True)
SIZES = pytest.mark.parametrize("sizes", [(48, 40), (40, 72)], ids=str)
ON_CUDA = pytest.mark.parametrize("device", ["cuda"], indirect=True)
DROPPING = {name: kind for name, kind in KINDS.items() if drop(*kind, 0.5)}


def run(layer, x, dy):
    """y and the gradients of x and what is trained."""
    x = x.detach().requires_grad_()
    y = layer(x)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
    return dict(zip(("y", "dx", *trained), (y.detach(), *grads), strict=True))


def assert_same(got, want, tol):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        error = (got[name].double().cpu() - value.double()).norm() / value.double().norm()
        assert error <= tol, f"{name}: {error:.2e}"


# Relative Frobenius difference; seen, emulated beside the CPU: 3.9e-7, in bfloat16 2.3e-4, merged 3.3e-3.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3}


@SIZES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@ON_KERNELS
@EACH
def test_layers_do_what_they_do_on_the_cpu(cls, settings, sizes, dtype, device):
    host = shake(cls(*sizes, **settings, dtype=dtype))
    layer, tol = copy.deepcopy(host).to(device), TOLERANCE[dtype]
    for lead in ((3,), (2, 35)):  # below and beyond where a basis is made again for a few rows
        x, dy = torch.randn(*lead, sizes[0]).to(dtype), torch.randn(*lead, sizes[1])
        assert_same(run(layer, x.to(device), dy.to(device)), on_cpu(run, host, x, dy), tol)
    assert_same({"": layer.delta_weight().detach()}, {"": on_cpu(host.delta_weight).detach()}, TOLERANCE[torch.float32])
    before = layer(x.to(device)).detach()
    layer.eval().merge()
    assert_same({"": layer(x.to(device)).detach()}, {"": before.cpu()}, 2e-6 if dtype == torch.float32 else 1e-2)


@ON_CUDA  # the emulated library has no autocast
@EACH
def test_layers_under_autocast(cls, settings, device):
    host = shake(cls(48, 40, **settings))
    layer, x, dy = copy.deepcopy(host).to(device), torch.randn(35, 48), torch.randn(35, 40)

    def cast(layer, x, dy):
        with torch.autocast(x.device.type, torch.bfloat16):
            return run(layer, x, dy)

    got = cast(layer, x.to(device), dy.to(device))
    assert got["y"].dtype == torch.bfloat16
    assert_same(got, on_cpu(cast, host, x, dy), TOLERANCE[torch.bfloat16])


def on_cpu(call, *args):
    """By the CPU's own kernels."""
    with lrkern.ops.dispatch.use_library(torch.ops.lrkern):
        return call(*args)


@ON_CUDA
@pytest.mark.parametrize(("cls", "settings"), DROPPING.values(), ids=DROPPING)
def test_two_replays_of_a_graph_draw_two_masks(cls, settings, device):
    """The seed is drawn inside the graph: as with nn.Dropout two replays differ, and torch's seed says which they are."""
    layer = shake(cls(48, 40, **settings, **drop(cls, settings, 0.5))).to(device).train()
    x, dy = torch.ones(64, 48, device=device), torch.ones(64, 40, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(layer, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = run(layer, x, dy)

    def replays(seed):
        torch.manual_seed(seed)
        found = []
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            found.append({name: t.clone() for name, t in out.items()})
        return found

    (first, second), again = replays(1), replays(1)
    for name in ("y", "dx"):
        assert first[name].isfinite().all() and not torch.equal(first[name], second[name]), name
    for one, other in zip((first, second), again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
