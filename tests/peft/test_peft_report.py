# SPDX-License-Identifier: Apache-2.0
"""What lrkern.peft.report says of a layer is what its next forward does, on all-MiniLM-L6-v2: offloaded, checkpointed and
compiled here, sharded in peft_workers.py. Ops are counted at the seam below the wrappers."""

import pytest
import torch
import torch._dynamo.testing

from minilm import (  # isort: skip
    adapted, assert_report_is_true, first, forward, lora_layers, outcome, patched, step,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrkern.peft

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
EVERYWHERE = {"base_model.model.embeddings": "cpu", "base_model.model.encoder.layer.0": "disk",
              "base_model.model.encoder.layer.1": "cpu", "base_model.model.pooler": "disk"}  # fmt: skip


def dispatched(model, folder, **options):
    return accelerate.dispatch_model(
        model, EVERYWHERE, main_device="cpu", offload_dir=folder, force_hooks=True, **options
    )


BLOCKS = {"preload_module_classes": ["BertLayer", "BertPooler"]}
OFFLOADS = {  # and how many of 13 layers that leaves fused where patch comes first, and where it comes second
    "cpu_offload": (lambda model, folder: accelerate.cpu_offload(model, CPU), 0, 0),
    "disk_offload": (lambda model, folder: accelerate.disk_offload(model, folder, CPU), 0, 0),
    "cpu_offload, a block at once": (lambda model, folder: accelerate.cpu_offload(model, CPU, **BLOCKS), 13, 13),
    "dispatch_model": (dispatched, 0, 0),
    "dispatch_model, a block at once": (lambda model, folder: dispatched(model, folder, **BLOCKS), 7, 7),
    "dispatch_model, a linear at once": (lambda m, f: dispatched(m, f, preload_module_classes=["Linear"]), 7, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded(tmp_path, offload, patch_first, config):
    """Between calls weights are on meta. Hooks on A and B themselves must see their calls: PEFT's code runs then."""
    run, *fused = OFFLOADS[offload]
    model, want, stock = (adapted(2, **config) for _ in range(3))
    if patch_first:
        lrkern.peft.patch(model)
    (tmp_path / "stock").mkdir()
    run(stock, tmp_path / "stock"), run(model, tmp_path)
    if not patch_first:
        lrkern.peft.patch(model)
    with torch.no_grad():
        assert "meta" in {p.device.type for layer in lora_layers(model).values() for p in layer.parameters()}
        if isinstance(outcome(forward, stock), type):
            assert config, "PEFT's DoRA reads weights past accelerate's hooks"
            assert lrkern.peft.report(model).fused == fused[not patch_first]
            return
        assert_report_is_true(model, fused=fused[not patch_first])
        torch.testing.assert_close(forward(model), forward(want), atol=2e-5, rtol=0)


def test_checkpointed():
    for reentrant in (False, True):
        model = patched(2).train()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_report_is_true(model, run=step, fused=13)
    model = patched(2).train()
    for layer in lora_layers(model).values():
        call = layer.base_layer.forward
        layer.base_layer.forward = lambda x, call=call: checkpoint(call, x, use_reentrant=False)
    assert_report_is_true(model, run=step, fused=13)


def changed_after(model):
    layers = [*lora_layers(model).values()]
    layers[0].lora_A["default"].register_forward_hook(lambda *_: None)
    layers[1].base_layer.register_forward_hook(lambda *_: None)
    layers[2].lora_dropout["default"] = nn.AlphaDropout(0.5)
    layers[3].lora_A["default"] = torch.compile(layers[3].lora_A["default"], backend="eager")
    layers[4].merge()
    layers[5].enable_adapters(False)
    layers[6].base_layer.compile(backend="eager")


def test_layers_that_are_not_fused():
    model = patched(2)
    changed_after(model)
    assert_report_is_true(model, fused=8)
    lrkern.peft.unpatch(model)
    assert_report_is_true(model, fused=0)
    stock = adapted(1)
    assert_report_is_true(stock, fused=0)


COMPILED = {
    "the model": lambda model, backend: torch.compile(model, backend=backend),
    "in place": lambda model, backend: [model, model.compile(backend=backend)][0],
    "layers in place": lambda model, backend: [model, *(m.compile(backend=backend) for m in lora_layers(model).values())][0],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("how", COMPILED)
def test_compiled(how, patch_first):
    """The ops are in the graphs that run; layers alike share one."""
    torch._dynamo.reset()
    ops = []

    def backend(graph, inputs):
        called = [n for n in graph.graph.nodes if "lrkern" in str(n.target)]
        return lambda *args: [graph(*args), ops.extend(called)][0]

    model = adapted(1)
    first(model).lora_A["default"].register_forward_hook(lambda *_: None)
    if patch_first:
        lrkern.peft.patch(model)
    compiled = COMPILED[how](model, backend)
    if not patch_first:
        lrkern.peft.patch(compiled)
    with torch.no_grad():
        got = forward(compiled)
    report = lrkern.peft.report(compiled)
    assert report.fused == len(ops) == 6, (str(report), ops)
    torch.testing.assert_close(got, forward(model), atol=1e-5, rtol=0)
    torch._dynamo.reset()
