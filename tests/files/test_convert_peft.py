# SPDX-License-Identifier: Apache-2.0
"""VeRA and RandLoRA folders: PEFT's projections drawn again bit for bit, and lrkern's own adapters in stock PEFT."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.peft.test_peft_basis import KINDS, Net, config, model_of, peft  # isort: skip

import lrkern.functional as F
from lrkern.files import draw_projections, save_randlora, save_vera, store_projections

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
SHAPES = {"up": (24, 40), "down": (40, 16), "same": (16, 16)}
DRAWS = [("vera", {}), ("randlora", {}), ("randlora", {"sparse": True}), ("randlora", {"very_sparse": True})]


def stored(model, kind):
    layer = model.base_model.model.same
    return [getattr(layer, f"{kind}_{x}")["default"] for x in "AB"]


@pytest.mark.parametrize("targets", [["up", "down", "same"], ["down"], ["up", "same"]], ids=str)
@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.parametrize("key", [0, 3407])
@pytest.mark.parametrize(("kind", "options"), DRAWS, ids=str)
def test_pefts_projections_bit_for_bit(kind, options, key, r, targets):
    if options.get("very_sparse") and r == 1:
        pytest.skip("PEFT's own A may be all zeros over zero")
    options = {"r": r, "projection_prng_key": key, "save_projection": False, "target_modules": targets} | options
    state = torch.get_rng_state()
    made = config(kind, **options)
    pair = draw_projections(made.to_dict(), [SHAPES[name] for name in targets])
    assert torch.equal(torch.get_rng_state(), state)
    layer = getattr(peft.get_peft_model(Net(), made).base_model.model, targets[0])
    for x, ours in zip("AB", pair, strict=True):
        theirs = getattr(layer, f"{kind}_{x}")["default"]
        assert theirs.dtype == torch.float32 and torch.equal(ours, theirs)


def test_the_drawn_numbers_do_not_depend_on_threads():
    made, threads = config("randlora", r=8, sparse=True).to_dict(), torch.get_num_threads()
    pairs = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            pairs.append(draw_projections(made, [(1000, 700)]))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *pairs))


def test_drawn_in_float16():
    made = config("randlora").to_dict()
    half, brain = (draw_projections(made, [(24, 40)], drawn_in=d)[0] for d in (torch.float16, torch.bfloat16))
    assert not torch.equal(half, brain) and torch.equal(half.half().float(), half)
    torch.testing.assert_close(half.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("change", "message"), [
    ({"r": 0}, "r must be a whole number above 0, got 0"),
    ({"projection_prng_key": None}, "projection_prng_key must be a 64-bit integer, got None"),
    ({"projection_prng_key": 2**64}, "projection_prng_key must be a 64-bit integer"),
    ({"peft_type": "LORA"}, "peft_type must be VERA or RANDLORA, got 'LORA'"),
], ids=str)  # fmt: skip
def test_what_cannot_be_drawn(change, message):
    with pytest.raises(ValueError, match=message):
        draw_projections(config("vera").to_dict() | change, SHAPES.values())
    with pytest.raises(ValueError, match="drawn_in must be"):
        draw_projections(config("randlora").to_dict(), SHAPES.values(), torch.float32)


def test_another_generator_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros(2))
    with pytest.raises(ValueError, match="this torch's CPU generator gives other numbers"):
        draw_projections(config("vera").to_dict(), SHAPES.values())


def of_base(model, kind):
    """A fresh base with the base weights of a PEFT model."""
    net = Net()
    net.load_state_dict({k.replace("base_model.model.", "").replace("base_layer.", ""): v
                         for k, v in model.state_dict().items() if kind not in k})  # fmt: skip
    return net


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("kind", "options"), DRAWS, ids=str)
def test_a_folder_gets_its_projections(kind, options, saved, tmp_path):
    model, x = model_of(kind, save_projection=saved, **options), torch.randn(7, 24)
    model.save_pretrained(tmp_path / "from")
    base = of_base(model, kind)
    store_projections(tmp_path / "from", base, tmp_path / "to")
    tensors = load_file(tmp_path / "to" / "adapter_model.safetensors")
    assert len([k for k in tensors if k.endswith(("_A", "_B"))]) == 2
    settings = json.loads((tmp_path / "to" / "adapter_config.json").read_text())
    assert settings == json.loads((tmp_path / "from" / "adapter_config.json").read_text()) | {"save_projection": True}
    settings["projection_prng_key"] = 99  # what is stored decides
    (tmp_path / "to" / "adapter_config.json").write_text(json.dumps(settings))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "to")
    assert all(map(torch.equal, stored(loaded, kind), stored(model, kind)))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda c, t: t.pop("base_model.vera_B"), "lacks base_model.vera_B"),
    (lambda c, t: [t.pop("base_model.vera_B"), t.pop("base_model.vera_A")], "which save_projection says it holds"),
    (lambda c, t: t.update({"base_model.vera_A": torch.ones(5, 39)}), r"must have shape \[5, 40\], got \[5, 39\]"),
    (lambda c, t: t["base_model.vera_A"].fill_(torch.nan), "must be finite"),
    (lambda c, t: c.update(r=None), "r must be a whole number"),
    (lambda c, t: c.update(peft_type="LORA"), "peft_type must be VERA or RANDLORA"),
    (lambda c, t: [t.pop(k) for k in list(t) if "lambda" in k], "linears, got none"),
    (lambda c, t: t.update({"base_model.model.x.vera_lambda_d": torch.ones(5)}), "linears, got x"),
])  # fmt: skip
def test_a_damaged_folder_writes_nothing(spoil, message, tmp_path):
    model = model_of("vera")
    model.save_pretrained(tmp_path / "from")
    path, settings = tmp_path / "from" / "adapter_model.safetensors", tmp_path / "from" / "adapter_config.json"
    c, t = json.loads(settings.read_text()), load_file(path)
    spoil(c, t)
    settings.write_text(json.dumps(c))
    save_file(t, path)
    with pytest.raises(ValueError, match=message):
        store_projections(tmp_path / "from", Net(), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def own_vectors(kind, r):
    torch.manual_seed(2)
    for name, (I, O) in SHAPES.items():
        n = math.ceil(min(I, O) / r)
        sizes = ((r,), (O,)) if kind == "vera" else ((r, n), (n, min(I, O)))
        yield name, ((I, O), *(torch.randn(size) * 0.3 for size in sizes))


@pytest.mark.parametrize("distribution", ["uniform8", "uniform16", "uniform32", "sign", "ternary6"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_a_basis_load_in_stock_peft(kind, distribution, tmp_path):
    r, net, x, scale = 5, Net(), torch.randn(70, 24), 0.7
    basis = lambda tensor, bound: F.Basis(1234, kind, 0, 0, r, bound, distribution, tensor)
    A, B = basis(0, 0.4), basis(1, 1.1)  # the sizes of a layer are the caller's; the stream knows none
    layers = dict(own_vectors(kind, r))
    if kind == "vera":
        save_vera(tmp_path, layers, A, B)
    else:
        save_randlora(tmp_path, layers, A, B, alpha=scale * r)

    def layer(name, x):
        (I, O), v, w = layers[name]
        base = getattr(net, name)
        if kind == "vera":
            return F.vera_linear(
                x, base.weight, base.bias, v, w, A._replace(rows=r, cols=I), B._replace(rows=r, cols=O)
            )
        a, b = A._replace(rows=r, cols=min(I, O)), B._replace(rows=w.shape[0] * r, cols=max(I, O))
        return F.randlora_linear(x, base.weight, base.bias, v, w, a, b, scale)

    want = layer("same", layer("down", layer("up", x).relu()))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    error = (loaded(x) - want).norm() / want.norm()
    assert error < 1e-5 and not torch.allclose(want, net(x), rtol=0.1)
    pair, drawn = stored(loaded, kind), [p._replace(rows=2, cols=3).fill(torch.empty(0)) for p in (A, B)]
    if kind == "vera":
        assert torch.equal(pair[0][:2, :3], drawn[0]) and torch.equal(pair[1][:3, :2].mT, drawn[1])
    else:
        assert torch.equal(pair[0][:2, 0, :3], drawn[0]) and torch.equal(pair[1][:3, 0, :2].mT, drawn[1])


@pytest.mark.parametrize("kind", KINDS)
def test_stored_projections_are_written_as_they_are(kind, tmp_path):
    model, x = model_of(kind), torch.randn(9, 24)
    names = {"vera": ("lambda_d", "lambda_b"), "randlora": ("lambda", "gamma")}[kind]
    layers = {
        name: (shape, *(getattr(getattr(model.base_model.model, name), f"{kind}_{v}")["default"] for v in names))
        for name, shape in SHAPES.items()
    }
    A, B = stored(model, kind)
    if kind == "vera":
        save_vera(tmp_path, layers, A, B.mT)
    else:
        save_randlora(tmp_path, layers, A[:, 0], B.flatten(1).mT, alpha=1)
    loaded = peft.PeftModel.from_pretrained(of_base(model, kind), tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_what_cannot_be_written(tmp_path):
    layers, A, B = dict(own_vectors("vera", 5)), torch.ones(5, 40), torch.ones(5, 40)
    for change, message in (
        (({}, A, B), "layers must hold at least one"),
        ((layers, A[:, 1:], B), r"A must have at least shape \[5, 40\], got \[5, 39\]"),
        ((layers, A, B[1:]), r"B must have at least shape \[5, 40\], got \[4, 40\]"),
        ((layers | {"up": ((24, 40), torch.ones(5), torch.ones(39))}, A, B), r"up.vera_lambda_d and .* got \[\[5\], \[39\]\]"),
        ((layers | {"up": ((24, 40), torch.ones(6), torch.ones(40))}, A, B), r"shapes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            save_vera(tmp_path / "x", *change)
    assert not (tmp_path / "x").exists()
