# SPDX-License-Identifier: Apache-2.0
"""Dense models with the linears in factors and no W (``nn.FactorizedLinear``), to be trained afterwards: WeLore, LoRD, PELA, and TRP and
Maestro, which find the ranks in training."""

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
