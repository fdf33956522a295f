# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models of many kinds with random weights, and LoRA adapters of stock PEFT for them."""

import copy
import functools
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch
import transformers
from torch import nn

V = 97
_DECODER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=V,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, forced_eos_token_id=None)
_BART = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
    decoder_ffn_dim=48, vocab_size=V,
)  # fmt: skip
MODELS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**_DECODER)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**_DECODER)),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=V, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda t: t.BertModel(
        t.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=V)
    ),
    "t5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=V, decoder_start_token_id=0)
    ),
    "bart": lambda t: t.BartForConditionalGeneration(
        t.BartConfig(**_BART, **_IDS, max_position_embeddings=64)
    ),
    "whisper": lambda t: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            **_BART, **_IDS, num_mel_bins=8, max_source_positions=10, max_target_positions=32, suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "opt": lambda t: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
    "qwen2_moe": lambda t: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            **_DECODER, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=3, num_experts_per_tok=2,
            decoder_sparse_step=1,
        )
    ),
    "bloom": lambda t: t.BloomForCausalLM(t.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=2)),
    "xlnet": lambda t: t.XLNetModel(t.XLNetConfig(vocab_size=V, d_model=32, n_layer=2, n_head=2, d_inner=48)),
    "longt5": lambda t: t.LongT5ForConditionalGeneration(
        t.LongT5Config(
            vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0, local_radius=4,
            encoder_attention_type="local",
        )
    ),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**_DECODER, num_local_experts=3, num_experts_per_tok=2)),
    "llava": lambda t: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
                projection_dim=16,
            ),
            text_config=t.LlamaConfig(**_DECODER), image_token_index=V - 1, vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    ),
}  # fmt: skip


@functools.cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind](transformers).eval()


def tiny(kind: str) -> nn.Module:
    return copy.deepcopy(_made(kind))


def adapt(model: nn.Module, seed: int, targets: list[str] | str, rank: int = 4) -> peft.PeftModel:
    """The model (a copy) with a random LoRA adapter that shows."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def parts(adapted: peft.PeftModel) -> tuple:
    """What AdapterPool.add takes."""
    return adapted.peft_config["default"], peft.get_peft_model_state_dict(adapted)
