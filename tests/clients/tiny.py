"""Tiny models, tokenizers and adapters with fixed numbers, the same under every version of `peft`."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from peft import LoraConfig


IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz", *".,?!"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
TRAINING = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1}
"""Arguments of every trainer: quiet, on the CPU."""


def config(**kwargs: Any) -> LlamaConfig:
    """A llama of two layers, width 16, whose words are `WORDS`."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"tie_word_embeddings": False, **kwargs},
    )


def fill(model: nn.Module, seed: int = 0, only: str = "", scale: float = 0.2) -> Any:
    """Give every parameter whose name holds `only` numbers that depend on the seed and on the order of names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name:
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(drawn + 1 if parameter.ndim == 1 and name.endswith("norm.weight") else drawn)
    return model


def llama(seed: int = 0, **kwargs: Any) -> LlamaForCausalLM:
    """The causal model, in evaluation mode."""
    return fill(LlamaForCausalLM(config(**kwargs)), seed).eval()


def scorer(seed: int = 0) -> LlamaForSequenceClassification:
    """One score a sequence."""
    return fill(LlamaForSequenceClassification(config(num_labels=1)), seed).eval()


def lora(**kwargs: Any) -> LoraConfig:
    """A LoRA on the attention, without dropout."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **kwargs})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`, with a chat template."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Outputs in evaluation mode, without gradients; the mode stays as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        result = model(input_ids=ids).logits
    for module, mode in modes.items():
        module.training = mode
    return result


def losses(trainer: Any) -> list[float]:
    """Training loss by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
