# SPDX-License-Identifier: Apache-2.0
"""The shared headers, through lrkern._host: known answers of Philox, every 16-bit float, the dropout mask's addressing."""

import numpy as np
import pytest
import torch

from lrkern import functional, limits, reference

host = pytest.importorskip(
    "lrkern._host", reason="lrkern._host is not built for this Python (LRK_HOST=OFF, or a wheel)"
)

F, PI = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = 0x299F31D0_A4093822
KNOWN_ANSWERS = [  # Random123's kat_vectors, and counters 1 and 2
    (10, (0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, (1, 0, 0, 0), 0, "f8e4cca4 5cb200db b1a574eb 097eff67"),
    (10, (2, 0, 0, 0), 0, "04faa329 51c732a6 241513ad 459135e4"),
    (10, (F, F, F, F), 0xFFFFFFFF_FFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, PI_KEY, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    (7, (0, 0, 0, 0), 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, (F, F, F, F), 0xFFFFFFFF_FFFFFFFF, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, PI_KEY, "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, expected):
    out = host.philox4x32(np.array(counter, np.uint32), key, rounds)
    assert " ".join(f"{word:08x}" for word in out) == expected


def test_philox_is_elementwise():
    counters = np.random.default_rng(0).integers(0, 2**32, (3, 5, 4), dtype=np.uint32)
    out = host.philox4x32(counters, 77)
    assert out.shape == (3, 5, 4)
    assert np.array_equal(out[1, 2], host.philox4x32(counters[1, 2], 77))


def philox_reference(counter, key):
    """Philox4x32-10 once more, in Python integers."""
    c, k = list(counter), [key & F, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & F, (a >> 32) ^ c[3] ^ k[1], a & F]
        k = [(k[0] + 0x9E3779B9) & F, (k[1] + 0xBB67AE85) & F]
    return c


def test_dropout_mask_is_the_written_stream():
    """rng.h's addressing, spelled out: counter (column block, row, 0, method 1 and distribution 1), 8 columns a block."""
    seed, p = 2**63 - 5, 0.3
    mask = host.dropout_mask(seed, 3, 20, p, row0=2**32 - 3, col0=5)
    for i in range(3):
        for j in range(20):
            row, column = 2**32 - 3 + i, 5 + j
            words = philox_reference((column // 8, row, 0, 1 << 16 | 1 << 22), seed)
            bits = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
            assert mask[i, j] == (bits >= round(65536 * p))


def test_dropout_mask_of_a_slice_is_the_slice_of_the_mask():
    whole = host.dropout_mask(3, 40, 70, 0.5)
    for row, column in [(0, 0), (7, 3), (39, 69), (11, 8)]:
        part = host.dropout_mask(3, 40 - row, 70 - column, 0.5, row0=row, col0=column)
        assert np.array_equal(part, whole[row:, column:])


@pytest.mark.parametrize("distribution", reference.BITS)
def test_basis_elements_are_the_reference(distribution):
    """Any corner of any basis, over block borders; and the golden file's numbers through tests/ops/test_rng.py."""
    seed, row0 = 2**63 - 9, 2**32 - 4
    for basis, tensor, col0 in ((0, 0, 0), (3, 2**32 - 1, 61), (2**16 - 1, 5, 128)):
        got = host.basis_elements(seed, 3, distribution, 3, 150, basis, tensor, row0, col0)
        want = reference.basis_elements(seed, 3, distribution, tensor, basis, 2**32, row0, col0, 3, 150)
        assert got.dtype == np.float32 and np.array_equal(got, want.numpy())


def test_dropout_rates():
    assert host.dropout_mask(0, 64, 64, 0.0).all()
    assert not host.dropout_mask(0, 64, 64, 1.0).any()
    for p in (0.1, 0.5, 0.9):
        n = 1000 * 1000
        dropped = n - int(host.dropout_mask(11, 1000, 1000, p).sum())
        assert abs(dropped - n * p) < 5 * (n * p * (1 - p)) ** 0.5  # five standard deviations
    assert not np.array_equal(host.dropout_mask(1, 8, 64, 0.5), host.dropout_mask(2, 8, 64, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seed=-1, rows=1, cols=1, p=0.5), "seed"),
        (dict(seed=0, rows=1, cols=1, p=1.5), "p must be"),
        (dict(seed=0, rows=1, cols=1, p=float("nan")), "p must be"),
        (dict(seed=0, rows=2, cols=1, p=0.5, row0=2**32 - 1), "rows"),
        (dict(seed=0, rows=1, cols=2, p=0.5, col0=2**35 - 1), "columns"),
        (dict(seed=0, rows=-1, cols=2, p=0.5), "rows"),
    ],
)
def test_dropout_mask_refuses_what_it_cannot_address(arguments, message):
    with pytest.raises(ValueError, match=message):
        host.dropout_mask(**arguments)


# ---- 16-bit floats


ALL_BITS = np.arange(65536, dtype=np.uint16)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_all_16_bit_floats_convert_exactly(name, dtype):
    ours = getattr(host, f"{name}_to_float")(ALL_BITS)
    truth = torch.from_numpy(ALL_BITS.view(np.int16)).view(dtype).float().numpy()
    nan = np.isnan(truth)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan].view(np.uint32), truth[~nan].view(np.uint32))
    back = getattr(host, f"{name}_from_float")(ours)
    assert np.array_equal(back[~nan], ALL_BITS[~nan])
    assert np.isnan(getattr(host, f"{name}_to_float")(back[nan])).all()


def interesting_floats() -> np.ndarray:
    """Random bit patterns, all exponents; and for every 16-bit float the fp32 neighbours of it and of the tie above it."""
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 2**32, 2_000_000, dtype=np.uint32), (ALL_BITS.astype(np.uint32) << 16)]
    with np.errstate(invalid="ignore"):
        half = ALL_BITS.view(np.float16).astype(np.float32)
        next_half = (ALL_BITS + np.uint16(1)).view(np.float16).astype(np.float32)
        tie = np.where(np.isfinite(half) & np.isfinite(next_half), half + (next_half - half) / 2, half)
    tie = tie.astype(np.float32).view(np.uint32)
    bf16_tie = (ALL_BITS.astype(np.uint32) << 16) | 0x8000
    edges = np.array(
        [65519.996, 65520.0, 65504.0, 2**-24, 2**-25, 3.3895314e38, np.inf, -np.inf, 0.0, -0.0], np.float32
    )
    for centre in (half.view(np.uint32), tie, bf16_tie, edges.view(np.uint32)):
        pieces += [centre, centre + np.uint32(1), centre - np.uint32(1)]
    return np.concatenate(pieces).view(np.float32)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_is_to_nearest_even(name, dtype):
    x = interesting_floats()
    ours = getattr(host, f"{name}_from_float")(x)
    truth = bits(torch.from_numpy(x).to(dtype))
    nan = np.isnan(x)
    assert np.array_equal(ours[~nan], truth[~nan])
    assert np.isnan(getattr(host, f"{name}_to_float")(ours[nan])).all()
    if name == "f16":  # numpy rounds by code of its own
        with np.errstate(over="ignore"):
            assert np.array_equal(ours[~nan], x[~nan].astype(np.float16).view(np.uint16))


# ---- choices


def test_explain_says_what_and_why():
    wide = host.explain("lora_backward", T=4096, O=4096, R=4, dtype="bfloat16", device="cuda")
    assert wide["fused"]
    assert wide["saved_bytes"] == 4096 * 4096 * 2
    assert wide["paid_bytes"] < wide["saved_bytes"]
    assert "one pass" in wide["why"]
    narrow = host.explain("lora_backward", T=4096, O=4096, R=512, dtype="bfloat16", device="cuda")
    assert not narrow["fused"]
    assert "two passes" in narrow["why"]
    shrink = host.explain("lora_shrink", T=8, N=8192, R=16)
    assert shrink["planes"] == shrink["chunks"] == 32 and "32 partial sums" in shrink["why"]
    few = host.explain("basis_matmul", T=1, Q=256, C=4096, device="cpu")
    assert not few["scratch"]
    many = host.explain("basis_matmul", T=512, Q=4096, C=4096, device="cpu")
    assert many["scratch"]
    assert many["rows"] == 4096
    assert many["rows"] * many["cols"] * 4 <= 4 << 20
    assert "scratch memory" in many["why"]
    busy = host.explain("lora_backward", T=4096, O=4096, R=4, device="cpu", threads=64)
    assert not busy["fused"] and "too few tasks for 64 threads" in busy["why"]
    assert host.explain("lora_backward", T=4096, O=4096, R=4, device="cpu", threads=4)["fused"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", host.choices())
def test_every_choice_answers(name, device):
    choice = host.choices()[name]
    assert choice["rule"] and choice["numbers"]
    assert {"device", "arch"} <= set(choice["arguments"])
    asked = [argument for argument, default in choice["arguments"].items() if default is None]
    assert asked
    for size in (1, 16, 100, 4096):
        answer = host.explain(name, **dict.fromkeys(asked, size), device=device)
        assert answer["why"] and len(answer) > 1


def test_choices_by_the_shape():
    """Facts beside the rules of the contracts."""
    assert host.explain("lora_wgrad", T=600)["splits"] == 5
    assert host.explain("lora_wgrad", T=600, device="cpu")["splits"] == 3
    assert host.explain("lora_shrink", T=8, N=64, R=64, device="cpu")["tasks"] == 16
    assert host.explain("lora_shrink", T=48, N=64, R=64, device="cpu")["tasks"] == 2
    assert host.explain("multi_lora_shrink", T=8, N=8192)["split"]
    spans = {T: host.explain("lora_shrink", T=T, N=4096, R=16)["span"] for T in (1, 4096, 8192, 16384)}
    assert spans == {1: 1, 4096: 1, 8192: 4, 16384: 8}, "chunks of a block: the fewest rounds of blocks"
    assert host.explain("lora_shrink", T=1 << 20, N=1024, R=16)["planes"] == 1
    assert host.explain("multi_lora_shrink", T=8192, N=8192)["split"]  # where one block a tile used half of a wave
    assert not host.explain("multi_lora_shrink", T=528 * 64, N=8192)["split"]
    assert not host.explain("multi_lora_shrink", T=132 * 64, N=8192, R=200)["split"]
    assert host.explain("multi_lora_wgrad", T=600, K=2)["splits"] == 2  # of both slots
    assert host.explain("basis_combine", R=1, W=64, K=1024)["splits"] == 32
    assert host.explain("basis_dot", T=1, K=4)["splits"] == 128
    assert host.explain("basis_matmul", T=1, Q=4096, C=64)["splits"] == 64
    assert host.explain("basis_matmul", T=1, Q=4096, C=64, transposed=True)["splits"] == 1


def test_randlora_chooses_as_python_does():
    for T in (1, 16, 17, 100, 511, 512, 513, 2048):
        for I in (1, 64, 1000, 1024):
            for O in (1, 64, 1024, 4096):
                assert host.explain("randlora", T=T, I=I, O=O)["way"] == functional.randlora_way(T, I, O)


def test_limits_are_those_of_python():
    kept = {"page": limits.PAGE, "plan_rows": limits.PLAN_ROWS, "max_rank": limits.MAX_RANK}
    assert host.limits() == kept | {"dtypes": tuple(str(t).removeprefix("torch.") for t in limits.DTYPES)}
    for T in (0, 1, 63, 64, 65, 1000):
        for A in (0, 1, 7, 2000):
            assert host.explain("multi_lora_plan", T=T, A=A)["length"] == limits.plan_length(T, A)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("gemm",), ValueError, "choice must be"),
        (("lora_backward", 1, 2), TypeError, "explain"),
        (("lora_backward",), TypeError, "lora_backward needs"),
    ],
)
def test_explain_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        host.explain(*arguments)
    with pytest.raises(TypeError, match="randlora has no argument R"):
        host.explain("randlora", T=1, I=1, O=1, R=1)
    with pytest.raises(ValueError, match="dtype must be"):
        host.explain("lora_backward", T=1, O=1, R=1, dtype="int8")
    with pytest.raises(ValueError, match="device must be"):
        host.explain("lora_backward", T=1, O=1, R=1, device="tpu")


def test_build_info():
    import lrkern

    info = host.build_info()
    assert info["version"] == lrkern.__version__
    assert info["target_abi"] == "2.11"
    assert isinstance(info["with_cuda"], bool)
    assert bool(info["cuda_archs"]) == info["with_cuda"]


def test_which_products_kernels_by_cutlass_take():
    product = lambda **q: host.explain("mx_product", **{"T": 4096, "O": 4096, "K": 4096, "arch": 100, **q})
    assert all(
        product(arch=arch, bits=bits, R=R)["pays"] for arch in (100, 120) for bits in (4, 8) for R in (0, 16, 512)
    )
    few = product(T=63)
    assert few["fits"] and not few["pays"] and "tile of 128 rows" in few["why"]
    for q, why in (
        ({"arch": 90}, "sm_100a and sm_120a"),
        ({"arch": 103}, "sm_100a and sm_120a"),
        ({"device": "cpu"}, "sm_100a and sm_120a"),
        ({"dtype": "float32"}, "give bfloat16"),
        ({"K": 4104}, "no multiple of 32"),
        ({"K": 4128, "bits": 8}, "no multiple of 128"),
        ({"O": 4100}, "no whole vectors"),
        ({"R": 12}, "no whole vectors"),
        ({"T": 0}, "T and O lie in"),
        ({"T": 8388481}, "T and O lie in"),
    ):
        assert not product(**q)["fits"] and why in product(**q)["why"], q
    assert product(K=4128)["fits"]
    gemm = lambda **q: host.explain("lora_gemm", **{"T": 4096, "N": 4096, "K": 4096, "R": 16, "arch": 100, **q})
    assert gemm()["pays"] and gemm()["tiles"] == 32 * 32 and gemm()["cluster"] == 1
    assert (
        gemm(T=8)["fits"] and not gemm(T=8)["pays"] and not gemm(dtype="float32")["fits"] and not gemm(arch=120)["fits"]
    )
