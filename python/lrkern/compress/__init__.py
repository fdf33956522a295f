# SPDX-License-Identifier: Apache-2.0
"""Models whose linears are two factors and no W (``nn.FactorizedLinear``), trained afterwards: WeLore, LoRD and PELA compress a dense
model, TRP and Maestro find the ranks in training.

All work in place on the linears that PEFT's rules name: ``target_modules`` ("all-linear" is every nn.Linear but the output
embeddings, a list of names or of their ends, or a regex of whole names), ``exclude_modules``, ``layers_to_transform``,
``layers_pattern``. They return a ``Report``, keep biases, dtypes and devices, and refuse with a ValueError, the model as it was: one that
has adapters, and linears that are not plain (a subclass, hooks, a packed or parametrized weight), not finite, on the meta device,
tied to another place, or read by torch's TransformerEncoderLayer past their forward.
"""

from .lord import lord
from .maestro import finish, group_lasso, maestro, prefix, shrink
from .model import Layer, Report, restore
from .pela import feature_loss, pela, weight_loss
from .trp import TRP
from .welore import welore

__all__ = [
    "TRP", "Layer", "Report", "feature_loss", "finish", "group_lasso", "lord", "maestro", "pela", "prefix", "restore", "shrink",
    "weight_loss", "welore",
]  # fmt: skip
