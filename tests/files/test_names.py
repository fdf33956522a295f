# SPDX-License-Identifier: Apache-2.0
"""Files that name the same tensors otherwise than PEFT does: what PEFT computes of its own file, or a refusal that names the key."""

import json
import re
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import peft
import transformers
from safetensors.torch import load_file, save_file

import lrkern.files
from lrkern.files.folder import features_of, ranks_and_scalings, read_adapter
from lrkern.files.names import as_peft
from lrkern.nn import FusedLoRALinear, MissLinear
from lrkern.serving import AdapterPool, MultiLoraModel

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False}  # fmt: skip
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 8, "patch_size": 4}  # fmt: skip
IDS = torch.randint(1, 39, (2, 5), generator=torch.Generator().manual_seed(1))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama(seed=0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


def llava():
    text, sight = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**SIGHT)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=sight, image_token_index=39)
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    sight = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=sight, tie_word_embeddings=False)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def saved(folder, model, config=None, **settings):
    """A folder that PEFT wrote of an adapter that does something."""
    config = config or peft.LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | settings
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad and "modules_to_save" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
    adapted.save_pretrained(folder)
    return folder


def rewritten(folder, to, rename=lambda key: key, change=lambda key, t: t, **config):
    to.mkdir()
    tensors = {rename(k): change(k, t) for k, t in load_file(folder / WEIGHTS).items()}
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    return to


@torch.no_grad()
def by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()(input_ids=IDS).logits


@torch.no_grad()
def by_pool(model, folder):
    pool = AdapterPool(model, pages=8, targets=r".*")
    pool.load("a", folder)
    with MultiLoraModel(model, pool) as served:
        return served(input_ids=IDS, adapters=["a"] * len(IDS)).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def called(key, name):
    """With an adapter's name in it, as in PEFT's own state_dict."""
    own = r"(lora_(?:embedding_)?[AB]|lora_magnitude_vector|(?:vera|randlora)_(?:lambda_?\w*|gamma|[AB])|miss_block)"
    return re.sub(rf"\.{own}(?=$|\.weight$)", rf".\1.{name}", key)


FORMS = {
    "an adapter's name": lambda k: called(k, "default"),
    "another adapter's name": lambda k: called(k, "mine-2"),
    "compiled, around it": lambda k: f"_orig_mod.{k}",
    "compiled, within": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "linears compiled": lambda k: re.sub(r"(q_proj|down_proj)\.", r"\1._orig_mod.", k),
    "layers compiled": lambda k: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", k),
    "no prefix": lambda k: k.removeprefix("base_model.model.").removeprefix("base_model."),
    "all of it": lambda k: "_orig_mod." + called(k, "x").removeprefix("base_model.model.").removeprefix("base_model."),
}  # fmt: skip
METHODS = {
    "lora": lambda: None,
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"]),
    "randlora": lambda: peft.RandLoraConfig(r=5, target_modules=["q_proj"]),
    "embedding": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]),
    "miss": lambda: peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_form_is_pefts_file(tmp_path, method, form):
    folder = saved(tmp_path / "a", llama(), METHODS[method]())
    config, want = read_adapter(folder)
    got, tensors = as_peft(config, {FORMS[form](k): t for k, t in want.items()}, llama())
    want = {k: t for k, t in want.items() if "base_layer" not in k}
    assert got == config and tensors.keys() == want.keys() and all(torch.equal(tensors[k], t) for k, t in want.items())


@pytest.mark.parametrize("form", FORMS)
def test_every_reader_takes_it(tmp_path, form):
    folder = saved(tmp_path / "lora", llama())
    written = rewritten(folder, tmp_path / "lora 2", FORMS[form])
    assert torch.equal(by_pool(llama(), written), by_pool(llama(), folder))
    close(by_pool(llama(), written), by_peft(llama(), folder))
    model = fused(llama())
    lrkern.files.load(model, written)
    close(model(input_ids=IDS).logits, by_peft(llama(), folder))
    miss = saved(tmp_path / "miss", llama(), METHODS["miss"]())
    lrkern.files.load(model := llama(), rewritten(miss, tmp_path / "miss 2", FORMS[form]))
    close(model(input_ids=IDS).logits, by_peft(llama(), miss))
    vera = saved(tmp_path / "vera", llama(), METHODS["vera"]())
    lrkern.files.store_projections(rewritten(vera, tmp_path / "vera 2", FORMS[form]), llama(), tmp_path / "vera 3")
    close(by_peft(llama(), tmp_path / "vera 3"), by_peft(llama(), vera))
    close(by_pool(llama(), tmp_path / "vera 2"), by_peft(llama(), vera))


COMPILED = {
    "the model": lambda model: torch.compile(model, backend="eager"),
    "layers": lambda model: swapped(model, [f"model.layers.{i}" for i in range(2)], compiled),
    "linears": lambda model: swapped(model, adapted(model), compiled),
}


def adapted(model):
    return [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]


def compiled(module):
    return torch.compile(module, backend="eager")


def swapped(model, names, by):
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, by(model.get_submodule(name)))
    return model


def fused(model, make=lambda m: FusedLoRALinear.from_linear(m, r=3, lora_alpha=7)):
    return swapped(model, adapted(model), make)


@pytest.mark.parametrize("what", COMPILED)
def test_files_of_compiled_models_are_the_models(tmp_path, what):
    """Read and written. PEFT takes nothing from keys with _orig_mod, and only warns."""
    folder = saved(tmp_path / "a", llama())
    model = COMPILED[what](fused(llama()))
    assert any("_orig_mod." in name for name, _ in model.named_modules())
    lrkern.files.load(model, folder)
    lrkern.files.save(model, tmp_path / "b")
    want = load_file(folder / WEIGHTS)
    got = load_file(tmp_path / "b" / WEIGHTS)
    assert got.keys() == want.keys() and all(torch.equal(got[k], t) for k, t in want.items())
    close(by_peft(llama(), tmp_path / "b"), by_peft(llama(), folder))
    ours = fused(llama(), lambda m: MissLinear.from_linear(m, r=4))
    for name in adapted(ours):
        nn.init.normal_(ours.get_submodule(name).miss_block, 0, 0.1)
    ours = COMPILED[what](ours)
    lrkern.files.save(ours, tmp_path / "own")
    lrkern.files.save(ours, tmp_path / "lora", "lora")
    lrkern.files.load(again := llama(), tmp_path / "own")
    close(again(input_ids=IDS).logits, by_peft(llama(), tmp_path / "lora"))
    lrkern.files.load(model := COMPILED[what](llama()), tmp_path / "own")
    lrkern.files.save(model, tmp_path / "own 2")
    assert (tmp_path / "own 2").read_bytes() == (tmp_path / "own").read_bytes()


@pytest.mark.parametrize("what", COMPILED)
def test_ranks_of_compiled_models(tmp_path, what):
    """By names that are anchored, which a compiled model's are not."""
    folder = saved(tmp_path / "a", llama(), rank_pattern={"^model.layers.1.self_attn.q_proj": 2})
    model = COMPILED[what](llama())
    config, tensors = as_peft(*read_adapter(folder), model)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    assert all("_orig_mod" in name and features_of(model.get_submodule(name)) for name in names)
    ranks = {name: r for name, (r, _) in ranks_and_scalings(config, names).items()}
    assert (
        ranks == {name: len(tensors[f"base_model.model.{name}.lora_A.weight"]) for name in names}
        and 2 in ranks.values()
    )
    pool = AdapterPool(model, pages=2)
    pool.load("a", folder)
    assert len(pool._adapters["a"].host) == len(names) == 4


# ---- vision-language models


HERE = "base_model.model.model.language_model."
OLDER = {  # before transformers 4.52; of the second PEFT 0.21 takes none, and warns
    llava: lambda k: k.replace(HERE, "base_model.model.language_model.model."),
    qwen2_vl: lambda k: k.replace(HERE, "base_model.model.model."),
}


@pytest.mark.parametrize("make", OLDER)
def test_names_of_before_transformers_4_52(tmp_path, make):
    folder = saved(tmp_path / "a", make())
    old = rewritten(folder, tmp_path / "b", OLDER[make])
    _, tensors = as_peft(*read_adapter(old), make())
    assert tensors.keys() == load_file(folder / WEIGHTS).keys() != load_file(old / WEIGHTS).keys()
    close(by_pool(make(), old), by_peft(make(), folder))
    if make is llava:
        close(by_pool(make(), old), by_peft(make(), old))


def test_names_that_a_models_own_code_maps(tmp_path):
    """As transformers before 5, and code beside a model, say it."""

    def mapped():
        model = llama()
        model._checkpoint_conversion_mapping = {r"^old\.text\.": "model.", r"^never": "lm_head"}
        return model

    folder = saved(tmp_path / "a", llama())
    old = rewritten(
        folder, tmp_path / "b", lambda k: k.replace("base_model.model.model.", "base_model.model.old.text.")
    )
    close(by_pool(mapped(), old), by_peft(mapped(), old))
    close(by_pool(mapped(), old), by_peft(llama(), folder))
    with pytest.raises(ValueError, match=r"must be of this model's linears, got old\.text\.layers"):
        by_pool(llama(), old)


@pytest.mark.parametrize("make", OLDER)
def test_an_adapter_of_the_text_model_alone(tmp_path, make):
    """On a model with a tower that has linears of the same names: PEFT warns and leaves them as they are."""
    folder = saved(tmp_path / "a", llama())
    new = rewritten(folder, tmp_path / "b", lambda k: k.replace("base_model.model.model.", HERE))
    with pytest.warns(UserWarning, match="Found missing adapter keys") if make is llava else warnings.catch_warnings():
        want = by_peft(make(), new)
    for each in (folder, new):
        says = pytest.warns(
            UserWarning, match="the adapter has nothing for model.vision_tower.encoder.layers: .*q_proj"
        )
        with says if make is llava else warnings.catch_warnings():
            close(by_pool(make(), each), want)


def test_a_part_of_a_tower_is_no_tower(tmp_path):
    folder = saved(tmp_path / "a", llava(), target_modules=["q_proj", "k_proj"])
    sight = lambda k, t: None if "vision" in k else t
    refused = [
        rewritten(folder, tmp_path / "b", change=lambda k, t: None if "language_model.layers.1" in k else t),
        rewritten(folder, tmp_path / "c", change=lambda k, t: None if "vision" in k and "k_proj" in k else t),
        rewritten(folder, tmp_path / "d", change=sight, init_lora_weights=False),  # PEFT's is random there
    ]
    for each in refused:
        with pytest.raises(ValueError, match="lacks model"):
            by_pool(llava(), each)
    close(by_pool(llava(), rewritten(folder, tmp_path / "e", change=sight)), by_peft(llava(), tmp_path / "e"))


def test_a_config_in_the_files_names(tmp_path):
    """PEFT finds no module by such a regex; of a pattern that means something else by either name nobody knows which it is."""
    folder = saved(tmp_path / "a", llava(), target_modules=r".*language_model.*q_proj")
    regex = r"language_model\.model\.layers\.\d+\.self_attn\.q_proj"
    old = rewritten(folder, tmp_path / "b", OLDER[llava], target_modules=regex)
    with pytest.raises(ValueError, match="not found in the base model"):
        by_peft(llava(), old)
    close(by_pool(llava(), old), by_peft(llava(), folder))
    short = rewritten(
        folder, tmp_path / "c", OLDER[llava], lambda k, t: None if ".1." in k else t, target_modules=regex
    )
    with pytest.raises(ValueError, match=r"lacks model\.language_model\.layers\.1\.self_attn\.q_proj"):
        by_pool(llava(), short)
    pattern = {"language_model.model.layers.1.self_attn.q_proj": 3}
    odd = rewritten(folder, tmp_path / "d", OLDER[llava], alpha_pattern=pattern)
    text = (
        r"alpha_pattern must be the same by either name, got another of language_model\.model\.layers\.1.*its name here"
    )
    with pytest.raises(ValueError, match=text):
        by_pool(llava(), odd)
    same = {"layers.1.self_attn.q_proj": 3}
    both = rewritten(folder, tmp_path / "e", OLDER[llava], alpha_pattern=same)
    close(by_pool(llava(), both), by_peft(llava(), both))


# ---- weights of the base beside the adapter's


def test_the_heads_own_weight_is_checked_and_left_out(tmp_path):
    folder = saved(tmp_path / "a", llama(), target_modules=["lm_head", "q_proj"])
    head = "base_model.model.lm_head.base_layer.weight"
    assert head in load_file(folder / WEIGHTS)
    close(by_pool(llama(), folder), by_peft(llama(), folder))
    half = lambda k, t: t.bfloat16() if "base_layer" in k else t  # as PEFT saves where the base was in bfloat16
    close(by_pool(llama(), rewritten(folder, tmp_path / "b", change=half)), by_peft(llama(), folder))
    narrow = llama().bfloat16()
    close(by_pool(narrow, folder).float(), by_pool(llama().bfloat16(), tmp_path / "b").float())
    trained = rewritten(folder, tmp_path / "c", change=lambda k, t: t + 1e-3 if "base_layer" in k else t)
    grown = rewritten(folder, tmp_path / "d", change=lambda k, t: torch.cat([t, t]) if "base_layer" in k else t)
    for each, message in ((trained, "other values: it was trained"), (grown, r"shape \[80, 16\] for \[40, 16\]")):
        with pytest.raises(ValueError, match=f"{re.escape(head)} is a weight of the base.*{message}.*modules_to_save"):
            by_pool(llama(), each)
    with pytest.raises(ValueError, match="cannot be compared"):
        as_peft(*read_adapter(folder), llama().to("meta"))


def test_a_head_beside_fused_layers(tmp_path):
    folder = saved(tmp_path / "a", llama(), target_modules=["lm_head", "q_proj", "down_proj"])
    make = lambda: swapped(fused(llama()), ["lm_head"], lambda m: FusedLoRALinear.from_linear(m, r=3, lora_alpha=7))
    lrkern.files.load(model := make(), folder)
    close(model(input_ids=IDS).logits, by_peft(llama(), folder))
    lrkern.files.save(model, tmp_path / "b")
    close(by_peft(llama(), tmp_path / "b"), by_peft(llama(), folder))
    trained = rewritten(folder, tmp_path / "c", change=lambda k, t: t * 2 if "base_layer" in k else t)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="lm_head.base_layer.weight is a weight of the base.*; the model is unchanged"):
        lrkern.files.load(model, trained)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_embeddings_that_peft_saved_whole(tmp_path):
    """As where the vocabulary was resized, or save_embedding_layers=True: PEFT would load them into the base."""
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "a" / WEIGHTS)
    close(by_pool(llama(), tmp_path / "a"), by_peft(llama(), tmp_path / "a"))
    other = rewritten(tmp_path / "a", tmp_path / "b", change=lambda k, t: t.flip(0) if "embed_tokens" in k else t)
    with pytest.raises(ValueError, match="embed_tokens.weight is a weight of the base and must be this model's"):
        by_pool(llama(), other)


@pytest.mark.parametrize("name", ["", "default.", "mine."])
def test_modules_to_save_as_a_state_dict_has_them(tmp_path, name):
    folder = saved(tmp_path / "a", llama(), modules_to_save=["lm_head"])
    config, want = read_adapter(folder)
    raw = {k.replace("lm_head.", f"lm_head.modules_to_save.{name}"): t for k, t in want.items()}
    if name:
        raw = {called(k, name[:-1]): t for k, t in raw.items()}
    _, tensors = as_peft(config, raw, llama())
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[k], t) for k, t in want.items())


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)  # fmt: skip
def test_dtypes_of_storage(tmp_path, dtype):
    folder = saved(tmp_path / "a", llama())
    stored = rewritten(folder, tmp_path / "b", change=lambda k, t: t.to(dtype))
    want = rewritten(folder, tmp_path / "c", change=lambda k, t: t.to(dtype).float())
    assert torch.equal(by_pool(llama(), stored), by_pool(llama(), want))
    close(by_pool(llama(), stored), by_peft(llama(), stored))


# ---- shards


def sharded(folder, to, n=3):
    to.mkdir()
    tensors = load_file(folder / WEIGHTS)
    name = lambda i: f"adapter_model-{i + 1:05}-of-{n:05}.safetensors"
    where = {key: name(i % n) for i, key in enumerate(tensors)}
    for i in range(n):
        save_file({k: t for k, t in tensors.items() if where[k] == name(i)}, to / name(i))
    (to / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (to / CONFIG).write_text((folder / CONFIG).read_text())
    return to


def test_shards(tmp_path):
    folder = saved(tmp_path / "a", llama())
    parts = sharded(folder, tmp_path / "b")
    assert torch.equal(by_pool(llama(), parts), by_pool(llama(), folder))
    (config, tensors), (same, want) = read_adapter(parts), read_adapter(folder)
    assert config == same and tensors.keys() == want.keys() and all(torch.equal(tensors[k], t) for k, t in want.items())


# ---- what nobody can know


class Twice(nn.Module):
    """A linear by PEFT's prefix and one without it; and another compiled in place."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
        inner = nn.ModuleDict({"l": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        self.base_model = nn.ModuleDict({"model": inner})
        self.x = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"o": nn.Linear(4, 4)}), "o": nn.Linear(4, 4)})


def pair(name, end=""):
    return {f"{name}.lora_A{end}.weight": torch.ones(2, 4), f"{name}.lora_B{end}.weight": torch.ones(4, 2)}


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
UNKNOWN = {
    "two adapters": (pair("l", ".one") | pair("base_model.model.k", ".two"), "must be of one adapter, got one and two: write each into"),
    "a name and none": (pair("l", ".one") | pair("base_model.model.base_model.model.k"), "must be of one adapter, got"),
    "one tensor twice": (pair("l") | pair("base_model.model.l"), "l.lora_A.weight and base_model.model.l.lora_A.weight are both"),
    "of two modules": (pair("x.o"), "x.o must be one module of this model, got x._orig_mod.o and x.o"),
    "of none": (pair("y.l"), r"must hold lora_A.* of linears, got y.l.lora_A.weight|must be of this model's linears, got"),
    "of itself": (pair("base_model.model."), "must hold|must be of"),
    "of no end": ({"l.lora_C.weight": torch.ones(2, 4)}, "must hold lora_A.weight and lora_B.weight of linears, got l.lora_C"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_can_know_is_refused(name):
    tensors, message = UNKNOWN[name]
    pool = AdapterPool(Twice(), pages=2)
    with pytest.raises(ValueError, match=message):
        pool.add("a", LORA, tensors)
    assert pool.names == []


def test_what_peft_would_read_means_what_peft_reads():
    model = Twice()
    by_itself = pair("base_model.model.base_model.model.l")
    assert as_peft(LORA, pair("base_model.model.l"), model)[1].keys() == pair("base_model.model.l").keys()
    assert as_peft(LORA, by_itself, model)[1].keys() == by_itself.keys()
    assert (
        as_peft(LORA, pair("base_model.model.k"), model)[1].keys() == pair("base_model.model.base_model.model.k").keys()
    )
    assert all(features_of(model.get_submodule(name)) == (4, 4) for name in ("l", "base_model.model.l"))
