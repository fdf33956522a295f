# SPDX-License-Identifier: Apache-2.0
"""docs/api.md is what the docstrings say now, and everything public has one."""

import re

from lrkern.reference import OPS
from tools import api_page


def test_the_page_is_current():
    assert api_page.PAGE.read_text() == api_page.page(), "run python tools/api_page.py"


def test_everything_public_is_there_and_says_what_it_is():
    page = api_page.page()
    rooms = dict(re.findall(r"^## lrkern\.(\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert [*rooms] == api_page.ROOMS and {"peft", "nn", "ops", "serving"} <= {*rooms}
    assert {*OPS} <= {*re.findall(r"^- `(\w+)\(", rooms["ops"], re.M)}
    assert "- `VeRALinear(in_features, out_features, bias=True, *, r=256, d_initial=0.1," in rooms["nn"]
    assert (
        "  - `.load(" in rooms["serving"] and "- `patch(model, mixed_training=False)`: Makes the LoRA" in rooms["peft"]
    )
    bare = [line for line in re.findall(r"^ *- `.*`$", page, re.M) if "(" in line]
    assert not bare, f"no docstring: {bare}"
