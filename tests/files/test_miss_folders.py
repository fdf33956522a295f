# SPDX-License-Identifier: Apache-2.0
"""PEFT's MiSS folders: into MissLinear layers and out of them, each way to the same y."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lrkern.convert
import lrkern.files
from lrkern.nn import MissLinear, NOLALinear

peft = pytest.importorskip("peft")

INIT = {"balance": True, "random": False, "mini": "mini", "bat": "bat"}
kinds = pytest.mark.parametrize("kind", INIT)
X = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
BLOCK = "base_model.model.{}.miss_block"


class Net(nn.Module):
    """Sizes that differ; up.down ends as down does."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleDict({"down": nn.Linear(24, 40), "free": nn.Linear(40, 20)})
        self.down = nn.Linear(20, 32, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.up["free"](self.up["down"](x).tanh()).tanh())


def config(kind, **more):
    settings = {"r": 4, "target_modules": ["down"], "init_weights": INIT[kind]}
    if kind in ("balance", "random"):
        settings["r"] = 7  # divides no size
    if kind == "mini":
        settings |= {"r": 7, "mini_r": 8}
    return peft.MissConfig(**settings | more)


def stock(kind, dtype=torch.float32, **more):
    model = peft.get_peft_model(Net(dtype), config(kind, **more)).eval()
    for name, p in model.named_parameters():
        if "miss_block" in name:
            p.data.normal_(0, 0.1)
    return model


def fused(kind, **more):
    """The layers of ours over the same net."""
    net = Net()
    given = config(kind, **more)
    kind = "balance" if kind == "random" else kind
    settings = {"r": given.r, "kind": kind, "mini_r": given.mini_r, "dropout": given.miss_dropout}
    net.up["down"], net.down = (MissLinear.from_linear(m, **settings) for m in (net.up["down"], net.down))
    with torch.no_grad():
        for m in (net.up["down"], net.down):
            m.miss_block.normal_(0, 0.1)
    return net.eval()


def close(got, want, tol=1e-5):
    torch.testing.assert_close(got, want, atol=tol, rtol=tol)


@kinds
def test_a_folder_of_peft_s_makes_layers(kind, tmp_path):
    theirs = stock(kind, miss_dropout=0.0 if kind == "bat" else 0.25)
    theirs.save_pretrained(tmp_path)
    net = Net().eval()
    base = net.down
    assert not lrkern.files.load(net, tmp_path)
    assert isinstance(net.down, MissLinear) and net.down.base_layer is base and isinstance(net.up["down"], MissLinear)
    assert net.down.dropout == (0.0 if kind == "bat" else 0.25) and not net.down.training
    close(net(X), theirs(X))
    again = fused(kind, miss_dropout=net.down.dropout)
    lrkern.files.load(again, tmp_path)  # over layers that are there
    assert torch.equal(again(X), net(X)) and again.down.miss_block.requires_grad
    (tmp_path / "adapter_model.safetensors").unlink()
    assert torch.equal(again(X), net(X))


@kinds
def test_a_folder_of_ours_is_peft_s(kind, tmp_path):
    ours = fused(kind, miss_dropout=0.0 if kind == "bat" else 0.25)
    lrkern.files.save(ours, tmp_path / "a", "peft")
    lrkern.convert.to_peft(ours, tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "a").eval()
    assert sum(isinstance(m, peft.tuners.miss.MissLayer) for m in theirs.modules()) == 2
    close(theirs(X), ours(X))
    read = theirs.peft_config["default"]
    assert (read.r, read.mini_r, read.miss_dropout) == (ours.down.r, ours.down.mini_r, ours.down.dropout)
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() == {BLOCK.format("down"), BLOCK.format("up.down")}
    net = Net().eval()
    lrkern.files.load(net, tmp_path / "a")
    assert torch.equal(net(X), ours(X)) and net.down.settings == ours.down.settings


@kinds
def test_a_16_bit_base(kind, tmp_path):
    theirs = stock(kind, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    net = Net(torch.bfloat16).eval()
    lrkern.files.load(net, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")[BLOCK.format("down")]
    assert net.down.miss_block.dtype == stored.dtype and torch.equal(net.down.miss_block, stored)
    close(net(X.bfloat16()), theirs(X.bfloat16()), 2e-2)


def test_one_target_of_two_that_end_alike(tmp_path):
    net = Net().eval()
    net.down = MissLinear.from_linear(net.down, r=4)
    nn.init.normal_(net.down.miss_block)
    lrkern.files.save(net, tmp_path, "peft")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert type(theirs.base_model.model.up["down"]) is nn.Linear
    close(theirs(X), net(X), 1e-4)


def put(key, value):
    return lambda config, tensors: config.update({key: value})


WRONG = {
    "r": (put("r", 6), r"down.miss_block must have shape \[6, \d+\], got \[7"),
    "no r": (put("r", None), "must be a whole number in 1..2147483647, got None"),
    "a large r": (put("r", 25), "cannot be made: MissLinear: r must be at most in = 2[04], got 25"),
    "kind": (put("init_weights", "bat"), 'cannot be made: MissLinear: r must divide in = .* for "bat", got 7'),
    "another kind": (put("init_weights", "pissa"), "init_weights must be true, false, 'mini' or 'bat', got 'pissa'"),
    "a list": (put("init_weights", ["bat"]), "init_weights must be true, false or a string, got"),
    "mini": (lambda c, t: c.update(init_weights="mini", mini_r=3), "mini_r must divide out = "),
    "dropout": (put("miss_dropout", "0.1"), r"dropout must lie in \[0, 1\], got '0.1'"),
    "bias": (put("bias", "all"), "bias must be 'none', got 'all'"),
    "modules_to_save": (put("modules_to_save", ["free"]), "modules_to_save must be off"),
    "targets": (put("target_modules", ["free"]), "must hold what target_modules"),
    "another layer": (lambda c, t: t.update({BLOCK.format("x"): t[BLOCK.format("down")].clone()}), "linears, got x"),
    "one too few": (lambda c, t: t.pop(BLOCK.format("down")), "lacks down and 0 more"),
    "none": (lambda c, t: t.clear(), "must hold miss_block of linears, got none"),
    "another tensor": (lambda c, t: t.update({"base_model.model.down.lora_A.weight": torch.ones(2)}), "linears, got base"),
    "nan": (lambda c, t: t[BLOCK.format("down")].view(-1)[3].fill_(torch.nan), "down.miss_block must be finite floats"),
    "whole numbers": (lambda c, t: t.update({BLOCK.format("down"): torch.ones(7, 32).int()}), "finite floats"),
    "a method of others": (put("peft_type", "VERA"), "must be LoRA or DoRA, got peft_type='VERA'"),
}  # fmt: skip


@pytest.mark.parametrize("layers", [False, True], ids=["linears", "layers"])
@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_what_is_refused_changes_nothing(spoil, text, layers, tmp_path):
    stock("balance").save_pretrained(tmp_path)
    path, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    c, t = json.loads(settings.read_text()), load_file(path)
    spoil(c, t)
    settings.write_text(json.dumps(c))
    save_file(t, path)
    net = fused("balance") if layers else Net()
    before, words = [p.clone() for p in net.parameters()], str(net)
    if "LoRA" in text:
        text = "model must have FusedLoRALinear layers"
    with pytest.raises(ValueError, match=text):
        lrkern.files.load(net, tmp_path)
    assert all(map(torch.equal, net.parameters(), before)) and str(net) == words


def test_what_a_layer_that_is_there_refuses(tmp_path):
    stock("balance").save_pretrained(tmp_path)
    for other, text in (
        (fused("mini"), r"differs from the model's: .*kind.*\(file, model\)"),
        (fused("balance"), "is merged"),
    ):
        if "merged" in text:
            other.down.merge()
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match=rf"lrkern.files.load: .*{text}.*; the model is unchanged"):
            lrkern.files.load(other, tmp_path)
        assert all(map(torch.equal, other.parameters(), before))
    quantised = Net()
    quantised.down = nn.Conv1d(20, 32, 1)
    with pytest.raises(ValueError, match="must be of this model's linears, got down"):
        lrkern.files.load(quantised, tmp_path)


def test_what_peft_cannot_hold(tmp_path):
    ranks, spoilt, mixed = fused("balance"), fused("bat"), fused("mini")
    ranks.down = MissLinear.from_linear(ranks.down.base_layer, r=5)
    spoilt.down.miss_block.data[0, 0, 0] = torch.inf
    mixed.down = NOLALinear.from_linear(mixed.down.base_layer)
    for net, text in (
        (ranks, "down.r must be 7, as the first layer's, got 5: PEFT has one for all layers"),
        (spoilt, "down.miss_block must be finite, got inf or nan"),
        (mixed, "down must be VeRALinear, RandLoRALinear, MissLinear, or AdaLoRALinear as all others, got NOLALinear"),
    ):
        with pytest.raises(ValueError, match=f"lrkern.convert.to_peft: {text}"):
            lrkern.convert.to_peft(net, tmp_path / "out")
        assert not any(tmp_path.iterdir())


def test_a_layer_over_a_copy_is_the_same(tmp_path):
    """What was loaded does not share memory with the file."""
    ours = fused("balance")
    lrkern.files.save(ours, tmp_path, "peft")
    net = Net().eval()
    lrkern.files.load(net, tmp_path)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.down.miss_block.zero_()
    assert torch.equal(twin(X), ours(X))
