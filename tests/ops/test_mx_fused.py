# SPDX-License-Identifier: Apache-2.0
"""MXFP4's products by the emulated sm_90a's own kernels."""

import pytest
import torch
from op_checks import check_forward, check_gradient

import lrkern.ops
from lrkern import _host, testing
from lrkern.reference import OPS, Draw
from tests.ops.test_fused import TYPES, emulated, fused, names  # noqa: F401  (emulated is a fixture)

MX = [OPS["mx_linear"], OPS["mx_linear_expand"]]
SAMPLES = [(op, s.name) for op in MX for s in op.samples("cpu", torch.bfloat16)]


def kernel_of(op, sample, dtype) -> str | None:
    """What docs say of the kernels, in words of its own."""
    named = op.named(sample)
    x, O = named["x"], named["codes"].shape[-2]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if dtype != torch.bfloat16 or not rows * O:
        return None
    if rows <= 16:
        return "mx_few"
    pitch = x.stride(-2) if x.dim() > 1 else 0
    return "mx_gemm" if O % 8 == 0 and pitch % 8 == 0 and x.data_ptr() % 16 == 0 else None


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "name"), SAMPLES, ids=[f"{op.name}-{name}" for op, name in SAMPLES])
def test_every_sample(op, name, dtype, emulated, monkeypatch):  # noqa: F811
    s = op.sample(name, "cpu", dtype)
    with fused(monkeypatch):
        check_forward(op, s, dtype)
        seen, want = {"mx_few", "mx_gemm"} & names(), kernel_of(op, s, dtype)
        if op.named(s)["experts"] is None:  # whose rows are by expert, each expert's so many
            assert seen == ({want} if want else set())
        check_gradient(op, s, dtype)


def layer(T, O, K, R, factor=torch.bfloat16, seed=5):
    draw = Draw("cpu", torch.bfloat16, seed)
    codes, scales, _ = lrkern.ops.mx_quantize(draw(O, K))
    b = draw(O, R)
    return draw(T, K), codes, scales, draw(O), draw(T, R).to(factor), b.to(factor)


@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("T", "kernel"), [(5, "mx_few"), (16, "mx_few"), (17, "mx_gemm"), (200, "mx_gemm")])
def test_beside_the_portable_kernels(T, kernel, factor, emulated, monkeypatch):  # noqa: F811
    x, codes, scales, bias, s, b = args = layer(T, 264, 544, 20, factor)
    w = lrkern.ops.mx_dequantize(codes, scales, 544, torch.float32)
    truth = torch.nn.functional.linear(x.double(), w.double(), bias.double()) + s.double() @ b.double().mT
    portable = lrkern.ops.mx_linear_expand(*args)
    with fused(monkeypatch):
        y = lrkern.ops.mx_linear_expand(*args)
        assert kernel in names()
    testing.check(y, truth, truth.bfloat16(), "mx_linear_expand")
    assert (y - truth).abs().max() <= 1.01 * (portable - truth).abs().max()
    assert (y == truth.bfloat16()).float().mean() > 0.97  # the truth rounded once


def test_rows_do_not_depend_on_their_number(emulated, monkeypatch):  # noqa: F811
    x, codes, scales, bias, s, b = layer(300, 264, 1056, 16)
    with fused(monkeypatch):
        for first, rows in [(0, 16), (100, 200)]:
            all_rows = lrkern.ops.mx_linear_expand(
                x[first : first + rows], codes, scales, bias, s[first : first + rows], b
            )
            for n in (1, 3, 8, 9, 16) if rows == 16 else (17, 129):
                part = slice(first, first + n)
                assert torch.equal(
                    lrkern.ops.mx_linear_expand(x[part], codes, scales, bias, s[part], b), all_rows[:n]
                ), n
        assert {"mx_few", "mx_gemm"} <= names()


@pytest.mark.parametrize("T", [16, 40])
def test_every_code_and_scale(T, emulated, monkeypatch):  # noqa: F811
    """x picks out one weight a row: each is the bf16 that mx_dequantize makes of it, bit for bit, and a NaN block is NaN."""
    K = 32
    codes = torch.arange(256, dtype=torch.uint8)[:, None] + torch.arange(16, dtype=torch.uint8) * 17
    scales = torch.arange(256, dtype=torch.uint8)[:, None].clone()
    w = lrkern.ops.mx_dequantize(codes, scales, K, torch.bfloat16)
    for first in range(0, K, T):
        x = torch.zeros(T, K, dtype=torch.bfloat16)
        n = min(T, K - first)
        x[torch.arange(n), first + torch.arange(n)] = 1
        with fused(monkeypatch):
            y = lrkern.ops.mx_linear(x, codes, scales)
            assert names() & {"mx_few", "mx_gemm"}
        want = w[:, first : first + n].T.clone()
        want[:, w.isinf().any(1)] = torch.nan  # an inf times the zeros of x
        assert torch.equal(y[:n].nan_to_num(7), want.nan_to_num(7)) and torch.equal(y[:n].isnan(), want.isnan())


def test_a_row_of_nan_touches_no_other(emulated, monkeypatch):  # noqa: F811
    for T in (16, 40):
        x, codes, scales, bias, s, b = layer(T, 136, 96, 16)
        spoilt, spoilt_s = x.clone(), s.clone()
        spoilt[3], spoilt_s[7] = torch.nan, torch.inf
        with fused(monkeypatch):
            y = lrkern.ops.mx_linear_expand(x, codes, scales, bias, s, b)
            got = lrkern.ops.mx_linear_expand(spoilt, codes, scales, bias, spoilt_s, b)
        others = [t for t in range(T) if t not in (3, 7)]
        assert torch.equal(y[others], got[others]) and got[3].isnan().all() and not got[7].isfinite().any()


def test_an_infinite_factor_of_fp32_meets_no_zero(emulated, monkeypatch):  # noqa: F811
    for T in (16, 40):
        x, codes, scales, bias, s, b = layer(T, 136, 96, 16, torch.float32)
        s[2, 5], b[9, 5] = torch.inf, torch.inf
        s[:, 5].abs_(), b[:, 5].abs_()
        with fused(monkeypatch):
            y = lrkern.ops.mx_linear_expand(x, codes, scales, bias, s, b)
        assert (y[2] == torch.inf).all() and (y[:, 9] == torch.inf).all()
        rest = torch.ones_like(y, dtype=torch.bool)
        rest[2], rest[:, 9] = False, False
        assert y[rest].isfinite().all()


def test_the_choice_is_printed():
    ask = lambda **change: _host.explain(
        "mx_fused", **{"T": 1, "O": 14336, "K": 4096, "R": 16, "device": "cuda", "arch": 90} | change
    )
    few = ask()
    assert (few["fits"], few["pays"], few["few"], few["parts"], few["steps"]) == (True, True, True, 2, 4)
    assert all({**ask(T=T), "why": few["why"]} == few for T in range(2, 17)), "T has no part in how K is cut"
    assert (ask(O=4096)["parts"], ask(O=4096)["steps"]) == (8, 1)
    assert (ask(O=4096, K=14336)["parts"], ask(O=4096, K=14336)["steps"]) == (7, 4)
    many = ask(T=8192)
    assert (many["fits"], many["pays"], many["few"], many["tile_n"], many["cluster"]) == (True, True, False, 256, 2)
    for change, why in [
        ({"arch": 80}, "sm_90a"), ({"dtype": "float16"}, "another type"), ({"T": 0}, "1..2^30"), ({"T": 64, "O": 4100}, "16 bytes"),
    ]:  # fmt: skip
        assert not ask(**change)["fits"] and why in ask(**change)["why"]
    assert not ask(O=128)["pays"] and "too few" in ask(O=128)["why"]
