# SPDX-License-Identifier: Apache-2.0
"""The kernels of random bases: plans of csrc/cuda/basis/, and calls that launch them."""

from collections.abc import Iterator

from tools.families import Kernel, Mixed, Plan, Shape, Timed, streams

# Beyond the registry: equal bits of the random stream.
TESTS = {"tests/ops/test_rng.py": "cpu and adjoint", "tests/nn/test_basis_sizes.py": "nothing"}

# Products of elements made in registers. Sums over rows keep 4 rows by 16 columns of them, and what they are multiplied by is
# the same for a whole warp; sums over columns load one row or eight, at 4 columns a piece at the least, all of it unrolled.
over_rows = streams(4)


def over_columns(blocks: int):
    return lambda distribution, rows: Plan(blocks, wide=rows, code=48 << 10)


ROWS = [("", 1), ("", 8)]


def product(x: str, x_terms: int, u_terms: int, uniform8: bool, transposed: bool) -> Plan:
    """Tiles [128, 32] of x, four for each of its terms, of which three arrive; two of U; scales."""
    shared = 8192 * (4 * x_terms + 2 * u_terms) + 256
    code = 32 << 10 if uniform8 else 72 << 10  # of five distributions, of which a launch runs one
    return Plan(1, shared, "HMMA", flight=20 << 10, code=code, threads=256)


def terms(transposed: bool) -> list[tuple]:
    """Of activations of each type: terms of x and of U, whether U is of 8 bits."""
    mine = {"bf16": [(1, 1, True), (1, 2, True), (2, 1, True), (1, 2, False), (2, 2, False)],
            "f16": [(1, 1, True), (2, 1, True), (2, 2, False)]}  # fmt: skip
    return [(x, *each, transposed) for x, all_of in mine.items() for each in all_of]


KERNELS = {
    "basis_fill": Kernel(streams(6)),
    "basis_combine": Kernel(over_rows),
    "basis_combine_sum": Kernel(streams(8), part=True),
    "basis_dot": Kernel(over_columns(3), rest=ROWS, again={"g": "x"}),
    "basis_dot_sum": Kernel(streams(8), part=True),
    "basis_matmul_x": Kernel(streams(8), part=True),
    "basis_matmul": Kernel(over_rows),
    "basis_matmul_sum": Kernel(streams(8), part=True),
    "basis_matmul_transposed": Kernel(over_columns(2), rest=ROWS),
    "basis_product_x": Mixed(streams(8), rest=[("bf16",), ("f16",)], part=True),
    "basis_product": Mixed(product, rest=[*terms(False), *terms(True)], again={"x": "x", "scratch": "x"}),
}


SHAPES = [
    Shape(k=1024, T=16, I=2048, O=2048, R=8),
    Shape(k=256, T=16, I=4096, O=4096, R=16),
    Shape(T=8192, I=4096, O=4096, R=256),
]


def timed(op, device: str, dtype, shape: Shape) -> Iterator[Timed]:
    """k bases [R, O] for one layer; their first rows as the fixed factor of 16 tokens. flop: of the sums, none for U."""
    import torch

    K, N, R, Q = shape.k or 256, shape.O, shape.R, 1024
    T, stream, spec = min(shape.T, 16), (1, 2, 2, 0), ([N], [K], [1.0])  # seed, NOLA, uniform8, tensor
    like = torch.empty(0, device=device, dtype=dtype)
    coef, g = (torch.randn(*shape, device=device) for shape in ((K,), (R, N)))
    whole = torch.empty(Q, N, device=device, dtype=dtype)
    yield Timed("basis_fill", lambda: op.basis_fill(like, None, None, *stream, 0, R, 0, 0, Q, N), {"u": whole}, Q * N)
    flop, call = 2 * K * R * N, lambda: op.basis_combine(coef, None, *stream, R, *spec)
    yield Timed("basis_combine", call, {"coef": coef, "sum": g}, flop)
    yield Timed("basis_dot", lambda: op.basis_dot(g, *stream, *spec), {"g": g, "dots": coef}, flop)
    short, long = (torch.randn(T, n, device=device).to(dtype) for n in (Q, N))
    for name, x, y, transposed in (
        ("basis_matmul", short, long, False),
        ("basis_matmul_transposed", long, short, True),
    ):
        call = lambda x=x, transposed=transposed: op.basis_matmul(x, None, None, *stream, 0, R, Q, N, transposed)
        yield Timed(name, call, {"x": x, "y": y}, 2 * T * Q * N)
    if shape.T > 16:
        yield from products(op, device, dtype, shape, stream)


def products(op, device: str, dtype, shape: Shape, stream: tuple[int, ...]) -> Iterator[Timed]:
    """VeRA's forward with fp32 vectors over activations of 16 bits: u = x A^T in fp32, y += b (.) ((d (.) u) B)."""
    import torch

    T, I, O, R = shape.T, shape.I, shape.O, shape.R
    x, y = (torch.randn(T, n, device=device).to(dtype) for n in (I, O))
    u, d, b = (torch.randn(*n, device=device) for n in ((T, R), (R,), (O,)))
    call = lambda: op.basis_matmul(x, None, None, *stream, 0, R, R, I, True, True)
    yield Timed("basis_product", call, {"x": x, "u": u}, 2 * T * I * R)
    call = lambda: op.basis_matmul_(y, u, d, b, *stream, 0, R, R, O, False)
    yield Timed("basis_product", call, {"y": y, "u": u}, 2 * T * R * O)
