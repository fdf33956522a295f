# SPDX-License-Identifier: Apache-2.0
"""What the kernels take, as csrc/ has it (compared in tests/test_host.py)."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of activations
MAX_RANK = 512
PAGE = 16  # rows of a pool with one owner: kPageRanks
PLAN_ROWS = 64  # of one adapter in a tile of a plan: kPlanRows


def plan_length(T, adapters):
    """Of a slot's plan for T rows: order, begin, tiles (csrc/multi_lora.h). Sizes may be symbolic."""
    tiles = (T + PLAN_ROWS - 1) // PLAN_ROWS + torch.sym_min(adapters + 2, T)
    return T + adapters + 3 + 2 * tiles
