# SPDX-License-Identifier: Apache-2.0
"""README's first lines do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import peft
import torch
from tiny_models import adapt, tiny
from torch import nn

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_six_lines(tmp_path):
    block = re.search(r"```python\n(.*?)```", README, re.S)[1]
    code = block.replace("adapters/legal", str(tmp_path))
    first, serving = code.split("pool = ")
    assert sum(bool(line) for line in code.splitlines()) <= 7, "six lines and an import"
    base = tiny("llama")
    adapted = adapt(base, 0, ["q_proj", "v_proj"])
    adapted.save_pretrained(tmp_path)
    x, W, A, B = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    names = dict(torch=torch, model=adapted, linear=nn.Linear(8, 4), x=x, W=W, bias=None, A=A, B=B, scale=0.5)
    exec(first, names)
    assert type(names["model"].base_model.model.model.layers[0].self_attn.q_proj).__module__.startswith("lrkern")
    assert torch.equal(names["y"], x @ W.mT + 0.5 * (x @ A.mT) @ B.mT)
    names |= dict(model=base, ids=torch.ones(2, 3, dtype=torch.int64))
    exec("pool = " + serving, names)
    assert names["pool"].names == ["legal"] and isinstance(adapted, peft.PeftModel)


def test_peft_comes_when_it_is_used():
    code = "import sys, lrkern; assert 'peft' not in sys.modules; lrkern.peft.patch; assert 'peft' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
