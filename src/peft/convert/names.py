"""Names of modules that were written without dots."""

from __future__ import annotations

from collections.abc import Iterable

from peft.errors import ConfigError


# Parts of module names with an underscore inside, of the models that such files are made for: UNets as diffusers and
# as their authors name them, CLIP, T5, DiTs (Flux, SD3), language models.
# fmt: off
_COMPOUND = [
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks",
    "joint_transformer_blocks", "to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj",
    "add_v_proj", "proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj",
    "time_embedding", "time_proj", "add_embedding", "linear_1", "linear_2", "class_embedding", "encoder_hid_proj",
    "ff_context", "norm1_context", "context_embedder", "x_embedder", "pos_embed", "time_text_embed",
    "timestep_embedder", "text_embedder", "guidance_embedder", "norm_out", "input_blocks", "middle_block",
    "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embed", "label_emb",
    "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
    "lm_head", "embed_tokens", "token_embedding", "position_embedding", "text_projection", "final_layer_norm",
    "layer_norm1", "layer_norm2", "double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp",
    "img_mod", "txt_mod", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "in_layer", "out_layer",
    "final_layer", "adaLN_modulation", "joint_blocks", "x_block", "context_block", "wi_0", "wi_1", "gate_up_proj",
    "qkv_proj", "c_attn", "c_proj", "c_fc", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "cross_attn",
    "ff_net",
]
# fmt: on
# fmt: off
_SINGLE = {
    "attentions", "resnets", "attn", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1", "conv2", "downsamplers",
    "upsamplers", "op", "norm", "norm1", "norm2", "encoder", "decoder", "layers", "layer", "block", "blocks",
    "embeddings", "mlp", "fc1", "fc2", "shared", "model", "transformer", "h", "wte", "lin", "linear", "linear1",
    "linear2", "qkv", "modulation", "SelfAttention", "EncDecAttention", "DenseReluDense", "q", "k", "v", "o", "wi",
    "wo", "out", "w1", "w2", "w3", "visual", "dense", "attention", "query", "key", "value", "output", "intermediate",
    "bert", "roberta",
}
# fmt: on
_PARTS = sorted((tuple(name.split("_")) for name in _COMPOUND), key=len, reverse=True)  # the longest compound first


def flat(name: str) -> str:
    """A module's name without dots."""
    return name.replace(".", "_")


def dotted(name: str, known: Iterable[str] | None) -> str:
    """The module that a name without dots means.

    Args:
        known: names of the base model's modules; without them, parts of names that models are known to have.

    Raises:
        ConfigError: there is no such module, there are several, or a part of the name is not known.
    """
    if known is not None:
        found = [module for module in known if flat(module) == name]
        if len(found) == 1:
            return found[0]
        which = f"means several modules: {', '.join(found)}" if found else "is no module of the base model"
        raise ConfigError(f"{name} {which}.")
    words, parts = name.split("_"), []
    while words:
        size = next((len(part) for part in _PARTS if tuple(words[: len(part)]) == part), 1)
        if size == 1 and not words[0].isdigit() and words[0] not in _SINGLE:
            raise ConfigError(
                f"{name}: where the dots of this module's name belong is not known ({words[0]}); give the base model, "
                "base=..., whose names say it."
            )
        parts.append("_".join(words[:size]))
        words = words[size:]
    return ".".join(parts)


UNET_OF_DIFFUSERS = {"down_blocks", "up_blocks", "mid_block"}
UNET_OF_AUTHORS = {"input_blocks", "middle_block", "output_blocks"}
TRANSFORMERS = ("double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "single_transformer_blocks")


def component_of(modules: Iterable[str]) -> str:
    """The component of a pipeline that modules are of, by their names; "" if these do not tell."""
    words = {word for module in modules for word in module.split(".")}
    if words & (UNET_OF_DIFFUSERS | UNET_OF_AUTHORS):
        return "unet"
    if words & {"text_model", "SelfAttention", "DenseReluDense"}:
        return "text_encoder"
    return "transformer" if words & set(TRANSFORMERS) else ""


def is_t5(modules: Iterable[str]) -> bool:
    """Whether modules are of a T5, as pipelines have one beside CLIPs."""
    return any(word in ("SelfAttention", "DenseReluDense") for module in modules for word in module.split("."))
