# SPDX-License-Identifier: Apache-2.0
"""The kernels of random bases: plans of csrc/cuda/basis/, and calls that launch them."""

from collections.abc import Iterator

from tools.families import Kernel, Timed, streams

# Beyond the registry: equal bits of the random stream.
TESTS = {"tests/ops/test_rng.py": "cpu and adjoint", "tests/nn/test_basis_sizes.py": "nothing"}

# Products of elements made in registers. Sums over rows keep 4 rows by 16 columns of them, and what they are multiplied by
# is the same for a whole warp; sums over columns load eight rows at 4 columns a piece, more where there are more.
over_rows, over_columns = streams(4), streams(3, wide=8)

KERNELS = {
    "basis_fill": Kernel(streams(6)),
    "basis_combine": Kernel(over_rows),
    "basis_combine_sum": Kernel(streams(8), part=True),
    "basis_dot": Kernel(over_columns),
    "basis_dot_sum": Kernel(streams(8), part=True),
    "basis_matmul_x": Kernel(streams(8), part=True),
    "basis_matmul": Kernel(over_rows),
    "basis_matmul_sum": Kernel(streams(8), part=True),
    "basis_matmul_transposed": Kernel(over_columns),
}


def timed(op, device: str, dtype, T: int, N: int, R: int) -> Iterator[Timed]:
    """256 bases [R, N] for one layer; their first rows as the fixed factor of 16 tokens. flop: of the sums, none for U."""
    import torch

    K, Q = 256, 1024
    T, stream, spec = min(T, 16), (1, 2, 2, 0), ([N], [K], [1.0])  # seed, NOLA, uniform8, tensor
    like = torch.empty(0, device=device, dtype=dtype)
    coef, g = (torch.randn(*shape, device=device) for shape in ((K,), (R, N)))
    whole = torch.empty(Q, N, device=device, dtype=dtype)
    yield Timed("basis_fill", lambda: op.basis_fill(like, None, None, *stream, 0, R, 0, 0, Q, N), [whole], Q * N)
    yield Timed("basis_combine", lambda: op.basis_combine(coef, None, *stream, R, *spec), [coef, g], 2 * K * R * N)
    yield Timed("basis_dot", lambda: op.basis_dot(g, *stream, *spec), [coef, g], 2 * K * R * N)
    short, long = (torch.randn(T, n, device=device).to(dtype) for n in (Q, N))
    for name, x, transposed in (("basis_matmul", short, False), ("basis_matmul_transposed", long, True)):
        call = lambda x=x, transposed=transposed: op.basis_matmul(x, None, None, *stream, 0, R, Q, N, transposed)
        yield Timed(name, call, [short, long], 2 * T * Q * N)
