# SPDX-License-Identifier: Apache-2.0
"""Cases that hold every pair of values of every two axes: what a few hundred tests can show of a grid of billions."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Case = dict[str, Any]


def all_pairs(axes: dict[str, list], feasible: Callable[[Case], bool], seed: int = 0) -> Iterator[Case]:
    """Cases over the axes, greedily, until every feasible pair of values has been in one. feasible(case) must hold for a
    case with fewer axes where it holds for one with more. A pair that fits into no case raises."""
    rng, names = random.Random(seed), list(axes)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b])))
        if feasible({a: axes[a][x], b: axes[b][y]})
    }

    def pairs_of(at, name):
        """Of one value with all others."""
        for n in at:
            if n != name:
                a, b = sorted((n, name), key=names.index)
                yield a, at[a], b, at[b]

    left = sorted(pairs)
    while left:
        a, x, b, y = left[0]
        at = {a: x, b: y}
        rest = [n for n in names if n not in at]
        rng.shuffle(rest)

        for name in rest:
            fits = [v for v in range(len(axes[name])) if feasible({n: axes[n][i] for n, i in {**at, name: v}.items()})]
            if not fits:
                raise ValueError(f"no value of {name} goes with { {n: axes[n][i] for n, i in at.items()} }")
            at[name] = max(
                fits, key=lambda v, name=name: (sum(p in pairs for p in pairs_of({**at, name: v}, name)), rng.random())
            )
        case = {n: axes[n][at[n]] for n in names}
        pairs -= {(a, at[a], b, at[b]) for a, b in itertools.combinations(names, 2)}
        left = [p for p in left if p in pairs]
        yield case
