# SPDX-License-Identifier: Apache-2.0
"""Gates, diagonals and prefixes: SoRA, BeamLoRA, IncreLoRA and DyLoRA, beside what test_methods.py says of all variants."""

import copy

import pytest
import torch
from peak import Peak
from variant_kinds import change, make

from lrkern.nn import FusedLoRALinear
from lrkern.nn.variants import DyLoRALinear, IncreLoRALinear, SoRALinear
from lrkern.nn.variants.dylora import draw_rank
from lrkern.reference.variants import VARIANTS


def changed(name, **settings):
    return change(make(VARIANTS[name], **settings), VARIANTS[name])


def lora(layer, a, b, alpha):
    """A LoRA over the same base layer."""
    other = FusedLoRALinear.from_linear(copy.deepcopy(layer.base_layer), r=len(a), lora_alpha=alpha)
    with torch.no_grad():
        other.lora_A.weight.copy_(a)
        other.lora_B.weight.copy_(b)
    return other


def gradients(layer, x, dy):
    layer.zero_grad()
    layer(x).backward(dy)
    return {name: p.grad for name, p in layer.coefficients().items()}


def sizes(layer):
    return {name: list(p.shape) for name, p in layer.coefficients().items()}


@pytest.mark.parametrize("name", ["beamlora", "sora"])
def test_a_gate_of_ones_is_lora(name):
    layer, x = changed(name), torch.randn(5, 24)
    with torch.no_grad():
        layer.lora_gate.fill_(1.0 if name == "sora" else 0.0)
    plain = lora(layer, layer.lora_A, layer.lora_B, layer.lora_alpha)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)


# SoRA


def test_the_gates_step_is_the_proximal_one():
    """It minimises ½ (z - g)² + t |z|, where the authors' code sets everything below 2 t to zero."""
    layer = make(VARIANTS["sora"], r=6)
    gate, t = torch.tensor([-0.9, -0.15, -0.05, 0.1, 0.19, 2.0]), 0.1
    with torch.no_grad():
        layer.lora_gate.copy_(gate)
    layer.shrink_gate(t)
    z = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    best = z[((z - gate[:, None].double()) ** 2 / 2 + t * z.abs()).argmin(1)]
    torch.testing.assert_close(layer.lora_gate.double(), best, rtol=0, atol=1e-4)
    assert layer.lora_gate.count_nonzero() == 4 and layer.lora_gate[1] != 0 and layer.lora_gate[4] != 0
    with pytest.raises(ValueError, match="^SoRALinear: threshold must be .*, got -1"):
        layer.shrink_gate(-1)


def test_ranks_without_a_gate_are_dropped_and_y_stays():
    layer, x = changed("sora", r=5), torch.randn(4, 24)
    with torch.no_grad():
        layer.lora_gate[[0, 3]] = 0
    y, scaling = layer(x).detach(), layer.scaling
    assert layer.drop_ranks() == 3 == layer.r
    assert sizes(layer) == {"lora_A": [3, 24], "lora_B": [16, 3], "lora_gate": [3]}
    torch.testing.assert_close(layer(x), y)
    assert layer.scaling == pytest.approx(scaling) and all(p.requires_grad for p in layer.coefficients().values())
    again = SoRALinear.from_linear(layer.base_layer, **layer.settings)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        layer.lora_gate.zero_()
    assert layer.drop_ranks() == 1 and torch.equal(layer(x), layer.base_layer(x))


# BeamLoRA


def test_importance_is_a_share_of_the_rank():
    layer = changed("beamlora", r=6)
    want = 6 * torch.softmax(layer.lora_gate.detach().double() / 0.05, 0)
    torch.testing.assert_close(layer.importance().double(), want, rtol=1e-5, atol=1e-6)
    assert not layer.importance().requires_grad
    with pytest.raises(ValueError, match="^BeamLoRALinear: tau must be .*, got 0"):
        make(VARIANTS["beamlora"], tau=0)


def trained_with_adam(r=5):
    layer = changed("beamlora", r=r)
    optimizer = torch.optim.AdamW(layer.coefficients().values(), lr=0.01, amsgrad=True)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(6, 24)).square().sum().backward()
        optimizer.step()
    return layer, optimizer


def test_a_weak_rank_becomes_a_copy_with_its_moments():
    layer, optimizer = trained_with_adam()
    before, params = copy.deepcopy(layer), layer.coefficients()
    moments = copy.deepcopy({n: optimizer.state[p] for n, p in params.items()})
    layer.replace([1, 4], torch.tensor([0, 2]), optimizer)
    rows = torch.tensor([0, 0, 2, 3, 2])  # where each rank's factors come from
    assert torch.equal(layer.lora_A, before.lora_A[rows]) and torch.equal(layer.lora_B, before.lora_B[:, rows])
    g = before.lora_gate.detach()
    mean = torch.stack([g[0] + g[1], g[0] + g[1], g[2] + g[4], 2 * g[3], g[2] + g[4]]) / 2
    assert torch.equal(layer.lora_gate.detach(), mean)
    assert all(layer.get_parameter(n) is p for n, p in params.items())  # the optimizer has them still
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        now = {n: optimizer.state[p][key] for n, p in params.items()}
        assert torch.equal(now["lora_A"], moments["lora_A"][key][rows])
        assert torch.equal(now["lora_B"], moments["lora_B"][key][:, rows])
        assert now["lora_gate"].nonzero().flatten().tolist() == [3]
        assert now["lora_gate"][3] == moments["lora_gate"][key][3]


def test_a_copy_of_an_earlier_step():
    layer, _ = trained_with_adam()
    earlier = {name: torch.randn_like(p) for name, p in layer.coefficients().items() if name != "lora_gate"}
    kept = layer.lora_A.detach().clone()
    layer.replace([3], [1], earlier=earlier)
    assert torch.equal(layer.lora_A[3], earlier["lora_A"][1])
    assert torch.equal(layer.lora_B[:, 3], earlier["lora_B"][:, 1])
    assert torch.equal(layer.lora_A[[0, 1, 2, 4]], kept[[0, 1, 2, 4]])


@pytest.mark.parametrize(
    "weak, strong", [([0], [0]), ([0, 1], [2]), ([0], [5]), ([-1], [2]), ([0, 1], [2, 2]), ([[0]], [[1]])]
)
def test_a_replacement_that_means_nothing_is_refused(weak, strong):
    layer = changed("beamlora", r=5)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"^BeamLoRALinear\.replace: weak and strong must be as many ranks of 0\.\.4"):
        layer.replace(weak, strong)
    with pytest.raises(ValueError, match=r"^BeamLoRALinear\.replace: earlier\['lora_B'\] must have shape \[16, 5\]"):
        layer.replace([0], [1], earlier={"lora_A": layer.lora_A, "lora_B": layer.lora_B[:, :4]})
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


# IncreLoRA


def test_the_score_is_that_of_the_whole_matrices():
    layer = changed("increlora")
    x, dy = torch.randn(2, 7, 24), torch.randn(2, 7, 16)
    delta = torch.nn.Parameter(layer.delta_weight().double())
    (gradient,) = torch.autograd.grad((x.double() @ delta.mT), delta, dy.double())
    torch.testing.assert_close(layer.score(x, dy).double(), (delta * gradient).abs().sum().detach(), rtol=1e-5, atol=0)


def test_a_score_forms_no_matrix_of_the_weights_size():
    layer = IncreLoRALinear(1024, 2048, r=4)
    x, dy = torch.randn(16, 1024), torch.randn(16, 2048)
    with Peak() as peak:
        found = layer.score(x, dy)
    assert 2**20 <= peak.most < 2048 * 1024 * 4 / 2, peak.most  # some blocks of a MiB, of eight
    with torch.no_grad():
        layer.lora_E.fill_(1.0)
    whole = (layer.delta_weight() * (dy.mT @ x)).abs().sum()
    assert found < 1e-3 * whole
    torch.testing.assert_close(layer.score(x, dy), whole, rtol=1e-4, atol=0)


def test_orthonormal_factors_have_no_orthogonality_to_learn():
    layer = changed("increlora")
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(6, 24))
        layer.lora_B.copy_(torch.eye(16, 6) * 2)  # 2² - 1 six times
    assert layer.orthogonality().item() == pytest.approx(3 * 6**0.5 / 2)
    layer.orthogonality().backward()
    assert layer.lora_B.grad.norm() > 0 and layer.lora_E.grad is None
    with torch.no_grad():
        layer.lora_B.div_(2)
    assert layer.orthogonality() == 0


def test_growing_grants_the_reserve_and_changes_little():
    layer, x = changed("increlora"), torch.randn(5, 24)  # r = 4 and 2 more
    before, delta = (
        {n: p.detach().clone() for n, p in layer.coefficients().items()},
        layer.delta_weight() / layer.scaling,
    )
    layer.grow(2)
    assert (layer.r, layer.reserve, layer.lora_rank) == (6, 2, 8)
    assert sizes(layer) == {"lora_A": [8, 24], "lora_E": [6, 1], "lora_B": [16, 8]}
    assert layer.scaling == pytest.approx(32 / 6, rel=1e-4)
    assert torch.equal(layer.lora_A[:6], before["lora_A"]) and torch.equal(layer.lora_B[:, :6], before["lora_B"])
    assert torch.equal(layer.lora_E[:4], before["lora_E"]) and (layer.lora_E[4:] == 1e-5).all()
    new = layer.lora_A[6:].norm() * layer.lora_B[:, 6:].norm()
    assert 0 < (layer.delta_weight() / layer.scaling - delta).norm() <= 1.01e-5 * new + 1e-6 * delta.norm()
    got = gradients(layer, x, torch.randn(5, 16))
    assert (got["lora_E"] != 0).all() and (
        got["lora_A"] != 0
    ).all()  # the granted ranks train, and the reserve's factors
    again = IncreLoRALinear.from_linear(layer.base_layer, **layer.settings)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_growing_by_more_than_the_reserve_and_finishing():
    layer = changed("increlora-no_reserve")
    delta = layer.delta_weight() / layer.scaling
    layer.grow(3)
    assert (layer.r, layer.reserve) == (7, 0) and layer.lora_E[4:].flatten().tolist() == pytest.approx([1e-5] * 3)
    torch.testing.assert_close(layer.delta_weight() / layer.scaling, delta, rtol=0, atol=1e-4)
    layer = changed("increlora")
    kept = layer.factors()
    layer.finish()
    assert layer.lora_rank == layer.r == 4 and layer.reserve == 0
    a, b, scale = layer.factors()
    assert torch.equal(a, kept[0][:4]) and torch.equal(b, kept[1][:, :4]) and scale == kept[2]


def test_it_grows_to_the_rank_that_kernels_take():
    layer = IncreLoRALinear(8, 8, r=500, reserve=10)
    for n in (3, 0, 1.0, True):
        with pytest.raises(ValueError, match=r"^IncreLoRALinear: n must be a whole number in 1\.\.2, got"):
            layer.grow(n)
    assert layer.r == 500 and len(layer.lora_A) == 510
    with pytest.raises(ValueError, match=r"^IncreLoRALinear: reserve must be a whole number in 0\.\.12, got 13"):
        IncreLoRALinear(8, 8, r=500, reserve=13)


# DyLoRA


@pytest.mark.parametrize("b", [1, 2, 3, 5])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_prefix_is_a_lora_of_its_rank(b, frozen):
    layer, x, dy = changed("dylora", r=5, frozen=frozen), torch.randn(6, 24), torch.randn(6, 16)
    layer.set_active(b)
    plain = lora(layer, layer.lora_A[:b], layer.lora_B[:, :b], layer.lora_alpha)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    got, want = gradients(layer, x, dy), gradients(plain, x, dy)
    trains = slice(b - 1, b) if frozen else slice(0, b)
    a, bt = got["lora_A"], got["lora_B"].mT
    assert torch.equal(a[trains], want["lora_A.weight"][trains]) and (a[trains] != 0).any(1).all()
    torch.testing.assert_close(bt[trains], want["lora_B.weight"].mT[trains])
    for g in (a, bt):
        rest = torch.ones(5, dtype=torch.bool)
        rest[trains] = False
        assert (g[rest] == 0).all()


def test_one_rank_is_drawn_for_a_model():
    def model():
        return torch.nn.Sequential(DyLoRALinear(4, 4, r=6), torch.nn.Sequential(DyLoRALinear(4, 4, r=8)))

    one, other = model(), model()
    g, same = (torch.Generator().manual_seed(3) for _ in range(2))
    torch.manual_seed(1)
    drawn = []
    for _ in range(60):
        drawn.append(draw_rank(one.modules(), 2, 5, generator=g))
        assert drawn[-1] == draw_rank(other.modules(), 2, 5, generator=same)
        assert [m.active for m in one.modules() if isinstance(m, DyLoRALinear)] == [drawn[-1]] * 2
    assert {*drawn} == {2, 3, 4, 5}
    state = torch.get_rng_state()
    assert {draw_rank(one.modules(), generator=g) for _ in range(90)} == {*range(1, 7)}
    assert torch.equal(torch.get_rng_state(), state)
    for low, high in ((0, 3), (3, 2), (1, 7), (1.0, 2)):
        with pytest.raises(ValueError, match="^draw_rank: low and high must be whole numbers .* <= 6"):
            draw_rank(one.modules(), low, high)
    with pytest.raises(ValueError, match="^draw_rank: modules must have DyLoRALinear"):
        draw_rank([torch.nn.Linear(2, 2)])


def test_a_prefix_is_a_rank_of_the_layer():
    layer = changed("dylora", r=5)
    for b in (0, 6, 2.0, True):
        with pytest.raises(ValueError, match=r"^DyLoRALinear: active must be a whole number in 1\.\.5, got"):
            layer.set_active(b)
    assert layer.active == layer.lora_rank == 5
    layer.set_active(2)
    assert layer.settings["active"] == layer.lora_rank == 2
    with pytest.raises(ValueError, match=r"^DyLoRALinear: active must be a whole number in 0\.\.5, got 6"):
        DyLoRALinear(8, 8, r=5, active=6)
    with pytest.raises(ValueError, match="^DyLoRALinear: frozen must be True or False"):
        DyLoRALinear(8, 8, r=5, frozen=1)
