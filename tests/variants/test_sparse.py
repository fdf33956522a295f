# SPDX-License-Identifier: Apache-2.0
"""Masks and scores: RoseLoRA, PRILoRA and LoRAPrune, beside what test_methods.py says of all variants."""

import copy
import pickle

import pytest
import torch
from peak import Peak
from test_gates import changed, gradients, lora
from torch import nn
from variant_kinds import make

from lrkern import convert
from lrkern.nn.variants import LoRAPruneLinear, PRILoRALinear, RoseLoRALinear
from lrkern.nn.variants.scores import largest_in_rows, row_blocks
from lrkern.reference.variants import VARIANTS


def unmasked(name, **settings):
    """A layer that was trained, its masks all true."""
    layer = changed(name, **settings)
    with torch.no_grad():
        for p in layer.coefficients().values():
            if p.dtype == torch.bool:
                p.fill_(True)
    return layer


@pytest.mark.parametrize("name", ["loraprune", "prilora", "roselora"])
def test_without_a_mask_it_is_lora(name):
    layer, x = unmasked(name), torch.randn(5, 24)
    assert layer.low_rank
    torch.testing.assert_close(layer(x), lora(layer, layer.lora_A, layer.lora_B, layer.lora_alpha)(x), rtol=0, atol=0)


def test_exactly_so_many_of_each_row_are_kept():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])  # with ties
    assert largest_in_rows(scores, 0.6)[0].tolist() == [True, False, True, True, False]
    for share, count in ((0.0, 1), (0.19, 1), (0.2, 1), (0.6, 3), (0.79, 3), (1.0, 5)):
        assert largest_in_rows(scores, share).sum(1).tolist() == [count] * 2
    assert largest_in_rows(torch.rand(1, 100), 0.29).sum() == 29  # 0.29 * 100 < 29


def test_blocks_of_rows_are_all_rows():
    for rows, cols in ((5, 3), (4096, 1000), (3, 2**20), (0, 4), (7, 0)):
        found = [i for s in row_blocks(rows, cols) for i in range(s.start, s.stop)]
        assert found == [*range(rows)]
        assert all(s.stop - s.start == 1 or (s.stop - s.start) * cols <= 2**18 for s in row_blocks(rows, cols))


# RoseLoRA


def test_sensitivity_is_an_average_of_weight_times_gradient():
    layer, beta = unmasked("roselora"), 0.8
    want = {name: torch.zeros_like(layer.get_parameter(f"lora_{name}")) for name in "AB"}
    for _ in range(3):
        got = gradients(layer, torch.randn(9, 24), torch.randn(9, 16))
        layer.observe()
        for name in "AB":
            p = layer.get_parameter(f"lora_{name}").detach()
            want[name] = beta * want[name] + (1 - beta) * (p * got[f"lora_{name}"]).abs()
            torch.testing.assert_close(getattr(layer, f"sensitivity_{name}"), want[name])
    assert "sensitivity_A" not in layer.state_dict()


def test_the_most_sensitive_of_each_row_and_column_stay_and_others_may_come_back():
    layer, x, dy = unmasked("roselora"), torch.randn(9, 24), torch.randn(9, 16)
    with pytest.raises(RuntimeError, match="^RoseLoRALinear.observe: the layer must have gradients"):
        layer.observe()
    with pytest.raises(RuntimeError, match="^RoseLoRALinear.prune: the layer must have observed"):
        layer.prune(0.5)
    gradients(layer, x, dy)
    layer.observe()
    sensitivity = layer.sensitivity_A.clone()
    layer.prune(0.3)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    assert (a != 0).sum(1).tolist() == [7] * 4 and (b != 0).sum(0).tolist() == [4] * 4  # of 24 and 16
    for row, zero in zip(sensitivity, a == 0, strict=True):
        assert row[zero].max() <= row[~zero].min()
    assert layer.mask_A.all() and layer.mask_B.all()
    got = gradients(layer, x, dy)
    assert (got["lora_A"][a == 0] != 0).all()  # and so they come back


def test_a_fixed_mask_holds_through_training():
    layer, x, dy = unmasked("roselora"), torch.randn(9, 24), torch.randn(9, 16)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1)
    gradients(layer, x, dy)
    optimizer.step()  # has moments of all weights
    layer.observe()
    layer.prune(0.3, fix=True)
    assert layer.mask_A.sum(1).tolist() == [7] * 4 and layer.mask_B.sum(0).tolist() == [4] * 4
    for _ in range(3):
        got = gradients(layer, x, dy)
        assert (got["lora_A"][~layer.mask_A] == 0).all() and (got["lora_B"][~layer.mask_B] == 0).all()
        optimizer.step()
    a, b, _ = layer.factors()
    assert (a != 0).sum(1).tolist() == [7] * 4 and (b != 0).sum(0).tolist() == [4] * 4
    again = RoseLoRALinear.from_linear(layer.base_layer, **layer.settings)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


# PRILoRA


def planned(names, settings=None):
    settings = settings or {}
    return {n: s["r"] for n, s in PRILoRALinear.plan(None, {}, {n: settings.get(n, settings) for n in names}).items()}


def test_ranks_grow_with_the_depth():
    names = [f"model.layers.{i}.{m}" for i in range(5) for m in ("self_attn.q_proj", "mlp.0")]
    assert [*planned(names).values()] == [4, 4, 6, 6, 8, 8, 10, 10, 12, 12]
    assert [*planned(names, {"r_start": 8, "r_end": 8}).values()] == [8] * 10
    assert [*planned(names, {"r_start": 9, "r_end": 7}).values()] == [
        9,
        9,
        9,
        9,
        8,
        8,
        8,
        8,
        7,
        7,
    ]  # 8.5 is 9, 7.5 is 8
    assert planned(["fc1", "fc2", "head"], {"r_start": 2, "r_end": 6}) == {"fc1": 2, "fc2": 4, "head": 6}
    assert planned(["only"], {"r_start": 2, "r_end": 6}) == {"only": 2}
    assert planned(["h.0.q", "h.1.q"], {"h.0.q": {"r": 3}, "h.1.q": {}}) == {"h.0.q": 3, "h.1.q": 12}
    with pytest.raises(ValueError, match="^PRILoRALinear: r_start and r_end must be whole numbers, got 4 and None"):
        planned(["a"], {"r_end": None})
    with pytest.raises(ValueError, match=r"^PRILoRALinear: r_end must be a whole number in 1\.\.512, got 0"):
        PRILoRALinear(8, 8, r_end=0)


def test_the_norms_of_columns_are_averaged_while_it_is_watched():
    layer, xs = unmasked("prilora"), torch.randn(4, 2, 5, 24)
    layer(xs[0])
    assert layer.x_norm is None
    handle = layer.watch(beta=0.75)
    want = None
    for x in xs:
        layer(x)
        now = x.flatten(0, 1).norm(dim=0)
        want = now if want is None else 0.75 * want + 0.25 * now
        torch.testing.assert_close(layer.x_norm, want)
    layer.eval()(xs[0])
    pickle.loads(pickle.dumps(layer)).train()(xs[0])
    handle.remove()
    layer.train()(xs[0])
    torch.testing.assert_close(layer.x_norm, want)
    assert "x_norm" not in layer.state_dict()


def test_the_smallest_weights_by_their_inputs_are_pruned():
    layer, x = unmasked("prilora"), torch.randn(6, 24)
    with pytest.raises(RuntimeError, match="^PRILoRALinear.prune: the layer must have observed its inputs"):
        layer.prune(0.5)
    x[:, 3] *= 100  # a column that keeps all its weights
    layer.observe(x)
    score = layer.lora_A.detach().abs() * x.norm(dim=0)
    layer.prune(0.4)
    assert layer.mask_A.sum(1).tolist() == [14] * 4 and layer.mask_A[:, 3].all()  # floor(0.6 * 24)
    for row, kept in zip(score, layer.mask_A, strict=True):
        assert row[~kept].max() <= row[kept].min()
    assert torch.equal(layer.lora_A != 0, layer.mask_A.detach())
    got = gradients(layer, x, torch.randn(6, 16))["lora_A"]
    assert (got[~layer.mask_A] == 0).all() and (got[layer.mask_A] != 0).all()
    mask = layer.mask_A.clone()
    layer.prune(0.6)
    assert layer.mask_A.sum(1).tolist() == [9] * 4 and not (layer.mask_A & ~mask).any()


# LoRAPrune


def dense_scores(layer):
    """The formula on whole matrices: |B A - (B - gB)(A - gA)| ⊙ |W + scaling B A| [out, in] in float64."""
    a, b, ga, gb = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.lora_A.grad, layer.lora_B.grad))
    w = layer.base_layer.weight.double() + layer.scaling * b @ a
    return ((b @ a - (b - gb) @ (a - ga)) * w).abs()


@pytest.mark.parametrize("side, dim, groups", [("out", 1, (1, 4, 16)), ("in", 0, (1, 6, 24))])
def test_scores_are_those_of_the_whole_matrices(side, dim, groups):
    layer = unmasked("loraprune")
    gradients(layer, torch.randn(9, 24), torch.randn(9, 16))
    want = dense_scores(layer).sum(dim)
    for group in groups:
        got = layer.scores(group, side)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want.view(-1, group).sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["in", "out"])
def test_scores_form_no_matrix_of_the_weights_size(side):
    layer = LoRAPruneLinear(1024, 2048, r=4, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(9, 1024, dtype=torch.bfloat16), torch.randn(9, 2048, dtype=torch.bfloat16)
    gradients(layer, x, dy)
    with Peak() as peak:
        got = layer.scores(side=side)
    assert 2**20 <= peak.most < 2048 * 1024 * 4 / 2, peak.most  # some blocks of a MiB, of eight
    torch.testing.assert_close(got.double(), dense_scores(layer).sum(1 if side == "out" else 0), rtol=1e-3, atol=0)


def test_scores_are_refused_where_there_is_nothing_to_score():
    layer = unmasked("loraprune")
    with pytest.raises(
        RuntimeError, match="^LoRAPruneLinear.scores: the layer must have gradients of lora_A and lora_B"
    ):
        layer.scores()
    gradients(layer, torch.randn(9, 24), torch.randn(9, 16))
    for more, text in (
        ({"side": "rows"}, r"side must be one of \['in', 'out'\], got 'rows'"),
        ({"group": 5}, "group must divide out = 16, got 5"),
        ({"group": 16, "side": "in"}, "group must divide in = 24, got 16"),
        ({"group": 0}, "group must be a whole number in 1"),
    ):
        with pytest.raises(ValueError, match=f"^LoRAPruneLinear: {text}"):
            layer.scores(**more)
    layer.merge()
    with pytest.raises(RuntimeError, match="^LoRAPruneLinear.scores: the layer must not be merged"):
        layer.scores()


def test_pruned_groups_are_zero_and_no_others():
    layer, x = unmasked("loraprune"), torch.randn(5, 24)
    y = layer(x).detach()
    layer.prune([1, 3], group=4)
    assert layer.mask.view(4, 4).any(1).tolist() == [True, False, True, False]
    assert torch.equal(layer(x), y * layer.mask) and not layer.low_rank
    layer.prune(torch.tensor([0]), group=4)
    assert layer.mask.view(4, 4).all(1).tolist() == [False, True, True, True]
    before = layer.mask.clone()
    for groups in ([4], [-1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"^LoRAPruneLinear: groups must be in 0\.\.3 and leave one"):
            layer.prune(groups, group=4)
    assert torch.equal(layer.mask, before)
    layer.prune([])
    assert torch.equal(layer(x), y) and layer.low_rank


def test_a_mask_under_torch_func():
    layer, x = changed("loraprune"), torch.randn(3, 5, 24)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-6)
    got = torch.func.grad(lambda t: layer(t).square().sum())(x)
    x.requires_grad_()
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sliced_model_is_the_masked_model(bias):
    """Of two layers with an activation that leaves zero alone, after one more step of training too."""
    torch.manual_seed(2)
    up = LoRAPruneLinear.from_linear(nn.Linear(12, 20, bias=bias), r=3)
    down = LoRAPruneLinear.from_linear(nn.Linear(20, 8, bias=bias), r=3)
    for layer in (up, down):
        nn.init.normal_(layer.lora_B, std=0.3)
    up.prune([0, 3, 4], group=2)
    down.prune([5])
    masked, sliced = nn.Sequential(up, nn.GELU(), down), nn.Sequential(up.sliced(), nn.GELU(), down.sliced(up.mask))
    assert [tuple(m.base_layer.weight.shape) for m in (sliced[0], sliced[2])] == [(14, 12), (7, 14)]
    x, dy = torch.randn(6, 12), torch.randn(6, 8)
    for _ in range(2):
        y, small = masked(x), sliced(x)
        torch.testing.assert_close(small, y[:, down.mask], rtol=1e-5, atol=1e-6)
        assert (y[:, ~down.mask] == 0).all()
        for model, out, d in ((masked, y, dy), (sliced, small, dy[:, down.mask])):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            optimizer.zero_grad()
            out.backward(d)
            optimizer.step()
    assert not torch.equal(masked(x), y)


def test_a_sliced_layer_is_one_of_copies():
    layer = unmasked("loraprune", dropout=0.25).eval()
    layer.prune([2, 7])
    small = layer.sliced()
    assert small.settings == layer.settings and not small.training and small.low_rank
    assert not small.base_layer.weight.requires_grad and small.lora_A.requires_grad
    assert small.lora_A.data_ptr() != layer.lora_A.data_ptr()
    for inputs in (torch.ones(23, dtype=torch.bool), torch.ones(24), torch.zeros(24, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^LoRAPruneLinear: inputs must be a mask \[24\] of bool"):
            layer.sliced(inputs)


def test_merge_takes_the_bias_too_and_unmerge_gives_both_back():
    layer, x = unmasked("loraprune").eval(), torch.randn(5, 24)
    layer.prune([1, 2, 9])
    w, bias = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    y, delta = layer(x), layer.delta_weight()
    torch.testing.assert_close(w + delta, layer.mask[:, None] * (w + layer.scaling * layer.lora_B @ layer.lora_A))
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.base_layer(x), y, rtol=1e-5, atol=1e-6)
    assert (layer(x)[:, ~layer.mask] == 0).all()
    torch.testing.assert_close(layer.delta_weight(), delta, rtol=1e-5, atol=1e-6)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            again.mask.fill_(True)  # acts from unmerge on
        again.unmerge()
        assert torch.equal(again.base_layer.bias, bias)
        assert torch.equal(again.base_layer.weight[[1, 2, 9]], w[[1, 2, 9]])  # to the bit: no difference of sums
        torch.testing.assert_close(again.base_layer.weight, w, rtol=1e-6, atol=1e-6)
        assert again.low_rank and again(x)[:, 1].abs().min() > 0


def test_a_merge_that_is_refused_leaves_the_bias():
    layer = unmasked("loraprune")
    layer.prune([1])
    with torch.no_grad():
        layer.lora_B[0, 0] = float("inf")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"^LoRAPruneLinear.merge: mask \(W \+ scaling B A\) must be finite"):
        layer.merge()
    assert not layer.merged and all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_mask_is_no_lora(tmp_path):
    layer = unmasked("loraprune")
    convert.to_lora({"l": layer}, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    layer.prune([1])
    with pytest.raises(ValueError, match="LoRAPruneLinear"):
        convert.to_lora({"l": layer}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_mask_is_kept_with_the_layer():
    layer, x = unmasked("loraprune"), torch.randn(5, 24)
    layer.prune([1, 9])
    again = make(VARIANTS["loraprune"], seed=11)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


class Packed(nn.Module):
    """A linear that keeps W in no ``weight`` of floats."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 64).round().to(torch.int8))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight / 64, self.bias)


def test_a_packed_weight_is_masked_too_and_not_read():
    base, x = Packed(nn.Linear(24, 16)), torch.randn(5, 24)
    layer = LoRAPruneLinear.from_linear(base, r=3)
    nn.init.normal_(layer.lora_B)
    gradients(layer, x, torch.randn(5, 16))
    y, whole = layer(x).detach(), layer.delta_weight()
    torch.testing.assert_close(whole, (layer.scaling * layer.lora_B @ layer.lora_A).detach())
    layer.prune([3, 4])
    assert torch.equal(layer(x), y * layer.mask)
    for name in ("delta_weight", "merge", "scores", "sliced"):
        with pytest.raises(
            RuntimeError, match=rf"^LoRAPruneLinear\.{name}: the layer must have a (W of floats|plain nn.Linear)"
        ):
            getattr(layer, name)()
