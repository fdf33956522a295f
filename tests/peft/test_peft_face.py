# SPDX-License-Identifier: Apache-2.0
"""What a user sees of lrkern.peft: the report in text and in a notebook, what is said where there is nothing to patch, and the
callback of transformers' Trainer."""

import xml.etree.ElementTree as ET

import peft
import pytest
import torch
import transformers
from tiny_models import adapt, tiny
from torch import nn

import lrkern.peft
from lrkern.nn import FusedLoRALinear

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama():
    return adapt(tiny("llama"), 0, PROJECTIONS)


def table(report):
    html = ET.fromstring(report._repr_html_())
    return html.find("caption").text, [[cell.text or "" for cell in row] for row in html.iter("tr")][1:]


def test_a_report_is_a_short_table():
    model = llama()
    before = lrkern.peft.report(model)
    names = list(before.layers)
    assert not before and before.fused == 0 and before.reasons == {"not patched": names}
    report = lrkern.peft.patch(model)
    assert report and str(report) == "lrkern: 8 of 8 adapted layers fused"
    assert table(report) == (str(report), [["lrkern", "8", "", ""]])
    for name in names[:5]:
        model.get_submodule(name).lora_dropout["default"] = nn.AlphaDropout(0.5)
    model.get_submodule(names[5]).merge()
    report = lrkern.peft.report(model)
    assert not report and report.fused == 2
    why, merged = (report.layers[names[i]] for i in (0, 5))
    assert str(report).splitlines() == [
        "lrkern: 2 of 8 adapted layers fused",
        f"  5 layers: PEFT's own code, {why}: {names[0]}, {names[1]}, {names[2]} and 2 more",
        f"  1 layer: PEFT's own code, {merged}: {names[5]}",
    ]
    assert table(report)[1] == [
        ["lrkern", "2", "", ""],
        ["PEFT's own code", "5", why, f"{names[0]}, {names[1]}, {names[2]} and 2 more"],
        ["PEFT's own code", "1", merged, names[5]],
    ]
    odd = lrkern.peft.Report({"<a> & b": 'not "this" <one>'})
    assert table(odd)[1] == [["PEFT's own code", "1", 'not "this" <one>', "<a> & b"]]


@pytest.mark.parametrize("who", ["patch", "report", "unpatch"])
def test_what_is_no_model(who):
    call = getattr(lrkern.peft, who)
    for given, got in ((None, "None"), ([llama()], "a list"), ({"model": 1}, "a dict"), ("model", "a str")):
        with pytest.raises(
            TypeError, match=f"^lrkern.peft.{who}: model must be a PEFT model, an nn.Module, got {got}$"
        ):
            call(given)


def test_nothing_to_patch_says_what_is_there():
    must = r"^lrkern.peft.patch: model must have PEFT LoRA layers \(or VeRA, RandLoRA, MiSS, AdaLoRA\), got "
    other = peft.get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for model, got in (
        (nn.Linear(4, 4), "Linear with none; get_peft_model comes first"),
        (nn.Sequential(FusedLoRALinear(4, 4, r=2)), "Sequential with layers of lrkern.nn, which are fused as they are"),
        (other, "PeftModel with none, but layers of PEFT's ia3"),
    ):
        with pytest.raises(ValueError, match=f"{must}{got}$"):
            lrkern.peft.patch(model)


def arguments(folder):
    return transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        logging_steps=1, seed=0, learning_rate=1e-2,
    )  # fmt: skip


def test_a_callback_patches_when_training_starts(tmp_path, capsys):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 97, (8, 6))]
    losses = []
    for callbacks in ([], [lrkern.peft.PatchCallback()]):
        model = llama()
        trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=callbacks)
        assert not lrkern.peft.report(model).fused, "not before training starts"
        capsys.readouterr()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert bool(lrkern.peft.report(model)) == bool(callbacks)
    assert callbacks[0].report.fused == 8 and "lrkern: 8 of 8 adapted layers fused" in capsys.readouterr().out
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 2
    plain = transformers.Trainer(tiny("llama"), arguments(tmp_path), train_dataset=rows, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"lrkern\.peft\.patch: model must have PEFT LoRA layers"):
        plain.train()
