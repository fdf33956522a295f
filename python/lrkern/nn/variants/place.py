# SPDX-License-Identifier: Apache-2.0
"""Where a layer stands in a model, by its name."""

import re
from typing import NamedTuple

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Place(NamedTuple):
    """model.layers.3.self_attn.q_proj: 3, between "model.layers." and ".self_attn.q_proj". The index is 0 where a name has no number."""

    before: str
    index: int
    after: str


def place_of(name: str) -> Place:
    at = _NUMBER.search(name)
    return Place(name[: at.start()], int(at[0]), name[at.end() :]) if at else Place(name, 0, "")
