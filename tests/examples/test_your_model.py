# SPDX-License-Identifier: Apache-2.0
"""docs/your-model.md: its blocks run one after another as they stand. What it says of exports: tests/nn/test_export.py, and of
derivatives tests/nn/test_derivatives.py."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "your-model.md").read_text()


def test_its_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(block, names)
    assert capsys.readouterr().out.startswith(
        "lrkern: 5 of 6 adapted layers fused\n  1 layer: PEFT's own code, dropout Alpha"
    )
    assert names["pool"].names == ["mine", "vera"] and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
