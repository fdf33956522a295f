# SPDX-License-Identifier: Apache-2.0
"""One way to put any method of this library into a whole model, and to save, load, merge and disable it.

``lrkern.adapt`` and the others are these functions.
"""

from .adapt import adapt
from .methods import methods
from .report import Report
from .storage import load, save
from .switch import disable, merge, unmerge

__all__ = ["Report", "adapt", "disable", "load", "merge", "methods", "save", "unmerge"]
