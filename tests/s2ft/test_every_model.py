# SPDX-License-Identifier: Apache-2.0
"""All models of transformers: whatever lrkern.s2ft.find takes computes the same in another order. With LRK_TEST_FULL, two minutes."""

import contextlib

import pytest
import torch
from s2ft_models import another_order
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from lrkern.s2ft import find, reorder
from tests.conftest import FULL

# By the names that configs have for them.
SIZES = {
    32: "hidden_size d_model dim n_embd embed_dim embedding_size",
    48: "intermediate_size ffn_dim hidden_dim encoder_ffn_dim decoder_ffn_dim d_ff",
    2: "num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers num_key_value_heads eos_token_id type_vocab_size",
    4: "num_attention_heads n_heads n_head num_heads encoder_attention_heads decoder_attention_heads",
    8: "head_dim d_kv", 97: "vocab_size", 64: "max_position_embeddings", 1: "bos_token_id", 0: "pad_token_id",
}  # fmt: skip
LARGEST = 3e7  # parameters: some have parts whose sizes have other names


def tiny(config):
    """A model of the config's class with random weights, biases and norms too, or None where these sizes make none."""
    config_class = CONFIG_MAPPING[config]
    default = config_class()
    given = {name: n for n, names in SIZES.items() for name in names.split() if hasattr(default, name)}
    given |= {"layer_types": None} if hasattr(default, "layer_types") else {}
    aliases = getattr(config_class, "attribute_map", {})
    made = config_class(**{name: n for name, n in given.items() if name not in aliases})
    kind = MODEL_MAPPING[config_class]
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    with torch.device("meta"):
        if sum(p.numel() for p in kind(made).parameters()) > LARGEST:
            return None
    model = kind(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.3 * torch.randn(p.shape) * (1 if p.dim() <= 1 else p.shape[-1] ** -0.5))
    return model


def taken(model):
    parts = []
    for which in ({"ffn": False}, {"attention": False}):
        with contextlib.suppress(ValueError):
            parts += find(model, **which)
    return parts


def outputs(model):
    """Of the first kind of input that it takes, twice, or None."""
    ids, side = torch.randint(3, 90, (2, 40)), getattr(model.config, "image_size", 32)
    pixels = torch.randn(1, 3, side, side) if isinstance(side, int) else torch.randn(1, 3, 32, 32)
    texts = [{"input_ids": ids}, {"input_ids": ids, "decoder_input_ids": ids}]
    for inputs in (*texts, {"pixel_values": pixels}, {"input_values": torch.randn(1, 8000)}):
        with contextlib.suppress(Exception), torch.no_grad():
            run = lambda inputs=inputs: model(**inputs)[0]
            return run, run(), run()
    return None


@pytest.mark.skipif(not FULL, reason="LRK_TEST_FULL")
def test_whatever_is_taken_computes_the_same():
    same, wrong = [], {}
    for config in CONFIG_MAPPING:
        model = None
        with contextlib.suppress(Exception):  # sizes that do not go together, packages that are not there
            model = tiny(config)
        parts = taken(model) if model is not None else []
        ran = outputs(model) if parts else None
        if ran is None or not torch.equal(ran[1], ran[2]):  # such as ViT-MAE's random masks
            continue
        run, y, _ = ran
        reorder(model, another_order(parts))
        with torch.no_grad():
            off = float((run() - y).norm() / y.norm())
        if off <= 1e-5:  # seen: 6e-7
            same.append(config)
        else:
            wrong[config] = off
    assert not wrong, wrong
    assert len(same) > 140, same
    assert {"llama", "qwen2", "qwen3", "mistral", "bert"} <= {*same}
