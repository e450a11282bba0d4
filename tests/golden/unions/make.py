"""Records what the library ``adapters`` computes for MAM and UniPELT: `python make.py` in an environment that has it.

Made with adapters 1.3.0, transformers 4.57.6 and torch 2.13, eager attention. Nothing is padded, over which its gates
average too. The prefix of an encoder-decoder is in the self-attention of the decoder alone, as it is here. There is no
MAM of a LLaMA: where a block normalises first, its parallel adapters read the stream before that, and ours what the
network reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import torch
import transformers as tf
from adapters import LoRAConfig, MAMConfig, ParBnConfig, PrefixTuningConfig, SeqBnConfig, UniPELTConfig
from safetensors.torch import save_file


HERE = Path(__file__).parent
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40,
}  # fmt: skip
BASES = {
    "bert": (tf.BertModel, tf.BertConfig, SMALL),
    "llama": (tf.LlamaModel, tf.LlamaConfig, {**SMALL, "num_key_value_heads": 1}),
    "bart": (
        tf.BartModel,
        tf.BartConfig,
        {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40},
    ),
}  # fmt: skip


def prefix(base: str, **fields: object) -> PrefixTuningConfig:
    """Three tokens: by a network or, before rotary positions, as a table whose keys can be turned."""
    return PrefixTuningConfig(prefix_length=3, bottleneck_size=5, flat=base == "llama", encoder_prefix=base != "bart",
                              cross_prefix=False, **fields)  # fmt: skip


def main() -> None:
    """Write a file for each base and each union."""
    for base, (model_cls, config_cls, fields) in BASES.items():
        unions = {
            "mam": MAMConfig(prefix(base), ParBnConfig(reduction_factor=4)),
            "unipelt": UniPELTConfig(
                prefix(base, use_gating=True),
                SeqBnConfig(reduction_factor=4, use_gating=True),
                LoRAConfig(r=4, alpha=2, use_gating=True),
            ),
        }
        for name, union in unions.items():
            if (base, name) == ("llama", "mam"):
                continue
            torch.manual_seed(0)
            model = model_cls(config_cls(**fields, attn_implementation="eager")).eval()
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() > 1:
                        p.normal_(0, 0.2)
            tensors = {f"base|{key}": t.clone() for key, t in model.state_dict().items()}
            adapters.init(model)
            model.add_adapter("a", config=union)
            model.set_active_adapters("a")
            given = {"input_ids": torch.randint(3, 40, (3, 6))}
            if base == "bart":
                given["decoder_input_ids"] = torch.randint(3, 40, (3, 5))
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if ".a." in key:
                        p.add_(torch.randn(p.shape) * 0.5)
                        tensors[f"adapter|{key}"] = p.clone()
                output = model(**given).last_hidden_state
            tensors.update({f"in|{key}": t for key, t in given.items()}, output=output)
            held = {key: t.contiguous() for key, t in tensors.items()}
            save_file(held, HERE / f"{base}_{name}.safetensors", {"config": json.dumps(fields)})


if __name__ == "__main__":
    main()
