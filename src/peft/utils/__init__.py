"""Names at the paths by which the ecosystem imports them; what they name stands elsewhere. Resolved on first use."""

from peft._lazy import lazy_module


# The methods with a table of default targets.
_METHODS = """
    ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LNTUNING LOHA LOKR
    LORA MISS OFT OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT
"""

__getattr__, __dir__, __all__ = lazy_module(
    __name__,
    {
        "peft.utils.constants": (
            "ALLOWED_COMPUTE_DTYPES",
            "CONFIG_NAME",
            "INCLUDE_LINEAR_LAYERS_SHORTHAND",
            "SAFETENSORS_WEIGHTS_NAME",
            "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "UPCAST_DTYPES",
            "WEIGHTS_NAME",
            "bloom_model_postprocess_past_key_value",
            *(f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" for method in _METHODS.split()),
        ),
        "peft.utils.error": ("NoMatchingPeftModuleError", "PeftError"),
        "peft.utils.integrations": ("map_cache_to_layer_device_map",),
        "peft.utils.loftq_utils": ("loftq_init", "replace_lora_weights_loftq"),
        "peft.utils.other": (
            "AuxiliaryTrainingWrapper",
            "ModulesToSaveWrapper",
            "TrainableTokensWrapper",
            "_get_batch_size",
            "_get_input_embeddings_name",
            "_get_submodules",
            "_is_valid_match",
            "cast_mixed_precision_params",
            "get_gptqmodel_quant_linear",
            "get_quantization_config",
            "id_tensor_storage",
            "infer_device",
            "prepare_model_for_kbit_training",
            "shift_tokens_right",
            "transpose",
        ),
        "peft.utils.peft_types": ("PeftType", "TaskType", "register_peft_method"),
        "peft.utils.quantization_utils": (
            "get_quantization_kwargs",
            "quantization_extra_repr",
            "resolve_quantization_backend",
        ),
        "peft.utils.save_and_load": (
            "get_base_model_state_dict",
            "get_peft_model_state_dict",
            "load_peft_weights",
            "set_base_model_state_dict",
            "set_peft_model_state_dict",
        ),
        "peft.compat.trained_modules": (
            "_freeze_adapter",
            "_prepare_prompt_learning_config",
            "_set_adapter",
            "_set_trainable",
            "set_additional_trainable_modules",
        ),
        "peft.utils.warning": ("PeftWarning",),
    },
)
