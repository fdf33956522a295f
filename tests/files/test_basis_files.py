# SPDX-License-Identifier: Apache-2.0
"""Adapter files of the layers over random bases (lrkern.files.own), and the same adapters as LoRA (lrkern.convert)."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lrkern.convert import to_lora, to_peft
from lrkern.files.own import load_adapter, save_adapter
from lrkern.nn import FusedLoRALinear, NOLALinear, RandLoRALinear, VeRALinear


def plain():
    """Frozen and in eval: what only a mistake would change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 33)), nn.Tanh())
    return model.append(nn.Linear(33, 8)).eval()


PLACES = {"0": (NOLALinear, {"r": 4, "k": 70, "l": 65}), "2.0": (VeRALinear, {"r": 9, "max_in": 64, "max_out": 80}),
          "2.1": (RandLoRALinear, {"r": 6}), "4": (VeRALinear, {"r": 9, "max_in": 64, "max_out": 80, "dropout": 0.1})}  # fmt: skip


def adapted(places=PLACES, seed=5, **more):
    model, g = plain(), torch.Generator().manual_seed(seed)
    for i, (name, (cls, settings)) in enumerate(places.items()):
        parent, _, child = name.rpartition(".")
        layer = cls.from_linear(model.get_submodule(name), **{"seed": 100 * seed + i} | settings | more)
        setattr(model.get_submodule(parent), child, layer.eval())
        for p in layer.parameters():
            if p.requires_grad:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))

# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("options", [{}, {"adapter_dtype": torch.bfloat16}, {"distribution": "ternary6"}], ids=str)
def test_a_file_makes_the_layers_again(tmp_path, options):
    model, path = adapted(**options), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    assert path.stat().st_size < 6000 and [p.name for p in tmp_path.iterdir()] == [path.name]
    built, there, rng = plain(), adapted(seed=6, **options), torch.get_rng_state()
    pointers = [p.data_ptr() for p in there.parameters()]
    for other in (built, there):
        load_adapter(other, path)
        assert torch.equal(other(X), model(X)) and same(state(other), state(model))
        assert [str(m) for m in other.modules()] == [str(m) for m in model.modules()]
        assert all(
            p.requires_grad == q.requires_grad for p, q in zip(other.parameters(), model.parameters(), strict=True)
        )
    assert [p.data_ptr() for p in there.parameters()] == pointers, "an optimizer goes on with the same parameters"
    assert torch.equal(torch.get_rng_state(), rng)
    assert built[2][0].training is False
    mixed = plain()
    load_adapter(mixed, path)
    save_adapter(mixed, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_files(tmp_path, bits):
    model, path = adapted(), tmp_path / "adapter.safetensors"
    sizes = []
    for b in (None, bits):
        save_adapter(model, path, b)
        with safe_open(path, "pt") as f:
            sizes.append(sum(f.get_tensor(key).nbytes for key in f.keys()))  # noqa: SIM118, not a dict
    assert sizes[1] < sizes[0] * (bits / 32 + 0.05)
    other, m = plain(), 2 ** (bits - 1) - 1
    load_adapter(other, path)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        groups = nn.functional.pad(p.detach().flatten(), (0, -p.numel() % 64)).view(-1, 64)
        error = nn.functional.pad((p - q).detach().flatten(), (0, -p.numel() % 64)).view(-1, 64).abs()
        largest = groups.abs().amax(1)
        if not p.requires_grad:
            assert torch.equal(p, q)
        else:
            assert (error.amax(1) <= largest / m / 2 * 1.001).all() and error.any(), name
            at = groups.abs().argmax(1, keepdim=True)
            assert (error.gather(1, at)[:, 0] <= 1e-6 * largest).all(), "the largest of a group comes back"
    assert (other(X) - model(X)).norm() < (0.05 if bits == 8 else 0.5) * (plain()(X) - model(X)).norm()
    again = tmp_path / "again.safetensors"
    save_adapter(other, again, bits)
    third = plain()
    load_adapter(third, again)
    torch.testing.assert_close(third(X), other(X), atol=1e-5, rtol=1e-5)


def test_zero_coefficients_are_quantised_to_zero(tmp_path):
    model, other = nn.Sequential(NOLALinear(8, 8, r=2, k=3, l=3)), nn.Sequential(NOLALinear(8, 8, r=2, k=3, l=3))
    nn.init.ones_(other[0].nola_beta)
    save_adapter(model, tmp_path / "a", 4)
    load_adapter(other, tmp_path / "a")
    assert not other[0].nola_beta.any() and not other[0].nola_alpha.any()


def rewritten(path, edit):
    """The file with its header (a dict) and tensors changed by ``edit``."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["lrkern"])
    tensors = load_file(path)
    edit(header, tensors)
    save_file(tensors, path, metadata={"lrkern": json.dumps(header)})


def put(where, key, value):
    where[key] = value


KEY = "0.nola_alpha"
BROKEN = {
    "newer format": (lambda h, t: put(h, "format", 2), "format must be 1, got 2, another lrkern's"),
    "newer stream": (lambda h, t: put(h, "stream", 1), "stream must be 0, the random stream .*, got 1"),
    "bits": (lambda h, t: put(h, "bits", 3), "bits must be null, 8 or 4, got 3"),
    "no bits": (lambda h, t: h.pop("bits"), "bits must be null, 8 or 4, got none"),
    "no layers": (lambda h, t: h.pop("layers"), "must list kinds and layers"),
    "lacks a tensor": (lambda h, t: t.pop(KEY), f"lacks {KEY}"),
    "more tensors": (lambda h, t: put(t, "5.nola_alpha", torch.ones(1)), "has 5.nola_alpha and 0 more"),
    "a shape": (lambda h, t: put(t, KEY, torch.ones(71)), rf"{KEY} must be torch.float32 \[70\], got torch.float32 \[71\]"),
    "a dtype": (lambda h, t: put(t, KEY, torch.ones(70).half()), f"{KEY} must be torch.float32 .*, got torch.float16"),
    "not finite": (lambda h, t: t[KEY].fill_(torch.nan), f"{KEY} must be finite"),
    "a class": (lambda h, t: put(h["kinds"][0], "class", "LoRA"), "kinds: class must be a layer of lrkern.nn.variants, MissLinear, .* or RandLoRALinear, got 'LoRA'"),
    "a setting more": (lambda h, t: put(h["kinds"][0], "rank", 4), "kinds: settings must be"),
    "a setting": (lambda h, t: put(h["kinds"][0], "r", 0), "0 cannot be made: NOLALinear: r must be"),
    "a setting's type": (lambda h, t: put(h["kinds"][0], "dropout", "no"), "kinds: dropout must be a finite number"),
    "a size": (lambda h, t: put(h["kinds"][0], "in_features", 65), r"0 (must have a weight of shape \[48, 65\]|differs)"),
    "a seed": (lambda h, t: put(h["layers"], "0", [0, -1]), "0 cannot be made: NOLALinear: seed must be"),
    "an index": (lambda h, t: put(h["layers"], "0", [9, 1]), r"0 must be \[which of the 4 kinds, seed\], got \[9, 1\]"),
    "a name": (lambda h, t: put(h["layers"], "9", h["layers"]["0"]), "has 9, which the model does not"),
    "another layer": (lambda h, t: (put(h["layers"], "1", h["layers"].pop("0")),
                      [put(t, f"1.{k}", t.pop(f"0.{k}")) for k in ("nola_alpha", "nola_beta")]),
                      r"1 must be an nn.Linear with a plain weight in the model, got Tanh"),
    "no such layer": (lambda h, t: (put(h["layers"], "9", h["layers"].pop("0")),
                      [put(t, f"9.{k}", t.pop(f"0.{k}")) for k in ("nola_alpha", "nola_beta")]),
                      "has 9, which the model does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_changes_nothing(tmp_path, name):
    edit, text = BROKEN[name]
    save_adapter(adapted(), tmp_path / "a")
    rewritten(tmp_path / "a", edit)
    for model in (plain(), adapted(seed=6)):
        before, shown = state(model), str(model)
        frozen = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"load_adapter: .*a: {text}.*; the model is unchanged"):
            load_adapter(model, tmp_path / "a")
        assert same(state(model), before) and str(model) == shown
        assert [p.requires_grad for p in model.parameters()] == frozen


def test_a_partial_file_and_a_foreign_one_change_nothing(tmp_path):
    model, path = adapted(), tmp_path / "a"
    save_adapter(model, path)
    whole, before = path.read_bytes(), state(model)
    for content, text in [*((whole[:n], "cannot be read") for n in (0, 7, 100, len(whole) - 1)),
                          (b"\x80\x04}", "cannot be read")]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            load_adapter(model, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(model, tmp_path / "none")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="without the metadata lrkern"):
        load_adapter(model, path)
    assert same(state(model), before)


def test_what_cannot_be_saved_or_loaded(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(ValueError, match="save_adapter: bits must be None, 8 or 4, got 2"):
        save_adapter(adapted(), path, bits=2)
    with pytest.raises(
        ValueError, match="model must have a layer of lrkern.nn.variants, MissLinear, .* got Sequential with none"
    ):
        save_adapter(plain(), path)
    model = adapted()
    model[0].nola_alpha.data[3] = torch.inf
    with pytest.raises(ValueError, match="0.nola_alpha must be finite"):
        save_adapter(model, path)
    assert not path.exists()
    save_adapter(adapted(), path)
    merged = adapted()
    merged[0].merge()
    with pytest.raises(ValueError, match="0 is merged in the model; unmerge it first"):
        load_adapter(merged, path)
    other = adapted(PLACES | {"0": (NOLALinear, {"r": 5, "k": 70, "l": 65})})
    with pytest.raises(ValueError, match=r"0 differs from the model's: {'r': \(4, 5\)}"):
        load_adapter(other, path)
    lone = NOLALinear(8, 6, r=2, k=3, l=3)
    save_adapter(lone, path)
    twin = NOLALinear(8, 6, r=2, k=3, l=3)
    load_adapter(twin, path)
    assert twin.seed == lone.seed
    with pytest.raises(ValueError, match="an nn.Linear cannot be replaced in itself"):
        load_adapter(nn.Linear(8, 6), path)


# ---------------------------------------------------------------------------------------------------- as LoRA

RANKS = {"0": (NOLALinear, {"r": 4, "k": 7, "l": 6, "lora_alpha": 3}), "2.0": (VeRALinear, {"r": 16}),
         "2.1": (NOLALinear, {"r": 16, "k": 5, "l": 5}), "4": (VeRALinear, {"r": 3, "distribution": "sign"})}  # fmt: skip


def vllm_takes(folder):
    """What vLLM 0.33's PEFTHelper asks of a config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["bias"] == "none" and config["r"] > 0
    assert not any(
        config.get(key) for key in ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "layer_replication")
    )
    assert isinstance(config.get("init_lora_weights", True), bool)
    assert all(type(r) is int and r > 0 for r in config["rank_pattern"].values())
    return config


def test_stock_peft_loads_the_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(RANKS)
    to_lora(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = vllm_takes(tmp_path)
    assert config["r"] == config["lora_alpha"] == 16 and config["target_modules"] == ["0", "2.0", "2.1", "4"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^0": 4, "^4": 3}
    stock = peft.PeftModel.from_pretrained(plain(), str(tmp_path))
    assert (stock(X) - plain()(X)).norm() > 0.01
    torch.testing.assert_close(stock(X), model(X), atol=1e-5, rtol=1e-5)
    for name, ours in model.named_modules():
        if name in RANKS:
            theirs = stock.base_model.model.get_submodule(name)
            assert theirs.r["default"] == ours.r and theirs.scaling["default"] == 1
            torch.testing.assert_close(theirs.get_delta_weight("default"), ours.delta_weight(), atol=1e-6, rtol=1e-5)
    loaded = peft.utils.load_peft_weights(str(tmp_path))
    assert loaded.keys() == peft.get_peft_model_state_dict(stock).keys(), "keys as PEFT writes them"


def test_names_that_end_like_others(tmp_path):
    """PEFT takes a name in target_modules, and a key of rank_pattern, for the end of a longer one too."""
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"a": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
        return nn.ModuleDict({"a": nn.Linear(8, 8), "in": inner, "fc": nn.Linear(8, 8)})

    model = base()
    for parent, name, r in ((model, "a", 2), (model["in"], "a", 5), (model, "fc", 5)):
        parent[name] = VeRALinear.from_linear(parent[name], r=r)
        nn.init.normal_(parent[name].vera_lambda_b)
    to_lora(model, tmp_path)
    config = vllm_takes(tmp_path)
    stock = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    layers = {n for n, m in stock.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers == {"a", "in.a", "fc"} and config["rank_pattern"] == {"^a": 2}
    for name in layers:
        theirs = stock.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(theirs, model.get_submodule(name).delta_weight(), atol=1e-6, rtol=1e-5)


def test_lrkern_loads_the_lora(tmp_path):
    """In FusedLoRALinear, from a layer given by name and a 16-bit base."""
    lrkern_peft = pytest.importorskip("lrkern.peft")
    layer = adapted(RANKS)[0].to(torch.bfloat16)
    to_lora({"q.proj": layer}, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    fused = FusedLoRALinear.from_linear(copy.deepcopy(layer.base_layer), r=4, lora_alpha=4)
    holder = nn.ModuleDict({"q": nn.ModuleDict({"proj": fused})})
    lrkern_peft.load_adapter(holder, tmp_path)
    torch.testing.assert_close(fused(X.bfloat16()), layer(X.bfloat16()), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(fused.delta_weight(), layer.delta_weight(), atol=1e-6, rtol=1e-5)


def test_what_is_no_lora(tmp_path):
    folder = tmp_path / "out"
    spoilt = adapted(RANKS)
    spoilt[4].vera_lambda_b.data[0] = torch.nan
    large = nn.Sequential(VeRALinear(8, 8, r=513))
    for model, text in [
        (
            plain(),
            "model must have a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear or VeRALinear layers, got none",
        ),
        (
            adapted(),
            "2.1 must be a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear or VeRALinear, got RandLoRALinear: its ΔW has full rank, 33, which no LoRA",
        ),
        (large, "0 must have a rank of at most 512, the most that LoRA kernels take, got r=513"),
        (spoilt, "4.lora_B must be finite, got inf or nan"),
        (large[0], "model must hold its layers by name, got a layer; give {name: layer}"),
    ]:
        with pytest.raises(ValueError, match=f"lrkern.convert.to_lora: {text}"):
            to_lora(model, folder)
        assert not folder.exists()


SHARED = {
    "vera": (VeRALinear, {"r": 9, "max_in": 80}),
    "vera ternary6": (VeRALinear, {"r": 9, "max_in": 80, "distribution": "ternary6"}),
    "randlora": (RandLoRALinear, {"r": 6, "randlora_alpha": 3.0}),
    "randlora sign": (RandLoRALinear, {"r": 6, "randlora_alpha": 3.0, "distribution": "sign"}),
}


def sharing(kind, **more):
    cls, settings = SHARED[kind]
    return adapted(dict.fromkeys(("0", "2.0", "2.1"), (cls, settings | {"seed": 77} | more)))


@pytest.mark.parametrize("kind", SHARED)
def test_stock_peft_loads_the_projections(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = sharing(kind)
    to_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is True
    stock = peft.PeftModel.from_pretrained(plain(), str(tmp_path))
    assert (stock(X) - plain()(X)).norm() > 0.01
    torch.testing.assert_close(stock(X), model(X), atol=1e-5, rtol=1e-5)
    for name in ("0", "2.0", "2.1"):
        theirs = stock.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(theirs, model.get_submodule(name).delta_weight(), atol=1e-6, rtol=1e-5)


def test_what_peft_cannot_hold(tmp_path):
    folder = tmp_path / "out"
    other_seed = sharing("vera")
    other_seed[0].seed = 78
    spoilt = sharing("randlora")
    spoilt[0].randlora_gamma.data[0, 0] = torch.inf
    for model, text in [
        (plain(), "model must have VeRALinear, RandLoRALinear, MissLinear or AdaLoRALinear layers, got none"),
        (
            adapted({"0": PLACES["0"]}),
            "0 must be VeRALinear, RandLoRALinear, MissLinear, or AdaLoRALinear as all others, got NOLALinear",
        ),
        (
            adapted({k: PLACES[k] for k in ("2.0", "2.1")}),
            "2.1 must be VeRALinear, RandLoRALinear, MissLinear, or AdaLoRALinear as all others",
        ),
        (other_seed, "2.0.seed must be 78, as the first layer's, got 77: PEFT has one for all layers"),
        (sharing("randlora", paper_pairing=True), "0.paper_pairing must be False, PEFT's pairing, got True"),
        (spoilt, "0.randlora_gamma must be finite, got inf or nan"),
    ]:
        with pytest.raises(ValueError, match=f"lrkern.convert.to_peft: {text}"):
            to_peft(model, folder)
        assert not folder.exists()
