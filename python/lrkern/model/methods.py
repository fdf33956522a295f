# SPDX-License-Identifier: Apache-2.0
"""The methods that ``adapt`` knows: all that the kinds of layers say they are."""

import inspect
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from ..nn.linear import AdapterLinear


class About(NamedTuple):
    """layer: the class; fixed: the settings that make it this method; settings: all others with their defaults; paper: its source."""

    layer: type[AdapterLinear]
    fixed: dict[str, Any]
    settings: dict[str, Any]
    paper: str


class Methods(dict[str, About]):
    """``About`` by name; prints as a table, in a notebook too."""

    def _rows(self) -> list[tuple[str, str, str]]:
        said = lambda settings: ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return [(name, said(about.settings), about.paper) for name, about in self.items()]

    def __str__(self) -> str:
        return "\n".join(f"{name}\n  {paper}\n  {settings}" for name, settings, paper in self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in ("method", "settings", "paper"))
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows())
        return f"<table><tr>{head}</tr>{body}</table>"


def methods() -> Methods:
    """The methods that ``adapt`` puts into a model, by name: their class, settings with defaults, and papers. Prints as a table."""
    found = {
        name: About(cls, method.settings, _settings(cls, method.settings), method.paper)
        for cls in AdapterLinear.KINDS.values()
        for name, method in cls.__dict__.get("METHODS", {}).items()
    }
    return Methods(sorted(found.items()))


def _settings(cls: type[AdapterLinear], fixed: Mapping[str, Any]) -> dict[str, Any]:
    given = list(inspect.signature(cls.from_linear).parameters.values())[1:]
    return {p.name: p.default for p in given if p.name not in fixed}


def method_of(layer: AdapterLinear) -> str | None:
    """By name the method that a layer is, or None: of several the one that says most about its settings."""
    fits = lambda method: all(layer.settings.get(name) == value for name, value in method.settings.items())
    found = [(len(method.settings), name) for name, method in type(layer).METHODS.items() if fits(method)]
    return max(found)[1] if found else None
