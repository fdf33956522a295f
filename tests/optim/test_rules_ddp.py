# SPDX-License-Identifier: Apache-2.0
"""Rules in two processes."""

import pytest
from optim_rules import RULES

NAMES = [*RULES, "a communication hook", "sharded", "one layer ran in one process", "in a trainer"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(in_two_processes, name):
    results = in_two_processes("optim_workers.py")
    assert results.keys() == {*NAMES}
    assert not results[name], results[name]
