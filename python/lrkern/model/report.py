# SPDX-License-Identifier: Apache-2.0
"""What ``adapt`` and ``load`` say of a model, in text and in a notebook."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from torch import nn

from ..nn.linear import AdapterLinear
from .saved import saved_in

SHOWN = 3  # names of one kind


@dataclass(frozen=True)
class Report:
    """method; layers: by name the parameters that train in each; modules_to_save: the same of the modules that train whole; trainable
    and total: parameters of the model, packed ones as they are stored."""

    method: str
    layers: dict[str, int]
    modules_to_save: dict[str, int]
    trainable: int
    total: int

    @classmethod
    def of(cls, model: nn.Module, method: str, layers: Mapping[str, AdapterLinear]) -> "Report":
        trained = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
        saved = {name: trained(m) for name, m in saved_in(model).items()}
        total = sum(p.numel() for p in model.parameters())
        return cls(method, {name: trained(m) for name, m in layers.items()}, saved, trained(model), total)

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rest = [f"  {count} {what}: {names}" for what, count, _, names in self._rows()]
        return "\n".join([self._title(), *rest])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in ("", "how many", "parameters that train", "which"))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        return f"<table><caption>{escape(self._title())}</caption><tr>{head}</tr>{body}</table>"

    def _title(self) -> str:
        return f"lrkern: {self.method}, {self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g}%)"

    def _rows(self) -> list[tuple[str, int, int, str]]:
        kinds = (("layers", self.layers), ("modules to save", self.modules_to_save))
        return [(what, len(found), sum(found.values()), _few([*found])) for what, found in kinds if found]


def _few(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
