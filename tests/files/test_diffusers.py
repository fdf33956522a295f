# SPDX-License-Identifier: Apache-2.0
"""Folders of diffusers' layout, made by hand (diffusers is not installed): PEFT with the same factors is the oracle."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import peft
from safetensors.torch import save_file

import lrkern.files
from lrkern.files.folder import DIFFUSERS, METADATA
from lrkern.nn import FusedLoRALinear
from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore")
D = 8
NAMES = [f"blocks.{i}.attn.{name}" for i in range(2) for name in ("to_q", "to_out.0")]
X = torch.randn(3, D, generator=torch.Generator().manual_seed(2))


class Part(nn.Module):
    """Of a pipeline: attention as diffusers names it, or as transformers' text encoders do."""

    def __init__(self, width=D, q="to_q", out="to_out", depth=2):
        super().__init__()
        torch.manual_seed(0)
        last = lambda: nn.ModuleList([nn.Linear(width, width)]) if out == "to_out" else nn.Linear(width, width)
        attn = lambda: nn.ModuleDict({"attn": nn.ModuleDict({q: nn.Linear(width, width), out: last()})})
        self.blocks, self.ends = nn.ModuleList(attn() for _ in range(depth)), (q, out)

    def forward(self, x):
        for block in self.blocks:
            q, out = (block["attn"][end] for end in self.ends)
            x = (out[0] if isinstance(out, nn.ModuleList) else out)(q(x).tanh())
        return x


def factors(ranks, width=D, names=NAMES):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / 3
    return {name: (draw(r, width), draw(width, r)) for name, r in zip(names, ranks, strict=True)}


def keys(ab, a="lora_A.weight", b="lora_B.weight", part="unet."):
    return {f"{part}{name}.{end}": t for name, pair in ab.items() for end, t in zip((a, b), pair, strict=True)}


def folder(to, tensors, about=None):
    to.mkdir()
    metadata = {"format": "pt"} | ({METADATA: about if isinstance(about, str) else json.dumps(about)} if about else {})
    save_file({k: t.clone() for k, t in tensors.items()}, to / DIFFUSERS, metadata=metadata)
    return to


@torch.no_grad()
def by_peft(ab, alphas, **settings):
    """Of these factors and alphas by name."""
    config = {"r": 1, "target_modules": list(ab), "rank_pattern": {f"^{k}": len(a) for k, (a, _) in ab.items()}}
    config |= {"alpha_pattern": {f"^{k}": v for k, v in alphas.items()}} | settings
    model = peft.get_peft_model(Part(), peft.LoraConfig(**config))
    result = peft.set_peft_model_state_dict(model, keys(ab, part="base_model.model."))
    assert not result.unexpected_keys
    return model(X)


@torch.no_grad()
def by_pool(path, model=None):
    pool = AdapterPool(model := (model or Part()).eval(), pages=4)
    pool.load("a", path)
    with MultiLoraModel(model, pool) as served:
        return served(X, adapters=["a"] * len(X))


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def fused():
    model = Part()
    for name in NAMES:
        parent, _, child = name.rpartition(".")
        layer = FusedLoRALinear.from_linear(model.get_submodule(name), r=3, lora_alpha=3)
        setattr(model.get_submodule(parent), child, layer)
    return model


FORMS = {
    "as PEFT's": {"a": "lora_A.weight", "b": "lora_B.weight"},
    "down and up": {"a": "lora.down.weight", "b": "lora.up.weight"},
    "lora_linear_layer": {"a": "lora_linear_layer.down.weight", "b": "lora_linear_layer.up.weight"},
    "transformer": {"part": "transformer."},
    "no part": {"part": ""},
    "compiled": {"part": "unet._orig_mod."},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    ab = factors([3] * 4)
    path = folder(tmp_path / "a", keys(ab, **FORMS[form]))
    want = by_peft(ab, dict.fromkeys(ab, 3))
    close(by_pool(path), want)
    lrkern.files.load(model := fused(), path)
    close(model(X), want)


def test_attention_processors_of_before_peft(tmp_path):
    ab = factors([3] * 4)
    old = {k.replace(".to_out.0.", ".to_out."): t for k, t in keys(ab, "down.weight", "up.weight").items()}
    old = {k.replace(".attn.to_", ".attn.processor.to_").replace(".down", "_lora.down"): t for k, t in old.items()}
    old = {k.replace(".up", "_lora.up"): t for k, t in old.items()}
    assert "unet.blocks.0.attn.processor.to_out_lora.up.weight" in old
    close(by_pool(folder(tmp_path / "a", old)), by_peft(ab, dict.fromkeys(ab, 3)))
    text = {k.replace("unet.", "text_encoder.").replace(".processor", ""): t for k, t in old.items()}
    close(by_pool(folder(tmp_path / "b", text), Part(q="q_proj", out="out_proj")), by_peft(ab, dict.fromkeys(ab, 3)))


@pytest.mark.parametrize("end", [".alpha", ".lora.alpha"])
def test_alpha_of_each(tmp_path, end):
    ab, alphas = factors([2, 3, 3, 4]), dict(zip(NAMES, (1.0, 2.0, 3.5, 8.0), strict=True))
    said = {f"unet.{name}{end}": torch.tensor(a) for name, a in alphas.items()}
    close(by_pool(folder(tmp_path / "a", keys(ab) | said)), by_peft(ab, alphas))


def test_the_headers_config(tmp_path):
    ab = factors([2, 3, 3, 3])
    said = {"r": 3, "lora_alpha": 5, "rank_pattern": {"blocks.0.attn.to_q": 2}, "alpha_pattern": {"to_out.0": 7},
            "target_modules": ["to_q", "to_out.0"], "use_rslora": True}  # fmt: skip
    path = folder(tmp_path / "a", keys(ab), {f"unet.{k}": v for k, v in said.items()} | {"text_encoder.r": 9})
    alphas = {name: 7 if "to_out" in name else 5 for name in NAMES}
    close(by_pool(path), by_peft(ab, alphas, use_rslora=True))
    fewer = folder(tmp_path / "b", dict(list(keys(ab).items())[:4]), {f"unet.{k}": v for k, v in said.items()})
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.attn\.to_out\.0"):
        by_pool(fewer)


def test_each_part_is_its_models(tmp_path):
    ab, text = factors([3] * 4), factors([3] * 4, 6)
    path = folder(tmp_path / "a", keys(ab) | keys(text, part="text_encoder.") | keys(text, part="text_encoder_2."))
    close(by_pool(path), by_peft(ab, dict.fromkeys(ab, 3)))
    with pytest.raises(ValueError, match="must have one part whose .*, got text_encoder and text_encoder_2: write"):
        AdapterPool(Part(6), pages=4).load("a", path)
    pipeline = nn.ModuleDict({"unet": Part(), "text_encoder": Part(6), "text_encoder_2": Part(6)})
    pool = AdapterPool(pipeline, pages=4)
    pool.load("a", path)
    assert len(pool._adapters["a"].host) == 12


AB = factors([3] * 4)
REFUSED = {
    "another model": (keys(AB | {"blocks.9.attn.to_q": AB[NAMES[0]]}), None, r"whose linears are all this model's, by name and shape, got unet with unet\.blocks\.9"),
    "another width": (keys(factors([3] * 4, 6)), None, r"whose linears are all this model's"),
    "kohya's": ({"lora_unet_blocks_0_attn_to_q.lora_down.weight": torch.ones(3, D)}, None, "got lora_unet_.*save_lora_weights convert"),
    "ranks that differ": (keys(factors([2, 3, 3, 3])), None, r"ranks must be equal where no alpha is said, got \[2, 3\]"),
    "alpha of some": (keys(AB) | {f"unet.{NAMES[0]}.alpha": torch.tensor(2.0)}, None, r".alpha of all linears or of none, got none of blocks\.0\.attn\.to_out"),
    "alpha of two": (keys(AB) | {f"unet.{NAMES[0]}.alpha": torch.ones(2)}, None, r"alpha must be a finite number, got shape \[2\]"),
    "alpha nan": (keys(AB) | {f"unet.{NAMES[0]}.alpha": torch.tensor(torch.nan)}, None, "alpha must be a finite number"),
    "an alpha alone": (keys({n: AB[n] for n in NAMES[1:]}) | {f"unet.{n}.alpha": torch.tensor(1.0) for n in NAMES}, None, "lacks lora_A of blocks.0.attn.to_q, which has unet"),
    "two alphas of one": (keys(AB) | {f"unet.{NAMES[0]}{end}": torch.tensor(1.0) for end in (".alpha", ".lora.alpha")}, None, "to_q.alpha and unet.*to_q.lora.alpha are both"),
    "alpha beside a config": (keys(AB) | {f"unet.{n}.alpha": torch.tensor(1.0) for n in NAMES}, {"unet.r": 3, "unet.lora_alpha": 3}, "or keys .alpha, got both"),
    "one under two names": (keys(AB) | keys(AB, "lora.down.weight", "lora.up.weight"), None, "lora_A.weight are both lora_A.weight of blocks.0.attn.to_|down.weight are both lora_A.weight"),
    "a down without an up": ({k: t for k, t in keys(AB).items() if "lora_B" not in k}, None, r"lacks blocks\.0\.attn\.to_\S+\.lora_B and 3 more"),
    "a list in the header": (keys(AB), "[1]", f"{METADATA} must be an object, got list"),
    "no JSON in the header": (keys(AB), "{", f"its metadata {METADATA} must be JSON"),
    "words for ranks": (keys(AB), {"unet.r": "3", "unet.lora_alpha": 3}, "r must be a whole number .*, got '3'"),
    "more than LoRA by its header": (keys(AB), {"unet.r": 3, "unet.lora_alpha": 3, "unet.lora_bias": True}, r"lacks .*lora_B\.bias"),
    "nothing": ({"a": torch.ones(1)}, None, "must have keys of lora_A.weight, .*, got a"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    tensors, about, message = REFUSED[name]
    pool = AdapterPool(Part(), pages=4)
    with pytest.raises(ValueError, match=message):
        pool.load("a", folder(tmp_path / "a", tensors, about))
    assert pool.names == []
    with pytest.raises(ValueError, match="the model is unchanged"):
        lrkern.files.load(fused(), tmp_path / "a")


def test_a_config_of_pefts_beside_it_is_not_guessed(tmp_path):
    path = folder(tmp_path / "a", keys(AB))
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    with pytest.raises(ValueError, match=f"must hold adapter_model.safetensors, .*got .*'{DIFFUSERS}'"):
        by_pool(path)
