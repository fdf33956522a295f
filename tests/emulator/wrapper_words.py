# SPDX-License-Identifier: Apache-2.0
"""What the words that wrappers.cu dumps must be, in plain Python integers: of the emulator's build and of the device's.

python tests/emulator/wrapper_words.py PROGRAM: runs it on random input, prints a line per wrapper, exit status 1 if one
is off. Data movement is bit-equal; mma within the rounding of its fp32 sum.
"""

import random
import struct
import subprocess
import sys
from collections.abc import Iterator

THREADS, WORDS, GLOBALS = 64, 108, 4
VALUES = (1.00390625, -3.1415927, 65504.0, 70000.0, 6.1e-5, 3e-8, -0.0, 1e-45, 1e30)
MASK = 0xFFFFFFFF


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def f32_bits(x: float) -> int:
    return struct.unpack("I", struct.pack("f", x))[0]


def f32_of(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def f16_bits(x: float) -> int:
    try:
        return struct.unpack("H", struct.pack("e", x))[0]
    except OverflowError:
        return 0x7C00 | (0x8000 if x < 0 else 0)


def f16_of(bits: int) -> float:
    return struct.unpack("e", struct.pack("H", bits))[0]


def bf16_bits(x: float) -> int:
    bits = f32_bits(x)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def bf16_of(bits: int) -> float:
    return f32_of(bits << 16)


def tile_of(rng: random.Random) -> list[list[int]]:
    """[64, 64] small halves: the same bits stand for other numbers in bf16 and in f16, and products are exact in both."""
    return [[f16_bits(float(rng.randint(-8, 8))) for _ in range(64)] for _ in range(64)]


def signed(x: int) -> int:
    return x - (1 << 32) if x & 0x80000000 else x


def expected(tile: list[list[int]]) -> Iterator[tuple[str, int, list[int]]]:
    """(wrapper, word, its 64 values); mma is left to mma_faults."""
    T = range(THREADS)
    lane, g, q = [t % 32 for t in T], [t % 32 // 4 for t in T], [t % 4 * 2 for t in T]

    def pairs(first, second):
        return [tile[r][c] | tile[r2][c2] << 16 for (r, c), (r2, c2) in zip(first, second, strict=True)]

    for form, matrices, word in (("x4", 4, 0), ("x2", 2, 8)):
        for i in range(matrices):  # matrix i of the tile: x4 at rows 8 (i % 2), columns 8 (i / 2)
            r, c = (i % 2 * 8, i // 2 * 8) if form == "x4" else (0, i * 8)
            rt, ct = (r, c) if form == "x4" else (i * 8, 0)
            along = pairs([(r + g[t], c + q[t]) for t in T], [(r + g[t], c + q[t] + 1) for t in T])
            across = pairs([(rt + q[t], ct + g[t]) for t in T], [(rt + q[t] + 1, ct + g[t]) for t in T])
            yield f"ldmatrix_{form}", word + i, along
            yield f"ldmatrix_{form}_trans", word + matrices + i, across

    yield "shfl", 20, [t // 32 * 32 + 5 for t in T]
    yield "shfl_xor", 21, [t ^ 9 for t in T]
    yield "shfl_down", 22, [t + 3 if lane[t] + 3 < 32 else t for t in T]
    yield "shfl_up", 23, [t - 3 if lane[t] >= 3 else t for t in T]
    yield "ballot", 24, [sum(1 << n for n in range(0, 32, 3))] * THREADS
    yield "any_lane", 25, [int(t >= 32) for t in T]
    yield "all_lanes", 26, [int(t < 32) for t in T]
    yield "sync_warp", 27, [1000 + (t ^ 1) for t in T]
    yield "sync_named", 28, [1000 + 63 - t for t in T]
    yield "sync_named", 29, [2000 + 31 - t if t < 32 else 0 for t in T]

    flat = [v for row in tile for v in row]
    for k, count in enumerate((0, 3, 8)):
        for i in range(4):
            own = [[v if j < count else 0 for j, v in enumerate(flat[t * 8 : t * 8 + 8])] for t in T]
            yield "cp_async_16_zfill", 30 + 4 * k + i, [own[t][2 * i] | own[t][2 * i + 1] << 16 for t in T]

    for k, value in enumerate(map(f32, VALUES)):
        scaled = [f32(value * (1 + t % 7)) for t in T]
        for name, bits, at in (("bf16", bf16_bits, 0), ("f16", f16_bits, 1)):
            yield f"from_float_fast<{name}>", 42 + 4 * k + at, [bits(v) for v in scaled]
            yield f"pack_fast<{name}>", 44 + 4 * k + at, [bits(v) | bits(value) << 16 for v in scaled]
    yield "to_float_fast(f16)", 78, [f32_bits(f16_of(flat[t])) for t in T]
    yield "to_float_fast(bf16)", 79, [flat[t] << 16 for t in T]
    yield "to_float_fast(f16)", 80, [f32_bits(f16_of(t * 9)) for t in T]  # subnormals

    mixed, falling = [t * 2654435761 & MASK for t in T], [7 - t for t in T]
    for word, name, values, fold in (
        (81, "add", mixed, sum), (82, "add", falling, sum), (83, "min", mixed, min), (84, "min", falling, min),
        (85, "max", mixed, max), (86, "max", falling, max), (87, "and", [m | 0x80 for m in mixed], all_bits),
        (88, "or", [t & 5 for t in T], any_bit), (89, "xor", mixed, odd_bits),
    ):  # fmt: skip
        halves = [fold(values[:32]) & MASK, fold(values[32:]) & MASK]
        yield f"__reduce_{name}_sync", word, [halves[t // 32] for t in T]
    for i, v in enumerate((sum(T), max(mixed), 7, f32_bits(0.25 * sum(T)))):
        yield (
            ("atomicAdd shared", "atomicMax shared", "atomicCAS shared", "atomicAdd float shared")[i],
            90 + i,
            [v] * 64,
        )
    yield "clock64, __threadfence", 94, [1] * THREADS
    e2m1 = [(0, 0.5, 1, 1.5, 2, 3, 4, 6)[t % 8] for t in T]
    low = [bf16_bits(e2m1[t]) | (t // 8 % 2) << 15 for t in T]
    yield "mul_bf16x2", 99, [low[t] | bf16_bits(f32(1.5 * bf16_of(flat[t]))) << 16 for t in T]
    for i in (0, 1):
        yield "byte_perm", 104 + i, [flat[t * 8 + i] | flat[t * 8 + 2 + i] << 16 for t in T]
    for name, word in (("load_16, store_shared_16", 95), ("store_16", 100)):
        for i in range(4):
            yield name, word + i, [flat[t * 8 + 2 * i] | flat[t * 8 + 2 * i + 1] << 16 for t in T]


def all_bits(values: list[int]) -> int:
    out = MASK
    for v in values:
        out &= v
    return out


def any_bit(values: list[int]) -> int:
    out = 0
    for v in values:
        out |= v
    return out


def odd_bits(values: list[int]) -> int:
    out = 0
    for v in values:
        out ^= v
    return out


def mma_faults(tile: list[list[int]], out: list[int]) -> Iterator[tuple[str, str]]:
    for name, first, value in (("mma_16816 bf16", 12, bf16_of), ("mma_16816 f16", 16, f16_of)):
        a = [[value(v) for v in row[:16]] for row in tile[:16]]
        b = [[value(v) for v in row[:16]] for row in tile[:8]]
        fault = ""
        for t in range(THREADS):
            for i in range(4):
                row, col = t % 32 // 4 + i // 2 * 8, t % 4 * 2 + i % 2
                terms = [x * y for x, y in zip(a[row], b[col], strict=True)]
                want, got = sum(terms) + i + 1, f32_of(out[t * WORDS + first + i])
                if not abs(got - want) <= 1e-6 * (sum(map(abs, terms)) + i + 1):
                    fault = fault or f"thread {t}, element {i}: {got}, expected {want}"
        yield name, fault


def faults(tile: list[list[int]], out: list[int]) -> dict[str, str]:
    """{wrapper: the first fault, or ""}."""
    found: dict[str, str] = {}
    for name, word, values in expected(tile):
        wrong = [(t, out[t * WORDS + word], v) for t, v in enumerate(values) if out[t * WORDS + word] != v]
        text = "thread {}, word {}: {:#x}, expected {:#x}".format(wrong[0][0], word, *wrong[0][1:]) if wrong else ""
        found[name] = found.get(name) or text
    found.update(mma_faults(tile, out))
    globals_ = out[THREADS * WORDS :]
    want = [3 * THREADS, f32_bits(0.5 * THREADS), THREADS, THREADS]
    for name, at in (("atomicAdd global", 0), ("atomicAdd float global", 1), ("atomicAdd 64-bit global", 2)):
        size = 2 if at == 2 else 1
        off = globals_[at : at + size] != want[at : at + size]
        found[name] = f"{globals_[at : at + size]}, expected {want[at : at + size]}" if off else ""
    return found


def run(program: str, seed: int = 0) -> dict[str, str]:
    """Runs a build of wrappers.cu; {wrapper: fault or ""}."""
    tile = tile_of(random.Random(seed))
    data = struct.pack("4096H", *(v for row in tile for v in row))
    done = subprocess.run([program], input=data, capture_output=True)
    count = THREADS * WORDS + GLOBALS
    if done.returncode or len(done.stdout) != 4 * count:
        raise RuntimeError(f"{program}: exit status {done.returncode}, {done.stderr.decode(errors='replace')}")
    return faults(tile, list(struct.unpack(f"{count}I", done.stdout)))


if __name__ == "__main__":
    found = run(sys.argv[1])
    for name, fault in found.items():
        print(f"{name:<28}{fault or 'ok'}")
    sys.exit(any(found.values()))
