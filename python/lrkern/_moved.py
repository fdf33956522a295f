# SPDX-License-Identifier: Apache-2.0
"""Module names of earlier versions: each is another name of the module that holds its contents now, for one release.

Models that ``torch.save`` wrote name their classes by them.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "lrkern.convert_peft": "lrkern.files.projections",
    "lrkern.functional.basis": "lrkern.functional",
    "lrkern.nn.basis_file": "lrkern.files.own",
    "lrkern.nn.dora": "lrkern.caches",
    "lrkern.nn.mixed": "lrkern.caches",
    "lrkern.peft_basis": "lrkern.peft",
    "lrkern.peft_layer": "lrkern.peft.layer",
    "lrkern.sharding": "lrkern.ops.sharding",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """What import returns is what sys.modules then has."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_Finder())
