# SPDX-License-Identifier: Apache-2.0
"""lrkern.peft inside what trains and ships a model: Trainer, DDP, FSDP2, tensor parallelism, checkpointing, autocast,
torch.compile and torch.export, on all-MiniLM-L6-v2 beside stock PEFT."""

import ast

import pytest
import torch
import torch._dynamo.testing
import two_processes

from minilm import (  # isort: skip
    PATH, adapted, assert_as_exact, assert_same, batch, bert, forward, fused_calls, lora_config, lora_layers,
    patched, peft, step, transformers,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lrkern.peft

LORA_DORA = pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
WORKERS = "peft_workers.py"
I = 384

# ---- 11: Trainer ----------------------------------------------------------------------------------------------------


def trainer(folder, patch, steps=3, **config):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2, "num_labels": 2}
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(PATH, local_files_only=True, **off)
    model = peft.get_peft_model(model, lora_config(task_type="SEQ_CLS", **config))
    if patch:
        assert lrkern.peft.patch(model).fused == 13
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, gradient_checkpointing=True,
        save_steps=3, logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, save_only_model=False,
    )  # fmt: skip
    ids = torch.randint(1000, 20000, (16, 10), generator=torch.Generator().manual_seed(2))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones(10, dtype=torch.long), "labels": i % 2}
        for i, row in enumerate(ids)
    ]
    return transformers.Trainer(model, arguments, train_dataset=rows)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@LORA_DORA
def test_trainer_with_gradient_checkpointing(tmp_path, config):  # row 11
    stock, ours = trainer(tmp_path / "stock", False, **config), trainer(tmp_path / "ours", True, **config)
    stock.train()
    with fused_calls() as calls:
        ours.train()
    assert calls.total() == 13 * 3 + 12 * 3, "three steps, forward, and again in backward for what is checkpointed"
    assert len(losses(ours)) == 3
    assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
    checkpoint = tmp_path / "ours" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    loaded = transformers.BertForSequenceClassification.from_pretrained(PATH, num_hidden_layers=2, num_labels=2)
    loaded, inputs = peft.PeftModel.from_pretrained(loaded, str(checkpoint)).eval(), batch()
    with torch.no_grad():
        want, got = loaded(**inputs).logits, ours.model.eval()(**inputs).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    again = trainer(tmp_path / "ours", True, steps=4, **config)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 4 and torch.tensor(losses(again)).isfinite().all()


# ---- 12, 13, 14: two processes --------------------------------------------------------------------------------------


CHECKS = [
    node.name
    for node in ast.parse((two_processes.HERE / WORKERS).read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "check" for d in node.decorator_list)
]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(in_two_processes, check):  # rows 12 to 14
    results = in_two_processes(WORKERS)
    assert results[check] is None, results[check]


# ---- 15: torch.compile ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(n, tokens=10):
    return {
        key: value.repeat(2, 1, 1)[:n] if value.dim() == 3 else value[:1].repeat(n, 1)
        for key, value in batch(3, tokens).items()
    }


@pytest.mark.slow
def test_the_model_compiles_to_one_graph(fresh_dynamo):  # row 15
    model, stock = patched(2), adapted(2)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    counts = set()
    with torch.no_grad():
        for n in (2, 4, 6):
            torch.testing.assert_close(forward(compiled, **rows(n)), forward(stock, **rows(n)), atol=1e-5, rtol=0)
            counts.add(graphs.frame_count)
    assert len(counts) == 1, "one graph for every batch size"


@pytest.mark.slow
@LORA_DORA
def test_training_compiles_to_one_graph(fresh_dynamo, config):
    model, stock = patched(1, **config).train(), adapted(1, **config).train()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True), set()
    for n in (2, 4, 6):
        want, got = step(stock, **rows(n)), step(compiled, **rows(n))
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
        assert_same((got[0], grads), want, y_tol=2e-5)
        counts.add(graphs.frame_count)
    assert len(counts) == 1, "one graph for forward and one for backward, for every batch size"
    assert_same(step(model), step(stock), y_tol=2e-5)  # eager again: nothing of the trace stays in the layers


def piece(config):
    """Two LoRA linears and a gelu, taken from the patched model: one transformer layer's MLP."""
    layer = patched(1, **config).base_model.model.encoder.layer[0]
    return nn.Sequential(layer.intermediate, layer.output.dense)


@pytest.mark.slow
@LORA_DORA
def test_inductor(fresh_dynamo, config):
    model = piece(config).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (4, 7):
        x = torch.randn(n, I, requires_grad=True)
        params = [x, *(p for p in model.parameters() if p.requires_grad)]
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for p, q in zip(*(torch.autograd.grad(y.cos().sum(), params) for y in (got, want)), strict=True):
            assert (p - q).norm() <= 1e-5 * q.norm()


@pytest.mark.slow
def test_a_compiled_model_notices_what_changes(fresh_dynamo):
    model, stock = patched(1), adapted(1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for change in (
            lambda m: None,
            lambda m: [layer.scale_layer(2.0) for layer in lora_layers(m).values()],
            lambda m: m.merge_adapter(),
            lambda m: m.unmerge_adapter(),
            lambda m: [layer.enable_adapters(False) for layer in lora_layers(m).values()],
            lambda m: [layer.enable_adapters(True) for layer in lora_layers(m).values()],
            lambda m: [layer.lora_B["default"].weight.mul_(2) for layer in lora_layers(m).values()],
        ):
            change(model), change(stock)
            torch.testing.assert_close(forward(compiled), forward(stock), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_hotswap_of_a_compiled_model_does_not_recompile(fresh_dynamo, tmp_path):
    torch.manual_seed(5)
    peft.get_peft_model(bert(1), lora_config(r=4)).save_pretrained(tmp_path)
    model = adapted(1)
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    lrkern.peft.patch(model)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(forward(compiled), forward(adapted(1)), atol=1e-5, rtol=0)
        peft.utils.hotswap.hotswap_adapter(compiled, str(tmp_path), "default", torch_device="cpu")
        want = forward(peft.PeftModel.from_pretrained(bert(1), str(tmp_path)))
        torch.testing.assert_close(forward(compiled), want, atol=1e-5, rtol=0)
    assert graphs.frame_count == 1


# ---- 16: activation checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@LORA_DORA
def test_gradient_checkpointing(config, use_reentrant):  # row 16
    stock, ours = adapted(2, **config).train(), patched(2, **config).train()
    want = step(stock)
    ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with fused_calls() as calls:
        assert_same(step(ours), want, y_tol=2e-5)
    assert calls.total() == 13 + 12, "the encoder runs twice"


@pytest.mark.parametrize("use_reentrant", [False, True])
@LORA_DORA
def test_checkpointing_draws_the_same_dropout_mask_twice(config, use_reentrant):
    model, results = patched(1, lora_dropout=0.5, **config).train(), []
    layer = model.base_model.model.encoder.layer[0].intermediate
    x = torch.randn(5, I, requires_grad=True)
    params = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        y = run(x)
        y.cos().sum().backward()
        results.append((y.detach(), [p.grad.clone() for p in params]))
        for p in params:
            p.grad = None
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))


@LORA_DORA
def test_a_selective_checkpointing_policy_sees_our_ops(config):
    layer, x, seen = piece(config).train(), torch.randn(4, I, requires_grad=True), set()

    def policy(ctx, op, *args, **kwargs):
        seen.add(str(op))
        return CheckpointPolicy.MUST_SAVE if "lrkern" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    params = [x, *(p for p in layer.parameters() if p.requires_grad)]
    got, want = (torch.autograd.grad(out.cos().sum(), params) for out in (y, layer(x)))
    assert any(op.startswith("lrkern.") for op in seen), seen
    for p, q in zip(got, want, strict=True):
        assert torch.equal(p, q)


# ---- 17: autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@LORA_DORA
def test_autocast(config, base_dtype):  # row 17
    """Same dtypes as stock PEFT under autocast, and as close to float64."""

    def model():
        torch.manual_seed(1)
        return peft.get_peft_model(bert(2).to(base_dtype), lora_config(**config)).eval()

    stock, ours, truth = model(), model(), step(model().double())
    assert lrkern.peft.patch(ours).fused == 13
    with torch.autocast("cpu", torch.bfloat16), fused_calls() as calls:
        got, want = step(ours), step(stock)
        layers = [next(iter(lora_layers(m).values())) for m in (ours, stock)]
        x = torch.randn(2, I)
        assert layers[0](x).dtype == layers[1](x).dtype == torch.bfloat16
    assert calls.total() == 14
    assert_as_exact(got, want, truth)


# ---- 18: torch.export -----------------------------------------------------------------------------------------------


class Embedder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds, attention_mask):
        return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).pooler_output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers
@pytest.mark.parametrize("strict", [False, True])
@LORA_DORA
def test_export(config, strict):  # row 18
    ours, stock = Embedder(patched(1, **config)), Embedder(adapted(1, **config))
    dynamic = {name: {0: torch.export.Dim("rows", min=2, max=64)} for name in ("inputs_embeds", "attention_mask")}
    with torch.no_grad():
        program = torch.export.export(ours, (), rows(2), dynamic_shapes=dynamic, strict=strict)
        nodes = [str(node.target) for node in program.graph.nodes if "lrkern" in str(node.target)]
        assert len(nodes) >= 7, "every fused layer is in the graph as one of our ops"
        torch.testing.assert_close(program.module()(**rows(5)), stock(**rows(5)), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            ours(**rows(3)), stock(**rows(3)), atol=1e-5, rtol=0
        )  # the trace left nothing behind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_aot_inductor_package(tmp_path):
    model, x = piece({}), torch.randn(2, I)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "piece.pt2"))
        run = torch._inductor.aoti_load_package(package)
        x = torch.randn(9, I)
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)
