# SPDX-License-Identifier: Apache-2.0
"""Module names of earlier versions: each has what the modules have that hold its contents now, for one release.

Models that ``torch.save`` wrote name their classes by them.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lrkern.convert_peft": "lrkern.files.projections lrkern.files.vera lrkern.files.randlora",
    "lrkern.functional.basis": "lrkern.functional lrkern.functional.projection",
    "lrkern.nn.basis_file": "lrkern.files.own",
    "lrkern.nn.dora": "lrkern.caches",
    "lrkern.nn.mixed": "lrkern.caches",
    "lrkern.peft_basis": "lrkern.peft",
    "lrkern.peft_layer": "lrkern.peft.layer lrkern.files.folder",
    "lrkern.serving.families": "lrkern.serving.kinds",
    "lrkern.sharding": "lrkern.ops.sharding",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [vars(importlib.import_module(home)) for home in MOVED[module.__name__].split()]
        for name in {name for home in homes for name in home if not name.startswith("__")}:
            setattr(module, name, next(home[name] for home in homes if name in home))
        if len(homes) == 1 and "__all__" in homes[0]:
            module.__all__ = homes[0]["__all__"]


sys.meta_path.append(_Finder())
