# SPDX-License-Identifier: Apache-2.0
"""docs/variants.md: a row for every method, with its class, and lines that run."""

import re
from pathlib import Path

from lrkern.nn import variants
from lrkern.nn.linear import AdapterLinear

PAGE = (Path(__file__).parents[2] / "docs" / "variants.md").read_text()


def test_a_row_for_every_method():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE, re.M))
    kinds = [cls for cls in AdapterLinear.KINDS.values() if cls.__module__.startswith(variants.__name__)]
    assert rows == {name: cls.__name__ for cls in kinds for name in cls.METHODS}
    others = {name for cls in AdapterLinear.KINDS.values() if cls not in kinds for name in cls.METHODS}
    assert others <= {*re.findall(r"`(\w+)`", PAGE)}


def test_its_lines_run():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {}
    exec(block, names)
    assert names["y"].shape == (4, 32)
