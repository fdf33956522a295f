# SPDX-License-Identifier: Apache-2.0
"""Every method of lrkern.methods() through the one door: into a model, trained, saved, loaded elsewhere, merged, disabled, served."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("safetensors")
import door_models
from door_models import SOME, Layered, X, given, same, state

import lrkern
from lrkern.nn.linear import AdapterLinear
from lrkern.reference.variants import VARIANTS

METHODS = sorted(lrkern.methods())
every = pytest.mark.parametrize("method", METHODS)
SAMPLES = sorted({*METHODS, *VARIANTS})  # and what options make of a method


def targets(method):
    return {"target_modules": SOME.get(method.partition("-")[0], "all-linear"), "exclude_modules": ["head.1"]}


def adapted(method, **more):
    settings = {"modules_to_save": ["head"], **targets(method), **more}
    return door_models.adapted(method, kind=Layered, **settings)


def layers_in(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, AdapterLinear)}


@every
def test_into_a_model(method):
    net, before = Layered().eval(), Layered().eval()
    report = lrkern.adapt(net, method, **targets(method), **given(method))
    layers, about = layers_in(net), lrkern.methods()[method]
    linears = [name for name, m in before.named_modules() if isinstance(m, torch.nn.Linear) and name != "head.1"]
    linears = [name for name in linears if method not in SOME or (name.startswith("layers") and name.endswith("up"))]
    assert list(report.layers) == list(layers) == linears and report.method == method
    assert all(type(m) is about.layer and m.settings.items() >= about.fixed.items() for m in layers.values())
    assert all(same(layers[name].base_layer.state_dict(), before.get_submodule(name).state_dict()) for name in layers)
    trains = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith(tuple(f"{n}." for n in layers)) for name in trains)
    assert not any(".base_layer." in name for name in trains)
    of_layers = [p for m in layers.values() for p in m.coefficients().values() if p.requires_grad]
    assert (
        report.trainable
        == sum(p.numel() for p in trains.values())
        == sum({id(p): p.numel() for p in of_layers}.values())
    )
    assert sum(report.layers.values()) == sum(p.numel() for p in of_layers)  # what is shared counts in each
    assert report.total == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("method", SAMPLES)
def test_it_trains_saves_and_loads_elsewhere(method, tmp_path, elsewhere):
    pytest.importorskip("peft") if method in ("adalora", "adalora-pruned", "dora", "lora") else None
    net = adapted(method).train()
    step = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01)
    frozen = {name: p.clone() for name, p in net.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    net(X).square().sum().backward()
    step.step()
    now = dict(net.named_parameters())
    slices = method == "s2ft"  # which are written into W
    assert all(torch.equal(now[name], p) for name, p in frozen.items() if not (slices and "base_layer" in name))
    assert any(not torch.equal(now[name], p) for name, p in trained.items() if not name.startswith("head"))
    assert not torch.equal(now["head.1.weight"], trained["head.1.weight"])
    net.eval()
    with torch.no_grad():
        y = net(X)
    lrkern.save(net, tmp_path / "folder")
    assert torch.equal(elsewhere(tmp_path / "folder", tmp_path / "y"), y)
    again = adapted(method)  # takes the values, whatever it holds
    lrkern.load(again, tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(again(X), y)
    assert method == "s2ft" or same(state(again), state(net))


@pytest.fixture(scope="module")
def elsewhere():
    """What a model computes in another process, over the same base, once it has loaded a folder."""
    worker = subprocess.Popen(
        [sys.executable, door_models.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def ask(folder, out):
        worker.stdin.write(json.dumps({"folder": str(folder), "out": str(out)}) + "\n")
        answer = worker.stdout.readline()
        assert answer == "done\n", answer
        return torch.load(out)

    yield ask
    worker.stdin.close()
    worker.wait(timeout=60)


@every
@torch.no_grad()
def test_merge_and_unmerge(method):
    net = adapted(method)
    y, w = net(X), {name: m.base_layer.weight.clone() for name, m in layers_in(net).items()}
    lrkern.merge(net)
    assert all(m.merged for m in layers_in(net).values())
    torch.testing.assert_close(net(X), y, rtol=1e-4, atol=1e-5)
    most = {name: m.base_layer.weight.abs().max().item() for name, m in layers_in(net).items()}
    lrkern.unmerge(net)
    torch.testing.assert_close(net(X), y, rtol=1e-4, atol=1e-5)
    for name, m in layers_in(net).items():
        torch.testing.assert_close(m.base_layer.weight, w[name], rtol=1e-6, atol=5e-7 * most[name])


@every
@torch.no_grad()
def test_disable_answers_as_the_base(method):
    net, base = adapted(method), Layered().eval()
    y = net(X)
    with lrkern.disable(net):
        assert torch.equal(net(X), base(X)) and not torch.equal(base(X), y)
    assert torch.equal(net(X), y)


@every
@torch.no_grad()
def test_what_is_a_lora_is_served_in_a_mixed_batch(method, tmp_path):
    pytest.importorskip("peft")
    from lrkern.serving import AdapterPool, MultiLoraModel

    net = adapted(method, modules_to_save=None)
    if not all(m.low_rank for m in layers_in(net).values()):
        with pytest.raises(ValueError, match="full rank"):
            lrkern.convert.to_lora(net, tmp_path / "a")
        return
    if method == "lora" or method == "dora":
        lrkern.save(net, tmp_path / "a")
    else:
        lrkern.convert.to_lora(net, tmp_path / "a")
    other = adapted("lora", modules_to_save=None)
    lrkern.save(other, tmp_path / "b")
    base = Layered().eval()
    pool = AdapterPool(base, pages=64)
    for name in ("a", "b"):
        pool.load(name, tmp_path / name)
    served = MultiLoraModel(base, pool)
    got = served(X[:6], adapters=["a", "b", None, "a", "b", None])
    models = {"a": net, "b": other, None: Layered().eval()}
    for i, name in enumerate(("a", "b", None, "a", "b", None)):
        torch.testing.assert_close(got[i], models[name](X[:6])[i], rtol=1e-4, atol=1e-5)
