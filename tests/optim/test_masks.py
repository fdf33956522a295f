# SPDX-License-Identifier: Apache-2.0
"""Rules that mask weights and features: PRILoRA, RoseLoRA and LoRAPrune."""

import copy

import pytest
import tiny_models
import torch
import transformers
from optim_rules import GROUPS, IN, MID, OUT, RULES, STEPS, adamw, batch, model, train
from torch import nn

from lrkern import optim
from lrkern.nn import variants


def one_step(m, optimizer, rule, n):
    x, want = batch(n)
    nn.functional.mse_loss(m(x), want).backward()
    optimizer.step()
    rule.step(optimizer)
    optimizer.zero_grad()


# ---- PRILoRA


@pytest.mark.parametrize("start, end, times", [(0, 0, [3, 6, 9, 12]), (4, 9, [6, 9])])
def test_prilora_prunes_in_time_by_what_it_saw(start, end, times):
    m = model(RULES["prilora"])
    rule = optim.PRILoRAPruning(m, share=0.75, every=3, start=start, end=end, beta=0.8)
    optimizer, norm = adamw(m), None
    for n in range(1, STEPS + 1):
        now = batch(n)[0].norm(dim=0)
        norm = now if norm is None else 0.8 * norm + 0.2 * now
        before = m[0].mask_A.clone()
        one_step(m, optimizer, rule, n)
        torch.testing.assert_close(m[0].x_norm, norm)
        assert (not torch.equal(m[0].mask_A, before)) <= (n in times)
        if n in times:
            for layer in m[::2]:
                assert (layer.mask_A.sum(1) == layer.in_features // 4).all() and not layer.lora_A[~layer.mask_A].any()
    rule.stop()
    m(batch(1)[0])
    torch.testing.assert_close(m[0].x_norm, norm)


def test_prilora_refuses_layers_that_did_not_run():
    m = model(RULES["prilora"])
    rule = optim.PRILoRAPruning(m, every=1)
    m[0](batch(1)[0])
    with pytest.raises(RuntimeError, match="layers must have run in training mode, '2' has not"):
        rule.step()
    assert m[0].mask_A.all() and rule.steps == 0


# ---- RoseLoRA


def test_roselora_leaves_the_share_of_each_row_of_a_and_column_of_b():
    m = model(RULES["roselora"])
    rule = optim.RoseLoRATopK(m, 20, tau=0.25, start=0.2, end=0.6)
    optimizer, shares = adamw(m), []
    for n in range(1, 22):
        one_step(m, optimizer, rule, n)
        share = 1.0 if n <= 4 else 0.25 + 0.75 * max(0.0, 1 - (n - 4) / 8) ** 3
        assert rule.share(n) == pytest.approx(share)
        shares.append(share)
        for layer in m[::2]:
            rows, cols = layer.in_features, layer.out_features
            assert (layer.lora_A != 0).sum(1).tolist() == [max(1, int(share * rows + 1e-9))] * 2
            assert (layer.lora_B != 0).sum(0).tolist() == [max(1, int(share * cols + 1e-9))] * 2
            kept = layer.lora_A != 0
            least = torch.where(kept, layer.sensitivity_A, torch.inf).amin(1)
            assert (torch.where(kept, 0.0, layer.sensitivity_A).amax(1) <= least).all()
            assert layer.mask_A.all() == (n < 20), "masks are fixed at the end"
    assert shares[0] == 1 and shares[-1] == 0.25


@pytest.mark.parametrize("settings, says", [
    ({"total_steps": 0}, "total_steps must be a whole number >= 1"),
    ({"total_steps": 5, "tau": 2}, r"tau must lie in \[0, 1\]"),
    ({"total_steps": 5, "start": 0.8, "end": 0.8}, "end must be more than start = 0.8"),
], ids=["total_steps", "tau", "end"])  # fmt: skip
def test_roselora_refuses(settings, says):
    with pytest.raises(ValueError, match=f"RoseLoRATopK: {says}"):
        optim.RoseLoRATopK(model(RULES["roselora"]), **settings)


# ---- LoRAPrune


def dense_scores(layer):
    """|(gB A + B gA - gB gA) ⊙ (W + s B A)|"""
    a, b, da, db = layer.lora_A, layer.lora_B, layer.lora_A.grad, layer.lora_B.grad
    return ((db @ a + b @ da - db @ da) * (layer.base_layer.weight + layer.scaling * b @ a)).abs().detach()


def test_loraprune_masks_the_least_important_groups():
    m = model(RULES["loraprune"])
    rule = optim.LoRAPrunePruning(m, GROUPS, 20, ratio=0.5, every=2, start=0.1, final=0.3)
    optimizer, importance, gone = adamw(m), torch.zeros(MID // 2), set()
    for n in range(1, 21):
        x, want = batch(n)
        nn.functional.mse_loss(m(x), want).backward()
        optimizer.step()
        s = [dense_scores(m[0]).view(-1, 2, IN).sum((1, 2)), dense_scores(m[2]).view(OUT, -1, 2).sum((0, 2))]
        importance = 0.9 * importance + 0.1 * sum(t / (t.norm() + 1e-8) for t in s)
        rule.step(optimizer)
        optimizer.zero_grad()
        torch.testing.assert_close(rule.importance[0], importance, rtol=1e-4, atol=1e-6)
        share = 0.0 if n <= 2 else 0.5 - 0.5 * max(0.0, 1 - (n - 2) / 12) ** 3
        assert rule.share(n) == pytest.approx(share)
        mask = m[0].mask.view(-1, 2)
        assert torch.equal(mask[:, 0], mask[:, 1]) and m[2].mask.all()
        now = {*(~mask[:, 0]).nonzero().flatten().tolist()}
        assert now >= gone, "what is masked stays so"
        if n % 2 == 0:
            assert len(now) == int(share * 8 + 1e-9)
            others = [i for i in range(8) if i not in gone]
            least = sorted(others, key=lambda i: float(importance[i]))[: len(now) - len(gone)]
            assert now == gone | {*least}
        gone = now
    assert len(gone) == 4


def test_loraprune_masks_again_what_matters_now():
    """By what it seemed to be worth before, too."""
    m = model(RULES["loraprune"])
    rule = optim.LoRAPrunePruning(m, GROUPS, 20, every=2, start=0.0)
    m[0].prune([3, 5], 2)
    rule.importance[0].copy_(torch.tensor([1.0, 1, 1, 9, 0, 9, 1, 1]))
    rule._mask(rule.groups[0], rule.importance[0], 3 / 8)
    assert (~m[0].mask.view(-1, 2)[:, 0]).nonzero().flatten().tolist() == [3, 4, 5]


def test_loraprune_gets_to_its_ratio_between_two_times():
    m = model(RULES["loraprune"])
    train(m, adamw(m), optim.LoRAPrunePruning(m, GROUPS, 10, every=7, start=0.0, final=0.2), range(1, 9))
    assert int((~m[0].mask).sum()) == MID // 2  # at step 8, not at 14


def test_loraprunes_masked_layers_are_sliced_into_smaller_ones():
    m = model(RULES["loraprune"])
    m[1] = nn.ReLU()  # of zero it is zero
    train(m, adamw(m), RULES["loraprune"].rule(m), range(1, STEPS + 1))
    x, _ = batch(1)
    small = nn.Sequential(m[0].sliced(), m[1], m[2].sliced(m[0].mask))
    assert small[0].out_features == MID // 2
    torch.testing.assert_close(small(x), m(x), rtol=1e-5, atol=1e-5)


def test_loraprune_skips_scores_that_are_not_finite():
    m = model(RULES["loraprune"])
    rule = RULES["loraprune"].rule(m)
    optimizer = adamw(m)
    train(m, optimizer, rule, range(1, 3))
    before = copy.deepcopy(rule.importance)
    (m(batch(3)[0]) * torch.inf).sum().backward()
    rule.step(optimizer)
    assert torch.equal(rule.importance[0], before[0]) and before[0].any()


def test_loraprune_over_a_llama():
    torch.manual_seed(0)
    m = tiny_models.tiny("qwen2").train()
    m.requires_grad_(False)
    for name, linear in [*m.named_modules()]:
        if name.rpartition(".")[2].endswith("_proj"):
            parent, _, last = name.rpartition(".")
            setattr(m.get_submodule(parent), last, variants.LoRAPruneLinear.from_linear(linear, r=2))
    groups = optim.llama_groups(m, 16)
    assert [(len(g.out), len(g.into), g.size, g.heads) for g in groups] == [(3, 1, 1, 1), (2, 1, 1, 0)] * 2
    rule = optim.LoRAPrunePruning(m, groups[1::2], 4, ratio=0.5, every=1, start=0.0)
    ids = torch.arange(10)[None]
    optimizer = adamw(m)
    for _ in range(4):
        m(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        rule.step(optimizer)
        optimizer.zero_grad()
    m.eval()
    want = m(input_ids=ids).logits
    for layer in m.model.layers:
        mlp = layer.mlp
        assert torch.equal(mlp.gate_proj.mask, mlp.up_proj.mask) and int(mlp.gate_proj.mask.sum()) == 24
        mlp.down_proj = mlp.down_proj.sliced(mlp.up_proj.mask)
        mlp.gate_proj, mlp.up_proj = mlp.gate_proj.sliced(), mlp.up_proj.sliced()
    torch.testing.assert_close(m(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


def test_loraprune_prunes_grouped_heads():
    """Four query heads attend to two key and value heads: the group is one of these with its two of those, in every layer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=32, head_dim=8
    )  # fmt: skip
    m = transformers.LlamaForCausalLM(config).train().requires_grad_(False)
    for name, linear in [*m.named_modules()]:
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            parent, _, last = name.rpartition(".")
            setattr(m.get_submodule(parent), last, variants.LoRAPruneLinear.from_linear(linear, r=2))
    rule = optim.LoRAPrunePruning(m, optim.llama_groups(m, 8), 4, ratio=0.5, every=1, start=0.0)
    assert [len(t) for t in rule.importance] == [2, 2]
    for wrong in (12, 64, 0, 8.0):  # heads of another size would be parts of two
        with pytest.raises(ValueError, match=f"llama_groups: head_dim must divide the outputs .*, got {wrong}"):
            optim.llama_groups(m, wrong)
    ids, optimizer = torch.arange(10)[None], adamw(m)
    for _ in range(4):
        m(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        attention = m.model.layers[1].self_attn
        found = torch.zeros(2)
        for last in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer, by = getattr(attention, last), (1, 0) if last == "o_proj" else (0, 1)
            s = dense_scores(layer).sum(by[1]).view(2, -1).sum(1)
            found += s / s.norm()
        before = rule.importance[1]
        rule.step(optimizer)
        torch.testing.assert_close(rule.importance[1], 0.9 * before + 0.1 * found, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
    m.eval()
    want = m(input_ids=ids).logits
    for attention, importance in zip((layer.self_attn for layer in m.model.layers), rule.importance, strict=True):
        kept = torch.zeros(2, dtype=torch.bool)
        kept[int(importance.argmax())] = True
        for last, features in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            assert torch.equal(getattr(attention, last).mask, kept.repeat_interleave(features))
        attention.o_proj = attention.o_proj.sliced(attention.q_proj.mask)
        for last in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, last, getattr(attention, last).sliced())
    torch.testing.assert_close(m(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


BAD = [
    ([], "groups must have a PruneGroup"),
    ([optim.PruneGroup(("1",))], r"groups\[0\] must name LoRAPruneLinear layers, got '1'"),
    ([optim.PruneGroup(("0",)), optim.PruneGroup(("0",))], r"groups\[1\].out must name layers, each in one group"),
    (
        [optim.PruneGroup(("0",), ("2",), 3)],
        r"groups\[0\] must have as many outputs as inputs, a multiple of size=3",
    ),
    ([optim.PruneGroup(("0", "2"))], r"got out \[16, 8\], into \[\]"),
    (
        [optim.PruneGroup(("0", "2"), heads=3)],
        r"groups\[0\] must have multiples of heads=3 features, got out \[16, 8\]",
    ),
    ([optim.PruneGroup(("0",), size=2, heads=2)], "must have a size >= 1 or a number of heads, got size=2, heads=2"),
    ([optim.PruneGroup(("0",), size=0)], "must have a size >= 1 or a number of heads, got size=0"),
    ([optim.PruneGroup(("0",), heads=-1)], "must have a size >= 1 or a number of heads, got size=1, heads=-1"),
]


@pytest.mark.parametrize("groups, says", BAD, ids=[says for _, says in BAD])
def test_loraprune_refuses_groups(groups, says):
    with pytest.raises(ValueError, match=says):
        optim.LoRAPrunePruning(model(RULES["loraprune"]), groups, 10)
