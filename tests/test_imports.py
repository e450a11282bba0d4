"""The public face: what importing costs, and which names there are and where; signatures are in test_api.py."""

import os
import subprocess
import sys

import pytest
from toys import tiny_llama

import peft
from peft import LoraConfig, get_peft_model
from peft._lazy import lazy_module


# What other libraries import, as they write it.
IMPORTED_BY_CLIENTS = {
    "peft": "PeftModel PeftModelForCausalLM PeftMixedModel PeftConfig PromptLearningConfig PeftType TaskType "
    "LoraConfig LoKrConfig OFTConfig PrefixTuningConfig LoftQConfig LoraModel AutoPeftModelForCausalLM "
    "get_peft_model inject_adapter_in_model get_peft_model_state_dict set_peft_model_state_dict "
    "prepare_model_for_kbit_training __version__",
    "peft.peft_model": "PeftModel",
    "peft.functional": "delete_adapter set_adapter inject_adapter_in_model get_peft_model_state_dict "
    "set_peft_model_state_dict set_requires_grad cast_adapter_dtype",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.tuners": "lora LoraModel LoraConfig",
    "peft.tuners.tuners_utils": "BaseTunerLayer BaseTuner BasePromptEncoder onload_layer "
    "_maybe_include_all_linear_layers",
    "peft.tuners.lora": "LoraLayer LoraConfig Linear",
    "peft.tuners.lora.layer": "LoraLayer Linear Conv2d Embedding check_adapters_to_merge _LoraParameterProxy",
    "peft.tuners.lora.model": "LoraModel",
    "peft.utils": "ModulesToSaveWrapper get_peft_model_state_dict _get_submodules WEIGHTS_NAME CONFIG_NAME "
    "SAFETENSORS_WEIGHTS_NAME",
    "peft.utils.other": "fsdp_auto_wrap_policy AuxiliaryTrainingWrapper ModulesToSaveWrapper get_pattern_key",
    "peft.utils.hotswap": "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
    "check_hotswap_configs_compatible",
    "peft.utils.integrations": "dequantize_module_weight",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping get_model_conversion_mapping",
    "peft.utils.save_and_load": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available is_transformers_ge_v5",
    # what others import
    "peft.optimizers": "create_loraplus_optimizer create_lorafa_optimizer",
    "peft.tuners.adaption_prompt.config": "TRANSFORMERS_MODEL_CONFIG ModelTypeConfig",
    "peft.tuners.lora.gptq": "GPTQLoraLinear dispatch_gptq",
    "peft.tuners.lora.torchao": "TorchaoLoraLinear",
    "peft.tuners.lora.tp_layer": "LoraParallelLinear dispatch_megatron",
    "peft.tuners.lora.te": "TeLinear",
}


def in_new_interpreter(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


# ---- The cost of importing ------------------------------------------------------------------------------------------


def test_import_loads_neither_transformers_nor_any_part_of_the_package():
    loaded = in_new_interpreter("import sys, peft; print(*sys.modules)")
    assert "peft" in loaded
    heavy = {"transformers", "accelerate", "huggingface_hub", "safetensors", "bitsandbytes", "torchao"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert {name for name in loaded if name.startswith("peft")} == {"peft", "peft._lazy", "peft._version"}


def test_names_that_clients_ask_for_at_start_load_no_model_of_transformers():
    loaded = in_new_interpreter(
        "import sys\n"
        "from peft import PeftModel, LoraConfig, get_peft_model\n"
        "from peft.tuners.tuners_utils import BaseTunerLayer\n"
        "print(*(name for name in sys.modules if name.startswith('transformers.models.')))"
    )
    # Config classes and the tables of the auto classes are allowed; the code of a model is not.
    assert not [name for name in loaded if ".modeling_" in name and ".models.auto." not in name]


# ---- Names ----------------------------------------------------------------------------------------------------------


FIRST = (
    "from peft import PeftConfig; assert type(PeftConfig.from_pretrained(FOLDER)).__name__ == 'LoraConfig'",
    "from peft.config import PeftConfig; assert PeftConfig.from_peft_type(peft_type='IA3').peft_type == 'IA3'",
    "from peft import get_peft_config; assert type(get_peft_config({'peft_type': 'VERA'})).__name__ == 'VeraConfig'",
    "from peft import PEFT_TYPE_TO_CONFIG_MAPPING as known; assert len(known) > 40",
    "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; assert len(known) > 40",
    "from peft import AutoPeftModelForCausalLM as Auto; Auto.from_pretrained(FOLDER)",
    "from peft import load_peft_weights; assert load_peft_weights(FOLDER)",
)
"""What a script may ask of the library first, in a process that has loaded nothing of it."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each runs in a fork of one interpreter")
def test_whatever_is_asked_first_is_answered(tmp_path):
    base = tmp_path / "base"
    model = tiny_llama()
    model.save_pretrained(base)
    model.name_or_path = str(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    code = f"""
import os, traceback, torch, transformers
for first in {FIRST!r}:
    if os.fork() == 0:
        status = 1
        try:
            exec(first, {{"FOLDER": {str(tmp_path / "adapter")!r}}})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        print(first.replace(" ", "_"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "", result.stderr


def test_every_public_name_resolves():
    unresolved = {}
    for name in peft.__all__:
        try:
            getattr(peft, name)
        except (AttributeError, ImportError) as error:
            unresolved[name] = str(error)
    assert not unresolved


def test_dir_and_submodules_need_no_import_of_their_own():
    assert set(peft.__all__) <= set(dir(peft))
    assert in_new_interpreter("import peft; print(peft.utils.other.transpose.__name__)") == ["transpose"]


@pytest.mark.parametrize("module", IMPORTED_BY_CLIENTS)
def test_import_paths_of_clients(module):
    namespace = {}
    for name in IMPORTED_BY_CLIENTS[module].split():
        exec(f"from {module} import {name}", namespace)
        assert namespace[name] is not None


@pytest.mark.parametrize("typo", ["LoraConfg", "loraconfig", "LoRAConfig"])
def test_a_misspelt_name_is_answered_with_the_closest_one(typo):
    with pytest.raises(ImportError, match="Did you mean 'LoraConfig'"):
        exec(f"from peft import {typo}")
    with pytest.raises(AttributeError, match="Did you mean 'LoraConfig'"):
        getattr(peft, typo)


def test_lazy_module_keeps_what_it_found_and_refuses_ambiguous_tables(monkeypatch):
    get, list_names, names = lazy_module("peft", {"math": ["tau"], "json": ["dumps"]})
    assert names == ["dumps", "tau"]
    assert "tau" in list_names()
    monkeypatch.setattr(peft, "tau", None, raising=False)  # restores `peft` afterwards
    assert get("tau") == pytest.approx(6.283185307)
    assert vars(peft)["tau"] == get("tau")
    with pytest.raises(ValueError, match="'tau'.*'math'.*'cmath'"):
        lazy_module("peft", {"math": ["tau"], "cmath": ["tau"]})
