# SPDX-License-Identifier: Apache-2.0
"""One batch whose rows use every kind of adapter there is, and the base: each row's text is that of its adapter alone."""

import copy

import peft
import pytest
import torch
from layer_kinds import shake
from tiny_models import tiny
from torch import nn

from minilm import one_thread  # isort: skip  # noqa: F401

import lrkern.files
from lrkern import nn as layers
from lrkern.nn.linear import AdapterLinear
from lrkern.serving import AdapterPool, MultiLoraModel
from lrkern.serving.kinds.kind import KINDS

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
OWN = {
    "mora 1": (layers.MoRALinear, {"r": 4, "mora_type": 1}),
    "mora 2": (layers.MoRALinear, {"r": 4, "mora_type": 2}),
    "mora 3": (layers.MoRALinear, {"r": 4, "mora_type": 3}),
    "mora 4": (layers.MoRALinear, {"r": 4, "mora_type": 4}),
    "miss": (layers.MissLinear, {"r": 4}),
    "miss mini": (layers.MissLinear, {"r": 4, "kind": "mini", "mini_r": 8}),
    "nola": (layers.NOLALinear, {"r": 4, "k": 6, "l": 7}),
    "vera": (layers.VeRALinear, {"r": 16, "max_in": 48, "max_out": 48}),
    "randlora": (layers.RandLoRALinear, {"r": 5, "randlora_alpha": 20.0}),
    "s2ft in": (layers.S2FTLinear, {"index": "0-5,9", "side": "input"}),
    "s2ft out": (layers.S2FTLinear, {"index": "3-9", "side": "output"}),
}
PEFT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False),
    "rslora": peft.LoraConfig(r=9, lora_alpha=12, use_rslora=True, target_modules=TARGETS, init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS, init_lora_weights=False),
    "peft randlora": peft.RandLoraConfig(r=6, randlora_alpha=400, target_modules=TARGETS, save_projection=True),
    "bias": peft.LoraConfig(r=4, bias="lora_only", lora_bias=True, target_modules=TARGETS, init_lora_weights=False),
    "peft miss": peft.MissConfig(r=4, target_modules=TARGETS, init_weights=False),
    "peft vera": peft.VeraConfig(r=8, target_modules=TARGETS),
    "another pair": peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=5),
    "embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "head of its own": peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, modules_to_save=["lm_head"]
    ),
}


def alone(model: nn.Module, cls: type[AdapterLinear], settings: dict, seed: int, by: float = 0.6) -> nn.Module:
    """The model with layers of ours that act."""
    model = copy.deepcopy(model)
    for name, m in [*model.named_modules()]:
        if name.split(".")[-1] in TARGETS:
            parent, _, child = name.rpartition(".")
            seeded = {"seed": 3} if "seed" in cls.SETTINGS else {}
            layer = shake(cls.from_linear(m, **settings | seeded), seed, by)
            setattr(model.get_submodule(parent), child, layer)
    return model.eval()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("adapters"), tiny("llama")
    models: dict = {None: base}
    for seed, (name, (cls, settings)) in enumerate(OWN.items(), 1):
        models[name] = alone(base, cls, settings, seed)
        lrkern.files.save(models[name], folder / f"{name}.safetensors", kind="own")
    for seed, (name, config) in enumerate(PEFT.items(), 40):
        torch.manual_seed(seed)
        models[name] = peft.get_peft_model(copy.deepcopy(base), config).eval()
        for key, p in models[name].named_parameters():
            if "magnitude" in key:
                p.data *= torch.rand_like(p) + 0.5
            elif any(
                word in key for word in ("vera_lambda", "randlora_lambda", "modules_to_save", "lora_B.default.bias")
            ):
                p.data.copy_(torch.randn(p.shape))
        models[name].save_pretrained(folder / name)
    return folder, models


def test_every_kind_in_one_batch_with_generate(everything):
    folder, models = everything
    names = [name for name in models if name]
    model = copy.deepcopy(models[None])
    pool = AdapterPool(model, pages=2 * len(names), targets=[*TARGETS, "embed_tokens"], max_rank=64)
    for name in names:
        path = folder / name
        pool.load(name, path if path.exists() else folder / f"{name}.safetensors")
    assert {type(pool._adapters[name].kind) for name in names} == {*KINDS}, (
        "a kind of the pool that no adapter here is of"
    )
    who = [*names, None, ["lora", "s2ft in"]]
    ids = torch.randint(3, 97, (len(who), 5), generator=torch.Generator().manual_seed(1))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with MultiLoraModel(model, pool) as served:
        logits = served(ids, adapters=who).logits
        text = served.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapters=who, **options)
    with torch.no_grad():
        base = models[None](ids).logits
        for i, name in enumerate(who[:-1]):
            want = models[name](ids[i : i + 1]).logits
            torch.testing.assert_close(logits[i : i + 1], want, rtol=1e-4, atol=2e-4)
            one = dict(input_ids=ids[i : i + 1], attention_mask=torch.ones_like(ids[i : i + 1]))
            assert torch.equal(text[i : i + 1], models[name].generate(**one, **options)), name
            if name:
                assert not torch.allclose(want, base[i : i + 1], atol=1e-2), f"{name} does nothing"
    assert torch.equal(logits[len(names)], base[len(names)])


def test_every_class_of_layers_is_served_or_refused_with_the_reason(tmp_path):
    """A new kind of layer joins the list."""
    tried = {cls for cls, _ in OWN.values()} | {layers.FusedLoRALinear}  # whose files are PEFT's
    variants = {cls for cls in AdapterLinear.KINDS.values() if ".variants." in cls.__module__}
    assert tried == {*AdapterLinear.KINDS.values()} - variants  # which tests/variants/test_files.py tries
    base = tiny("llama")
    pool = AdapterPool(copy.deepcopy(base), pages=4)
    for cls, settings in ((layers.MoRALinear, {"r": 4, "mora_type": 6}), (layers.MissLinear, {"r": 4, "kind": "bat"})):  # fmt: skip
        path = tmp_path / cls.__name__
        lrkern.files.save(alone(base, cls, settings, 1, 0.01), path, kind="own")
        with pytest.raises(ValueError, match="full rank"):
            pool.load("x", path)
    assert not pool.names
