# SPDX-License-Identifier: Apache-2.0
"""MXFP4Experts in a tiny gpt-oss of transformers: its own experts with dequantised weights are the oracle."""

import copy
import functools

import pytest
import torch
from torch import nn

from lrkern.nn import MXFP4Experts

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

E, H, N, K, V = 4, 64, 96, 2, 97
LORA = ("gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B")


@functools.cache
def made():
    config = transformers.GptOssConfig(
        hidden_size=H, intermediate_size=N, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_local_experts=E, num_experts_per_tok=K, vocab_size=V, max_position_embeddings=64, sliding_window=16, pad_token_id=0,
        experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape) / p.shape[-1] ** 0.5 + (1 if p.ndim == 1 else 0))
    return model


def model_of(dtype=torch.float32):
    return copy.deepcopy(made()).to(dtype)


def packed(model, **settings):
    """The model with experts in MXFP4 and adapters that act."""
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp.experts = experts = MXFP4Experts.from_experts(layer.mlp.experts, **settings)
        with torch.no_grad():
            for p in experts.parameters():
                if p.requires_grad:
                    p.copy_(0.1 * torch.randn(p.shape))
    return model


def dense(of, dtype=torch.float32):
    """transformers' experts of the weights that it decodes itself, with what the adapters add."""
    up, down = (
        mxfp4.convert_moe_packed_tensors(getattr(of, f"{n}_blocks"), getattr(of, f"{n}_scales"), dtype=torch.bfloat16)
        for n in ("gate_up_proj", "down_proj")
    )
    experts = modeling.GptOssExperts(made().config)
    factors = [getattr(of, n).detach().clone().requires_grad_() for n in LORA] if of.r else []
    weights = [up.to(dtype), down.to(dtype)]
    if factors:
        a1, b1, a2, b2 = factors
        weights = [w + of.scaling * (b @ a).mT for w, b, a in zip(weights, (b1, b2), (a1, a2), strict=True)]
    for name, w in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        delattr(experts, name)
        setattr(experts, name, w)
        setattr(experts, f"{name}_bias", nn.Parameter(getattr(of, f"{name}_bias").detach().clone(), False))
    return experts, factors


def routed(T, seed=3):
    g = torch.Generator().manual_seed(seed)
    weights, indices = torch.rand(T, E, generator=g).topk(K, dim=-1)
    return torch.randn(T, H, generator=g), indices, weights.softmax(-1)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("T", [1, 3, 60])
@pytest.mark.parametrize("r", [0, 5, 16])
def test_forward_and_gradients_are_those_of_transformers(device, T, r):
    """2 T rows of 4 experts: on CUDA up to 64 in one launch."""
    ours = packed(model_of(), r=r).model.layers[0].mlp.experts.to(device)
    theirs, factors = dense(ours)
    x, indices, weights = (t.to(device) for t in routed(T))
    g = torch.randn(T, H).to(device)
    results = []
    for experts, own in ((ours, [getattr(ours, n) for n in LORA] if r else []), (theirs, factors)):
        a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = experts(a, indices, w)
        results.append([y, *torch.autograd.grad(y, [a, w, *own], g)])
    assert len(results[0]) == (7 if r else 3)
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and relative(got, want) < 2e-5
    up, down = ours.dequantize(torch.float32)
    assert up.shape == (E, H, 2 * N) and down.shape == (E, N, H)
    assert r or (torch.equal(up, theirs.gate_up_proj) and torch.equal(down, theirs.down_proj))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_trains_and_generates(dtype):
    model = packed(model_of(dtype), r=4)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    want = copy.deepcopy(model)
    for layer in want.model.layers:
        layer.mlp.experts = dense(layer.mlp.experts)[0].to(dtype)
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.mlp.experts, name, getattr(layer.mlp.experts, name).to(dtype))
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert relative(model(ids).logits, want(ids).logits) < (2e-5 if dtype == torch.float32 else 0.03)
        assert relative(model(ids).logits, model_of(dtype)(ids).logits) > 1e-3
        assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 13)
    before = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.uint8}
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2), []
    for _ in range(12):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.93 * losses[0]
    assert len(before) == 8 and all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)


def test_a_row_without_an_expert_adds_nothing(device):
    ours = packed(model_of(), r=3).model.layers[0].mlp.experts.to(device)
    x, indices, weights = (t.to(device) for t in routed(7))
    some = indices.clone()
    some[2, 1], some[5] = -1, -7
    alone = torch.where(some < 0, 0, weights)
    assert torch.equal(ours(x, some, weights), ours(x, indices, alone))


def test_files_of_gpt_oss_load_as_they_are(tmp_path):
    """Their keys are the checkpoint's: blocks, scales and biases of each layer."""
    safetensors = pytest.importorskip("safetensors.torch")
    full = packed(model_of(), r=0).model.layers[0].mlp.experts
    keys = ["gate_up_proj_bias", "down_proj_bias", "gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks"]
    assert sorted(full.state_dict()) == sorted([*keys, "down_proj_scales"])
    safetensors.save_file(full.state_dict(), tmp_path / "w")
    again = MXFP4Experts(E, H, N, r=3, dtype=torch.float32)
    missing, unexpected = again.load_state_dict(safetensors.load_file(tmp_path / "w"), strict=False)
    assert sorted(missing) == sorted(LORA) and not unexpected
    x, indices, weights = routed(5)
    assert relative(again(x, indices, weights), full(x, indices, weights)) < 1e-6  # B is zero
    assert full.gate_up_proj_blocks.nbytes + full.gate_up_proj_scales.nbytes == 4.25 * E * H * 2 * N / 8


def test_refusals_change_nothing():
    experts = packed(model_of(), r=2).model.layers[0].mlp.experts
    before = {n: t.clone() for n, t in experts.state_dict().items()}
    for change, message in (
        ({"gate_up_proj_blocks": before["gate_up_proj_blocks"].float()}, "gate_up_proj_blocks must be uint8"),
        ({"down_proj_scales": before["down_proj_scales"][:2]}, r"down_proj_scales must be uint8 \[4, 64, 3\], got"),
    ):
        with pytest.raises(RuntimeError, match=message):
            experts.load_state_dict({n: t * 0 for n, t in before.items()} | change)
        assert all(torch.equal(t, before[n]) for n, t in experts.state_dict().items())
    x, indices, weights = routed(3)
    with pytest.raises(ValueError, match="router_indices must be below 4, got 4"):
        experts(x, indices + (indices == indices.max()) * (4 - indices), weights)
    with pytest.raises(TypeError, match="must be a GptOssExperts, got Linear"):
        MXFP4Experts.from_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"r must be a whole number in 0..512, got 513"):
        MXFP4Experts(E, H, N, r=513)
    broken = copy.deepcopy(made().model.layers[0].mlp.experts)
    with torch.no_grad():
        broken.down_proj[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="weights must be finite"):
        MXFP4Experts.from_experts(broken)
