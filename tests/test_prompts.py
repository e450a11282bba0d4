"""Prompts and prefixes in use: generation, tasks, training, files, several in one model, caches.

What a prompt is, is checked against the same model fed by hand with the virtual tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.core import caches


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 39}
PADDED = torch.tensor([[0, 0, 0, 7, 8], [0, 0, 5, 6, 9], [3, 4, 12, 13, 14], [0, 21, 22, 23, 24]])
MASK = (PADDED != 0).long()
DECODERS = {
    "llama": lambda **kw: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **kw)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_head=4, n_layer=2, eos_token_id=39)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=40, hidden_size=16, num_attention_heads=4, num_hidden_layers=2, ffn_dim=24,
                     word_embed_proj_dim=16, pad_token_id=0, eos_token_id=39)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
}  # fmt: skip
SEQ2SEQ = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=4, num_heads=4, d_ff=24, num_layers=2, decoder_start_token_id=0)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
                      bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
    ),
}  # fmt: skip
CONFIGS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}


def base(name: str) -> nn.Module:
    """A tiny model with weights large enough to tell tokens apart; the same ones each time."""
    torch.manual_seed(0)
    model = {**DECODERS, **SEQ2SEQ}[name]()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


def adapted(name: str, method: str, tokens: int = 3, **kwargs: Any) -> PeftModel:
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    return get_peft_model(base(name), CONFIGS[method](task_type=task, num_virtual_tokens=tokens, **kwargs)).eval()


def by_hand(model: PeftModel, method: str, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding of a decoder, one full forward of the plain model for each token: no cache is kept."""
    plain, prompt = model.get_base_model(), model.get_prompt(len(ids))
    count = model.active_peft_config.num_virtual_tokens
    whole = torch.cat([mask.new_ones(len(ids), count), mask], 1)
    for _ in range(steps):
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        if method == "prompt":
            embeds = torch.cat([prompt, plain.get_input_embeddings()(ids)], 1)
            logits = plain(inputs_embeds=embeds, attention_mask=whole, position_ids=positions).logits
        else:
            cache = model.get_prompt(len(ids))
            logits = plain(
                input_ids=ids, attention_mask=whole, position_ids=positions[:, count:],
                **{caches.cache_argument(plain.forward): cache},
            ).logits  # fmt: skip
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        whole = torch.cat([whole, whole.new_ones(len(ids), 1)], 1)
    return ids


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": -1}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generate_equals_the_model_fed_by_hand(name: str, method: str) -> None:
    model = adapted(name, method)
    wanted = by_hand(model, method, PADDED, MASK, 8)
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert got.tolist() == wanted.tolist()
    plain = base(name).generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    logits = model(input_ids=PADDED, attention_mask=MASK).logits[:, -1]
    assert (logits - model.get_base_model()(input_ids=PADDED, attention_mask=MASK).logits[:, -1]).abs().max() > 0.1
    with model.disable_adapter():
        assert model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).tolist() == plain.tolist()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_generate_of_an_encoder_decoder_equals_the_model_fed_by_hand(name: str, method: str) -> None:
    model = adapted(name, method)
    plain, start = model.get_base_model(), model.config.decoder_start_token_id
    target = torch.full((4, 1), start)
    for _ in range(8):
        if method == "prompt":
            embeds = torch.cat([model.get_prompt(4)[:, :3], plain.get_input_embeddings()(PADDED)], 1)
            mask = torch.cat([MASK.new_ones(4, 3), MASK], 1)
            logits = plain(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=target).logits
        else:
            cache = {caches.cache_argument(plain.forward): model.get_prompt(4)}
            logits = plain(input_ids=PADDED, attention_mask=MASK, decoder_input_ids=target, **cache).logits
        target = torch.cat([target, logits[:, -1:].argmax(-1)], 1)
    got = model.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY)
    assert got.tolist() == target.tolist()
    assert got.tolist() != plain.generate(input_ids=PADDED, attention_mask=MASK, **GREEDY).tolist()
