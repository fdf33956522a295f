# SPDX-License-Identifier: Apache-2.0
"""A step of DistributedDataParallel over two processes, for every variant."""

import pytest
from variant_kinds import EACH


@pytest.mark.parametrize("name", EACH)
def test_ddp(in_two_processes, name):
    results = in_two_processes("variants_workers.py")
    assert results.keys() == EACH.keys()
    assert not results[name], results[name]
