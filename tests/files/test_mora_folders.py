# SPDX-License-Identifier: Apache-2.0
"""Folders as MoRA's authors' fork of PEFT 0.9 writes them, into MoRALinear layers and into a pool. The forward below is the
formulas of their code, column by column."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lrkern.files
import lrkern.peft
from lrkern.nn import MissLinear, MoRALinear
from lrkern.serving import AdapterPool, MultiLoraModel

TYPES = (1, 2, 3, 4, 6)
SIZES = {"up": (24, 40), "odd.down": (40, 19)}  # r̂ divides none of them
R = 3
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.odd = nn.Linear(*SIZES["up"]), nn.ModuleDict({"down": nn.Linear(*SIZES["odd.down"])})

    def forward(self, x):
        return self.odd["down"](self.up(x).tanh())


def rank(name, type, r=R):
    n = int(math.sqrt(sum(SIZES[name]) * r) + 0.5)
    return n // 2 * 2 if type == 6 else n


def change(m, I, O, type):
    """ΔW [O, I] in float64, element by element."""
    n, m, w = len(m), m.double(), torch.zeros(O, I, dtype=torch.float64)
    padded = -(-I // n) * n
    cycle = lambda j, size: j % n
    block = lambda j, size: j // (size // n + 1) if j < size % n * (size // n + 1) else (j - size % n) // (size // n)
    if type != 6:
        fold, unfold = {1: (cycle, cycle), 2: (block, block), 3: (block, cycle), 4: (cycle, block)}[type]
        for j in range(padded if fold is cycle else I):  # what pads x is its own beginning
            for o in range(O):
                w[o, j % I] += m[unfold(o, O), fold(j, I)]
        return w
    chunks = padded // n
    for o in range(O):
        i, row = divmod(o % (chunks * n), n)
        for p in range(n):
            q = (p + n // 2) % n
            angle = i * 10000 ** (-2 * (p % (n // 2)) / n)
            w[o, (i * n + p) % I] += m[row, p] * math.cos(angle)
            w[o, (i * n + q) % I] += m[row, p] * math.sin(angle) * (-1 if p < n // 2 else 1)
    return w


def parts(type, **more):
    """Config and tensors, with the keys of the fork's LoraConfig that its code reads."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": 77, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "init_lora_weights": True, "loftq_config": {}, "megatron_config": None,
        "megatron_core": "megatron.core", "layers_to_transform": None, "layers_pattern": None, "inference_mode": True,
        "base_model_name_or_path": "some/model", "auto_mapping": None, "revision": None,
        "target_modules": ["down", "up"], "use_mora": True, "mora_type": type,
    }  # fmt: skip
    g, tensors = torch.Generator().manual_seed(type), {}
    for name in SIZES:
        m = torch.randn(rank(name, type), rank(name, type), generator=g) * 0.1
        tensors |= {f"base_model.model.{name}.lora_{x}.weight": m.clone() for x in "AB"}
    return config | more, tensors


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def truth(tensors, type):
    net = Net().double()
    with torch.no_grad():
        for name, sizes in SIZES.items():
            m = tensors[f"base_model.model.{name}.lora_A.weight"]
            net.get_submodule(name).weight += change(m, *sizes, type)
    return net(X.double()).float()


@pytest.mark.parametrize("type", TYPES)
def test_into_layers(type, tmp_path):
    config, tensors = parts(type, lora_dropout=0.05)
    net = Net().eval()
    lrkern.files.load(net, write(tmp_path, config, tensors))
    for name in SIZES:
        layer = net.get_submodule(name)
        assert isinstance(layer, MoRALinear) and layer.settings == {
            "r": R, "mora_type": type, "dropout": 0.05, "paper_rank": False,
        }  # fmt: skip
    torch.testing.assert_close(net(X), truth(tensors, type), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        net.up.lora_A.weight.zero_()
    lrkern.files.load(net, tmp_path)  # over layers that are there
    torch.testing.assert_close(net(X), truth(tensors, type), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("type", TYPES[:4])
def test_into_a_pool(type, tmp_path):
    net = Net().eval()
    pool = AdapterPool(net, pages=4)
    config, tensors = parts(type)
    pool.load("mora", write(tmp_path, config, tensors))
    pool.add("again", config, tensors)
    with MultiLoraModel(net, pool) as served:
        y = served(X, adapters=["mora", None, "again", "mora", None])
    want, base = truth(tensors, type), Net()(X)
    torch.testing.assert_close(y[[0, 2, 3]], want[[0, 2, 3]], atol=1e-5, rtol=1e-5)
    assert torch.equal(y[[1, 4]], base[[1, 4]]) and (want - base).abs().max() > 0.1


def test_ranks_by_pattern_and_one_tensor_of_two(tmp_path):
    config, tensors = parts(1, rank_pattern={"down": 5}, mora_type=None)
    n = rank("odd.down", 1, 5)
    for x in "AB":
        tensors[f"base_model.model.odd.down.lora_{x}.weight"] = torch.eye(n)
    del tensors["base_model.model.up.lora_B.weight"]
    net = Net().eval()
    lrkern.files.load(net, write(tmp_path, config, tensors))
    assert (net.odd["down"].r, net.up.r) == (5, R)
    torch.testing.assert_close(net(X), truth(tensors, 1), atol=1e-5, rtol=1e-5)


A = "base_model.model.up.lora_A.weight"
WRONG = {
    "type 5": (lambda c, t: c.update(mora_type=5), r"mora_type must be 1, 2, 3, 4 or 6 \(there is no 5\), or None, got 5"),
    "a word": (lambda c, t: c.update(mora_type="1"), "mora_type must be .*, got '1'"),
    "another type": (lambda c, t: c.update(mora_type=6), r"lora_A.weight must have shape \[12, 12\], got \[13, 13\]"),
    "r": (lambda c, t: c.update(r=4), r"lora_A.weight must have shape \[\d+, \d+\], got"),
    "two": (lambda c, t: t[A].add_(1), "up.lora_B.weight must be lora_A.weight, which is M too, got another"),
    "nan": (lambda c, t: t[A].fill_(torch.nan), "must be finite floats"),
    "dora": (lambda c, t: c.update(use_dora=True), "use_dora must be off, got True"),
    "bias": (lambda c, t: c.update(bias="lora_only"), "bias must be 'none', got 'lora_only'"),
    "modules_to_save": (lambda c, t: c.update(modules_to_save=["x"]), "modules_to_save must (be off|name modules of this model)"),
    "loftq": (lambda c, t: c.update(init_lora_weights="loftq"), "init_lora_weights must leave the base weights"),
    "the flag a word": (lambda c, t: c.update(use_mora="true"), "use_mora must be true or false, got 'true'"),
    "no flag": (lambda c, t: c.update(peft_type="MORA", use_mora=None), "use_mora must be true, .* got none"),
    "targets": (lambda c, t: c.update(target_modules=["up"]), "must hold what target_modules"),
    "a tensor more": (lambda c, t: t.update({"base_model.model.up.miss_block": t[A].clone()}), "must hold lora_A.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_what_is_refused_changes_nothing(spoil, text, tmp_path):
    config, tensors = parts(1)
    tensors = {key: t.clone() for key, t in tensors.items()}
    spoil(config, tensors)
    net = Net()
    pool, words, before = AdapterPool(net, pages=4), str(net), [p.clone() for p in net.parameters()]
    write(tmp_path, config, tensors)
    for call in (lambda: lrkern.files.load(net, tmp_path), lambda: pool.load("a", tmp_path)):
        with pytest.raises(ValueError, match=rf"{text}.*; the (model|pool) is unchanged"):
            call()
    assert str(net) == words and all(map(torch.equal, net.parameters(), before)) and not pool.names


def test_where_it_does_not_belong(tmp_path):
    write(tmp_path, *parts(6))
    with pytest.raises(
        ValueError,
        match="down must be a layer of lrkern.nn.variants, MissLinear, .* got MoRALinear, r=3, mora_type=6, .* full rank",
    ):
        AdapterPool(Net(), pages=4).load("a", tmp_path)
    fused = Net()
    fused.up = lrkern.nn.FusedLoRALinear.from_linear(fused.up, r=R)
    with pytest.raises(ValueError, match="must be LoRA or DoRA, got peft_type='MORA'"):
        lrkern.peft.load_adapter(fused, tmp_path)
    other = Net()
    other.up = MissLinear.from_linear(other.up, r=R)
    words = str(other)
    with pytest.raises(ValueError, match="up differs from the model's: .*class"):
        lrkern.files.load(other, tmp_path)
    assert str(other) == words
