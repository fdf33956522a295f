# SPDX-License-Identifier: Apache-2.0
"""The stream of docs/rng.md: addressing, oracles, equal bits everywhere, limits, statistics."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_checks import want_gradients

import lrkern.ops as ops
from lrkern import reference
from lrkern.ops.basis import DISTRIBUTIONS, METHODS

ALL = sorted(DISTRIBUTIONS.values())
NAMES = {number: name for name, number in DISTRIBUTIONS.items()}
VARIANCE = {2: (1 - 2**-16) / 3, 3: (1 - 2**-32) / 3, 4: (1 - 2**-48) / 3, 5: 1.0, 6: 21846 / 65536, 7: 0.5}
FAR = 2**63 - 5


def fill(distribution, R=4, q0=0, c0=0, Q=4, C=100, seed=7, method=2, tensor=0, first=0, like=None):
    like = torch.empty(0) if like is None else like
    return ops.basis_fill(like, None, None, seed, method, distribution, tensor, first, R, q0, c0, Q, C)


def test_reference_philox_is_randomgens():
    randomgen = pytest.importorskip("randomgen", reason="randomgen is not installed")
    rng = np.random.default_rng(0)
    for _ in range(50):
        counter, key = [int(w) for w in rng.integers(0, 2**32, 4)], int(rng.integers(0, 2**63))
        value = sum(w << 32 * i for i, w in enumerate(counter))
        theirs = randomgen.Philox(number=4, width=32, key=key, counter=(value - 1) % 2**128)  # counts up first
        ours = reference.philox4x32([torch.tensor([w]) for w in counter], key)
        assert [int(w) for w in ours] == [int(w) for w in theirs.random_raw(4)]


def test_reference_philox_is_torchs():
    random = pytest.importorskip("torch.func._random", reason="this torch has no stateless Philox")
    key, offset = FAR, 2**40 + 3
    if not hasattr(random, "bits"):
        pytest.skip("this torch's stateless Philox gives no bits (2.15 does)")
    bits = random.bits(torch.tensor([key, offset], dtype=torch.uint64), (8,), dtype=torch.uint32)
    words = []
    for block in range(2):
        at = offset + block
        words += reference.philox4x32([torch.tensor([w]) for w in (at & 0xFFFFFFFF, at >> 32, 0, 0)], key)
    assert bits.tolist() == [int(w) for w in words]


@pytest.mark.parametrize("distribution", ALL, ids=NAMES.get)
def test_elements_are_the_written_stream(distribution, device):
    """docs/rng.md in Python integers, at both ends of every counter."""
    b = reference.BITS[distribution]
    E, R = 128 // b, 2**32
    q0, c0, first, tensor = 2**32 - 2, min(2**32 * E, 2**48) - 70, 2**16 - 2, 2**32 - 1
    like = torch.empty(0, device=device)
    got = fill(distribution, R, q0, c0, 4, 70, FAR, METHODS["randlora"], tensor, first, like).cpu()
    value = {
        2: lambda h: (2 * h + 1) / 2**8 - 1,
        3: lambda h: (2 * h + 1) / 2**16 - 1,
        4: lambda h: (2 * (h >> 8) + 1) / 2**24 - 1,
        5: lambda h: 1 - 2 * h,
        6: lambda h: -1 if h < 10923 else int(h >= 54613),
        7: lambda h: (h & 1) - (h >> 1),
    }[distribution]
    for i in range(4):
        q = q0 + i
        for j in range(0, 70, 3):
            column = c0 + j
            tag = first + q // R | METHODS["randlora"] << 16 | distribution << 22
            words = reference.philox4x32([torch.tensor(w) for w in (column // E, q % R, tensor, tag)], FAR)
            bits = sum(int(w) << 32 * k for k, w in enumerate(words))
            assert float(got[i, j]) == value(bits >> column % E * b & (1 << b) - 1)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "stream0.json").read_text())


@pytest.mark.parametrize(
    "entry", GOLDEN, ids=lambda e: "-".join(str(e[k]) for k in ("method", "distribution") if k in e)
)
def test_version_0_of_the_stream_never_changes(entry, device):
    """Numbers that stand in a file: kernels and reference together cannot drift away from them."""
    e, method = entry, METHODS.get(entry["method"])
    if e["method"] == "dropout":
        rows, cols = len(e["kept"]), len(e["kept"][0])
        seed, keep = torch.tensor([e["seed"]]), torch.tensor(e["kept"]).double()
        assert torch.equal((reference.dropout_multiplier(rows, cols, e["p"], seed) > 0).double(), keep)
        got = ops.lora_shrink(
            torch.ones(rows, cols, device=device), torch.eye(cols, device=device), 1.0, e["p"], seed.to(device)
        )
        assert torch.equal((got.cpu() > 0).double(), keep)
        return
    distribution, want = DISTRIBUTIONS[e["distribution"]], torch.tensor(e["values"]).double()
    at = [e["seed"], method, distribution, e["tensor"], e["k"], 2**32, e["row"], e["column"], *want.shape]
    assert torch.equal(reference.basis_elements(*at), want)
    got = ops.basis_fill(torch.empty(0, device=device), None, None, *at)
    assert torch.equal(got.cpu().double(), want)


@pytest.mark.parametrize("distribution", ALL, ids=NAMES.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_slice_is_the_slice_of_the_whole(distribution, dtype, device):
    like = torch.empty(0, dtype=dtype, device=device)
    whole = fill(distribution, 5, 0, 0, 15, 1100, like=like)
    for q0, c0, Q, C in ((0, 0, 15, 1), (3, 127, 4, 130), (7, 1, 8, 1099), (14, 900, 1, 200), (2, 33, 0, 9)):
        part = fill(distribution, 5, q0, c0, Q, C, like=like)
        assert torch.equal(part, whole[q0 : q0 + Q, c0 : c0 + C])
    wide = fill(distribution, 5, 0, 0, 15, 1100, like=like.float())
    assert torch.equal(whole, wide.to(dtype))
    if dtype == torch.float32 or distribution in (2, 5, 6, 7):
        assert torch.equal(whole.double().cpu(), reference.basis_elements(7, 2, distribution, 0, 0, 5, 0, 0, 15, 1100))


FEW_VALUES = pytest.mark.parametrize("distribution", [5, 6, 7], ids=NAMES.get)  # -1, 0 and 1


@FEW_VALUES
@pytest.mark.parametrize("scale", [1.0, 0.75, -3.0, 1 / 3])
def test_signs_and_ternaries_are_exact_in_every_dtype(distribution, scale, dtype, device):
    """Minus the scale, 0 or the scale, once rounded; and what a table of 8 bits would hold are the same numbers."""
    like = torch.empty(0, dtype=dtype, device=device)
    stream = 7, METHODS["randlora"], distribution, 1, 0, 5, 3, 40, 12, 500
    units = reference.basis_elements(*stream)
    got = ops.basis_fill(like, None, None, *stream, scale=scale).cpu()
    assert got.dtype == dtype and torch.equal(got, units.to(dtype) * torch.tensor(scale).to(dtype))
    assert units.unique().tolist() == ([-1, 1] if distribution == 5 else [-1, 0, 1])
    for small in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.equal(units.to(small).double(), units)


@FEW_VALUES
@pytest.mark.parametrize("T", [5, 40])  # U in registers, and in scratch memory
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_whole_numbers_are_exact(distribution, T, transposed, dtype, device):
    """As integers sum them, in every dtype: no element is off, nothing is lost on the way."""
    Q, C = 33, 700
    stream = 9, METHODS["randlora"], distribution, 1, 2, 8
    U = reference.basis_elements(*stream, 0, 0, Q, C).to(torch.int8).int()
    x = torch.randint(-1, 2, (T, C if transposed else Q), dtype=torch.int32)
    want = x @ (U.T if transposed else U)
    assert 2 < want.abs().max() <= 256, "whole numbers that bfloat16 has"
    for fp32 in (False, True):
        y = ops.basis_matmul(x.to(device, dtype), None, None, *stream, Q, C, transposed, fp32)
        assert torch.equal(y.cpu(), want.to(torch.float32 if fp32 else dtype))


def digest() -> str:
    """Of every distribution's elements."""
    pieces = [fill(d, 3, 2, 37, 40, 3000, 2**40 + d) for d in ALL]
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in pieces)).hexdigest()


def isa() -> str:
    return json.loads(ops.build_info())["cpu_isa"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = "import sys; sys.path[:0] = 'tests/ops', 'tests/shared'; import test_rng; print(test_rng.digest(), test_rng.isa())"
    there = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LRKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    bits, ran = there.stdout.split()
    assert bits == digest()
    if ran != isa:
        pytest.skip(f"this CPU has no {isa}: {ran} ran beside {ran}")


def test_threads_do_not_change_a_bit():
    segments = ([700, 300], [33, 50], [0.5, 2.0])
    coef, g, x = torch.randn(3, 83), torch.randn(3, 9, 1000), torch.randn(5, 600)
    stream = 7, METHODS["nola"], DISTRIBUTIONS["uniform8"], 0
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(
            [
                ops.basis_combine(coef, None, *stream, 9, *segments),
                ops.basis_dot(g, *stream, *segments),
                ops.basis_matmul(x, None, None, *stream, 0, 20, 600, 90, False),
                ops.basis_matmul(x, None, None, *stream, 0, 20, 90, 600, True),
                fill(2, 9, 0, 0, 9, 1000),
            ]
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("distribution", ALL, ids=NAMES.get)
def test_layers_and_tokens_do_not_see_each_other(distribution, device):
    """A layer's matrix has the bits it has alone, and so has a row of a product up to 16 tokens."""
    stream = 11, METHODS["nola"], distribution, 3
    segments = ([210, 40], [17, 30], [0.5, 2.0])
    coef, g = torch.randn(5, 47, device=device), torch.randn(5, 4, 250, device=device)
    together = ops.basis_combine(coef, None, *stream, 4, *segments)
    assert all(torch.equal(together[i], ops.basis_combine(coef[i], None, *stream, 4, *segments)) for i in range(5))
    dots = ops.basis_dot(g, *stream, *segments)
    assert all(torch.equal(dots[i], ops.basis_dot(g[i], *stream, *segments)) for i in range(5))
    for transposed in (False, True):
        x = torch.randn(16, 300 if transposed else 40, device=device)
        y = ops.basis_matmul(x, None, None, *stream, 0, 8, 40, 300, transposed)
        for rows in (slice(0, 1), slice(3, 10), slice(15, 16)):
            assert torch.equal(ops.basis_matmul(x[rows], None, None, *stream, 0, 8, 40, 300, transposed), y[rows])


def test_combine_and_dot_are_adjoint(device):
    stream = 5, METHODS["nola"], DISTRIBUTIONS["ternary6"], 0
    segments = ([130, 77, 260], [9, 0, 40], [0.3, 1.0, 2.0])
    coef, g = torch.randn(2, 49, device=device), torch.randn(2, 6, 467, device=device)
    left = (ops.basis_combine(coef, None, *stream, 6, *segments).double() * g).sum()
    right = (coef.double() * ops.basis_dot(g, *stream, *segments)).sum()
    assert abs(left - right) <= 1e-5 * abs(left)


MATMUL = {"x": torch.ones(1, 4), "in_scale": None, "out_scale": None, "seed": 1, "method": 2, "distribution": 2,
          "tensor": 0, "first": 0, "R": 2, "Q": 4, "C": 8, "transposed": False}  # fmt: skip
FILL = {"like": torch.empty(0), "row_scale": None, "col_scale": None, "seed": 1, "method": 2, "distribution": 2,
        "tensor": 0, "first": 0, "R": 2, "q0": 0, "c0": 0, "Q": 4, "C": 8}  # fmt: skip
COMBINE = {"coef": torch.ones(3), "base": None, "seed": 1, "method": 2, "distribution": 2, "tensor": 0, "R": 2,
           "widths": [8], "counts": [3], "scales": [1.0]}  # fmt: skip
DOT = {k: v for k, v in COMBINE.items() if k not in ("coef", "base", "R")} | {"g": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("basis_fill", {"like": torch.empty(0).to(torch.int8)}, "like must be float32, float16 or bfloat16, got int8"),
        ("basis_fill", {"seed": -1}, r"seed must lie in \[0, 2\^63\), got -1"),
        ("basis_fill", {"method": 64}, r"method must lie in \[0, 64\), got 64"),
        ("basis_fill", {"distribution": 1}, r"distribution must lie in \[2, 8\), got 1"),
        ("basis_fill", {"distribution": 8}, r"distribution must lie in \[2, 8\), got 8"),
        ("basis_fill", {"tensor": 2**32}, "tensor must lie in"),
        ("basis_fill", {"tensor": -1}, "tensor must lie in"),
        ("basis_fill", {"first": 2**16 - 1}, r"first must leave all bases below 2\^16, got 2 bases from 65535"),
        ("basis_fill", {"q0": 2 * 2**16 - 3}, r"first must leave all bases below 2\^16"),
        ("basis_fill", {"R": 2**32 + 1}, "R must lie in"),
        ("basis_fill", {"R": 0}, "R must lie in"),
        ("basis_fill", {"c0": 2**36 - 7}, r"columns must stay below 2\^32 blocks of 16"),
        ("basis_fill", {"distribution": 4, "c0": 2**34 - 7}, r"columns must stay below 2\^32 blocks of 4"),
        ("basis_fill", {"Q": -1}, "Q must lie in"),
        ("basis_fill", {"scale": math.inf}, "scale must be finite"),
        ("basis_fill", {"row_scale": torch.ones(3)}, r"row_scale must have shape \[N\] = \[4\], got \[3\]"),
        ("basis_fill", {"col_scale": torch.ones(8).double()}, "col_scale must be float32, got float64"),
        (
            "basis_combine",
            {"tensor": 2**32 - 1, "widths": [4, 4], "counts": [1, 2], "scales": [1.0, 1.0]},
            "tensor must",
        ),
        ("basis_combine", {"counts": [2**16 + 1]}, "counts must lie in"),
        ("basis_combine", {"counts": [4]}, r"coef must have shape \[..., K\] = \[..., 4\], got \[3\]"),
        ("basis_combine", {"base": torch.ones(2, 7)}, r"base must have shape \[R, W\] = \[2, 8\], got \[2, 7\]"),
        (
            "basis_combine",
            {"widths": [], "counts": [], "scales": []},
            "widths, counts and scales must have one entry for each of 1 to 4",
        ),
        ("basis_combine", {"coef": torch.ones(3).half()}, "coef must be float32, got float16"),
        ("basis_dot", {"g": torch.ones(2, 9)}, r"g must have shape \[..., R, W\] = \[..., \*, 8\], got \[2, 9\]"),
        ("basis_dot", {"g": torch.ones(8)}, r"g must have shape \[..., R, W\] = \[..., \*, 8\], got \[8\]"),
        ("basis_dot", {"g": torch.ones(2, 8).half()}, "g must be float32, got float16"),
        ("basis_dot", {"seed": -1}, r"seed must lie in \[0, 2\^63\), got -1"),
        ("basis_dot", {"method": 64}, r"method must lie in \[0, 64\), got 64"),
        ("basis_dot", {"distribution": 8}, r"distribution must lie in \[2, 8\), got 8"),
        ("basis_dot", {"tensor": 2**32}, "tensor must lie in"),
        ("basis_dot", {"widths": [7]}, r"g must have shape \[..., R, W\] = \[..., \*, 7\], got \[2, 8\]"),
        ("basis_dot", {"counts": [2**16 + 1]}, "counts must lie in"),
        ("basis_dot", {"scales": [math.nan]}, "scales must be finite"),
        ("basis_dot", {"scales": []}, "widths, counts and scales must have one entry for each of 1 to 4"),
        ("basis_matmul", {"x": torch.ones(1, 5)}, r"x must have shape \[..., Q\] = \[..., 4\], got \[1, 5\]"),
        ("basis_matmul", {"transposed": True}, r"x must have shape \[..., C\] = \[..., 8\], got \[1, 4\]"),
        ("basis_matmul", {"in_scale": torch.ones(5)}, r"in_scale must have shape \[N\] = \[4\], got \[5\]"),
        ("basis_matmul", {"x": torch.ones(1, 4).double()}, "x must be float32, float16 or bfloat16, got float64"),
        ("basis_matmul", {"x": torch.ones(1, 4).to(torch.float8_e4m3fn)}, "x must be .*, got float8_e4m3fn"),
        ("basis_matmul_", {"y": torch.ones(2, 8)}, r"y must have shape \[..., C\] = \[1, 8\], got \[2, 8\]"),
    ],
)
def test_refusals(op, changed, message, device):
    good = {"basis_fill": FILL, "basis_combine": COMBINE, "basis_dot": DOT, "basis_matmul": MATMUL,
            "basis_matmul_": MATMUL | {"y": torch.ones(1, 8)}}[op]  # fmt: skip
    good, changed = (
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()} for kw in (good, changed)
    )
    getattr(ops, op)(**good)
    for track in (False, True) if reference.OPS[op].mutates is None else (False,):
        kwargs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in (good | changed).items()}
        if track:
            want_gradients(reference.OPS[op], kwargs)
        with pytest.raises(RuntimeError, match=f"lrkern::{op}: {message}"):
            getattr(ops, op)(**kwargs)


def test_scales_do_not_lose_gradients():
    for name in ("in_scale", "out_scale"):
        scale = torch.ones(4 if name == "in_scale" else 8, requires_grad=True)
        with pytest.raises(RuntimeError, match=f"lrkern::basis_matmul: {name} has no gradient"):
            ops.basis_matmul(**MATMUL | {name: scale})
    with pytest.raises(RuntimeError, match="lrkern::basis_fill: row_scale has no gradient"):
        ops.basis_fill(**FILL | {"row_scale": torch.ones(4, requires_grad=True)})


def test_gradients_have_gradients():
    """Each op is linear, so the gradient of its gradient, in direction v, is the op of v."""
    stream = 3, METHODS["nola"], DISTRIBUTIONS["sign"], 0
    segments = ([10], [4], [0.5])
    shape = 0, 5, 6, 9, True
    for op, x, g in (
        (lambda c: ops.basis_combine(c, None, *stream, 2, *segments), torch.randn(4), torch.randn(2, 10)),
        (lambda d: ops.basis_dot(d, *stream, *segments), torch.randn(2, 10), torch.randn(4)),
        (lambda x: ops.basis_matmul(x, torch.arange(9.0), None, *stream, *shape), torch.randn(3, 9), torch.randn(3, 6)),
    ):
        x.requires_grad_(), g.requires_grad_()
        (dx,) = torch.autograd.grad(op(x), x, g, create_graph=True)
        v = torch.randn_like(x)
        (dg,) = torch.autograd.grad(dx, g, v)
        torch.testing.assert_close(dg, op(v))


# ---------------------------------------------------------------------------------------------------- statistics
# One seed, so the outcome is fixed; the bounds are 5 standard deviations, or a chance of 1e-6.


@pytest.mark.parametrize("distribution", ALL, ids=NAMES.get)
def test_moments(distribution):
    u = fill(distribution, 64, Q=256, C=8192).double()
    n, variance = u.numel(), VARIANCE[distribution]
    assert abs(u.mean()) < 5 * math.sqrt(variance / n)
    fourth = (u**4).mean() - variance**2
    assert abs(u.square().mean() - variance) < 5 * math.sqrt(fourth / n) + 1e-12


@pytest.mark.parametrize(
    ("distribution", "weights"), [(2, [1] * 256), (5, [1] * 2), (6, [10923, 43690, 10923]), (7, [1, 2, 1])]
)
def test_levels_have_their_frequencies(distribution, weights):
    u = fill(distribution, 64, Q=256, C=8192, seed=3)
    levels, counts = u.unique(return_counts=True)
    assert len(levels) == len(weights)
    expected = torch.tensor(weights).double() / sum(weights) * u.numel()
    degrees = len(weights) - 1
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees) + 12


def test_uniforms_fill_their_interval():
    for distribution in (3, 4):
        u = fill(distribution, 64, Q=256, C=8192, seed=3)
        counts = torch.histc(u, 1024, -1, 1).double()
        expected = u.numel() / 1024
        assert ((counts - expected) ** 2 / expected).sum() < 1023 + 5 * math.sqrt(2 * 1023)
        assert u.abs().max() < 1


@pytest.mark.parametrize("distribution", ALL, ids=NAMES.get)
def test_neighbours_are_not_correlated(distribution):
    """Columns, blocks, rows, bases, tensors, seeds and methods side by side."""
    u = fill(distribution, 64, Q=256, C=8192, seed=10).double().view(4, 64, 8192)
    E = 128 // reference.BITS[distribution]
    pairs = {
        "column": (u[..., :-1], u[..., 1:]),
        "block": (u[..., :-E], u[..., E:]),
        "row": (u[:, :-1], u[:, 1:]),
        "basis": (u[:-1], u[1:]),
    }
    for what, other in (
        ("tensor", {"tensor": 1}),
        ("seed", {"seed": 11}),
        ("method", {"method": 3}),
        ("far", {"seed": FAR}),
    ):
        pairs[what] = u, fill(distribution, 64, Q=256, C=8192, **{"seed": 10} | other).double().view(4, 64, 8192)
    for what, (a, b) in pairs.items():
        correlation = float((a * b).mean()) / VARIANCE[distribution]
        assert abs(correlation) < 5 / math.sqrt(a.numel()), what
