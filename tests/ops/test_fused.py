# SPDX-License-Identifier: Apache-2.0
"""Kernels of one architecture that hold base product and low-rank term: the emulated sm_90a's, by LRKERN_FUSED."""

from contextlib import contextmanager

import pytest
import torch
from op_checks import check_forward, check_gradient

import build as emulator
import lrkern.ops
from lrkern import _host, testing
from lrkern.reference import OPS, Draw
from tests.conftest import enter_device

KERNELS = {"lora_linear": "lora_gemm", "multi_lora_linear": "multi_lora_gemm"}
SAMPLES = [(OPS[name], s.name) for name in KERNELS for s in OPS[name].samples("cpu", torch.bfloat16)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@contextmanager
def fused(monkeypatch, how="all", arch=90):
    monkeypatch.setenv("LRKERN_FUSED", how)
    with emulator.setting("arch", arch):
        emulator.launched()
        yield


def names():
    return {name for name, _, _ in emulator.launched()}


@pytest.fixture
def emulated(stack):
    return enter_device("emulated", stack)


def fits(op, sample, dtype) -> bool:
    """What docs say of the kernels, in words of its own."""
    named = op.named(sample)
    x, w = named["x"], named["weight"]
    whole = all(n % 8 == 0 for n in (*w.shape, x.stride(-2) if x.dim() > 1 else 0)) and x.data_ptr() % 16 == 0
    if op.name == "lora_linear":
        return x.numel() > 0 and whole and dtype != torch.float32
    alone = named["plan"].shape[0] == 1
    return (
        x.numel() > 0
        and whole
        and dtype == named["a_pool"].dtype == torch.bfloat16
        and len(named["ranks"]) > 0
        and (alone or named["dropout_p"] is None)
    )


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op.name}-{name}" for op, name in SAMPLES])
def test_every_sample(op, name, dtype, emulated, monkeypatch):
    s = op.sample(name, "cpu", dtype)
    with fused(monkeypatch):
        check_forward(op, s, dtype)
        assert (KERNELS[op.name] in names()) == fits(op, s, dtype)
        check_gradient(op, s, dtype)
        assert (KERNELS[op.name] in names()) == fits(op, s, dtype)


def test_who_asks(emulated, monkeypatch):
    """Off unless it is asked for, "1" where it pays, on an architecture that has it."""
    op = OPS["lora_linear"]
    s = op.sample("segments", "cpu", torch.bfloat16)
    for how, arch, expected in [
        ("", 90, False),
        ("0", 90, False),
        ("1", 90, False),
        ("all", 90, True),
        ("all", 80, False),
    ]:
        with fused(monkeypatch, how, arch):
            lrkern.ops.lora_linear(*s.args, **s.kwargs)
            assert ("lora_gemm" in names()) == expected, (how, arch)
    monkeypatch.delenv("LRKERN_FUSED")
    with emulator.setting("arch", 90):
        emulator.launched()
        lrkern.ops.lora_linear(*s.args, **s.kwargs)
        assert "lora_gemm" not in names()


def large_enough():
    """One layer whose tiles are enough by the choice, and hardly more: 66 tiles of 128 x 128."""
    draw = Draw("cpu", torch.bfloat16, 3)
    return draw(128 * 33, 8), draw(256, 8, std=0.3), draw(256), draw(8, 8, std=0.3), draw(256, 8)


def test_where_it_pays(emulated, monkeypatch):
    args = large_enough()
    with fused(monkeypatch, "1"):
        y = lrkern.ops.lora_linear(*args, 0.5)
        assert "lora_gemm" in names()
    x, w, bias, a, b = (t.double() for t in args)
    truth = x @ w.mT + bias + 0.5 * (x @ a.mT) @ b.mT
    testing.check(y, truth, truth.bfloat16(), "lora_linear")


def test_rows_do_not_depend_on_their_number(emulated, monkeypatch):
    """Nor on the tile they come to lie in."""
    draw = Draw("cpu", torch.bfloat16, 5)
    x, w, bias, a, b = draw(300, 136), draw(264, 136), draw(264), draw(16, 136), draw(264, 16)
    with fused(monkeypatch):
        all_rows = lrkern.ops.lora_linear(x, w, bias, a, b, 0.5)
        for first, last in [(0, 1), (7, 120), (100, 300), (299, 300)]:
            part = lrkern.ops.lora_linear(x[first:last].clone(), w, bias, a, b, 0.5)
            assert torch.equal(part, all_rows[first:last])
        assert "lora_gemm" in names()


def test_an_adapter_of_nan_touches_nobody(emulated, monkeypatch):
    op = OPS["multi_lora_linear"]
    s = op.sample("slots", "cpu", torch.bfloat16)
    named = op.named(s)
    page = int(named["pages"][1, 0, 0])
    poisoned = [t.clone() if isinstance(t, torch.Tensor) else t for t in s.args]
    for i, n in enumerate(op.parameters):
        if n in ("a_pool", "b_pool"):
            poisoned[i][16 * page] = float("nan")
    cotangent = torch.randn(33, 80).bfloat16()
    with fused(monkeypatch):
        clean, dirty = lrkern.ops.multi_lora_linear(*s.args), lrkern.ops.multi_lora_linear(*poisoned)
        grads = [
            testing.gradients(op, lrkern.ops.multi_lora_linear, s.__class__("s", tuple(args), {}), cotangent)
            for args in (s.args, poisoned)
        ]
        assert "multi_lora_gemm" in names()
    owns = dirty.isnan().any(-1)
    assert owns.any() and not owns.all()
    assert torch.equal(clean[~owns], dirty[~owns])
    dx, dx_dirty = (g["x"] for g in grads)
    assert torch.equal(dx_dirty.isnan().any(-1), owns) and torch.equal(dx[~owns], dx_dirty[~owns])


@pytest.mark.parametrize("name", sorted(KERNELS.values()))
def test_the_choice_is_printed(name):
    answer = _host.explain(name, T=8192, N=4096, K=4096, R=16, device="cuda", arch=90)
    assert answer["fits"] and answer["pays"] and answer["tile_n"] == 256 and answer["cluster"] == 2
    assert answer["tiles"] == 64 * 16 and "LRKERN_FUSED=1" in answer["why"]
    for change, why in [
        ({"arch": 80}, "sm_90a"), ({"K": 4097}, "16 bytes"), ({"dtype": "float32"}, "16 bits"), ({"T": 100, "N": 512}, "too few"), ({"T": 1 << 30, "N": 1 << 30}, "2^30 tiles")
    ]:  # fmt: skip
        asked = {"T": 8192, "N": 4096, "K": 4096, "R": 16, "device": "cuda", "arch": 90} | change
        answer = _host.explain(name, **asked)
        assert not answer["pays"] and why in answer["why"]
