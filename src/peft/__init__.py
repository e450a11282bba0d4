"""Parameter-efficient fine-tuning: adapt a frozen PyTorch model by small trainable parts.

The public names are resolved when they are first used: importing this package costs what importing torch costs, and
does not import transformers.
"""

from peft._lazy import lazy_module, no_such_name
from peft._version import __version__ as __version__


_TABLE = {
    "peft.auto": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "peft.config": ("PeftConfig", "PromptLearningConfig"),
    "peft.tools.memory": ("MemoryEstimate", "estimate_memory", "explain_out_of_memory"),
    "peft.tools.check_training": ("Finding", "check_training"),
    "peft.tools.condition_numbers": ("find_kappa_target_modules",),
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
        "inject_adapter_in_model",
    ),
    "peft.mapping_func": ("get_peft_model",),
    "peft.mixed_model": ("PeftMixedModel",),
    "peft.peft_model": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_layer_status",
        "get_model_status",
    ),
    "peft.tuners.adalora": ("AdaLoraConfig", "AdaLoraModel"),
    "peft.tuners.adamss": ("AdamssConfig", "AdamssModel"),
    "peft.tuners.adaption_prompt": ("AdaptionPromptConfig", "AdaptionPromptModel"),
    "peft.tuners.beft": ("BeftConfig", "BeftModel"),
    "peft.tuners.boft": ("BOFTConfig", "BOFTModel"),
    "peft.tuners.bottleneck": ("BottleneckConfig", "BottleneckModel"),
    "peft.tuners.c3a": ("C3AConfig", "C3AModel"),
    "peft.tuners.cartridge": (
        "CartridgeConfig",
        "CartridgeEncoder",
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "peft.tuners.cpt": ("CPTConfig", "CPTEmbedding"),
    "peft.tuners.deft": ("DeftConfig", "DeftModel"),
    "peft.tuners.delora": ("DeloraConfig", "DeloraModel"),
    "peft.tuners.fourierft": ("FourierFTConfig", "FourierFTModel"),
    "peft.tuners.frod": ("FrodConfig", "FrodModel"),
    "peft.tuners.glora": ("GloraConfig", "GloraModel"),
    "peft.tuners.gralora": ("GraloraConfig", "GraloraModel"),
    "peft.tuners.hira": ("HiraConfig", "HiraModel"),
    "peft.tuners.hra": ("HRAConfig", "HRAModel"),
    "peft.tuners.ia3": ("IA3Config", "IA3Model"),
    "peft.tuners.lily": ("LilyConfig", "LilyModel"),
    "peft.tuners.ln_tuning": ("LNTuningConfig", "LNTuningModel"),
    "peft.tuners.loha": ("LoHaConfig", "LoHaModel"),
    "peft.tuners.lokr": ("LoKrConfig", "LoKrModel"),
    "peft.tuners.lora.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "peft.tuners.lora.loraga": ("preprocess_loraga",),
    "peft.tuners.lora.restart": ("initialize",),
    "peft.tuners.lora": (
        "ArrowConfig",
        "BdLoraConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraConfig",
        "LoraGAConfig",
        "LoraModel",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "VeloraConfig",
        "convert_to_lora",
        "save_as_lora",
    ),
    "peft.tuners.miss": ("MissConfig", "MissModel"),
    "peft.tuners.multitask_prompt_tuning": ("MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"),
    "peft.tuners.oft": ("OFTConfig", "OFTModel"),
    "peft.tuners.osf": ("OSFConfig", "OSFModel"),
    "peft.tuners.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "peft.tuners.peanut": ("PeanutConfig", "PeanutModel"),
    "peft.tuners.poly": ("PolyConfig", "PolyModel"),
    "peft.tuners.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "peft.tuners.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "peft.tuners.psoft": ("PsoftConfig", "PsoftModel"),
    "peft.tuners.pvera": ("PveraConfig", "PveraModel"),
    "peft.tuners.randlora": ("RandLoraConfig", "RandLoraModel"),
    "peft.tuners.road": ("RoadConfig", "RoadModel"),
    "peft.tuners.shadow": ("ShadowConfig", "ShadowModel"),
    "peft.tuners.shira": ("ShiraConfig", "ShiraModel"),
    "peft.tuners.supertuning": ("SupertuningConfig", "SupertuningModel"),
    "peft.tuners.tinylora": ("TinyLoraConfig", "TinyLoraModel"),
    "peft.tuners.trainable_tokens": ("TrainableTokensConfig", "TrainableTokensModel"),
    "peft.tuners.unilora": ("UniLoraConfig", "UniLoraModel"),
    "peft.tuners.vblora": ("VBLoRAConfig", "VBLoRAModel"),
    "peft.tuners.vera": ("VeraConfig", "VeraModel"),
    "peft.tuners.waveft": ("WaveFTConfig", "WaveFTModel"),
    "peft.tuners.xlora": ("XLoraConfig", "XLoraModel"),
    "peft.utils.constants": (
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "bloom_model_postprocess_past_key_value",
    ),
    "peft.utils.error": ("NoMatchingPeftModuleError", "PeftError"),
    "peft.utils.loftq_utils": ("replace_lora_weights_loftq",),
    "peft.utils.other": ("cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"),
    "peft.utils.peft_types": ("PeftType", "TaskType"),
    "peft.utils.save_and_load": (
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
    "peft.utils.warning": ("PeftWarning",),
}

# Names of the ecosystem's API that this release does not have. Whoever adds one moves it into the table above.
_LATER = """
    create_arrow_model
"""


def _missing(name: str) -> str:
    later = _LATER.split()
    if name not in later:
        return no_such_name(__name__, name, [*__all__, *later])
    names = {other for group in _TABLE.values() for other in group}
    if name[0].islower():
        alternatives = [other for other in names if other[0].islower()]
    else:
        ending = "Model" if name.endswith("Model") else "Config"
        methods = [other.removesuffix("Model") for other in names if other.endswith("Model")]
        alternatives = [method + ending for method in methods if method + "Config" in names and method != "Peft"]
    return f"peft {__version__} does not have {name!r} yet. It has {', '.join(sorted(alternatives, key=str.lower))}."


__getattr__, __dir__, __all__ = lazy_module(__name__, _TABLE, _missing)
__all__.append("__version__")
