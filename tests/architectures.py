"""Tiny models of many architectures, built from the config classes of transformers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as tf
from torch import nn


_DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
_SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT = {**_SMALL, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
_SOUND = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 3),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 0,
}
_WIDE_HEADS = {**_DECODER, "head_dim": 8}
_EXPERTS = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}

DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _DECODER),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, _DECODER),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, _DECODER),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, _WIDE_HEADS),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig, _WIDE_HEADS),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, _WIDE_HEADS),
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config, _DECODER),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig, _DECODER),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, _DECODER),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, _GPT),
    "gptj": (tf.GPTJForCausalLM, tf.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    "neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, {**_ENCODER, **_SMALL}),
    "opt": (tf.OPTForCausalLM, tf.OPTConfig, {**_ENCODER, **_SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {**_DECODER, "num_local_experts": 2}),
    "deepseek": (tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, {**_DECODER, **_EXPERTS, "num_key_value_heads": 4}),
}
"""Name -> model class, config class, and the fields that make it tiny."""

ENCODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, _ENCODER),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, _ENCODER),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, {**_ENCODER, "image_size": 8, "patch_size": 4}),
    "wav2vec2": (tf.Wav2Vec2ForSequenceClassification, tf.Wav2Vec2Config, {**_ENCODER, **_SOUND}),
}

ENCODER_DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, **_SMALL},
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        {**_ENCODER_DECODER, **_SMALL, "forced_eos_token_id": None},
    ),
}

ALL = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}


@functools.cache
def _built(name: str) -> nn.Module:
    model_cls, config_cls, fields = ALL[name]
    known = {key: value for key, value in fields.items() if not (name == "vit" and key in ("vocab_size",))}
    torch.manual_seed(0)
    model = model_cls(config_cls(**known)).eval()
    with torch.no_grad():  # the usual start is so small that blocks hardly do anything
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def build(name: str) -> Any:
    """A tiny model, in evaluation mode; the same weights each time."""
    return copy.deepcopy(_built(name))


def inputs(name: str, batch: int = 4) -> dict[str, torch.Tensor]:
    """Arguments for a forward of the model, labels included."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (batch, 6), generator=draw)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=draw), "labels": torch.arange(batch) % 2}
    if name == "wav2vec2":
        return {"input_values": torch.randn(batch, 96, generator=draw), "labels": torch.arange(batch) % 2}
    return {"input_ids": ids, "labels": torch.arange(batch) % 2 if name in ENCODERS else ids}
