# SPDX-License-Identifier: Apache-2.0
"""What docs/your-model.md says of exports: what takes a layer with its adapter, and what takes a merged one."""

import io

import pytest
import torch
from layer_kinds import EACH, shake
from torch import nn

import lrkern.peft
from lrkern.nn import VeRALinear

peft = pytest.importorskip("peft")


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m, name):
        return type(m).__module__.startswith("lrkern") or super().is_leaf_module(m, name)


def by_export(model, x):
    stored = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), stored)
    stored.seek(0)
    return torch.export.load(stored).module()


def by_trace(model, x):
    stored = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), stored)
    stored.seek(0)
    return torch.jit.load(stored)


def by_fx(model, x):
    return torch.fx.GraphModule(model, Tracer().trace(model))


def check(model, x, *ways):
    with torch.no_grad():
        want = model(x)
        for way in ways:
            torch.testing.assert_close(way(model, x)(x), want, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.filterwarnings("ignore")
def test_layers_of_ours(cls, settings):
    torch.manual_seed(0)
    model, x = nn.Sequential(shake(cls(8, 8, **settings)), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    by_jit = () if settings.get("kind") == "bat" else (by_trace,)  # a Function of Python's
    check(model, x, by_export, by_fx, *by_jit)
    merged = model[0]
    merged.merge()
    check(model, x, by_export, by_trace, by_fx)
    model[0] = merged.base_layer  # a plain linear, which everything takes
    check(model, x, lambda m, _: torch.fx.symbolic_trace(m), lambda m, _: torch.jit.script(m))


@pytest.mark.filterwarnings("ignore")
def test_patched_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)).eval()
    assert lrkern.peft.patch(model)
    x = torch.randn(3, 8)
    check(model, x, by_export, by_trace)
    check(
        model.merge_and_unload(),
        x,
        by_export,
        by_trace,
        lambda m, _: torch.fx.symbolic_trace(m),
        lambda m, _: torch.jit.script(m),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_tracing_onnx_export_loses_nothing():
    """It leaves out ops that write in place, and says nothing."""
    layer = shake(VeRALinear(8, 8, r=2)).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="lrkern::basis_matmul_: writes in place, which torch.onnx"):
        torch.onnx.export(layer, (torch.randn(3, 8),), io.BytesIO(), dynamo=False)
