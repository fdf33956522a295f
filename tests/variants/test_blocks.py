# SPDX-License-Identifier: Apache-2.0
"""Factors in blocks: MELoRA and Block-LoRA, beside what test_methods.py says of all variants."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_gates import changed, gradients, lora

from lrkern import convert
from lrkern.nn import FusedLoRALinear
from lrkern.nn.variants import BlockLoRALinear, MELoRALinear


@pytest.mark.parametrize("name", ["melora", "melora-wide"])
def test_melora_is_small_loras_side_by_side(name, monkeypatch):
    layer, x = changed(name), torch.randn(5, 24)  # n = 4 of rank 2 or 9
    if name == "melora-wide":
        monkeypatch.setattr(MELoRALinear, "factors", None)  # has no use for the block diagonal ones
    small = []
    for a, b in zip(layer.lora_A, layer.lora_B, strict=True):
        one = FusedLoRALinear(6, 4, bias=False, r=layer.r, lora_alpha=16.0)
        with torch.no_grad():
            one.base_layer.weight.zero_()
            one.lora_A.weight.copy_(a)
            one.lora_B.weight.copy_(b)
        small.append(one)
    added = torch.cat([one(part) for one, part in zip(small, x.chunk(4, -1), strict=True)], -1)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added, rtol=1e-5, atol=1e-5)


def test_melora_has_n_times_the_rank_of_a_lora_of_its_size():
    layer = changed("melora")
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 8 == layer.lora_rank
    count = sum(p.numel() for p in layer.coefficients().values())
    assert count == sum(p.numel() for p in FusedLoRALinear(24, 16, r=2).coefficients().values())
    blocks = layer.delta_weight().view(4, 4, 4, 6)  # [block of outputs, out / n, block of inputs, in / n]
    off = ~torch.eye(4, dtype=torch.bool)
    assert (blocks.transpose(1, 2)[off] == 0).all() and (blocks.transpose(1, 2)[~off] != 0).all()


@pytest.mark.parametrize("name, rank", [("block_lora", 4), ("melora", 3), ("melora", 40)])
def test_one_block_is_lora(name, rank):
    layer, x = changed(name, r=rank, n=1), torch.randn(5, 24)
    a, b = layer.lora_A.flatten(0, -2), layer.lora_B.flatten(0, -2)
    torch.testing.assert_close(layer(x), lora(layer, a, b, layer.lora_alpha)(x), rtol=1e-5, atol=1e-5)


def test_melora_refuses_sizes_that_blocks_do_not_divide():
    for sizes, n, must in (
        ((24, 16), 3, "divide in = 24 and out = 16"),
        ((25, 20), 4, "divide in = 25 and out = 20"),
        ((2080, 2080), 65, "be at most 512 / r = 64"),
    ):
        with pytest.raises(ValueError, match=f"^MELoRALinear: n must {must}, got {n}"):
            MELoRALinear(*sizes, r=8, n=n)
    with pytest.raises(ValueError, match="^MELoRALinear: n must be a whole number in 1..2147483647, got 0"):
        MELoRALinear(8, 8, n=0)
    assert MELoRALinear(512, 512, r=1, n=512).lora_rank == 512


def test_block_loras_sum_of_products_is_the_product_of_the_sum():
    layer, x, dy = changed("block_lora"), torch.randn(5, 24), torch.randn(5, 16)  # 3 blocks of 2 ranks
    blocks, scale = layer.lora_B.view(16, 3, 2), layer.scaling
    assert scale == layer.lora_alpha / 6
    each = sum(scale * blocks[:, k] @ layer.lora_A for k in range(3))
    torch.testing.assert_close(layer.delta_weight(), each.detach(), rtol=1e-5, atol=1e-6)
    got = gradients(layer, x, dy)["lora_B"].view(16, 3, 2)
    assert torch.equal(got[:, 0], got[:, 1]) and torch.equal(got[:, 0], got[:, 2]) and (got != 0).all()
    with pytest.raises(ValueError, match="^BlockLoRALinear: n must divide r = 6, got 4"):
        BlockLoRALinear(8, 8, r=6, n=4)


@pytest.mark.parametrize("name", ["block_lora", "melora"])
def test_peft_serves_it_as_a_lora_of_its_rank(name, tmp_path):
    layer, x = changed(name), torch.randn(5, 24)
    y, rank = layer(x).detach(), layer.lora_rank
    base = torch.nn.Sequential(layer.base_layer)
    convert.to_lora({"0": layer}, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.lora_A.weight"].shape == (rank, 24)
    assert LoraConfig.from_pretrained(tmp_path).r == rank
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), y, rtol=1e-5, atol=1e-5)
