# SPDX-License-Identifier: Apache-2.0
"""What ``patch`` and ``report`` say of a model, in text and in a notebook."""

from dataclasses import dataclass
from html import escape

SHOWN = 3  # names of one reason


@dataclass
class Report:
    """Per adapted layer its name and None (fused) or the reason why PEFT's own code runs. True where all are fused."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> int:
        return sum(why is None for why in self.layers.values())

    @property
    def reasons(self) -> dict[str, list[str]]:
        """The names of the layers that are not fused, by reason."""
        found: dict[str, list[str]] = {}
        for name, why in self.layers.items():
            if why is not None:
                found.setdefault(why, []).append(name)
        return found

    def __bool__(self) -> bool:
        return self.fused == len(self.layers)

    def __str__(self) -> str:
        rest = [f"  {_count(names)}: PEFT's own code, {why}: {_few(names)}" for why, names in self.reasons.items()]
        return "\n".join([self._title(), *rest])

    def _repr_html_(self) -> str:
        rows = [("lrkern", self.fused, "", "")] if self.fused else []
        rows += [("PEFT's own code", len(names), why, _few(names)) for why, names in self.reasons.items()]
        head = "".join(f"<th>{title}</th>" for title in ("runs", "layers", "why", "which"))
        body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><caption>{self._title()}</caption><tr>{head}</tr>{body}</table>"

    def _title(self) -> str:
        return f"lrkern: {self.fused} of {len(self.layers)} adapted layers fused"


def _count(names: list[str]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names)} layers"


def _few(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
