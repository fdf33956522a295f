# SPDX-License-Identifier: Apache-2.0
"""lrkern.peft.quantize: PEFT models over a base in MXFP4. PEFT's own code over the same base is the oracle of what is fused over it,
and a dense model of the dequantised weights that of both."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from peft import LoraConfig, MissConfig, RandLoraConfig, VeraConfig  # noqa: E402

import lrkern.functional as F  # noqa: E402
import lrkern.peft  # noqa: E402
from lrkern.nn import MXFP4Linear  # noqa: E402

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": lambda **kw: LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=TARGETS, **kw),
    "dora": lambda **kw: LoraConfig(
        r=4, lora_alpha=12, use_dora=True, init_lora_weights=False, target_modules=TARGETS, **kw
    ),
    "vera": lambda **kw: VeraConfig(r=8, target_modules=["q_proj"], **kw),
    "randlora": lambda **kw: RandLoraConfig(r=8, target_modules=["q_proj"], **kw),
    "miss": lambda **kw: MissConfig(r=8, target_modules=TARGETS, **kw),
    "bat": lambda **kw: MissConfig(r=8, init_weights="bat", target_modules=TARGETS, **kw),
}
CALLED = {  # which form runs over such a base
    "lora": "lora_into", "dora": "dora_add", "vera": "vera_add", "randlora": "randlora_add", "miss": "miss_add",
    "bat": "bone_linear",
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", CONFIGS)


def adapted(kind="lora", dtype=torch.float32, **config):
    """Of a tiny llama, with adapters that act."""
    base = tiny_models.tiny("llama").to(dtype)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, CONFIGS[kind](**config))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape).to(p.dtype))
    return model.eval()


def quantised(kind="lora", patched=False, **kw):
    model = adapted(kind, **kw)
    lrkern.peft.quantize(model)
    if patched:
        report = lrkern.peft.patch(model)
        assert report.fused == len(report.layers), str(report)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}


def bases(model):
    return [m for m in model.modules() if isinstance(m, MXFP4Linear)]


def ids(rows=2, tokens=7):
    return torch.randint(3, tiny_models.V, (rows, tokens), generator=torch.Generator().manual_seed(3))


def forward(model):
    with torch.no_grad():
        return model(ids()).logits


def step(model):
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)).item()


def same(got, want, tolerance):
    assert len(got) == len(want) > 1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and relative(mine, theirs) < tolerance


@pytest.fixture
def calls(monkeypatch):
    """Names of the functional forms that ran."""
    seen = []
    for name in set(CALLED.values()) | {"lora_add"}:
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, name=name, real=real, **k: seen.append(name) or real(*a, **k))
    return seen


# ---- what runs


@kinds
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fused_is_what_peft_computes_over_the_same_base(kind, training, calls):
    stock, ours = quantised(kind).train(training), quantised(kind, patched=True).train(training)
    dense = quantised(kind).train(training)
    lrkern.peft.dequantize(dense)
    assert not bases(dense) and len(bases(stock)) == len(layers(stock)) == len(layers(ours))
    want = step(stock)
    same(step(dense), want, 1e-5)
    assert not calls
    same(step(ours), want, 1e-5)
    assert calls == [CALLED[kind]] * len(layers(ours))
    assert relative(forward(ours), forward(stock)) < 1e-5
    assert relative(forward(ours), forward(adapted(kind))) > 1e-4, "the base is another one"


@kinds
def test_in_bfloat16(kind):
    stock, ours = (quantised(kind, patched, dtype=torch.bfloat16).train() for patched in (False, True))
    truth = quantised(kind).train()
    lrkern.peft.dequantize(truth, torch.float32)
    got, want, true = step(ours), step(stock), step(truth)
    same(got, want, 0.03)
    assert got[0].dtype == torch.bfloat16
    worst = lambda results: max(map(relative, results, true))
    assert worst(got) < 1.02 * worst(want) < 0.04, "no further from float32 than PEFT's code"


def test_dropout_of_lora_and_dora():
    for kind, name in (("lora", "lora_into"), ("dora", "dora_add")):
        ours = quantised(kind, patched=True, lora_dropout=0.5).train()
        assert relative(forward(ours), forward(ours)) > 1e-3, name
        stock = quantised(kind, lora_dropout=0.5).eval()
        assert relative(forward(ours.eval()), forward(stock)) < 1e-5


def test_no_dense_weight_is_saved_for_backward_by_dora_with_dropout():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(512, 512)

        def forward(self, x):
            return self.linear(x)

    config = LoraConfig(r=4, use_dora=True, lora_dropout=0.5, target_modules=["linear"])
    model = peft.get_peft_model(Wide(), config)
    lrkern.peft.quantize(model)
    lrkern.peft.patch(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        model(torch.randn(3, 512, requires_grad=True))
    assert max(saved) == 512 * 256


def test_hooks_on_the_base_run(calls):
    ours, seen = quantised(patched=True), []
    for base in bases(ours):
        base.register_forward_hook(lambda *_: seen.append(1))
    assert relative(forward(ours), forward(quantised())) < 1e-5
    assert len(seen) == len(bases(ours)) and set(calls) == {"lora_add"}


def test_several_adapters_and_mixed_batches(calls):
    def two(patched):
        model = quantised(patched=patched)
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]))
        return model

    stock, ours = two(False), two(True)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        got, want = (m(ids(3), adapter_names=names).logits for m in (ours, stock))
    assert relative(got, want) < 1e-5
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "other"])
    same(step(ours), step(stock), 1e-5)
    assert set(calls) == {"lora_into", "lora_add"}
    with ours.disable_adapter(), stock.disable_adapter():
        assert torch.equal(forward(ours), forward(stock))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains_and_generates(patched, dtype):
    model = quantised(patched=patched, dtype=dtype).train()
    before = [t.clone() for base in bases(model) for t in base.buffers()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    assert all(map(torch.equal, before, (t for base in bases(model) for t in base.buffers())))
    with torch.no_grad():
        text = model.eval().generate(input_ids=ids(), max_new_tokens=5, do_sample=False)
    assert text.shape == (2, 12)


def test_trainer_takes_it(tmp_path):
    """transformers refuses to train what its own quantisers have marked. Nothing here is: the model was quantised once it was loaded."""
    pytest.importorskip("accelerate")
    model = quantised(patched=True).train()
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    data = [{"input_ids": row, "labels": row} for row in ids(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="steps", save_steps=2,
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, logging_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


# ---- the report, and what stays


def test_report_counts_the_bytes():
    model = adapted()
    report = lrkern.peft.quantize(model)
    assert len(report.layers) == 6 and not report.left
    for name, (before, after) in report.layers.items():
        base = model.get_submodule(name)
        assert before == 4 * base.in_features * base.out_features
        G = -(-base.in_features // 32)
        assert after == 17 * G * base.out_features
        if base.in_features % 32 == 0:
            assert 8 * after == 4.25 * base.in_features * base.out_features
    assert report.before == sum(b for b, _ in report.layers.values()) and report.after < report.before / 4.9
    assert str(report).startswith(f"lrkern: 6 weights in MXFP4, {report.before:,} bytes before, {report.after:,} after")
    with pytest.raises(ValueError, match="to quantise, got PeftModel with none"):
        lrkern.peft.quantize(model)


def test_the_other_linears_too():
    model = adapted()
    report = lrkern.peft.quantize(model, others=True)
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear and ".lora_" not in n}
    assert len(report.layers) == len(bases(model)) == 14 and plain == {"base_model.model.lm_head"}
    assert all(type(m.lora_A["default"]) is nn.Linear for m in layers(model).values())
    want = forward(model)
    lrkern.peft.patch(model)
    assert relative(forward(model), want) < 1e-5
    model = adapted()
    assert "lm_head" in str(lrkern.peft.quantize(model, others=True, keep=("q_proj", "k_proj")))
    assert type(model.base_model.model.model.layers[0].self_attn.k_proj) is nn.Linear


def test_what_stays_and_why():
    model = adapted()
    first, second = model.base_model.model.model.layers
    first.self_attn.q_proj.base_layer.weight.requires_grad_()
    first.self_attn.v_proj.base_layer.register_forward_hook(lambda *_: None)
    first.mlp.down_proj.base_layer.weight.data[0, 0] = torch.nan
    model.tied = nn.Linear(32, 32, bias=False)
    model.tied.weight = second.self_attn.q_proj.base_layer.weight
    report = lrkern.peft.quantize(model)
    found = {name.split("layers.")[1].removesuffix(".base_layer"): why for name, why in report.left.items()}
    assert found == {
        "0.self_attn.q_proj": "its weight trains",
        "0.self_attn.v_proj": "hooks, a forward of its own or a weight of another type",
        "0.mlp.down_proj": "inf or nan in its weight",
        "1.self_attn.q_proj": "another module has its weight too",
    }
    assert len(report.layers) == len(bases(model)) == 2 and "as it was, its weight trains" in str(report)


def test_layers_of_other_methods_and_of_no_linear_stay():
    model = peft.get_peft_model(tiny_models.tiny("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="Conv1D is no nn.Linear"):
        lrkern.peft.quantize(model)
    model = peft.get_peft_model(tiny_models.tiny("llama"), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PEFT's peft.tuners.loha.layer.Linear is over it"):
        lrkern.peft.quantize(model)


def test_a_refused_call_changes_nothing():
    model = adapted()
    with pytest.raises(ValueError, match="rule must be one of"):
        lrkern.peft.quantize(model, "round")
    with pytest.raises(ValueError, match="to quantise, got Linear with none"):
        lrkern.peft.quantize(nn.Linear(2, 2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="no merged adapters, unmerge them first; got 'default' in"):
        lrkern.peft.quantize(model)
    assert not bases(model) and {type(m) for m in layers(model).values()} == {peft.tuners.lora.layer.Linear}
    model = quantised()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"peft.dequantize: model must have no merged adapters"):
        lrkern.peft.dequantize(model)
    assert len(bases(model)) == 6


def test_who_needs_a_dense_weight_is_told():
    model = peft.get_peft_model(tiny_models.tiny("t5"), LoraConfig(target_modules=["wo"]))
    lrkern.peft.quantize(model)
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(AttributeError, match=r"keeps W in codes .* lrkern.peft.dequantize\(model\)"):
        model(input_ids=tokens, labels=tokens)  # T5 reads wo.weight
    lrkern.peft.dequantize(model)
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()
    with pytest.raises(AttributeError, match="keeps W in codes"):
        quantised().add_adapter("pissa", LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", ["vera", "randlora", "miss"])
def test_a_new_adapter_of_a_kind_that_peft_puts_over_no_such_base(kind):
    base, config = tiny_models.tiny("llama"), CONFIGS[kind]()
    lrkern.peft.quantize(base, others=True)
    lrkern.peft.register(config, base)
    with pytest.raises((TypeError, ValueError), match="MXFP4Linear.* is not supported|No layers types compatible"):
        peft.get_peft_model(base, config)


@pytest.mark.slow
def test_it_compiles():
    torch._dynamo.reset()
    model = quantised(patched=True)
    assert relative(forward(torch.compile(model, backend="aot_eager")), forward(model)) < 1e-5
    torch._dynamo.reset()


# ---- there and back


@kinds
@pytest.mark.parametrize("patch_first", [False, True])
def test_dequantize_undoes_quantize(kind, patch_first):
    model = adapted(kind)
    classes = [type(m) for m in model.modules()]
    if patch_first:
        lrkern.peft.patch(model)
    lrkern.peft.quantize(model)
    assert all(isinstance(m, lrkern.peft.mx.OverMXFP4) for m in layers(model).values())
    if patch_first:
        report = lrkern.peft.report(model)
        assert report.fused == len(report.layers), str(report)
    want = forward(model)
    lrkern.peft.dequantize(model)
    assert relative(forward(model), want) < 1e-5
    lrkern.peft.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(m.quantization_backend is None for m in layers(model).values())
    again = lrkern.peft.quantize(model)
    assert len(again.layers) == len(layers(model)) and relative(forward(model), want) < 1e-5


def test_unpatch_leaves_it_quantised():
    model = quantised(patched=True)
    lrkern.peft.unpatch(model)
    assert {type(m) for m in layers(model).values()} == {lrkern.peft.mx.LoraOverMXFP4} and len(bases(model)) == 6
    assert torch.equal(forward(model), forward(quantised()))


@pytest.mark.parametrize("patched", [False, True])
def test_copies_and_pickles(patched):
    model = quantised(patched=patched)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(forward(again), forward(model)) and len(bases(again)) == 6


def test_adapters_go_to_files_and_come_back(tmp_path):
    model = quantised(patched=True)
    model.save_pretrained(tmp_path)
    want = forward(model)
    stock = peft.PeftModel.from_pretrained(tiny_models.tiny("llama"), tmp_path).eval()
    lrkern.peft.quantize(stock)
    assert relative(forward(stock), want) < 1e-5
    # or over a base that is packed already
    base = tiny_models.tiny("llama")
    assert len(lrkern.peft.quantize(base, others=True).layers) == 14
    config = peft.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MXFP4Linear.*not supported"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    base = tiny_models.tiny("llama")
    lrkern.peft.quantize(base, others=True)
    lrkern.peft.register(config, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unsupported layer type")
        there = peft.PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    report = lrkern.peft.report(there)
    assert report.fused == 6 and {type(m).__name__ for m in layers(there).values()} == {"LoraOverMXFP4"}
    dense = quantised()
    lrkern.peft.quantize(dense, others=True)
    assert relative(forward(there), forward(dense)) < 1e-5
    status = there.get_layer_status()
    assert {s.quantization_backend for s in status} == {"lrkern MXFP4"}


@pytest.mark.parametrize("how", ["torch.save", "safetensors"])
def test_the_whole_state_dict_goes_to_files_and_comes_back(how, tmp_path):
    model, again = quantised(), adapted()
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(0.5)
    lrkern.peft.quantize(again)
    if how == "torch.save":
        torch.save(model.state_dict(), tmp_path / "w")
        state = torch.load(tmp_path / "w")
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_model(model, tmp_path / "w")
        state = safetensors.load_file(tmp_path / "w")
    assert relative(forward(again), forward(model)) > 1e-3
    again.load_state_dict(state)
    assert torch.equal(forward(again), forward(model))


# ---- merging


@kinds
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_rounds_once_and_unmerge_puts_the_bytes_back(kind, patched, safe):
    model = quantised(kind, patched)
    dense = quantised(kind)
    lrkern.peft.dequantize(dense)
    before, want = [t.clone() for b in bases(model) for t in b.buffers()], forward(model)
    dense.merge_adapter(safe_merge=safe)
    with pytest.warns(UserWarning, match="merging into MXFP4 rounds"):
        model.merge_adapter(safe_merge=safe)
    for mine, theirs in zip(bases(model), layers(dense).values(), strict=True):
        merged = MXFP4Linear.from_linear(theirs.get_base_layer())
        assert (mine.codes != merged.codes).float().mean() < 1e-3  # a sum in another order may fall on another side
        assert torch.equal(mine.scales, merged.scales)
    got = forward(model)
    assert relative(got, forward(dense)) > 1e-4 and relative(got, want) < 0.5
    model.unmerge_adapter()
    assert all(map(torch.equal, before, (t for b in bases(model) for t in b.buffers())))
    assert torch.equal(forward(model), want)


def test_merge_and_unload():
    model = quantised(patched=True)
    with pytest.warns(UserWarning, match="merging into MXFP4 rounds"):
        merged = model.merge_and_unload()
    assert not layers(merged) and len(bases(merged)) == 6
    model, exact = quantised(), quantised()
    want = forward(exact)
    lrkern.peft.dequantize(exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = exact.merge_and_unload()
    assert relative(forward(exact), want) < 1e-5 and not bases(exact)
    assert len(bases(model.unload())) == 6


@pytest.mark.filterwarnings("ignore:lrkern.peft. merging")
def test_a_second_adapter_is_merged_beside_the_first():
    """Into the W before both, so that nothing is rounded twice; DoRA's norm is that of this W."""
    for dora in (False, True):
        model = quantised("dora" if dora else "lora")
        torch.manual_seed(5)
        other = LoraConfig(r=3, init_lora_weights=False, use_dora=dora, target_modules=["q_proj"])
        model.add_adapter("other", other)
        before = [t.clone() for b in bases(model) for t in b.buffers()]
        dense = copy.deepcopy(model)
        lrkern.peft.dequantize(dense)
        for m in (model, dense):
            m.merge_adapter(["default"])
            m.merge_adapter(["other"])
        for mine, theirs in zip(bases(model), layers(dense).values(), strict=True):
            merged = MXFP4Linear.from_linear(theirs.get_base_layer())
            assert (mine.codes != merged.codes).float().mean() < 1e-3
        assert {len(m.merged_adapters) for m in layers(model).values()} == {1, 2}
        model.unmerge_adapter()
        assert all(map(torch.equal, before, (t for b in bases(model) for t in b.buffers())))
        assert not any(m.merged_adapters for m in layers(model).values())


@pytest.mark.filterwarnings("ignore:lrkern.peft. merging")
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_is_refused_changes_nothing(safe):
    model = quantised()
    layer = next(iter(layers(model).values()))
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]))
    model.merge_adapter(["default"])
    before = [t.clone() for t in layer.base_layer.buffers()]
    with torch.no_grad():
        layer.lora_A["other"].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected" if safe else "merge must leave W finite, got inf or nan"):
        layer.merge(safe, ["other"])
    assert all(map(torch.equal, before, layer.base_layer.buffers())) and layer.merged_adapters == ["default"]
    layer.unmerge()
    assert not layer.merged_adapters


@pytest.mark.filterwarnings("ignore:lrkern.peft. merging")
def test_a_bias_that_merging_changes_comes_back():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    model = peft.get_peft_model(net, LoraConfig(lora_bias=True, init_lora_weights=False, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].bias.add_(1.0)
    lrkern.peft.quantize(model)
    base, x = model.base_model.model[0].base_layer, torch.randn(4, 64).bfloat16()
    bias, want = base.bias.detach().clone(), model(x)
    model.merge_adapter()
    assert base.bias.dtype == torch.bfloat16 and (base.bias - bias).abs().min() > 0.5
    assert relative(model(x), want) < 0.5
    model.unmerge_adapter()
    assert torch.equal(base.bias, bias) and torch.equal(model(x), want)


def test_a_base_bias_still_trains():
    torch.manual_seed(1)
    config = LoraConfig(bias="lora_only", target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 32)), config)
    bias = model.base_model.model[0].base_layer.bias
    lrkern.peft.quantize(model)
    lrkern.peft.patch(model)
    model(torch.randn(4, 64)).sum().backward()
    assert model.base_model.model[0].base_layer.bias is bias and torch.equal(bias.grad, torch.full((32,), 4.0))
