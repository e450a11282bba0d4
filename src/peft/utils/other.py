"""Helpers around models, under the names by which the ecosystem imports them."""

from peft._lazy import HOMES, lazy_module
from peft.utils import constants


__getattr__, __dir__, _elsewhere = lazy_module(
    __name__,
    {
        "peft.utils.constants": [
            name
            for name in vars(constants)
            if (name.isupper() and name[0] != "_") or name.endswith("postprocess_past_key_value")
        ],
        "peft.compat.helpers": [
            "check_file_exists_on_hf_hub",
            "get_gptqmodel_quant_linear",
            "match_target_against_key",
        ],
        "peft.core.model.auxiliary": [
            "AuxiliaryTrainingWrapper",
            "ModulesToSaveWrapper",
            "TrainableTokensWrapper",
        ],
        "peft.core.prompts.calls": ["shift_tokens_right"],
        "peft.compat.trained_modules": [
            "_freeze_adapter",
            "_prepare_prompt_learning_config",
            "_set_adapter",
            "_set_trainable",
            "get_pattern_key",
            "set_additional_trainable_modules",
        ],
        "peft.tools.preparation": [
            "_get_batch_size",
            "_get_input_embeddings_name",
            "_get_submodules",
            "_is_valid_match",
            "cast_mixed_precision_params",
            "fsdp_auto_wrap_policy",
            "get_quantization_config",
            "id_tensor_storage",
            "infer_device",
            "prepare_model_for_kbit_training",
            "transpose",
        ],
    },
    homes=HOMES,
)

__all__ = [name for name in _elsewhere if not name.startswith("_")]  # noqa: PLE0605
