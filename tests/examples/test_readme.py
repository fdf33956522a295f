# SPDX-License-Identifier: Apache-2.0
"""README's first lines do what they say: their own text is run, and its table of versions is that of pyproject.toml, Makefile and
requirements/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrkern

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
USE, TRAINER, TRL, *_ = re.findall(r"```python\n(.*?)```", README, re.S)


def test_its_use_lines_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(USE, names)
    assert capsys.readouterr().out == "lrkern: 14 of 14 adapted layers fused\n" and "14 of 14" in USE
    assert type(names["layer"]).__module__ == "lrkern.nn.lora" and names["pool"].names == ["legal"]
    x, A, B, linear = (names[n] for n in ("x", "A", "B", "linear"))
    torch.testing.assert_close(names["y"], linear(x) + 2.0 * (x @ A.mT) @ B.mT, rtol=1e-4, atol=1e-3)
    exec(TRAINER, names)
    assert names["patch"].report and len(names["patch"].report.layers) == 14
    assert names["model"].base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.any(), "it trained"


def test_its_trl_lines_run_as_they_stand(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed (300 MB with what it needs)")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "one": 2, "two": 3}, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, pad_token_id=0
    )
    names = {}
    exec(re.search(r"import torch.*?import lrkern\n", USE, re.S)[0], names)
    names |= dict(
        base=LlamaForCausalLM(config), texts=__import__("datasets").Dataset.from_list([{"text": "one two one two"}] * 8),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    )  # fmt: skip
    exec(TRL, names)
    assert "lrkern: 7 of 7 adapted layers fused" in capsys.readouterr().out


def test_peft_comes_when_it_is_used():
    code = "import sys, lrkern; assert 'peft' not in sys.modules; lrkern.peft.patch; assert 'peft' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_its_versions_are_those_that_are_asked_for_and_tested():
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", README.partition("| package | needed |")[2], re.M))
    project, makefile = ((ROOT / name).read_text() for name in ("pyproject.toml", "Makefile"))
    pins = re.findall(r'^(\w+)==([\d.]+)(?:; python_version (\S+) "([\d.]+)")?$', (ROOT / "requirements/demo.txt").read_text(), re.M)  # fmt: skip
    tested = {}
    for name, version, sign, python in pins:
        tested.setdefault(name, []).append(version if sign in ("", ">=") else f"{version} on Python 3.10")
        assert not python or python == "3.11"
    tested["torch"] = re.findall(r"^TORCH \?= torch==([\d.]+)$", makefile, re.M)
    needed = {
        "Python": ">= " + re.search(r'^requires-python = ">=([\d.]+)"$', project, re.M)[1],
        "torch": ">= " + re.search(r'^dependencies = \["torch>=([\d.]+)"\]$', project, re.M)[1],
        "peft": ">= " + re.search(r'^peft = \["peft>=([\d.]+)", "safetensors"\]$', project, re.M)[1] + ", by the extra `peft`",
        "safetensors": "by the extra `peft`", "transformers": "by peft", "accelerate": "by peft",
    }  # fmt: skip
    for name, must in needed.items():
        asked, tried = rows[name].split(" | ")
        assert asked == must, name
        assert name == "Python" or tried.replace("`", "") == "; ".join(tested[name]), name
    assert f"## {lrkern.__version__}" in (ROOT / "CHANGELOG.md").read_text()
