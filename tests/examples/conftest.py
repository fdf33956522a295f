# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_data
import demo_text


@pytest.fixture(scope="module")
def everything():
    """All of the demo's text."""
    return demo_data.read(demo_text.fetched())
