# SPDX-License-Identifier: Apache-2.0
"""MissLinear against PEFT's MissLinear: forward, gradients and merge of every kind, and LoRA of the same change."""

import copy

import pytest
import torch
from torch import nn

import lrkern.convert
import lrkern.files
import lrkern.functional as F
import lrkern.peft
from lrkern.nn import FusedLoRALinear, MissLinear

peft = pytest.importorskip("peft")
INIT = {"balance": True, "mini": "mini", "bat": "bat"}
# facts of the family's grid, r dividing in and out or not; "mini" has columns that divide out, "bat" divides both
SIZES = [(64, 64), (96, 64), (64, 96), (100, 60), (60, 100), (97, 61), (64, 256), (256, 64)]
CASES = [("balance", I, O, 16, 1) for I, O in SIZES] + [("balance", 97, 61, r, 1) for r in (1, 97)]
CASES += [("mini", I, O, 16, 4) for I, O in SIZES if O % 4 == 0] + [("mini", 97, 61, 7, 61), ("mini", 97, 61, 7, 1)]
CASES += [("bat", I, O, 4, 1) for I, O in SIZES if I % 4 == O % 4 == 0] + [
    ("bat", 64, 96, 32, 1),
    ("bat", 97, 61, 1, 1),
]
each = pytest.mark.parametrize(("kind", "I", "O", "r", "mini_r"), CASES)
kinds = pytest.mark.parametrize("kind", INIT)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Of a quarter of W at most, as those of a large one."""
    monkeypatch.setattr("lrkern.functional.miss.PANEL", 1)


def made(kind, I=64, O=48, r=8, mini_r=None, std=0.1, **settings):
    mini_r = (4 if kind == "mini" else 1) if mini_r is None else mini_r
    layer = MissLinear(I, O, r=r, kind=kind, mini_r=mini_r, **settings)
    with torch.no_grad():
        layer.miss_block.normal_(0, std, generator=torch.Generator().manual_seed(I + O))
    return layer


def theirs(layer):
    """PEFT's layer over a copy of the base, with the same block."""
    config = peft.MissConfig(
        r=layer.r, mini_r=layer.mini_r, init_weights=INIT[layer.kind], miss_dropout=layer.dropout, target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config)
    there = model.base_model.model[0]
    there.miss_block["default"].data = layer.miss_block.detach().clone()
    return there.train(layer.training)


def step(layer, block, x, g):
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, block], g)


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-12)).item()


@each
def test_forward_gradients_and_merge_are_peft_s(kind, I, O, r, mini_r):
    layer = made(kind, I, O, r, mini_r)
    stock, x, g = theirs(layer), torch.randn(2, 5, I), torch.randn(2, 5, O)
    want = step(stock, stock.miss_block["default"], x, g)
    for got, expected in zip(step(layer, layer.miss_block, x, g), want, strict=True):
        assert got.shape == expected.shape and relative(got, expected) <= 2e-6
    w = layer.base_layer.weight.clone()
    layer.eval().merge()
    stock.merge()
    assert relative(layer.base_layer.weight, stock.base_layer.weight) <= 2e-6
    assert relative(layer(x), want[0]) <= 2e-6
    delta = layer.delta_weight()
    layer.unmerge()
    assert (layer.base_layer.weight - w).abs().max() <= 1e-6
    torch.testing.assert_close(layer.delta_weight(), delta, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(w + delta, stock.base_layer.weight, atol=1e-6, rtol=1e-5)


@kinds
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3)], ids=str)
def test_any_leading_sizes(kind, lead):
    layer, x = made(kind), torch.randn(*lead, 64)
    want = layer.base_layer(x) + x @ layer.delta_weight().mT
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base_keeps_the_block_in_float32(kind, dtype):
    layer = made(kind, dtype=dtype)
    assert layer.miss_block.dtype == torch.float32
    stock, x, g = theirs(layer), torch.randn(5, 64).to(dtype), torch.randn(5, 48).to(dtype)
    want = step(stock, stock.miss_block["default"], x, g)
    for got, expected in zip(step(layer, layer.miss_block, x, g), want, strict=True):
        assert got.dtype == expected.dtype and relative(got, expected) <= (4e-3 if dtype == torch.bfloat16 else 1e-3)


@kinds
def test_starts_as_the_base_and_learns_as_peft_s(kind):
    layer, x, target = made(kind, std=0.0), torch.randn(32, 64), torch.randn(32, 48)
    stock = theirs(layer)
    torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-6, rtol=1e-6)
    losses = []
    for m, block in ((layer, layer.miss_block), (stock, stock.miss_block["default"])):
        optimizer = torch.optim.AdamW([block], lr=1e-3)
        losses.append([])
        for _ in range(5):
            loss = (m(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("kind", ["balance", "mini"])
def test_dropout_is_on_the_adapters_x_alone(kind):
    layer, x = made(kind, dropout=0.5), torch.randn(6, 64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = torch.dropout(x, 0.5, True)
    torch.testing.assert_close(y, layer.base_layer(x) + dropped @ layer.delta_weight().mT, atol=1e-5, rtol=1e-5)
    assert relative(layer.eval()(x), theirs(layer)(x)) <= 2e-6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 13}, "r must be at most in = 12, got 13"),
        ({"r": 8, "kind": "bat"}, r'r must divide in = 12 and out = 20 for "bat", got 8'),
        ({"r": 4, "kind": "bat", "dropout": 0.1}, r'dropout must be 0 for "bat", which has none, got 0.1'),
        ({"kind": "mini", "mini_r": 3}, "mini_r must divide out = 20, got 3"),
        ({"mini_r": 4}, r'mini_r must be 1 for "balance", it is of "mini" alone, got 4'),
        ({"kind": True}, r"kind must be one of \['balance', 'bat', 'mini'\], got True"),
    ],
)
def test_settings_that_do_not_fit(settings, text):
    base = nn.Linear(12, 20)
    with pytest.raises(ValueError, match=f"^MissLinear: {text}"):
        MissLinear.from_linear(base, **settings)
    assert base.weight.requires_grad


def test_a_change_that_no_unmerge_finds_back_is_not_merged():
    layer = made("bat", std=0.0).eval()
    with torch.no_grad():
        layer.miss_block[1] = -torch.eye(8)
    w = layer.base_layer.weight.clone()
    with pytest.raises(
        ValueError, match=r"merge: I \+ miss_block must have a condition number of at most 8.38861e\+06"
    ):
        layer.merge()
    with torch.no_grad():
        layer.miss_block[1, 0, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"merge: W \+ delta_weight\(\) must be finite, got inf or nan; W is unchanged"
    ):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, w) and not layer.merged


@kinds
def test_the_keys_are_peft_s(kind):
    layer = made(kind)
    state = layer.state_dict()
    assert state.keys() == {"base_layer.weight", "base_layer.bias", "miss_block"}
    assert [*layer.coefficients()] == ["miss_block"]
    saved = peft.get_peft_model_state_dict
    config = peft.MissConfig(r=8, mini_r=layer.mini_r, init_weights=INIT[kind], target_modules=["0"])
    stock = saved(peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)), config))
    assert {key: t.shape for key, t in stock.items()} == {"base_model.model.0.miss_block": state["miss_block"].shape}


@kinds
def test_own_files(tmp_path, kind):
    net = nn.Sequential(made(kind), nn.Tanh(), made("mini", 48, 16, r=5, mini_r=8, dropout=0.1)).eval()
    lrkern.files.save(net, tmp_path / "a")
    plain = nn.Sequential(copy.deepcopy(net[0].base_layer), nn.Tanh(), copy.deepcopy(net[2].base_layer)).eval()
    lrkern.files.load(plain, tmp_path / "a")
    x = torch.randn(3, 64)
    assert torch.equal(plain(x), net(x)) and plain[2].settings == net[2].settings


@pytest.mark.parametrize(("kind", "I", "O", "r", "mini_r"), [case for case in CASES if case[0] != "bat"])
def test_as_lora(tmp_path, kind, I, O, r, mini_r):
    """Exact: A is zeros and ones."""
    net = nn.Sequential(made(kind, I, O, r, mini_r))
    a, b, scale = net[0].factors()
    assert (a.shape, b.shape, scale) == ((r, I), (O, r), 1.0) and torch.equal(b @ a, net[0].delta_weight())
    assert set(a.unique().tolist()) <= {0.0, 1.0} and torch.equal(a.sum(0), torch.ones(I))
    lrkern.convert.to_lora(net, tmp_path)
    twin = nn.Sequential(FusedLoRALinear.from_linear(copy.deepcopy(net[0].base_layer), r=r, lora_alpha=r))
    lrkern.peft.load_adapter(twin, tmp_path)
    x = torch.randn(5, I)
    torch.testing.assert_close(twin(x), net(x), atol=2e-6, rtol=1e-5)


def test_what_is_no_lora(tmp_path):
    net = nn.Sequential(made("bat"))
    with pytest.raises(
        ValueError,
        match="0 must be a layer of lrkern.nn.variants, MissLinear, .*, got MissLinear, r=8, kind=bat.* full rank, 48",
    ):
        lrkern.convert.to_lora(net, tmp_path / "a")
    with pytest.raises(ValueError, match="kind must be balance or mini, got bat"):
        net[0].factors()
    wide = nn.Sequential(MissLinear(1026, 16, r=513))
    with pytest.raises(ValueError, match="0 must have a rank of at most 512, .* got r=513"):
        lrkern.convert.to_lora(wide, tmp_path / "b")
    assert not any(tmp_path.iterdir())


def test_bone_add_names_a_y_that_does_not_fit():
    with pytest.raises(RuntimeError, match=r"bone_add: y must have shape \[2, 8\] beside x \[2, 6\], got \[8\]"):
        F.bone_add(torch.zeros(8), torch.zeros(2, 6), torch.zeros(8, 6), torch.zeros(4, 2, 2))


@kinds
def test_compiles_and_exports(kind):
    layer, x = made(kind), torch.randn(5, 64)
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), layer(x))
    fast(x).sum().backward()
    assert layer.miss_block.grad.abs().max() > 0
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
