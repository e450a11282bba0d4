"""What is adapted where a config names no targets: the tables of known architectures, one for each method.

One row is "module names: architectures (`config.model_type`)"; a row whose names are a regular expression starts with
"re:". Most methods adapt the query and value projections, as LoRA's authors do; the others say what differs.
"""

from __future__ import annotations


SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"


def _targets(rows: dict[str, str]) -> dict[str, list[str] | str]:
    return {
        architecture: names.removeprefix("re:") if names.startswith("re:") else names.split()
        for names, architectures in rows.items()
        for architecture in architectures.split()
    }


def _copy(table: dict[str, list[str] | str], without: str = "", **changes: str) -> dict[str, list[str] | str]:
    """The table with its own lists, so that a user who edits one method's table leaves the others alone."""
    dropped = without.split()
    copied = {k: v if isinstance(v, str) else list(v) for k, v in table.items() if k not in dropped}
    return copied | {architecture: names.split() for architecture, names in changes.items()}


_QUERY_VALUE = _targets(
    {
        "q v": "t5 mt5",
        "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 "
        "qwen3",
        "q v q_proj v_proj": "blip-2",
        "q_proj v_proj fc1 fc2": "phi",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_proj value_proj": "deberta-v2",
        "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "c_attn": "gpt2 gpt_bigcode",
        "c_proj c_attn": "btlm",
        "in_proj": "deberta",
        "qkv_proj": "codegen",
        "Wqkv": "mpt",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
        # The text model only: the projections of the vision and audio towers have the same names.
        r"re:.*language_model\..*\.(q_proj|v_proj)": "gemma4",
    }
)

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)
TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE)

# Methods that share tensors among layers leave out phi's feed-forward layers, whose shapes differ from the others'.
_SAME_SHAPE = _copy(_QUERY_VALUE, phi="q_proj v_proj")
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = _copy(_SAME_SHAPE)
TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING = _copy(_SAME_SHAPE, dinov2="query value")
TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING = _copy(_SAME_SHAPE, vit="query value")
TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING = _copy(_SAME_SHAPE)
TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING = _copy(_QUERY_VALUE, vit="query value")

_MLP_OF_GPT2 = _copy(_QUERY_VALUE, gpt2="mlp.c_proj", gpt_bigcode="mlp.c_proj")
TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING = _copy(_MLP_OF_GPT2)
TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING = _copy(_MLP_OF_GPT2)
TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING = _copy(_MLP_OF_GPT2, without="btlm rwkv rwkv7")

# These two adapt the feed-forward blocks of some architectures as well, and know fewer of them.
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = _copy(
    _QUERY_VALUE,
    without="blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral "
    "mixtral stablelm phi rwkv rwkv7",
    t5="q k v o wi wo",
    mt5="q k v o wi_0 wi_1 wo",
    bart="q_proj k_proj v_proj out_proj fc1 fc2",
    opt="q_proj k_proj v_proj out_proj fc1 fc2",
    **{"deberta-v2": "query_proj key_proj value_proj dense"},
)
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = _copy(
    TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING, roberta="query key value dense"
)

TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = _targets(
    {
        "v": "t5 mt5",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
        "v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
    }
)

TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING = _targets(
    {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": "llama llama4 mistral mixtral gemma gemma2 "
        "gemma3_text qwen2 qwen3 phi",
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    }
)

# IA3 scales keys and values (or what contains them), and the hidden activations of the feed-forward block. The latter
# are scaled at the input of the layer that reads them, which the second table names.
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _targets(
    {
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "k_proj v_proj down_proj": "llama mistral",
        "k_proj v_proj w2": "mixtral",
        "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "q_proj v_proj fc2": "bart phi",
        "q_proj v_proj fc_out": "gptj",
        "q_proj v_proj c_proj": "gpt_neo",
        "q_proj k_proj fc2": "opt",
        "key value output.dense": "bert roberta",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
        "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    }
)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = _targets(
    {
        "wo": "t5",
        "": "mt5",
        "down_proj": "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
        "w2": "mixtral",
        "fc2": "bart opt phi",
        "fc_out": "gptj",
        "c_proj": "gpt_neo",
        "output.dense": "bert roberta deberta deberta-v2",
        "dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "mlp.dense_4h_to_h": "bloom",
        "mlp.c_proj": "gpt2 gpt_bigcode",
    }
)

TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _targets(
    {
        "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 "
        "gemma3_text",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
        "layer_norm final_layer_norm": "t5 mt5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
    }
)
