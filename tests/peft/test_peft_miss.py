# SPDX-License-Identifier: Apache-2.0
"""PEFT's MiSS layers patched: its own layer is the oracle, of every kind that init_weights names."""

import copy

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrkern.functional as F
import lrkern.peft

KINDS = {  # init_weights, in, out, r, mini_r
    "balance": (True, 64, 48, 8, 1),
    "padded": (True, 67, 50, 16, 1),
    "random": (False, 40, 24, 6, 1),
    "mini": ("mini", 67, 48, 8, 12),
    "mini_whole": ("mini", 32, 24, 4, 24),
    "bat": ("bat", 64, 96, 8, 1),
    "bat_wide": ("bat", 160, 32, 16, 1),
    "bat_one": ("bat", 48, 48, 48, 1),
}
EACH = pytest.mark.parametrize("kind", KINDS)
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Of a quarter of W at most, as those of a large one."""
    monkeypatch.setattr("lrkern.functional.miss.PANEL", 1)


def model(kind, dtype=torch.float32, bias=True, dropout=0.0, base=nn.Linear):
    init, I, O, r, mini = KINDS[kind]
    torch.manual_seed(0)
    config = MissConfig(r=r, mini_r=mini, init_weights=init, miss_dropout=dropout, target_modules=["0"])
    made = get_peft_model(nn.Sequential(base(I, O, bias=bias, dtype=dtype)), config)
    for name, p in made.named_parameters():
        if "miss_block" in name:
            p.data.normal_(0, 0.1)
    return made


def pair(kind, **more):
    stock = model(kind, **more)
    ours = copy.deepcopy(stock)
    report = lrkern.peft.patch(ours)
    return stock, ours, report


def layer_of(m):
    return m.base_model.model[0]


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)).item()


def step(m, x, g):
    x = x.clone().requires_grad_()
    y = m(x)
    grads = torch.autograd.grad(y, [x, *(p for p in m.parameters() if p.requires_grad)], g)
    return y, *grads


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (1,), (0,)], ids=str)
def test_forward_and_gradients_are_those_of_peft(kind, dtype, lead):
    stock, ours, report = pair(kind, dtype=dtype)
    assert report.fused == 1, str(report)
    I, O = KINDS[kind][1:3]
    x, g = torch.randn(*lead, I).to(dtype), torch.randn(*lead, O).to(dtype)
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert relative(got, expected) <= DTYPES[dtype]


def test_a_small_w_is_one_panel(monkeypatch):
    monkeypatch.undo()
    stock, ours, _ = pair("bat")
    x, g = torch.randn(5, 64), torch.randn(5, 96)
    made, panels = [], lrkern.functional.miss._panels
    monkeypatch.setattr("lrkern.functional.miss._panels", lambda *given: made.append([*panels(*given)]) or made[-1])
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert relative(got, expected) <= 2e-6
    assert made == [[(slice(0, 96), slice(0, 12))]] * 2


@EACH
def test_without_bias_and_in_float64_reference(kind):
    """Against W' itself in float64, made by PEFT's own merge."""
    stock, ours, _ = pair(kind, bias=False)
    x = torch.randn(9, KINDS[kind][1])
    y = ours(x)
    merged = copy.deepcopy(stock).merge_and_unload()[0].weight.double()
    assert relative(y, x.double() @ merged.mT) <= 2e-6


def test_dropout_drops_x_of_the_adapter_alone():
    stock, ours, _ = pair("balance", dropout=0.5)
    x = torch.ones(4000, 64)
    base, y = layer_of(ours).base_layer(x), ours(x)
    block = next(p for n, p in ours.named_parameters() if "miss_block" in n)
    mean = (y - base).mean(0)
    assert relative(mean, 8 * block.sum(0)) < 0.05 and not torch.equal(y[0], y[1])
    ours.eval(), stock.eval()
    assert relative(ours(x), stock(x)) < 2e-6


@pytest.mark.parametrize("kind", ["balance", "bat"])
def test_a_weight_that_lies_across(kind):
    """Such as a Conv1D's, seen as a linear layer's; and an x and dY whose rows are not next to each other."""
    stock, ours, _ = pair(kind)
    for m in (stock, ours):
        base = layer_of(m).base_layer
        base.weight = nn.Parameter(base.weight.detach().mT.contiguous().mT, requires_grad=False)
    assert lrkern.peft.report(ours).fused == 1
    I, O = KINDS[kind][1:3]
    x, g = torch.randn(I, 6).mT, torch.randn(O, 6).mT
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert relative(got, expected) <= 2e-6


def test_several_adapters_add_up():
    stock = model("padded")
    stock.add_adapter("other", MissConfig(r=5, init_weights=True, target_modules=["0"]))
    layer_of(stock).miss_block["other"].data.normal_(0, 0.1)
    stock.base_model.set_adapter(["default", "other"])
    ours = copy.deepcopy(stock)
    assert lrkern.peft.patch(ours).fused == 1
    x = torch.randn(7, 67)
    assert relative(ours(x), stock(x)) < 2e-6


def test_what_is_not_fused_says_why():
    bat = model("bat")
    bat.add_adapter("other", MissConfig(r=16, init_weights="bat", target_modules=["0"]))
    bat.base_model.set_adapter(["default", "other"])
    assert "several bat adapters" in str(lrkern.peft.patch(bat))
    stock = copy.deepcopy(bat)
    lrkern.peft.unpatch(stock)
    x = torch.randn(3, 64)
    assert torch.equal(bat(x), stock(x)), "PEFT's own code runs"

    ours = pair("balance")[1]
    ours.merge_adapter()
    assert "adapters disabled or merged" in str(lrkern.peft.report(ours))
    ours.unmerge_adapter()
    assert lrkern.peft.report(ours).fused == 1
    layer_of(ours).miss_dropout["default"] = nn.AlphaDropout(0.1)
    assert "dropout AlphaDropout" in str(lrkern.peft.report(ours))
    layer_of(ours).miss_dropout["default"] = nn.Identity()
    layer_of(ours).miss_block["default"].data = layer_of(ours).miss_block["default"].data.double()
    assert "a block of dtype torch.float64" in str(lrkern.peft.report(ours))


class Scaled(nn.Linear):
    """As a quantised layer: what it computes is not its weight alone."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", ["balance", "mini"])
def test_any_other_base_layer_runs_itself(kind):
    stock, ours, report = pair(kind, base=Scaled)
    assert report.fused == 1
    x, g = torch.randn(6, KINDS[kind][1]), torch.randn(6, KINDS[kind][2])
    for got, expected in zip(step(ours, x, g), step(stock, x, g), strict=True):
        assert relative(got, expected) <= 2e-6


def test_bat_over_another_base_layer_is_left_to_peft():
    stock, ours, report = pair("bat", base=Scaled)
    assert (
        report.fused == 0
        and "bat over a base layer that is no plain nn.Linear, nor gives its dequantised weight" in str(report)
    )
    x = torch.randn(6, 64)
    assert torch.equal(ours(x), stock(x))


@EACH
def test_merging_and_files_stay_peft_s(kind, tmp_path):
    stock, ours, _ = pair(kind)
    x = torch.randn(5, KINDS[kind][1])
    ours.save_pretrained(tmp_path)
    base = copy.deepcopy(stock).unload()
    again = PeftModel.from_pretrained(base, tmp_path)
    lrkern.peft.patch(again)
    assert relative(again(x), stock(x)) <= 2e-6
    before = ours(x)
    ours.merge_adapter()
    assert relative(ours(x), before) <= 1e-5


@pytest.mark.parametrize("kind", ["balance", "mini", "bat"])
def test_a_few_steps_train_alike(kind):
    stock, ours, _ = pair(kind)
    x, target = torch.randn(32, KINDS[kind][1]), torch.randn(32, KINDS[kind][2])
    losses = []
    for m in (stock, ours):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for _ in range(5):
            loss = (m(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an op made, of those that are no input's."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("size", [512, 2048])
@pytest.mark.parametrize("kind", ["balance", "bat"])
def test_nothing_of_the_size_of_w_is_made(kind, size, monkeypatch):
    """8 tokens beside a W of 1 MB, or of 16 with panels as they are: forward and backward make panels of a quarter at most. PEFT's code is
    seen to make all of it."""
    if size == 2048:
        monkeypatch.undo()
    init = True if kind == "balance" else "bat"
    torch.manual_seed(0)
    stock = get_peft_model(
        nn.Sequential(nn.Linear(size, size)), MissConfig(r=32, init_weights=init, target_modules=["0"])
    )
    ours = copy.deepcopy(stock)
    assert lrkern.peft.patch(ours).fused == 1
    made = {}
    for name, m in (("peft", stock), ("lrkern", ours)):
        x = torch.randn(8, size, requires_grad=True)
        with Largest([x, *m.parameters()]) as seen:
            m(x).sum().backward()
        made[name] = seen.bytes
    w = size * size * 4
    assert made["lrkern"] <= w / 4
    if kind == "bat":
        assert made["peft"] >= w


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x, w: F.bone_linear(x, w, None, torch.zeros(3, 5, 5)), r"blocks must have shape \[O / r, r, r\] = \[1, 5, 5\]"),
        (lambda x, w: F.bone_linear(x, w, None, torch.zeros(2, 4, 4)), "blocks must have an r that divides I = 6, got 4"),
        (lambda x, w: F.bone_linear(x, w.requires_grad_(), None, torch.zeros(4, 2, 2)), "weight must not require a gradient"),
        (lambda x, w: F.miss_linear(x, w, None, torch.zeros(2, 3)), r"miss_linear: block must have shape \[r, m\] with m a divisor of 8, got \[2, 3\]"),
        (lambda x, w: F.miss_add(x, x[:1], torch.zeros(2, 6)), r"miss_add: y must have shape \[..., O\] beside x \[1, 6\], got \[2, 6\]"),
        (lambda x, w: F.miss_linear(x, w, None, torch.zeros(2, 8), 1.5), r"dropout_p must lie in \[0, 1\], got 1.5"),
    ],
)  # fmt: skip
def test_bad_shapes_are_refused(call, text):
    with pytest.raises(RuntimeError, match=text):
        call(torch.randn(2, 6), torch.randn(8, 6))


@EACH
def test_autocast_is_peft_s(kind):
    stock, ours, _ = pair(kind)
    x, g = torch.randn(6, KINDS[kind][1]), torch.randn(6, KINDS[kind][2])
    with torch.autocast("cpu", torch.bfloat16):
        results = [step(m, x, g) for m in (ours, stock)]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and relative(got, expected) <= 2e-2
