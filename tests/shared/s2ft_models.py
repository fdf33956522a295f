# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose heads and channels all differ, biases and norms too: MHA and GQA, gated and plain, decoders and encoders."""

import copy
import functools
import os
from collections.abc import Iterable, Iterator

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as t
from torch import Tensor, nn

V = 61
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
_DECODER = SIZES | dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_GQA, _MHA = dict(num_key_value_heads=2), dict(num_key_value_heads=4)
MODELS = {
    "llama-mha": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**_DECODER, **_MHA, head_dim=12, attention_bias=True, mlp_bias=True)
    ),
    "llama-gqa": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_DECODER, **_GQA)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_DECODER, **_GQA)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_DECODER, **_GQA, head_dim=8)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_DECODER, num_key_value_heads=1)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
}
DECODERS = [kind for kind in MODELS if kind != "bert"]


@functools.cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():  # at their own start most biases are 0 and norms 1
            p.add_(0.3 * torch.randn(p.shape) * (1 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


def made(kind: str) -> nn.Module:
    return copy.deepcopy(_made(kind))


def batch(seed: int = 0, rows: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model: nn.Module, **kwargs) -> Tensor:
    return model(**(kwargs or batch())).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert not [name for name, t in before.items() if not torch.equal(t, now[name])]


def cycle(n: int, gen: torch.Generator) -> Tensor:
    """A random order that leaves nothing where it was."""
    c, order = torch.randperm(n, generator=gen), torch.empty(n, dtype=torch.int64)
    order[c] = c.roll(1)
    return order


def another_order(parts: Iterable, seed: int = 0) -> Iterator[tuple]:
    """A random order of every part: groups as a whole, and heads within them."""
    gen = torch.Generator().manual_seed(seed)
    for part in parts:
        groups = cycle(part.units // part.group, gen)
        yield part, torch.cat([g * part.group + cycle(part.group, gen) for g in groups])
