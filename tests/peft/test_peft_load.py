# SPDX-License-Identifier: Apache-2.0
"""gpt-oss' own files loaded packed, with LoRA over experts and attention: transformers' dequantised model is the oracle."""

import copy
import functools
import json
import shutil
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
safetensors = pytest.importorskip("safetensors.torch")

import lrkern  # noqa: E402
from lrkern.nn import MXFP4Experts, MXFP4Linear  # noqa: E402

E, H, N, V = 4, 64, 96, 97
TARGETS = ["q_proj", "v_proj", "experts"]
IDS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as gpt-oss' is: bfloat16, experts in blocks and scales, quantization_config mxfp4."""
    where = tmp_path_factory.mktemp("gpt-oss")
    config = transformers.GptOssConfig(
        hidden_size=H, intermediate_size=N, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_local_experts=E, num_experts_per_tok=2, vocab_size=V, max_position_embeddings=64, sliding_window=16, pad_token_id=0,
        experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling.GptOssForCausalLM(config).bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape) / p.shape[-1] ** 0.5 + (1 if p.ndim == 1 else 0))
    model.save_pretrained(where)
    tensors = safetensors.load_file(where / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        blocks = [lrkern.ops.mx_quantize(w.mT)[:2] for w in tensors.pop(name)]  # [E, in, out]
        tensors[f"{name}_blocks"] = torch.stack([codes.view(len(codes), -1, 16) for codes, _ in blocks])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in blocks])
    write(where, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return where


def write(folder, tensors, quantization):
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, dtype=torch.float32, **more):
    return lrkern.peft.load_mxfp4(folder, dtype=dtype, **more)


def stock(folder, dtype=torch.float32):
    dequantise = transformers.Mxfp4Config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantise, dtype=dtype)


def adapted(folder, dtype=torch.float32, **settings):
    model = load(folder, dtype)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **settings)
    lrkern.peft.register(config, model)
    torch.manual_seed(7)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.mul_(0.3)
    return model


def logits(model, grad=False):
    with torch.set_grad_enabled(grad):
        return model(input_ids=IDS).logits


def experts(model):
    return [m for m in model.modules() if isinstance(m, MXFP4Experts)]


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_files_bytes_stay_and_the_model_is_that_of_transformers(folder, dtype):
    model, tensors = load(folder, dtype), safetensors.load_file(folder / "model.safetensors")
    assert relative(logits(model), logits(stock(folder, dtype))) < (1e-5 if dtype == torch.float32 else 0.03)
    assert len(experts(model)) == 2 and not model.training
    for name, t in model.state_dict().items():
        assert t.dtype == (torch.uint8 if name in tensors and tensors[name].dtype == torch.uint8 else dtype), name
        assert torch.equal(t, tensors[name].to(t.dtype)), name
    report = lrkern.peft.quantized(model)
    names = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    elements = E * (H * 2 * N + N * H)
    assert report.layers == dict.fromkeys(names, (elements * dtype.itemsize, elements * 17 // 32))
    assert str(report).startswith(f"lrkern: 2 weights in MXFP4, {2 * elements * dtype.itemsize:,} bytes before")


def test_logits_and_gradients_with_lora_are_those_of_the_dequantised_model(folder):
    """Of which PEFT adapts the attention, and W of each expert has ΔW added."""
    ours, theirs = adapted(folder), stock(folder)
    attention = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[:2], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, attention)
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    twins = dict(theirs.named_parameters())
    with torch.no_grad():
        for n in own.keys() & twins.keys():
            twins[n].copy_(own[n])
    wanted = {}
    for i, layer in enumerate(theirs.base_model.model.model.layers):
        dense = layer.mlp.experts
        for which in ("gate_up", "down"):
            path = f"base_model.model.model.layers.{i}.mlp.experts.lora_"
            a, b = (own[f"{path}{f}.default.{which}"].detach().clone().requires_grad_() for f in "AB")
            wanted |= {f"{path}A.default.{which}": a, f"{path}B.default.{which}": b}
            w = dense._parameters.pop(f"{which}_proj").detach()
            setattr(dense, f"{which}_proj", w + 2.0 * (b @ a).mT)
    wanted |= {n: twins[n] for n in own.keys() & twins.keys()}
    assert wanted.keys() == own.keys() and len(own) == 2 * (4 + 4)
    got, want = logits(ours, True), logits(theirs, True)
    assert relative(got, want) < 1e-5 and relative(got, logits(load(folder))) > 0.01
    g = torch.randn(got.shape)
    names = list(own)
    ours_g = torch.autograd.grad(got, [own[n] for n in names], g)
    for name, mine, real in zip(names, ours_g, torch.autograd.grad(want, [wanted[n] for n in names], g), strict=True):
        assert relative(mine, real) < 1e-4, name
    report = lrkern.peft.report(ours)
    assert report.fused == len(report.layers) == 6, str(report)


def test_trainer_trains_adapters_alone(folder, tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="steps", save_steps=2,
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(load(folder), arguments, train_dataset=data)
    model = adapted(folder, torch.bfloat16)
    assert model.base_model.model.is_quantized and model.base_model.model.hf_quantizer.is_trainable
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) == ("lora_" not in name), name
    again = load(folder, torch.bfloat16)
    config = peft.LoraConfig.from_pretrained(tmp_path / "checkpoint-2")
    lrkern.peft.register(config, again)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "checkpoint-2", config=config)
    assert torch.equal(logits(again), logits(model.eval()))


def test_adapters_are_pefts(folder, tmp_path):
    model = adapted(folder)
    base, one = logits(load(folder)), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    torch.manual_seed(8)
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=TARGETS, use_rslora=True, init_lora_weights="gaussian")
    )
    assert torch.equal(logits(model), one)
    layer = model.base_model.model.model.layers[1].mlp.experts
    assert layer.scaling == {"default": 2.0, "other": 8 / 2**0.5} and {"default", "other"} == set(layer.lora_A)
    with torch.no_grad():
        for p in layer.lora_B["other"].parameters():
            p.normal_(std=0.1)
    layer.set_adapter(["default", "other"])
    x, weights = torch.randn(5, H), torch.rand(5, 2)
    indices = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]])
    both = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both.merge()
    together = layer(x, indices, weights)
    assert relative(together, layer.base_layer(x, indices, weights)) > 0.05
    assert relative(both(x, indices, weights), together) < 0.3  # but for 4 bits
    layer.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.mlp.experts.lora_"
    assert (
        tensors[f"{path}A.gate_up"].shape == (E, 3, H)
        and tensors[f"{path}B.down"].shape == (E, H, 3)
        and len(tensors) == 16
    )
    model.delete_adapter("other")
    assert set(layer.lora_A) == {"default"} and torch.equal(logits(model), one)


def test_merging_rounds_once_and_unmerge_puts_the_bytes_back(folder):
    model = adapted(folder)
    before, want, base = {n: b.clone() for n, b in model.named_buffers()}, logits(model), logits(load(folder))
    with pytest.warns(UserWarning, match="merging into experts in MXFP4 rounds"):
        model.merge_adapter()
    merged = logits(model)
    assert relative(merged, want) < 0.5 * relative(base, want)
    up, _ = experts(model)[0].dequantize(torch.float32)
    layer = model.base_model.model.model.layers[0].mlp.experts
    change = 2.0 * (layer.lora_B["default"].gate_up @ layer.lora_A["default"].gate_up).mT
    model.unmerge_adapter()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers()) and relative(logits(model), want) < 1e-5
    was, _ = experts(model)[0].dequantize(torch.float32)
    assert relative(up, was + change) < 0.15 and relative(up, was) > 0.15
    with torch.no_grad():
        layer.lora_A["default"].down[2, 0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="merge must leave down_proj of expert 2 finite, got inf or nan; nothing is changed"
    ):
        layer.merge()
    assert not layer.merged and all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model = adapted(folder)
    with pytest.warns(UserWarning, match="merging into experts"):
        whole = model.merge_and_unload()
    assert torch.equal(logits(whole), merged) and type(whole.model.layers[0].mlp.experts) is MXFP4Experts


def test_the_whole_goes_to_files_and_comes_back(folder, tmp_path):
    """gpt-oss' format while only experts are packed, so that others read it; attention that quantize packed is in ours."""
    model = load(folder)
    model.save_pretrained(tmp_path / "theirs")
    said = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4" and "model.layers.*.self_attn" in said["modules_to_not_convert"]
    for again in (load(tmp_path / "theirs"), stock(tmp_path / "theirs")):
        assert relative(logits(again), logits(model)) < 1e-5
    assert len(lrkern.peft.quantize(model, others=True).layers) == 8
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"] == {
        "quant_method": "lrkern_mxfp4"
    }
    for again in (
        load(tmp_path / "ours"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32),
    ):
        assert type(again.model.layers[0].self_attn.q_proj) is MXFP4Linear
        assert torch.equal(logits(again), logits(model))
        assert again.state_dict().keys() == model.state_dict().keys()
    report = lrkern.peft.quantized(again)
    assert len(report.layers) == 10 and report.after < report.before / 7
    config = peft.LoraConfig(r=3, target_modules=[*TARGETS, "o_proj"])
    lrkern.peft.register(config, again)
    report = lrkern.peft.report(peft.get_peft_model(again, config))
    assert report.fused == len(report.layers) == 8


def test_other_classes_shards_and_a_config_of_ones_own(folder, tmp_path):
    """The file's names have a prefix that the base model's have not."""
    model = load(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = transformers.AutoConfig.from_pretrained(folder)
    base = load(tmp_path, model_class=transformers.AutoModel, config=config, device_map={"": "cpu"})
    assert config.quantization_config["quant_method"] == "mxfp4"
    with torch.no_grad():
        hidden = base(input_ids=IDS).last_hidden_state
        assert relative(model.lm_head(hidden), logits(model)) < 1e-6


# ---- refusals


def plain_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def changed(folder, tmp_path, change, quantization=None):
    where = tmp_path / "bad"
    shutil.copytree(folder, where)
    tensors = safetensors.load_file(where / "model.safetensors")
    change(tensors)
    write(where, tensors, quantization or {"quant_method": "mxfp4"})
    return where


UP = "model.layers.1.mlp.experts.gate_up_proj"


def float_scales(t):
    t[f"{UP}_scales"] = t[f"{UP}_scales"].float()


def fewer_blocks(t):
    t[f"{UP}_blocks"] = t[f"{UP}_blocks"][:, :, :1].contiguous()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{UP}_scales"), rf"must have {UP}_scales as U8 \[4, 192, 2\], got none"),
        (float_scales, rf"must have {UP}_scales as U8 \[4, 192, 2\], got F32 \[4, 192, 2\]"),
        (fewer_blocks, rf"must have {UP}_blocks as U8 \[4, 192, 2, 16\], got U8 \[4, 192, 1, 16\]"),
        (lambda t: t.pop(f"{UP}_bias"), rf"must have {UP}_bias, got none"),
    ],
)
def test_a_bad_file_is_refused_before_a_weight_is_read(folder, tmp_path, change, says, monkeypatch):
    where = changed(folder, tmp_path, change)
    reads = []
    loads = transformers.PreTrainedModel._load_pretrained_model
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_load_pretrained_model", lambda *a, **k: reads.append(a) or loads(*a, **k)
    )
    with pytest.raises(ValueError, match=says):
        load(where)
    assert not reads


def test_refusals_of_files_and_settings(folder, tmp_path):
    with pytest.raises(ValueError, match="config must name mxfp4 or no quantisation, got 'gptq'"):
        load(changed(folder, tmp_path, lambda t: None, {"quant_method": "gptq", "bits": 4}))
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got torch.int8"):
        load(folder, torch.int8)
    stock(folder).save_pretrained(tmp_path / "misnamed")  # dense weights under the packed ones' names
    with pytest.raises(ValueError, match=r"gate_up_proj_blocks as U8 \[4, 192, 2, 16\], got F32 \[4, 64, 192\]"):
        load(tmp_path / "misnamed")
    modeling.GptOssForCausalLM(plain_config(folder)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="file of GptOssForCausalLM must have weights in MXFP4, got none"):
        load(tmp_path / "dense")
    with pytest.raises(ValueError, match="got a model without; load it as ever and call lrkern.peft.quantize"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=lrkern.peft.mx.load.MXFP4Config()
        )


@functools.cache
def loaded(folder):
    return load(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_dropout": 0.1}, "rank 1 to 512 without dropout and biases, got lora_dropout=0.1"),
        ({"lora_bias": True}, "got lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa'"),
        ({"r": 513}, "got r=513"),
        ({"use_dora": True}, "Invalid or unsupported variant combination"),
    ],
)
def test_loras_that_experts_do_not_take(folder, settings, says):
    model = copy.deepcopy(loaded(folder))
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["experts"]} | settings)
    lrkern.peft.register(config, model)
    with pytest.raises(ValueError, match=says):
        peft.get_peft_model(model, config)


def test_what_experts_do_not_do(folder):
    model = adapted(folder).eval()
    with pytest.raises(ValueError, match="one choice of adapters a batch, got 'adapter_names'"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
    base = copy.deepcopy(loaded(folder))
    with pytest.raises(NotImplementedError, match="must be dequantised as it is loaded"):
        base.dequantize()
    of = base.model.layers[0].mlp.experts
    base.model.layers[0].mlp.experts = MXFP4Experts(of.num_experts, of.hidden_size, of.intermediate_size, r=2)
    config = peft.LoraConfig(target_modules=["experts"])
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(copy.deepcopy(base), config)
    lrkern.peft.register(config, base)
    with pytest.raises(ValueError, match="must have none of their own, got MXFP4Experts with r=2"):
        peft.get_peft_model(base, config)
