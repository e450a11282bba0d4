"""LoRA: W' = W + s B A, a low-rank update of a frozen weight (Hu et al. 2021, arXiv 2106.09685), and its relatives."""

from peft.compat.lora_variant import LoraVariant
from peft.tuners.lora.alora import ALora
from peft.tuners.lora.arrow import Arrow
from peft.tuners.lora.arrow_model import create_arrow_model
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.dora import Dora
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import VARIANTS


Linear = LoraLayer.by_name["Linear"]
Conv1d = LoraLayer.by_name["Conv1d"]
Conv2d = LoraLayer.by_name["Conv2d"]
Conv3d = LoraLayer.by_name["Conv3d"]
Embedding = LoraLayer.by_name["Embedding"]
MultiheadAttention = LoraLayer.by_name["MultiheadAttention"]
ParamWrapper = LoraLayer.by_name["ParamWrapper"]
Linear4bit = LoraLayer.by_name["Linear4bit"]
Linear8bitLt = LoraLayer.by_name["Linear8bitLt"]

__all__ = [
    "ALora",
    "Arrow",
    "Dora",
    "Lora",
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "LoraVariant",
    "MontecloraConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "VeloraConfig",
    "VARIANTS",
    "convert_to_lora",
    "create_arrow_model",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "save_as_lora",
]
