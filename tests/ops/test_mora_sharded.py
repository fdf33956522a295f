# SPDX-License-Identifier: Apache-2.0
"""MoRA's ops on DTensors, in two processes on gloo."""

import pytest


@pytest.mark.parametrize("name", ["folds", "add", "linear", "uneven"])
def test_dtensor(in_two_processes, name):
    results = in_two_processes("mora_workers.py")
    assert name in results
    if results[name]:
        pytest.fail(results[name], pytrace=False)
