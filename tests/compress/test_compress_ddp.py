# SPDX-License-Identifier: Apache-2.0
"""Compressed models train under DDP in two processes as in one."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("check", ["factors", "maestro", "trp"])
def test_two_processes_train_as_one(in_two_processes, check):
    error = in_two_processes("compress_workers.py")[check]
    assert error is None, error
