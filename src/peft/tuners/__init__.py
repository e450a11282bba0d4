"""The methods, one file each. Importing this package registers all of them."""

from peft.tuners.hira import HiraConfig, HiraModel
from peft.tuners.ia3 import IA3Config, IA3Model
from peft.tuners.ln_tuning import LNTuningConfig, LNTuningModel
from peft.tuners.loha import LoHaConfig, LoHaModel
from peft.tuners.lokr import LoKrConfig, LoKrModel
from peft.tuners.lora import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.oft import OFTConfig, OFTModel
from peft.tuners.prefix_tuning import PrefixTuningConfig
from peft.tuners.trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from peft.tuners.vera import VeraConfig, VeraModel


__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "EvaConfig",
    "HiraConfig",
    "HiraModel",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "OFTConfig",
    "OFTModel",
    "PrefixTuningConfig",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
]
