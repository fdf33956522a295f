# SPDX-License-Identifier: Apache-2.0
"""Where a layer stands in a model, by its name."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Place(NamedTuple):
    """model.layers.3.self_attn.q_proj: 3, between "model.layers." and ".self_attn.q_proj". The index is 0 where a name has no number."""

    before: str
    index: int
    after: str


def place_of(name: str) -> Place:
    at = _NUMBER.search(name)
    return Place(name[: at.start()], int(at[0]), name[at.end() :]) if at else Place(name, 0, "")


def refuse_places(who: str, settings: Mapping[str, Mapping[str, Any]], *names: str) -> None:
    """Of the settings that a user gave for a model: these are for ``plan`` to find."""
    for given in settings.values():
        for name in names:
            if name in given:
                raise ValueError(
                    f"{who}: {name} must be left out, it follows from a layer's place, got {given[name]!r}"
                )
