# SPDX-License-Identifier: Apache-2.0
"""A file is all there is of an adapter: what it loses, nobody finds again. Random layers of every kind, trained a step, saved,
loaded over the original base by a process that knows nothing else, by everyone who reads such a file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

pytest.importorskip("peft")
import fresh_loader
from fresh_loader import SIZES, adapt, base
from layer_kinds import shake

from lrkern import files
from lrkern.nn.linear import AdapterLinear
from lrkern.nn.s2ft import as_text

FULL = bool(os.environ.get("LRK_TEST_FULL"))
some = settings(
    max_examples=400 if FULL else 25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
pytestmark = pytest.mark.filterwarnings("ignore")
dtypes = st.sampled_from(["float32", "bfloat16"])
names = st.lists(st.sampled_from([*SIZES]), min_size=1, unique=True).map(sorted)
rates, flags, alphas = st.sampled_from([0.0, 0.3]), st.booleans(), st.sampled_from([1, 6, 0.5, 16.0])
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Loads a file in the other process; y."""
    out = tmp_path_factory.mktemp("y") / "y.pt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.Popen([sys.executable, fresh_loader.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip

    def request(how, path, sample, layers=None):
        words = {"how": how, "path": str(path), "out": str(out), "layers": layers or {}}
        worker.stdin.write(json.dumps(words | {key: sample[key] for key in ("seed", "dtype")}) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline().strip()
        assert answer == "done", f"{how}: {answer}"
        return torch.load(out)

    yield request
    worker.stdin.close()
    worker.wait()


def trained(sample):
    """The model after a step, all that trains changed, what it computes, and the base's y."""
    net, x = base(sample["seed"], sample["dtype"])
    with torch.no_grad():
        plain = net(x)
    for m in adapt(net.requires_grad_(False), sample["layers"]).modules():
        if hasattr(m, "coefficients"):
            shake(m, by=0.1)
    parameters = [p for p in net.parameters() if p.requires_grad]
    net.train()(x).float().square().sum().backward()
    torch.optim.SGD(parameters, 0.05).step()
    net.eval()
    with torch.no_grad():
        return net, net(x), plain


def as_left(net, sample):
    """Layers are saved as they come: some disabled, some merged, which are no part of the adapter."""
    for name, state in sample["left"].items():
        layer = net.get_submodule(name)
        if state == "disabled":
            layer.disable_adapter()
        elif state == "merged":
            layer.merge()
    return net


def close(got, want, plain, sample):
    """Up to rounding, of the whole or of the base; a pool of bfloat16 rounds what it is given."""
    error = (got - want).float().norm() / max(want.float().norm(), plain.float().norm())
    assert error < (2e-5 if sample["dtype"] == "float32" else 0.1), error


@st.composite
def lora_samples(draw):
    layers, dtype = {}, draw(dtypes)
    one = {"use_dora": draw(flags), "use_rslora": draw(flags), "dropout": draw(rates)}
    for name in draw(names):
        r = draw(st.integers(1 if one["use_dora"] or not layers else 0, 6))
        layers[name] = one | {
            "class": "FusedLoRALinear", "r": r, "lora_alpha": draw(alphas),
            "init": draw(st.sampled_from(["kaiming", "gaussian", "pissa", "olora"])),
            "train_bias": draw(flags) and r > 0 and name != "x.head.l",
            "adapter_dtype": draw(st.sampled_from([None, "float32", dtype])),
        }  # fmt: skip
    left = {name: draw(st.sampled_from(["", "", "disabled", "merged"])) for name in layers}
    return {"seed": draw(seeds), "dtype": dtype, "layers": layers, "left": left}


@some
@given(sample=lora_samples())
def test_lora(ask, tmp_path_factory, sample):
    net, want, plain = trained(sample)
    path = tmp_path_factory.mktemp("lora")
    note(f"path={path}")
    files.save(as_left(net, sample), path)
    close(ask("peft", path, sample), want, plain, sample)
    close(ask("lrkern", path, sample, sample["layers"]), want, plain, sample)
    config = json.loads((path / "adapter_config.json").read_text())
    twice = {"pissa": 2, "olora": 2}
    whole = {}
    for name, layer in sample["layers"].items():
        n = twice.get(layer["init"], 1)
        alpha = layer["lora_alpha"] * (n**0.5 if layer["use_rslora"] else n)
        whole[name] = layer | {"r": n * layer["r"], "lora_alpha": alpha, "init": "kaiming"}
    close(ask("lrkern", path, sample, whole), want, plain, sample)
    if not config["use_dora"] and config["bias"] == "none":
        close(ask("pool", path, sample), want, plain, sample)


KINDS = ["NOLALinear", "VeRALinear", "RandLoRALinear", "MoRALinear", "MissLinear", "S2FTLinear"]


@st.composite
def miss_settings(draw):
    """Of any layer here."""
    kind, powers = draw(st.sampled_from(["balance", "mini", "bat"])), st.sampled_from([1, 2, 4])
    settings = {"kind": kind, "mini_r": draw(powers) if kind == "mini" else 1}
    return settings | ({"r": draw(powers), "dropout": 0.0} if kind == "bat" else {})


@st.composite
def slices(draw, I, O):
    side = draw(st.sampled_from(["input", "output"]))
    columns = draw(st.sets(st.integers(0, (I if side == "input" else O) - 1), min_size=1, max_size=9))
    return {"side": side, "index": as_text(sorted(columns))}


@st.composite
def own_samples(draw, shared=None):
    """shared: the settings that PEFT has once for all layers, of one kind."""
    layers, dtype = {}, draw(dtypes)
    distribution = st.sampled_from(["uniform8", "uniform16", "uniform32", "sign", "ternary6", "ternary4"])
    kind = draw(st.sampled_from(["VeRALinear", "RandLoRALinear", "MissLinear"]))
    all_alike = draw(miss_settings())
    one = {"seed": draw(seeds), "r": draw(st.integers(3, 9)), "dropout": draw(rates), "distribution": draw(distribution),
           "alpha": draw(alphas)}  # fmt: skip
    for name in draw(names):
        I, O = SIZES[name]
        cls = kind if shared else draw(st.sampled_from(KINDS))
        mine = one if shared else one | {"seed": draw(seeds), "r": draw(st.integers(2, 9)), "dropout": draw(rates),
                                         "distribution": draw(distribution), "alpha": draw(alphas)}  # fmt: skip
        alpha = mine["alpha"]
        common = {key: value for key, value in mine.items() if key != "alpha"}
        special = {
            "NOLALinear": {"k": draw(st.integers(1, 9)), "l": draw(st.integers(1, 9)), "lora_alpha": alpha, "normalize": draw(flags),
                           "frozen_a": draw(flags)},
            "VeRALinear": {"d_initial": draw(st.sampled_from([0.1, 1, 0.0])), "max_in": 24 if shared else draw(st.integers(I, 40)),
                           "max_out": 20 if shared else draw(st.integers(O, 40)), "save_output": draw(flags)},
            "RandLoRALinear": {"randlora_alpha": alpha, "paper_pairing": not shared and draw(flags),
                               "save_output": draw(flags)},
            "MoRALinear": {"mora_type": draw(st.sampled_from([1, 2, 3, 4, 6])), "paper_rank": draw(flags)},
            "MissLinear": all_alike if shared else draw(miss_settings()),
            "S2FTLinear": draw(slices(I, O)),
        }[cls]  # fmt: skip
        adapter_dtype = draw(st.sampled_from([None, "float32", dtype]))
        if cls == "S2FTLinear":
            common = {}
        if cls in ("MoRALinear", "MissLinear"):
            common = {key: common[key] for key in ("r", "dropout")}
        layers[name] = {"class": cls, "adapter_dtype": adapter_dtype} | common | special
    left = {name: draw(st.sampled_from(["", "", "disabled", "merged"])) for name in layers}
    return {"seed": draw(seeds), "dtype": dtype, "layers": layers, "left": left}


def has_low_rank(layer):
    return layer["class"] != "RandLoRALinear" and layer.get("mora_type") != 6 and layer.get("kind") != "bat"


@some
@given(sample=own_samples(), bits=st.sampled_from([None, None, 8]))
def test_own_files(ask, tmp_path_factory, sample, bits):
    net, want, plain = trained(sample)
    path = tmp_path_factory.mktemp("own") / "a"
    note(f"path={path}")
    if bits and any(layer["class"] == "S2FTLinear" for layer in sample["layers"].values()):
        with pytest.raises(ValueError, match="bits must be None for S2FTLinear"):
            files.save(net, path, bits=bits)
        bits = None
    files.save(as_left(net, sample), path, bits=bits)
    got = ask("lrkern", path, sample)
    if bits is None:
        assert torch.equal(got, want)
        low_rank = [has_low_rank(layer) for layer in sample["layers"].values()]
        if all(low_rank) and sample["dtype"] == "float32":
            close(ask("pool", path, sample), want, plain, sample)
    else:
        assert (got - want).float().norm() <= 0.1 * (want - plain).float().norm() + 0.05 * want.float().norm()


@some
@given(sample=own_samples())
def test_own_layers_as_lora(ask, tmp_path_factory, sample):
    layers = {name: layer for name, layer in sample["layers"].items() if has_low_rank(layer)}
    if not layers:
        return
    sample = sample | {"layers": layers, "left": {name: sample["left"][name] for name in layers}}
    net, want, plain = trained(sample)
    path = tmp_path_factory.mktemp("as_lora")
    note(f"path={path}")
    files.save(as_left(net, sample), path, kind="lora")
    for how in ("peft", "pool"):
        close(ask(how, path, sample), want, plain, sample)


@some
@given(sample=own_samples(shared=True))
def test_own_layers_as_pefts_method(ask, tmp_path_factory, sample):
    net, want, plain = trained(sample)
    path = tmp_path_factory.mktemp("as_peft")
    note(f"path={path}")
    files.save(as_left(net, sample), path, kind="peft")
    close(ask("peft", path, sample), want, plain, sample)
    kinds = {layer["class"] for layer in sample["layers"].values()}
    if kinds == {"MissLinear"}:
        close(ask("lrkern", path, sample), want, plain, sample)
    if "RandLoRALinear" not in kinds and all(map(has_low_rank, sample["layers"].values())):
        close(ask("pool", path, sample), want, plain, sample)


@pytest.mark.slow
def test_the_samples_have_every_setting():
    seen: dict[str, set] = {}

    def look(sample):
        for layer in sample["layers"].values():
            seen.setdefault(layer["class"], set()).update(layer)

    for samples in (lora_samples(), own_samples()):
        settings(max_examples=60, database=None, derandomize=True)(given(samples)(look))()
    variants = {name for name, cls in AdapterLinear.KINDS.items() if ".variants." in cls.__module__}
    assert seen.keys() == AdapterLinear.KINDS.keys() - variants  # whose files are in tests/variants/test_files.py
    for name, keys in seen.items():
        assert {*AdapterLinear.KINDS[name].SETTINGS} <= keys, name
