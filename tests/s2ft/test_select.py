# SPDX-License-Identifier: Apache-2.0
"""lrkern.s2ft.select: what ranks highest and lowest is found, counts are as said, and nothing of the model changes."""

import pytest
import torch
from s2ft_models import DECODERS, MODELS, assert_same_bits, batch, bits, made
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrkern.s2ft.calibrate
from lrkern.s2ft import find, select

BATCHES = [batch(1), batch(2, rows=2, tokens=5)]
LAYERS = 2


def o(i):
    return f"model.layers.{i}.self_attn.o_proj"


def v(i):
    return f"model.layers.{i}.self_attn.v_proj"


def down(i):
    return f"model.layers.{i}.mlp.down_proj"


def up(i):
    return f"model.layers.{i}.mlp.up_proj"


def counts(selection):
    return {name: len(chosen.index) for name, chosen in selection.items()}


def seen(model, batches):
    """Of each linear over all batches: its inputs, outputs [T, ...] and, a batch each, its dense gradient, by autograd."""
    found, hooks = {}, []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            found[name] = x, y, _ = [], [], []
            hooks.append(m.register_forward_hook(lambda m, a, out, x=x, y=y: (x.append(a[0]), y.append(out), None)[2]))
    for b in batches:
        model.zero_grad()
        model(**b).loss.backward()
        for name in found:
            found[name][2].append(model.get_submodule(name).weight.grad.clone())
    for hook in hooks:
        hook.remove()
    flat = lambda many: torch.cat([t.detach().flatten(0, -2) for t in many])
    return {name: (flat(x), flat(y), torch.stack(g)) for name, (x, y, g) in found.items()}


def expected(model, batches, by, name, side, size):
    """The score of each unit, as the docstring says it, in one line each."""
    x, y, g = seen(model, batches)[name]
    w = model.get_submodule(name).weight.detach()
    a = (x if side == "input" else y).unflatten(1, (-1, size))
    s = w.mT if side == "input" else w  # [channels, ...]
    g = g.mT if side == "input" else g
    score = {
        "weight": s.unflatten(0, (-1, size)).flatten(1).norm(dim=1),
        "activation": a.square().sum(-1).mean(0).sqrt(),
        "gradient": g.unflatten(1, (-1, size)).flatten(2).square().sum(2).sum(0).sqrt(),
    }
    return score["weight"] * score["activation"] if by == "product" else score[by]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("by", ["weight", "activation", "gradient", "product"])
@pytest.mark.parametrize("kind", ["llama-mha", "qwen2"])
def test_ranks_as_defined(kind, by, largest):
    model = made(kind)
    chosen = select(
        model, o=0.5, v=0.5, down=0.25, up=0.5, by=by, largest=largest, multiple=1, groups=False, batches=BATCHES
    )
    assert len(chosen) == 4 * LAYERS
    for part in find(model):
        for role, (name, side, units, size) in part.targets().items():
            score = expected(model, BATCHES, by, name, side, size)
            assert len(score) == units
            n = round(units * (0.25 if role == "down" else 0.5))
            best = score.topk(n, largest=largest).indices.sort().values
            assert chosen[name].side == side
            assert chosen[name].index.view(n, size)[:, 0].tolist() == (best * size).tolist(), name
            assert (chosen[name].index.view(n, size).diff(dim=1) == 1).all()


@pytest.mark.parametrize("by", ["weight", "activation", "gradient", "product"])
def test_planted(by):
    """Channels and heads made large, each in a layer's own place: by a huge weight in front (activations), or of their own."""
    model, places = made("llama-gqa"), {0: [3, 30], 1: [7, 21]}
    with torch.no_grad():
        for i, where in places.items():
            mlp, attention = model.model.layers[i].mlp, model.model.layers[i].self_attn
            own = by in ("weight", "product")  # their gradient is that of the activation before them
            if own:
                mlp.down_proj.weight[:, where] *= 50
                attention.o_proj.weight[:, 16:].mul_(50)
            else:
                mlp.up_proj.weight[where] *= 50
                attention.v_proj.weight[8:].mul_(50)  # read by heads 2 and 3
    chosen = select(model, o=0.5, down=2 / 48, by=by, multiple=1, batches=BATCHES)
    for i, where in places.items():
        assert chosen[down(i)].index.tolist() == where
        assert chosen[o(i)].index.tolist() == list(range(16, 32))
    lowest = select(model, o=0.5, down=2 / 48, by=by, multiple=1, batches=BATCHES, largest=False)
    for i, where in places.items():
        assert not {*lowest[down(i)].index.tolist()} & {*where}
        assert lowest[o(i)].index.tolist() == list(range(16))


def test_counts_are_rounded():
    """To 16 channels and whole heads, at least one of either and never more than there are."""
    model = made("llama-gqa")  # 48 channels, 4 heads of 8, 2 key and value heads
    layer = lambda **f: {
        n.removeprefix("model.layers.0."): c for n, c in counts(select(model, **f)).items() if ".0." in n
    }
    for fraction, n in ((0.01, 16), (0.4, 16), (0.5, 32), (0.9, 48), (1, 48)):
        assert layer(down=fraction) == {"mlp.down_proj": n}
        assert layer(up=fraction) == {"mlp.up_proj": n}
    assert layer(down=0.5, multiple=5) == {"mlp.down_proj": 25}
    assert layer(down=1, multiple=5) == {"mlp.down_proj": 48}
    assert layer(down=0.1, multiple=64) == {"mlp.down_proj": 48}
    for fraction, heads in ((0.01, 1), (0.3, 1), (0.4, 2), (0.75, 3), (1, 4)):
        assert layer(o=fraction) == {"self_attn.o_proj": 8 * heads}
    assert layer(o=0.3, groups=True) == {"self_attn.o_proj": 16}
    assert layer(v=0.3) == {"self_attn.v_proj": 8}
    assert layer(o=0.3, v=0.3) == {"self_attn.o_proj": 16, "self_attn.v_proj": 8}  # v's groups, so o's
    assert layer(o=0.3, v=0.3, groups=False) == {"self_attn.o_proj": 8, "self_attn.v_proj": 8}


def test_global_is_ragged():
    """The fraction is of all layers together: one with the large weights takes the most, and one may have none."""
    model = made("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, :30] *= 100
        model.model.layers[0].mlp.down_proj.weight[:, 40] *= 100
        model.model.layers[1].self_attn.o_proj.weight *= 100
    f = dict(o=0.5, down=31 / 96, by="weight", scope="global")
    chosen = select(model, **f)
    assert counts(chosen) == {down(0): 1, o(1): 32, down(1): 30}
    assert chosen[down(0)].index.tolist() == [40]
    lowest = counts(select(model, largest=False, **f))
    assert lowest[o(0)] == 32
    assert o(1) not in lowest
    assert sum(n for name, n in lowest.items() if "mlp" in name) == 31
    random = counts(select(model, down=0.25, scope="global", generator=0))
    assert sum(random.values()) == 24
    assert random[down(0)] != random[down(1)]


def test_random_follows_the_seed():
    model = made("llama-gqa")
    draw = lambda g: {n: c.index.tolist() for n, c in select(model, o=0.5, down=0.34, generator=g).items()}
    assert draw(1) == draw(1) == draw(torch.Generator().manual_seed(1)) != draw(2)
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert draw(None) == draw(1)
    counted = torch.zeros(48)
    for seed in range(200):
        counted[select(model, down=0.34, generator=seed)[down(0)].index] += 1
    assert ((counted - 200 / 3).abs() < 4.5 * (200 * 2 / 9) ** 0.5).all()  # each with the same chance


@pytest.mark.parametrize("by", ["random", "weight", "activation", "gradient", "product"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_as_it_was(kind, by):
    """Weights, flags, modes, grads and hooks; nothing stays of calibration."""
    model = made(kind).train()
    model.get_submodule(find(model)[1].down).eval()
    for p in [*model.parameters()][::3]:
        p.requires_grad_(False)
    before, modes, flags = (
        bits(model),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    chosen = select(model, o=0.5, down=0.3, by=by, batches=BATCHES)
    assert len(chosen) == 4
    assert_same_bits(model, before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_a_function_calibrates(by):
    def run(model):
        for b in BATCHES:
            loss = model(**b).loss
            if by == "gradient":
                loss.backward()

    model = made("qwen3")
    f = dict(down=0.25, up=0.25, o=0.5, v=0.5, by=by, multiple=1)
    one, two = (select(model, batches=b, **f) for b in (run, iter(BATCHES)))
    assert {n: c.index.tolist() for n, c in one.items()} == {n: c.index.tolist() for n, c in two.items()}


def test_a_panel_at_a_time(monkeypatch):
    """No gradient or float32 copy of a whole weight: sums over panels are those of the whole."""
    model = made("llama-mha")
    f = dict(down=0.5, up=0.5, o=0.5, v=0.5, multiple=1, batches=BATCHES)
    for by in ("weight", "gradient"):
        whole = select(model, by=by, **f)
        monkeypatch.setattr(lrkern.s2ft.calibrate, "PANEL", 5)
        panels = select(model, by=by, **f)
        monkeypatch.undo()
        assert all(torch.equal(whole[n].index, panels[n].index) for n in whole)


class Made(TorchDispatchMode):
    """How large the tensors are that ops make, views and in-place results aside."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.numel())
        return result


@pytest.mark.parametrize("by", ["weight", "activation", "gradient", "product"])
def test_nothing_as_large_as_a_weight(by, monkeypatch):
    """No copy of W, and no dW: with 2 rows of 4 tokens all else is smaller."""
    monkeypatch.setattr(lrkern.s2ft.calibrate, "PANEL", 8)
    model = made("llama-gqa")
    with Made() as seen:
        select(model, o=0.5, v=0.5, down=0.5, up=0.5, by=by, multiple=1, batches=[batch(0, rows=2, tokens=4)])
    assert 8 * 32 <= seen.largest < 16 * 32, "v's [16, 32] is the smallest of the weights"
    dense = made("llama-gqa").requires_grad_(False)
    dense.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    with Made() as seen:
        dense(**batch(0, rows=2, tokens=4)).loss.backward()
    assert seen.largest >= 16 * 32  # the mode sees backward


@pytest.mark.parametrize("kind", DECODERS)
def test_sixteen_bits(kind):
    chosen = select(made(kind).bfloat16(), o=0.5, v=1, down=0.3, by="gradient", batches=BATCHES)
    assert len(chosen) == 3 * LAYERS


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "one of o, v, down, up must be above 0"),
        ({"o": 1.5}, r"o must be a number in \[0, 1\], got 1.5"),
        ({"down": -0.1}, "down must be a number"),
        ({"up": float("nan")}, "up must be a number"),
        ({"v": True}, "v must be a number"),
        ({"o": 0.5, "by": "loss"}, "by must be one of random, weight"),
        ({"o": 0.5, "scope": "block"}, "scope must be layer or global"),
        ({"o": 0.5, "multiple": 0}, "multiple must be a whole number above 0"),
        ({"o": 0.5, "by": "activation"}, "batches must be given for by='activation'"),
        ({"o": 0.5, "by": "activation", "batches": []}, r"o_proj must see a batch, got none"),
        ({"o": 0.5, "by": "gradient", "batches": lambda m: m(**batch())}, "must see a batch, got no backward"),
        ({"o": 0.5, "by": "gradient", "batches": [{"input_ids": batch()["input_ids"]}]}, "labels, for a loss"),
    ],
)
def test_refused(arguments, text):
    model = made("llama-gqa")
    with pytest.raises(ValueError, match=text):
        select(model, **arguments)
    assert not any(m._forward_hooks for m in model.modules())


def test_refused_by_the_model():
    model = made("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.down_proj must be finite"):
        select(model, down=0.5, by="weight")
    mlp = made("llama-gqa")
    for layer in mlp.model.layers:  # which of the two is no gate?
        layer.mlp.w_proj = layer.mlp.gate_proj
        layer.mlp.x_proj = layer.mlp.up_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj
    with pytest.raises(ValueError, match="whose name says that it is no gate, for up"):
        select(mlp, up=0.5)
    assert len(select(mlp, down=0.5)) == LAYERS
