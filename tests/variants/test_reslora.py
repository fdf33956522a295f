# SPDX-License-Identifier: Apache-2.0
"""ResLoRA: chains of layers beside the formula, and that what goes from layer to layer never comes from another pass."""

import copy
import pickle

import pytest
import torch
from branch_models import D, N, Stack, adapted, data, shaken
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrkern.nn.variants import ResLoRALinear
from lrkern.reference.variants.branches import reslora_update

CHAINS = {
    "bs-1": ("bs", 1),
    "bs-all": ("bs", -1),
    "is": ("is", 1),
    "ms-1": ("ms", 1),
    "ms-2": ("ms", 2),
    "ms-all": ("ms", -1),
}
chains = pytest.mark.parametrize(("mode", "pre"), CHAINS.values(), ids=CHAINS)
shortcuts = pytest.mark.parametrize("mode", ["is", "ms"])


def stack(mode, pre=1, n=N, **more):
    return shaken(adapted(Stack(n), ResLoRALinear, r=3, mode=mode, pre=pre, **more))


def layers(model):
    return [m for m in model.modules() if isinstance(m, ResLoRALinear)]


def by_formula(model, x, pre):
    """y and the leaves, x first, in float64."""
    mine = layers(model)
    a, b = ([m.get_parameter(f"lora_{key}").detach().double().requires_grad_() for m in mine] for key in "AB")
    x = first = x.double().requires_grad_()
    xs = []
    for i, m in enumerate(mine):
        xs.append(x)
        y = nn.functional.linear(x, m.base_layer.weight.double(), m.base_layer.bias.double())
        before = i if pre == -1 else min(i, pre)
        x = x + (y + reslora_update(m.mode, before, xs, a[: i + 1], b[: i + 1], m.scaling)).tanh()
    return x, [first, *a, *b]


def run(model, x, call=None):
    x = x.clone().requires_grad_()
    mine = layers(model)
    leaves = [x, *(m.lora_A for m in mine), *(m.lora_B for m in mine)]
    y = model(x) if call is None else call(x)
    for leaf in leaves:
        leaf.grad = None
    y.square().sum().backward()  # reentrant checkpointing knows no other way
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def close(got, want, relative=1e-5):
    """By the Frobenius norm."""
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= relative * w.norm()


@chains
def test_a_chain_is_the_formula(mode, pre):
    model, x = stack(mode, pre), data()
    y, leaves = by_formula(model, x, pre)
    want = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    close(run(model, x), want, 5e-5)
    assert all(m._handed is None for m in layers(model)), "nothing is kept after a pass"
    with torch.no_grad():  # another batch, in eval
        more = torch.randn(2, 3, D)
        close([model.eval()(more)], [by_formula(model, more.flatten(0, 1), pre)[0].view(2, 3, D)])
    assert [m.before for m in layers(model)] == [i if pre == -1 else min(i, pre) for i in range(N)]


@chains
def test_over_a_base_of_any_kind(mode, pre):
    model, watched = stack(mode, pre), stack(mode, pre)
    for m in layers(watched):
        m.base_layer.register_forward_hook(lambda m, args, y: y)
    close(run(watched, data()), run(model, data()))


@shortcuts
def test_16_bit_and_autocast(mode):
    model, low = stack(mode, lora_alpha=3.0), stack(mode, lora_alpha=3.0).to(torch.bfloat16)
    for m in layers(low):
        for p in m.coefficients().values():
            p.data = p.data.float()
    want = run(model, data())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = run(model, data())
    for got in (run(low, data().bfloat16()), autocast):
        for g, w in zip(got, want, strict=True):
            assert (g.float() - w).norm() < 0.05 * w.norm()


@shortcuts
def test_the_first_layer_has_no_shortcut(mode):
    """The authors' code doubles its input."""
    model, x = stack(mode), data()
    first = layers(model)[0]
    lora = first.scaling * first.lora_B @ first.lora_A
    torch.testing.assert_close(first(x), first.base_layer(x) + x @ lora.mT)


def test_block_shortcuts_are_a_lora():
    model, x = stack("bs", -1).eval(), data()
    y = model(x)
    for i, m in enumerate(layers(model)):
        a, b, scale = m.factors()
        assert a.shape == (3 * (i + 1), D) and m.lora_rank == 3 * (i + 1)
        torch.testing.assert_close(m.delta_weight(), scale * b @ a)
    weights = [m.base_layer.weight.clone() for m in layers(model)]
    for m in layers(model):
        m.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    shaken(model)  # an earlier layer that trains on is not in what merge added
    for m, w in zip(layers(model), weights, strict=True):
        m.unmerge()
        torch.testing.assert_close(m.base_layer.weight, w)


def test_block_shortcuts_of_other_scalings():
    model, x = stack("bs", 2), data()
    layers(model)[1].scaling = 0.5
    mine = layers(model)[2]
    want = sum(m.scaling * m.lora_B @ m.lora_A for m in layers(model)[:3])
    torch.testing.assert_close(mine(x), mine.base_layer(x) + x @ want.mT)


@shortcuts
def test_what_depends_on_other_inputs_is_no_lora(mode):
    model = stack(mode)
    for m in layers(model):  # the first one too: others want its input
        assert not m.low_rank
        for call, who in ((m.merge, "merge"), (m.factors, "factors"), (m.delta_weight, "factors")):
            with pytest.raises(
                RuntimeError, match=f"ResLoRALinear.{who}: the layer must have mode 'bs'; '{mode}' depends"
            ):
                call()
        assert not m.merged


# ---------------------------------------------------------------------------------------------------- passes


class Given(Exception):
    pass


def give_up(module, args):
    raise Given


@shortcuts
def test_a_pass_that_was_given_up_leaves_nothing(mode):
    model, x = stack(mode), data()
    want = model(x)
    handle = model.blocks[2].register_forward_pre_hook(give_up)
    with pytest.raises(Given):
        model(torch.randn(5, D))
    assert (
        copy.deepcopy(model).blocks[1].proj._handed is None
        and pickle.loads(pickle.dumps(layers(model)[1]))._handed is None
    )
    handle.remove()
    model.blocks[0](torch.randn(5, D))
    with pytest.raises(RuntimeError, match="be called once in a forward pass, after the layer before it"):
        model.blocks[2](torch.randn(5, D))  # not what the pass that was given up has left
    assert torch.equal(model(x), want)


@shortcuts
def test_layers_out_of_turn_are_refused(mode):
    refused = pytest.raises(
        RuntimeError, match="ResLoRALinear.forward: the layer must be called once in a forward pass"
    )
    model, x = stack(mode), data()
    a, b, c, _ = layers(model)
    with refused:  # alone
        b(x)
    a(x), b(x)
    with refused:  # twice
        b(x)
    a(x)
    with refused:  # one skipped
        c(x)
    a(x), a(x + 1), b(x + 1)
    with refused:  # two batches in turns
        b(x)
    b.disable_adapter()
    with refused:  # after a disabled one
        model(x)
    b.enable_adapter()
    a(x)
    with pytest.raises(RuntimeError, match=r"as many rows as the layer before it, \[8\], got \[2\]"):
        b(x[:2])
    with torch.no_grad():
        a(x)
    with pytest.raises(RuntimeError, match="not record gradients where the layer before it did not"):
        b(x)
    assert torch.equal(model(x), stack(mode)(x))


@shortcuts
def test_two_passes_before_a_backward(mode):
    model, x, other = stack(mode), data(), torch.randn(5, D)
    first, second = model(x), model(other)
    got = torch.autograd.grad(first.square().sum() + second.square().sum(), layers(model)[1].lora_A)
    want = [run(model, t)[3] for t in (x, other)]  # y, x, A of two layers
    torch.testing.assert_close(got[0], want[0] + want[1])


@pytest.mark.parametrize("reentrant", [False, True])
@chains
def test_checkpointing(mode, pre, reentrant):
    """Of the whole stack it is as without. Of each block for itself the layers of "is" and "ms" are not called in order again."""
    model, x = stack(mode, pre), data()
    want = run(model, x)
    close(run(model, x, lambda t: checkpoint(model, t, use_reentrant=reentrant)), want, 0)

    def blockwise(t):
        for block in model.blocks:
            t = checkpoint(block, t, use_reentrant=reentrant)
        return t

    if mode == "bs":
        close(run(model, x, blockwise), want, 0)
    else:
        with pytest.raises(RuntimeError, match="ResLoRALinear.forward: the layer must"):
            run(model, x, blockwise)
        close(run(model, x), want, 0)

    def first_alone(t):
        t = checkpoint(model.blocks[0], t, use_reentrant=reentrant)
        for block in model.blocks[1:]:
            t = block(t)
        return t

    if mode != "bs" and reentrant:  # its input would be a constant to the next layer
        with pytest.raises(RuntimeError, match="not record gradients where the layer before it did not"):
            run(model, x, first_alone)
    else:
        close(run(model, x, first_alone), want, 0)
        if mode != "bs":  # what its second call in backward has handed on is of no forward pass
            with pytest.raises(
                RuntimeError, match="ResLoRALinear.forward: the layer must be called once in a forward pass"
            ):
                model.blocks[1](x)
        close(run(model, x), want, 0)


@chains
def test_compile(mode, pre):
    model, x = stack(mode, pre), data()
    want = run(model, x)
    close(run(model, x, torch.compile(model, fullgraph=True, backend="aot_eager")), want)
    assert all(m._handed is None for m in layers(model))
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        close(run(model, x), want)
    torch.compiler.reset()


@shortcuts
def test_dropout_is_drawn_once_for_an_input(mode):
    model, x = stack(mode, dropout=0.5), data()
    torch.manual_seed(0)
    y = model(x)
    assert not torch.equal(model(x), y)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)
    torch.manual_seed(0)
    again = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    again.sum().backward()
    assert torch.equal(again, y)
    assert torch.equal(model.eval()(x), stack(mode)(x))
    assert torch.equal(stack(mode, dropout=1.0)(x), Stack()(x))


# ---------------------------------------------------------------------------------------------------- ties


def test_copies_and_pickles_are_chains_of_their_own():
    model, x = stack("is"), data()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and {*layers(other)}.isdisjoint(layers(model))
        assert [m._earlier for m in layers(other)][1:] == [(m,) for m in layers(other)][:-1]


class Two(nn.Module):
    """Towers of their own, in one of which a layer of another size breaks the chain."""

    def __init__(self):
        super().__init__()
        size = lambda n: nn.ModuleDict({"up": nn.Linear(8, n), "down": nn.Linear(n, 8)})
        self.left, self.right = nn.ModuleList([size(8) for _ in range(11)]), nn.ModuleList(map(size, (8, 8, 6, 8, 8)))


def test_chains_are_of_one_name_and_one_size():
    model = adapted(Two(), ResLoRALinear, r=2, pre=-1)
    before = {n: m.before for n, m in model.named_modules() if isinstance(m, ResLoRALinear)}
    for way in ("up", "down"):
        assert [before[f"left.{i}.{way}"] for i in range(11)] == [*range(11)]  # 10 after 9
        assert [before[f"right.{i}.{way}"] for i in range(5)] == [0, 1, 0, 0, 1]
    m = model.left[3]["up"]
    assert m._earlier == tuple(model.left[i]["up"] for i in (2, 1, 0))


def made(n, **settings):
    return {f"{i}.q": ResLoRALinear.from_linear(nn.Linear(D, D), before=i, pre=-1, **settings) for i in range(n)}


def test_what_is_no_chain_is_refused():
    layer = ResLoRALinear.from_linear(nn.Linear(D, D), r=3, before=1)
    with pytest.raises(RuntimeError, match="must be tied to 1 earlier ones; ResLoRALinear.connect"):
        layer(data())
    with pytest.raises(RuntimeError, match="must be tied"):
        layer.merge()
    with pytest.raises(
        ValueError, match="ResLoRALinear: before must be left out, it follows from a layer's place, got 1"
    ):
        adapted(Stack(), ResLoRALinear, before=1)
    mine = made(3, r=3)
    with pytest.raises(ValueError, match="ResLoRALinear: 2.q must have 2 layers before it, got 1"):
        ResLoRALinear.connect({name: mine[name] for name in ("2.q", "0.q")})
    assert mine["2.q"]._earlier == ()
    other = mine | {"1.q": ResLoRALinear.from_linear(nn.Linear(D, D), r=4, before=1)}
    ResLoRALinear.connect(other)
    assert other["2.q"].lora_rank == 10 and other["2.q"].factors()[0].shape == (10, D)
    ms = made(2, r=3, mode="ms") | {"1.q": ResLoRALinear.from_linear(nn.Linear(D, D), r=4, before=1, mode="ms")}
    with pytest.raises(
        ValueError, match=r"ResLoRALinear: 1.q must have the r of those before it for mode 'ms', \[3\], got 4"
    ):
        ResLoRALinear.connect(ms)
    short = made(3, r=3, mode="ms")
    short["1.q"].before = 0
    with pytest.raises(ValueError, match="2.q must have at most 1 before it, one more than the layer before, got 2"):
        ResLoRALinear.connect(short)
    for settings, text in (
        ({"mode": "os"}, "mode must be one of"),
        ({"pre": -2}, "pre must be a whole number"),
        ({"mode": "is", "pre": 2}, "pre must be 1 for mode 'is'"),
        ({"before": 2}, "before must be at most pre=1, got 2"),
        ({"r": 256, "pre": 2, "before": 2}, r"before must give \(before \+ 1\) \* r <= 512 for mode 'bs'"),
    ):
        with pytest.raises(ValueError, match=f"ResLoRALinear: {text}"):
            ResLoRALinear.from_linear(nn.Linear(D, D), **settings)


def test_shards_are_refused():
    """torch.cat would take an empty one for nothing."""
    for mode, shard, of in (("bs", 0, 1), ("is", 1, 0)):  # earlier ones' factors, the next one's A
        model = stack(mode)
        layers(model)[shard].lora_A = nn.Parameter(torch.empty(0))
        with pytest.raises(RuntimeError, match="factors are whole, got shards"):
            layers(model)[of](data())
    model = stack("is")
    replica = layers(model)[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="not be nn.DataParallel's replica"):
        replica(data())
