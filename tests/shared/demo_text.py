# SPDX-License-Identifier: Apache-2.0
"""The demo's text, for tests that train on it. examples/ is on sys.path there."""

from pathlib import Path

import demo_data
import pytest


def fetched() -> Path:
    """The archive, fetched where it is not in .cache. Without a network there is nothing to train on; an archive that is there and wrong
    is a failure."""
    try:
        return demo_data.fetch()
    except demo_data.DemoError as error:
        if (demo_data.CACHE / demo_data.ARCHIVE).exists():
            raise
        pytest.skip(f"the demo's text is not in .cache and cannot be fetched: {error}")
