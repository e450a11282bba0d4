"""File names, default targets of known architectures, and other fixed values, at the path of the ecosystem."""

import torch

from peft.compat.helpers import bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value
from peft.compat.helpers import (
    starcoder_model_postprocess_past_key_value as starcoder_model_postprocess_past_key_value,
)
from peft.core.files.io import CONFIG_NAME as CONFIG_NAME
from peft.core.files.io import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peft.core.files.io import TOKENIZER_CONFIG_NAME as TOKENIZER_CONFIG_NAME
from peft.core.files.io import WEIGHTS_NAME as WEIGHTS_NAME
from peft.default_targets import *  # noqa: F403


EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

# Stand-ins where a config or a list of targets is needed and there is none.
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

# In which a quantised layer may compute, and which of its tensors' types adapters do not take over.
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

# By `config.model_type`. Empty, because current transformers keeps the caches of these models in the common layout.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict = {}
