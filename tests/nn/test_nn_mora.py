# SPDX-License-Identifier: Apache-2.0
"""MoRALinear: its rank and type, merging, restarts, the authors' keys, and LoRA of the same change."""

import copy
import math

import pytest
import torch
from torch import nn

import lrkern.convert
import lrkern.files
import lrkern.peft
from lrkern.functional import mora_delta, mora_factors, mora_linear, mora_rank
from lrkern.nn import FusedLoRALinear, MoRALinear
from lrkern.reference import OPS

TYPES = (1, 2, 3, 4, 6)
SIZES = [(64, 64), (96, 64), (64, 96), (100, 60), (60, 100), (97, 61), (64, 256), (256, 64)]
types = pytest.mark.parametrize("type", TYPES)


def made(I, O, type, r=8, **settings):
    layer = MoRALinear(I, O, r=r, mora_type=type, **settings)
    g = torch.Generator().manual_seed(I + O)
    with torch.no_grad():
        m = layer.lora_A.weight
        m.copy_(torch.randn(m.shape, generator=g) * 0.05)
    return layer


def test_the_rank_of_m_is_the_codes_or_the_papers():
    assert mora_rank(4096, 4096, 8) == mora_rank(4096, 4096, 8, paper=True) == 256
    assert (mora_rank(4096, 11008, 8), mora_rank(4096, 11008, 8, paper=True)) == (348, 347)
    assert mora_rank(4096, 11008, 8, 6, paper=True) == 346  # even for type 6
    assert mora_rank(97, 61, 9, 1) == 38 and mora_rank(100, 61, 9, 1) == 38 and mora_rank(100, 61, 9, 6) == 38
    assert mora_rank(97, 61, 10, 1) == 40 and mora_rank(97, 61, 8, 6) == 36 and mora_rank(95, 61, 8, 1) == 35
    assert mora_rank(95, 61, 8, 6) == 34
    for I, O in SIZES:
        for paper in (False, True):
            layer = MoRALinear(I, O, r=7, mora_type=1, paper_rank=paper)
            assert layer.rank == int(math.sqrt((I + O) * 7) + (0 if paper else 0.5))
            assert layer.lora_A.weight.shape == (layer.rank, layer.rank)


def test_the_type_follows_the_rank():
    assert [MoRALinear(64, 64, r=r).mora_type for r in (1, 8, 32, 33, 128)] == [6, 6, 6, 1, 1]
    assert MoRALinear(64, 64, r=128, mora_type=6).mora_type == 6
    with pytest.raises(ValueError, match=r"mora_type must be 1, 2, 3, 4 or 6 \(there is no 5\), or None, got 5"):
        MoRALinear(64, 64, mora_type=5)
    with pytest.raises(ValueError, match=r"r must give M a row at least \(in=1, out=1\), got r=1"):
        MoRALinear(1, 1, r=1, mora_type=6)


@pytest.mark.parametrize(("I", "O"), SIZES, ids=str)
@types
def test_merged_is_forward_and_unmerged_is_the_base(I, O, type):
    layer, x = made(I, O, type), torch.randn(7, I)
    y, w = layer(x), layer.base_layer.weight.clone()
    layer.eval().merge()
    assert (layer(x) - y).abs().max() <= 2e-6 * max(1.0, y.abs().max())
    layer.unmerge()
    assert (layer.base_layer.weight - w).abs().max() <= 1e-7
    torch.testing.assert_close(layer.delta_weight().mT, explicit(layer), atol=1e-6, rtol=1e-5)


def explicit(layer):
    """ΔWᵀ by the reference of the op, of one-hot rows."""
    I, O = layer.in_features, layer.out_features
    return OPS["mora_add"].truth(torch.zeros(I, O), torch.eye(I), layer.lora_A.weight.detach(), layer.mora_type)


@types
def test_one_chunk(type):
    """r̂ >= in: the authors' merge of type 6 fails there."""
    layer = made(20, 24, type, r=16)
    assert layer.rank >= 20
    x = torch.randn(3, 20)
    y = layer(x)
    layer.eval().merge()
    assert (layer(x) - y).abs().max() <= 2e-6


@types
def test_starts_as_the_base_and_learns(type):
    base, x = nn.Linear(40, 24), torch.randn(6, 40)
    layer = MoRALinear.from_linear(base, r=4, mora_type=type)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert layer.lora_A.weight.grad.abs().max() > 0 and base.weight.grad is None
    loss, optimizer = [], torch.optim.Adam([layer.lora_A.weight], 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        value = layer(x).square().mean()
        value.backward()
        optimizer.step()
        loss.append(value.item())
    assert loss[-1] < loss[0]


def test_dropout_is_on_the_adapters_x_alone():
    layer, x = made(40, 24, 1, dropout=1.0), torch.randn(6, 40)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.eval()
    assert not torch.allclose(layer(x), layer.base_layer(x))
    half = made(40, 24, 6, dropout=0.5)
    torch.manual_seed(3)
    y = half(x)
    torch.manual_seed(3)
    dropped = torch.dropout(x, 0.5, True)
    torch.testing.assert_close(y, half.base_layer(x) + dropped @ half.delta_weight().mT, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match=r"mora_linear: dropout_p must lie in \[0, 1\], got 1.5"):
        mora_linear(x, half.base_layer.weight, None, half.lora_A.weight, 6, 1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@types
def test_a_16_bit_base_keeps_m_in_float32(type, dtype):
    layer = made(48, 40, type, dtype=dtype)
    x = torch.randn(5, 48).to(dtype)
    assert layer.lora_A.weight.dtype == torch.float32 and layer(x).dtype == dtype
    torch.testing.assert_close(
        layer(x).float(), layer.base_layer(x).float() + x.float() @ layer.delta_weight().mT, atol=0.05, rtol=0.02
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert made(48, 40, type)(torch.randn(2, 48)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- ReMoRA


def test_restart_merges_for_good_and_cycles_the_types():
    layer, x = made(40, 24, 1), torch.randn(5, 40)
    m, seen = layer.lora_A.weight, []
    for _ in range(5):
        with torch.no_grad():
            m.normal_(std=0.05)
        y = layer(x)
        layer.restart((1, 2, 3, 4))
        seen.append(layer.mora_type)
        assert layer.lora_A.weight is m and not m.any() and not layer.merged
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
        layer.unmerge()  # there is nothing to take away any more
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)
    assert seen == [2, 3, 4, 1, 2]
    layer.restart()
    assert layer.mora_type == 2
    layer.restart((1, 2))
    assert layer.mora_type == 1 and MoRALinear.from_linear(nn.Linear(40, 24), **layer.settings).mora_type == 1


def test_restart_refuses():
    layer = made(95, 61, 1)  # r̂ = 35, for type 6 it would be 34
    w, m = layer.base_layer.weight.clone(), layer.lora_A.weight.clone()
    with pytest.raises(
        RuntimeError, match=r"restart: the layer must keep the rank 35 of M with every type of \[1, 6\]"
    ):
        layer.restart((1, 6))
    with pytest.raises(ValueError, match="mora_type must be .*, got 5"):
        layer.restart((1, 5))
    with torch.no_grad():
        layer.lora_A.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="merge: .* must be finite"):
        layer.restart()
    assert torch.equal(layer.base_layer.weight, w) and torch.equal(layer.lora_A.weight.flatten()[1:], m.flatten()[1:])
    layer = made(40, 24, 1).eval()
    layer.merge()
    with pytest.raises(RuntimeError, match="merge: the layer must not be merged already"):
        layer.restart()


# ---------------------------------------------------------------------------------------------------- files


def test_the_authors_keys():
    layer = made(40, 24, 6)
    state = layer.state_dict()
    assert state.keys() == {"base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight"}
    assert torch.equal(state["lora_A.weight"], state["lora_B.weight"])
    assert [name for name, _ in layer.named_parameters() if "base" not in name] == ["lora_A.weight"]
    net = nn.Sequential(nn.Linear(40, 40), MoRALinear(40, 24, mora_type=6))
    theirs = {f"1.{key}": t for key, t in state.items()} | {f"0.{k}": t for k, t in net[0].state_dict().items()}
    net.load_state_dict(theirs)
    assert torch.equal(net[1].lora_A.weight, layer.lora_A.weight)
    del theirs["1.lora_B.weight"]
    net.load_state_dict(theirs)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"MoRALinear: 1.lora_B.weight must be lora_A.weight, which is M too"):
        net.load_state_dict(theirs | {"1.lora_B.weight": torch.zeros(2, 2)})
    assert all(map(torch.equal, net.parameters(), before))
    with pytest.raises(RuntimeError, match='Missing key.*"lora_A.weight"'):
        layer.load_state_dict({k: t for k, t in state.items() if "lora" not in k})


def test_own_files(tmp_path):
    net = nn.Sequential(made(24, 20, 6), nn.Tanh(), made(20, 16, 3, paper_rank=True))
    lrkern.files.save(net, tmp_path / "a")
    plain = nn.Sequential(copy.deepcopy(net[0].base_layer), nn.Tanh(), copy.deepcopy(net[2].base_layer))
    lrkern.files.load(plain, tmp_path / "a")
    x = torch.randn(3, 24)
    assert torch.equal(plain(x), net(x)) and plain[2].settings == net[2].settings
    with torch.no_grad():
        net[0].lora_A.weight.zero_()
    lrkern.files.load(net, tmp_path / "a")  # over layers that are there
    assert torch.equal(plain(x), net(x))


@pytest.mark.parametrize("type", (1, 2, 3, 4))
def test_as_lora(tmp_path, type):
    """Exact: A and B are M and zeros and ones."""
    net = nn.Sequential(made(97, 61, type), nn.Tanh(), made(61, 64, type, r=20))
    for layer in (net[0], net[2]):
        a, b, scale = layer.factors()
        assert scale == 1.0 and torch.equal(b @ a, layer.delta_weight()) and set(b.unique().tolist()) <= {0.0, 1.0}
    lrkern.convert.to_lora(net, tmp_path)
    bases = (copy.deepcopy(layer.base_layer) for layer in (net[0], net[2]))
    ranks = net[0].rank, net[2].rank
    first, last = (FusedLoRALinear.from_linear(b, r=r, lora_alpha=r) for b, r in zip(bases, ranks, strict=True))
    twin, x = nn.Sequential(first, nn.Tanh(), last), torch.randn(5, 97)
    lrkern.peft.load_adapter(twin, tmp_path)
    torch.testing.assert_close(twin(x), net(x), atol=2e-6, rtol=1e-5)


def test_what_is_no_lora(tmp_path):
    net = nn.Sequential(made(64, 48, 6))
    text = r"0 must be a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear or VeRALinear, got MoRALinear, r=8, mora_type=6.*full rank, 48, which no LoRA"
    with pytest.raises(ValueError, match=text):
        lrkern.convert.to_lora(net, tmp_path / "a")
    with pytest.raises(ValueError, match="type must be 1, 2, 3 or 4, got 6"):
        net[0].factors()
    assert torch.linalg.matrix_rank(net[0].delta_weight()) == 48
    wide = nn.Sequential(MoRALinear(2048, 2048, r=65, mora_type=1))
    assert wide[0].rank == 516
    with pytest.raises(ValueError, match="0 must have a rank of at most 512, .* got r=516"):
        lrkern.convert.to_lora(wide, tmp_path / "b")
    assert not any(tmp_path.iterdir())
    a, b = mora_factors(wide[0].lora_A.weight, 2048, 2048, 1)
    assert (
        a.shape == (516, 2048) and b.shape == (2048, 516) and mora_delta(wide[0].lora_A.weight, 0, 3, 6).shape == (3, 0)
    )


@pytest.mark.parametrize("type", (1, 6))
def test_compiles_and_exports(type):
    layer, x = made(40, 24, type), torch.randn(5, 40)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), layer(x))
    fast(x).sum().backward()
    assert layer.lora_A.weight.grad.abs().max() > 0
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
