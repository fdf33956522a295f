# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_data


@pytest.fixture(scope="module")
def everything():
    """All of the demo's text, fetched where it is not in .cache."""
    try:
        archive = demo_data.fetch()
    except demo_data.DemoError as error:
        if (demo_data.CACHE / demo_data.ARCHIVE).exists():
            raise
        pytest.skip(f"the demo's text is not in .cache and cannot be fetched: {error}")
    return demo_data.read(archive)
