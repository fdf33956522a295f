# SPDX-License-Identifier: Apache-2.0
"""Writes stream0.json from docs/rng.md alone, in Python integers. Run once: version 0 of the stream does not change."""

import json
import random
from pathlib import Path

DISTRIBUTIONS = {"uniform8": (2, 8), "uniform16": (3, 16), "uniform32": (4, 32), "sign": (5, 1), "ternary6": (6, 16),
                 "ternary4": (7, 2)}  # fmt: skip
METHODS = {"dropout": 1, "nola": 2, "vera": 3, "randlora": 4}


def words(c, seed):
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // 2**32 ^ c[1] ^ k0, p1 % 2**32, p0 // 2**32 ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return sum(w << 32 * i for i, w in enumerate(c))


def bits(method, number, b, seed, tensor, k, row, column):
    block = words([column // (128 // b), row, tensor, k + (METHODS[method] << 16) + (number << 22)], seed)
    return block >> column % (128 // b) * b & 2**b - 1


def value(name, b, h):
    if name.startswith("uniform"):
        h, b = (h >> 8, 24) if b == 32 else (h, b)
        return (2 * h + 1) / 2**b - 1
    return {"sign": lambda: 1 - 2 * h, "ternary4": lambda: h % 2 - h // 2,
            "ternary6": lambda: -1 if h < 10923 else int(h >= 54613)}[name]()  # fmt: skip


def main():
    rng, entries = random.Random(0), []
    for method in ("nola", "vera", "randlora"):
        for name, (number, b) in DISTRIBUTIONS.items():
            for far in (False, True):
                top = lambda limit, n, far=far: limit - n if far else rng.randrange(1, 1000)
                at = dict(seed=rng.randrange(2**63), tensor=top(2**32, 1), k=top(2**16, 1), row=top(2**32, 2))
                at["column"] = top(2**32 * (128 // b), 12)
                rows = [[value(name, b, bits(method, number, b, at["seed"], at["tensor"], at["k"], at["row"] + i,
                                             at["column"] + j)) for j in range(12)] for i in range(2)]  # fmt: skip
                entries.append(dict(method=method, distribution=name, **at, values=rows))
    for p in (0.1, 0.5):
        seed, keep = rng.randrange(2**63), int(p * 65536 + 0.5)
        kept = [
            [int(bits("dropout", 1, 16, seed, 0, 0, row, column) >= keep) for column in range(40)] for row in range(3)
        ]
        entries.append(dict(method="dropout", p=p, seed=seed, kept=kept))
    lines = ",\n".join(map(json.dumps, entries))
    Path(__file__).with_name("stream0.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
