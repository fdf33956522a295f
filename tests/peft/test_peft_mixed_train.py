# SPDX-License-Identifier: Apache-2.0
"""Several adapters trained in one batch: lrkern.peft.patch(model, mixed_training=True), adapter_names= in training. Beside one
adapter at a time: the same bits at a layer, 1e-5 over a model."""

import copy
import pickle

import pytest
import torch

from minilm import (  # isort: skip
    PATH, assert_report_is_true, assert_same, batch, bert, fused_calls, lora_config, lora_layers, outcome, peft,
    transformers,
    one_thread,  # noqa: F401, a fixture
)  # fmt: skip
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

import lrkern.peft

WHO = ["b", "__base__", "a", "c", "b"]
NAMES = ["a", "b", "c"]


def mixed(layers=1, dropout=0.0, also=(), base=None, **patch):
    """Three adapters of other ranks, scales and layers, all of which train; stock where nothing is said of patch."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base or bert(layers), lora_config(r=4, lora_dropout=dropout), adapter_name="a")
    for name, config in (("b", {"r": 40, "use_rslora": True}), ("c", {"target_modules": ["query", "dense"]}), *also):
        model.add_adapter(
            name, lora_config(lora_dropout=dropout) if not config else lora_config(**{"lora_dropout": dropout} | config)
        )
    model.set_requires_grad([*NAMES])
    if patch:
        lrkern.peft.patch(model, **patch)
    return model.train()


def ours(**options):
    return mixed(mixed_training=True, **options)


def loss_of(model, who, rows, **kwargs):
    """A sum over rows, so that the batch is the sum of its parts."""
    inputs = {key: value[list(rows)] for key, value in batch(5).items()} | kwargs
    out = model(**inputs, adapter_names=who)
    g = torch.randn(5, 384, generator=torch.Generator().manual_seed(3))[list(rows)]
    return (out.pooler_output.float() * g).sum() + out.last_hidden_state.float().square().sum()


def grads_of(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def one_at_a_time(model, who=WHO):
    """Stock PEFT: each adapter alone over its rows, active."""
    total = 0.0
    for name in dict.fromkeys(who):
        rows = [i for i, n in enumerate(who) if n == name]
        if name == "__base__":
            with model.disable_adapter():
                loss = loss_of(model, None, rows)
        else:
            model.base_model.set_adapter(name)
            model.set_requires_grad(NAMES)
            loss = loss_of(model, None, rows)
            loss.backward()
        total += loss.item()
    return torch.tensor(total), grads_of(model)


def mixed_step(model, who=WHO):
    loss = loss_of(model, who, range(len(who)))
    loss.backward()
    return loss.detach(), grads_of(model)


def close(got, want, tol=1e-5):
    assert abs(got[0] - want[0]) <= 1e-5 * abs(want[0])
    assert_same((torch.zeros(1), got[1]), (torch.zeros(1), want[1]), grad_tol=tol)


# ---- a layer ---------------------------------------------------------------------------------------------------------

DTYPES = {"float32": (torch.float32, torch.float32), "bf16, fp32 A and B": (torch.bfloat16, torch.float32),
          "bf16": (torch.bfloat16, torch.bfloat16), "fp16": (torch.float16, torch.float16),
          "fp16, fp32 A and B": (torch.float16, torch.float32)}  # fmt: skip


def layer_of(base_dtype, factors, r=(4, 40, 64), I=384, O=520, dropout=0.0, watched=False):
    torch.manual_seed(1)
    base = nn.Linear(I, O).to(base_dtype).requires_grad_(False)
    config = lambda r: lora_config(r=r, lora_alpha=2 * r, lora_dropout=dropout)
    layer = peft.tuners.lora.layer.Linear(base, "a", config(r[0]), r=r[0], lora_alpha=2 * r[0])
    for name, rank in zip("bc", r[1:], strict=True):
        layer.update_layer(name, r=rank, lora_alpha=3 * rank, config=config(rank))
    layer.set_adapter(NAMES)
    layer.lora_A.to(factors), layer.lora_B.to(factors)
    if watched:
        base.register_forward_hook(lambda *_: None)
    lrkern.peft.patch(layer)
    return layer.train()


def backward_of(layer, x, dy, active=None, **names):
    if active is not None:
        layer.set_adapter(active) if active else layer.enable_adapters(False)
    x = x.clone().requires_grad_()
    y = layer(x, **names)
    with torch.autocast("cpu", enabled=False):
        y.backward(dy)
    layer.enable_adapters(True)
    layer.set_adapter(NAMES)
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=True)
    return y.detach(), grads, x.grad


@pytest.mark.parametrize("watched", [False, True], ids=["linear", "other base"])
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (130,)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(d, a) for d in DTYPES for a in (False, True) if not a or "fp16" not in d]
)
@pytest.mark.slow
def test_a_layer_has_the_bits_of_one_adapter_at_a_time(dtype, tokens, watched, autocast):
    """y of the same batch with one adapter active, and dA, dB of the adapter's rows alone, for equal x and dY."""
    layer = layer_of(*DTYPES[dtype], watched=watched)
    who = ["b", "__base__", "a", "c", "b", "a", "c", "c"]
    base = DTYPES[dtype][0]
    x, dy = torch.randn(len(who), *tokens, 384).to(base), torch.randn(len(who), *tokens, 520)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dy = dy.to(torch.bfloat16 if autocast else base)
        y, grads, dx = backward_of(layer, x, dy, adapter_names=who)
        with torch.no_grad():
            assert torch.equal(layer(x, adapter_names=who), y), "without gradients too"
        for name in ("__base__", *NAMES):
            rows = [i for i, n in enumerate(who) if n == name]
            active = [] if name == "__base__" else [name]
            whole, _, dx_whole = backward_of(layer, x, dy, active)
            assert torch.equal(y[rows], whole[rows]), name
            if base == torch.float32 and not autocast:  # in 16 bit what comes through the adapter is rounded once more
                assert torch.equal(dx[rows], dx_whole[rows]), name
            torch.testing.assert_close(dx[rows], dx_whole[rows], rtol=0.02, atol=0.05)
            _, alone, _ = backward_of(layer, x[rows], dy[rows], active)
            assert all(torch.equal(grads[key], grad) for key, grad in alone.items()), name
            grads = {key: grad for key, grad in grads.items() if key not in alone}
    assert not grads


def test_rows_of_one_adapter_are_a_plain_batch_and_rows_in_order_are_not_copied():
    layer = layer_of(torch.bfloat16, torch.bfloat16)
    x, dy = torch.randn(4, 3, 384).to(torch.bfloat16), torch.randn(4, 3, 520).to(torch.bfloat16)
    got, want = backward_of(layer, x, dy, adapter_names=["b"] * 4), backward_of(layer, x, dy, ["b"])
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert all(torch.equal(got[1][key], grad) for key, grad in want[1].items())
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        layer(x.requires_grad_(), adapter_names=["__base__", "a", "a", "b"])
    assert {x[1:].data_ptr(), x[3:].data_ptr()} <= set(seen), "the views themselves are saved"


def test_dropout_of_each_adapter():
    """Each adapter's own probability and seed; its mask is that of a batch of its rows."""
    layer, p = layer_of(torch.float32, torch.float32, dropout=0.5), {"a": 0.0, "b": 0.3, "c": 1.0}
    for name, dropout in layer.lora_dropout.items():
        dropout.p = p[name]
    who, x, dy = ["b", "__base__", "a", "c", "b"], torch.randn(5, 9, 384), torch.randn(5, 9, 520)
    torch.manual_seed(5)
    y, grads, _ = backward_of(layer, x, dy, adapter_names=who)
    torch.manual_seed(5)
    again, same, _ = backward_of(layer, x, dy, adapter_names=who)
    assert torch.equal(y, again) and all(torch.equal(same[key], grad) for key, grad in grads.items())
    torch.manual_seed(5)  # b is the first that draws a seed
    _, alone, _ = backward_of(layer, x[[0, 4]], dy[[0, 4]], ["b"])
    assert all(torch.equal(grads[key], grad) for key, grad in alone.items())
    base = layer.base_layer(x)
    assert torch.equal(y[[1]], base[[1]]) and torch.equal(y[[3]], base[[3]]), "c drops all of it"
    assert not grads["lora_B.c.weight"].any() and not torch.equal(y[0], layer(x, adapter_names=who)[0])


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_pefts_refusal_is_the_default():
    want = outcome(loss_of, mixed(), WHO, range(5))
    assert want is ValueError and outcome(loss_of, mixed(mixed_training=False), WHO, range(5)) is want
    model = ours()
    mixed_step(model)
    lrkern.peft.patch(model)
    mixed_step(model)  # patched again it stays
    lrkern.peft.unpatch(model)
    assert type(model.base_model) is peft.tuners.lora.LoraModel and model.base_model.training
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        loss_of(model, WHO, range(5))
    assert not any(key.startswith("_lrkern") for m in model.modules() for key in vars(m))
    vera = peft.get_peft_model(bert(1), peft.VeraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="model must have a PEFT LoraModel in it for mixed_training"):
        lrkern.peft.patch(vera, mixed_training=True)


def test_a_batch_of_several_adapters_is_one_at_a_time():
    model = ours(layers=2)
    got, want = mixed_step(model), one_at_a_time(mixed(layers=2))
    assert all(m.training for m in model.modules())
    assert {name.split(".")[-2] for name in got[1]} == set(NAMES)
    close(got, want)
    close(mixed_step(copy.deepcopy(model)), want)
    close(mixed_step(pickle.loads(pickle.dumps(model))), want)
    assert "LoraModel" in repr(model)


def test_which_adapters_train_is_pefts_requires_grad():
    model, stock = ours(), mixed()
    for m in (model, stock):
        m.set_requires_grad(["b"], requires_grad=False)
    got = mixed_step(model)
    assert {name.split(".")[-2] for name in got[1]} == {"a", "c"}
    want = one_at_a_time(stock)  # which trains all three
    close(got, (want[0], {name: grad for name, grad in want[1].items() if ".b." not in name}))
    model.set_adapter("c")
    assert {name.split(".")[-2] for name in mixed_step(model)[1]} == {"c"}


def test_gradients_accumulate():
    model = ours()
    for who in (WHO, WHO[::-1]):
        loss_of(model, who, range(5)).backward()
    got, want = grads_of(model), {}
    for who in (WHO, WHO[::-1]):
        for name, grad in one_at_a_time(mixed(), who)[1].items():
            want[name] = want.get(name, 0) + grad
    close((torch.ones(()), got), (torch.ones(()), want))


def test_a_plain_loop():
    """Three optimizer steps end at the weights of one adapter at a time."""
    results = []
    for model, run in ((ours(), mixed_step), (mixed(), one_at_a_time)):
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-4)
        for _ in range(3):
            grads = run(model)[1]
            for name, p in model.named_parameters():
                p.grad = grads.get(name)
            optimizer.step()
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
    start = dict(mixed().named_parameters())
    for name, p in results[1].items():
        assert not torch.equal(p, start[name])
        assert (results[0][name] - p).norm() <= 1e-5 * p.norm(), name


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "checkpoint_wrapper"])
def test_what_is_checkpointed_gets_its_names_again(how):
    """PEFT's hooks that inject the names are gone when backward runs a part of the model again."""
    model, plain = ours(layers=2, dropout=0.3), ours(layers=2, dropout=0.3)
    if how == "checkpoint_wrapper":
        kinds = transformers.models.bert.modeling_bert.BertLayer
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    results, inputs = [], batch(5)["inputs_embeds"].requires_grad_()
    for m in (model, plain):
        torch.manual_seed(5)
        with fused_calls() as calls:
            losses = [loss_of(m, who, range(5), inputs_embeds=inputs) for who in (WHO, WHO[::-1])]
            first_run = calls.total()
            sum(losses).backward()  # of two forwards, with other names
        assert (calls.total() > first_run) == (m is model)
        grads = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in grads_of(m).items()}
        results.append((sum(losses).detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())
    for m in model.modules():
        assert not m._forward_pre_hooks, "nothing is left"
        assert all("lrkern" not in str(vars(m).get(key)) for key in ("_gradient_checkpointing_func", "checkpoint_fn"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_nobody_can_tell_is_refused(reentrant):
    model = ours()
    layer = model.base_model.model.encoder.layer[0].intermediate
    call, x = layer.forward, batch(5)["inputs_embeds"].requires_grad_()
    layer.forward = lambda x: checkpoint(call, x, use_reentrant=reentrant)
    y = model(inputs_embeds=x, adapter_names=WHO).pooler_output.sum()
    with pytest.raises(RuntimeError, match="a checkpointed forward with adapter_names must get them again, got none"):
        y.backward()
    model.set_adapter("a")
    model(inputs_embeds=x).pooler_output.sum().backward()  # without names there is nothing to lose


def test_autocast_and_16_bit():
    for base, cast in ((None, True), (bert(1).to(torch.bfloat16), False), (bert(1).half(), False)):
        model, truth = ours(base=copy.deepcopy(base)), one_at_a_time(mixed())[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), fused_calls() as calls:
            inputs = batch(5)
            inputs["inputs_embeds"] = inputs["inputs_embeds"].to(base.dtype if base else torch.float32)
            out = model(**inputs, adapter_names=WHO)
            g = torch.randn(5, 384, generator=torch.Generator().manual_seed(3))
            ((out.pooler_output.float() * g).sum() + out.last_hidden_state.float().square().sum()).backward()
        assert calls
        grads = grads_of(model)
        assert grads.keys() == truth.keys()
        errors = [(grads[n].double() - g.double()).norm() / g.double().norm() for n, g in truth.items() if g.norm() > 1]
        assert all(grad.dtype == torch.float32 for grad in grads.values()) and sum(errors) / len(errors) < 0.03


def test_what_cannot_train_so_is_refused_with_the_reason():
    model = ours(also=[("dora", {"use_dora": True})])
    with pytest.raises(
        ValueError, match=r"must name plain LoRA adapters in training, got 'dora' \(DoraLinearVariant\)"
    ):
        loss_of(model, ["a", "dora", "a", "a", "b"], range(5))
    mixed_step(model)
    for who, error in ((WHO[:3], ValueError), (["nobody"] * 5, ValueError), ("abcab", TypeError)):
        with pytest.raises(error):
            loss_of(model, who, range(5))
    assert model.base_model.training and all(not m._forward_pre_hooks for m in model.modules())
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged"):
        loss_of(model, WHO, range(5))


def test_layers_that_are_not_fused_train_as_pefts():
    """Embeddings and layers with hooks inside, beside fused ones; a head in modules_to_save: test_trainer."""
    targets = ["query", "word_embeddings", "dense"]
    ids = torch.randint(1000, 20000, (5, 6))
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = peft.get_peft_model(bert(1), lora_config(r=4, target_modules=targets), adapter_name="a")
        model.add_adapter("b", lora_config(r=8, target_modules=targets))
        lora_layers(model).popitem()[1].lora_A["b"].register_forward_hook(lambda *_: None)
        models.append(model.train())
    lrkern.peft.patch(models[0], mixed_training=True)
    models[0].set_requires_grad(["a", "b"])
    models[0](input_ids=ids, adapter_names=["a", "b", "b", "__base__", "a"]).pooler_output.square().sum().backward()
    for name, rows in (("a", [0, 4]), ("b", [1, 2])):
        models[1].set_adapter(name)
        models[1](input_ids=ids[rows]).pooler_output.square().sum().backward()
    models[1].set_requires_grad(["a", "b"])
    close((torch.ones(()), grads_of(models[0])), (torch.ones(()), grads_of(models[1])))


def test_eval_with_gradients_and_the_report():
    model = ours(layers=2)
    assert_report_is_true(model, lambda m: mixed_step(m), fused=13)
    close(mixed_step(model.eval()), one_at_a_time(mixed(layers=2).eval()))


# ---- transformers' Trainer -------------------------------------------------------------------------------------------


def classifier():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1, "num_labels": 2}
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(PATH, local_files_only=True, **off)
    config = lambda r: lora_config(r=r, task_type="SEQ_CLS")  # each adapter has a head of its own
    model = peft.get_peft_model(model, config(4), adapter_name="a")
    model.add_adapter("b", config(8))
    model.set_requires_grad(["a", "b"])
    return model


def rows_of(names, n=16):
    ids = torch.randint(1000, 20000, (n, 10), generator=torch.Generator().manual_seed(2))
    return [
        {
            "input_ids": row,
            "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": i % 2,
            "adapter_names": names[i % 4],
        }
        for i, row in enumerate(ids)
    ]


def collate(rows):  # docs/ops.md has this recipe
    names = [row["adapter_names"] for row in rows]
    rest = [{key: value for key, value in row.items() if key != "adapter_names"} for row in rows]
    return transformers.default_data_collator(rest) | {"adapter_names": names}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    model, rows = classifier(), rows_of(["a", "b", "b", "__base__"])
    lrkern.peft.patch(model, mixed_training=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-3,
        gradient_accumulation_steps=2, gradient_checkpointing=checkpointing, eval_strategy="steps", eval_steps=1,
        logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, save_steps=3,
        remove_unused_columns=False, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], data_collator=collate)
    seen, compute = [], trainer.compute_loss

    def recording(m, inputs, **kw):
        seen.extend([copy.deepcopy(inputs)] * m.training)
        return compute(m, inputs, **kw)

    trainer.compute_loss = recording
    trainer.train()
    history = trainer.state.log_history
    assert len([e for e in history if "loss" in e]) == len([e for e in history if "eval_loss" in e]) == 3
    assert {name.split("/")[0] for name in map(str, (p.name for p in (tmp_path / "checkpoint-3").iterdir()))} >= {
        "a",
        "b",
    }

    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in changed if "lora_" in n} == {"a", "b"}

    stock = classifier().train()  # the same steps, one adapter at a time
    halves = 1 if trainer.model_accepts_loss_kwargs else 2  # Trainer leaves the mean over micro-batches to such a model
    optimizer = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        for inputs in seen[2 * step : 2 * step + 2]:
            names = inputs.pop("adapter_names")
            for name in ("a", "b"):
                rows_at = [i for i, n in enumerate(names) if n == name]
                if rows_at:
                    stock.set_adapter(name)
                    stock.set_requires_grad(["a", "b"])
                    part = {key: value[rows_at] for key, value in inputs.items()}
                    (stock(**part).loss * len(rows_at) / len(names) / halves).backward()
        optimizer.step(), optimizer.zero_grad()
    for (name, got), want in zip(model.named_parameters(), stock.parameters(), strict=True):
        if "lora_" in name:
            moved = (want - start[name]).norm()
            assert (got - want).norm() <= 1e-4 * moved + 1e-7 and moved > 0, name

    predicted = trainer.predict(rows[:4]).predictions
    with torch.no_grad():
        for i, name in enumerate(["a", "b", "b"]):
            model.set_adapter(name)
            alone = model(
                **{k: torch.as_tensor(v)[None] for k, v in rows[i].items() if k not in ("labels", "adapter_names")}
            )
            torch.testing.assert_close(torch.tensor(predicted[i]), alone.logits[0], atol=1e-5, rtol=1e-5)


def test_trainer_without_the_recipe_says_so(tmp_path):
    """Trainer drops the column by default, and all rows would go to the active adapter: documented, as it cannot be seen."""
    model = classifier()
    lrkern.peft.patch(model, mixed_training=True)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows_of(["a", "b", "b", "a"]))
    assert "adapter_names" not in next(iter(trainer.get_train_dataloader()))
