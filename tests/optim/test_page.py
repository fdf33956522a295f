# SPDX-License-Identifier: Apache-2.0
"""docs/optim.md: a row for every rule, with its layers, and lines that run."""

import inspect
import re
from pathlib import Path

from lrkern import optim

PAGE = (Path(__file__).parents[2] / "docs" / "optim.md").read_text()


def test_a_row_for_every_rule():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE, re.M))
    rules = {n: k for n, k in vars(optim).items() if inspect.isclass(k) and issubclass(k, optim.Rule)}
    assert rows == {name: kind.LAYER.__name__ for name, kind in rules.items() if kind is not optim.Rule}


def test_its_lines_run():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {}
    exec(block, names)
    assert names["checkpoint"].tell() and int((names["model"][0].lora_E != 0).sum()) == 2
