"""The public face: what importing costs, which names there are and where, and their signatures.

``data/reference_api.json`` lists, for the parts that exist, names and parameters of the API that the ecosystem is
written against: by module the functions (with parameters) and other names (null), by class its public methods.
"""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft
from peft._lazy import lazy_module


REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_api.json").read_text())

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
    "peft.tuners.tuners_utils": "BaseTunerLayer BaseTuner BasePromptEncoder",
    "peft.tuners.lora": "LoraLayer LoraConfig Linear",
    "peft.tuners.lora.layer": "LoraLayer Linear Conv2d Embedding",
    "peft.tuners.lora.model": "LoraModel",
    "peft.utils": "ModulesToSaveWrapper get_peft_model_state_dict _get_submodules WEIGHTS_NAME CONFIG_NAME "
    "SAFETENSORS_WEIGHTS_NAME",
    "peft.utils.other": "fsdp_auto_wrap_policy AuxiliaryTrainingWrapper ModulesToSaveWrapper",
    "peft.utils.hotswap": "hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
    "check_hotswap_configs_compatible",
    "peft.utils.integrations": "dequantize_module_weight",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
    "peft.utils.save_and_load": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available",
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


def test_a_name_of_a_later_release_says_so_and_lists_what_there_is():
    with pytest.raises(ImportError, match=r"does not have 'create_arrow_model' yet.*\bget_peft_model"):
        exec("from peft import create_arrow_model")
    with pytest.raises(AttributeError, match=r"does not have 'preprocess_loraga' yet.*\bget_peft_model"):
        peft.preprocess_loraga  # noqa: B018
    assert not hasattr(peft, "create_arrow_model")
    assert "create_arrow_model" not in peft.__all__


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


# ---- Signatures -----------------------------------------------------------------------------------------------------


def default_text(value):
    """A default as the reference file writes it: classes by their name, everything else by its ``repr``."""
    return value.__name__ if inspect.isclass(value) else repr(value)


def complaints(function, reference, bound):
    """How the parameters of ``function`` fall short of ``reference``, e.g. ``"self, name, r=8, *, safe=True"``."""
    ours = inspect.signature(function).parameters
    expected = split_parameters(reference)[bound:]
    found, last, keyword_only = [], -1, False
    for part in expected:
        name, _, default = part.partition("=")
        bare = name.lstrip("*")
        if name.startswith("*"):
            kind = inspect.Parameter.VAR_KEYWORD if name.startswith("**") else inspect.Parameter.VAR_POSITIONAL
            keyword_only = True
            if bare and kind not in [parameter.kind for parameter in ours.values()]:
                found.append(f"takes no {name}")
            continue
        if bare not in ours:
            found.append(f"has no parameter {bare}")
            continue
        parameter = ours[bare]
        actual = "" if parameter.default is parameter.empty else default_text(parameter.default)
        if default.rpartition("peft.")[1]:
            default = default.rpartition(".")[2]
        if actual != default:
            found.append(f"{bare} defaults to {actual or 'nothing'} instead of {default or 'nothing'}")
        position = list(ours).index(bare)
        if not keyword_only and (position < last or parameter.kind is parameter.KEYWORD_ONLY):
            found.append(f"{bare} is not at its place")
        last = max(last, position)
    return found


def split_parameters(text):
    """The parameters of a signature without its brackets; commas within defaults do not count."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def test_the_comparison_of_signatures_notices_differences():
    def function(a, b=1, *args, c="x", **kwargs): ...

    assert complaints(function, "a, b=1, *args, c='x', **kwargs", bound=False) == []
    assert complaints(function, "a, b=1", bound=False) == []
    assert complaints(function, "self, a", bound=True) == []
    assert complaints(function, "b=1, a", bound=False) == ["a is not at its place"]
    assert complaints(function, "a, b=2, d=(1, 2)", bound=False) == [
        "b defaults to 1 instead of 2",
        "has no parameter d",
    ]
    assert complaints(lambda a: a, "a, *args, **kwargs", bound=False) == ["takes no *args", "takes no **kwargs"]
    assert complaints(function, "a, c='x'", bound=False) == ["c is not at its place"]


@pytest.mark.parametrize("module", REFERENCE["modules"])
def test_names_and_functions_of_modules(module):
    imported = importlib.import_module(module)
    found = {}
    for name, reference in REFERENCE["modules"][module].items():
        if not hasattr(imported, name):
            found[name] = "missing"
        elif reference is not None:
            found[name] = complaints(getattr(imported, name), reference, bound=False)
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize("path", REFERENCE["classes"])
def test_methods_of_classes(path):
    module, name = path.split(":")
    cls = getattr(importlib.import_module(module), name)
    found = {}
    for method, reference in REFERENCE["classes"][path].items():
        if not hasattr(cls, method):
            found[method] = "missing"
        else:
            raw = inspect.getattr_static(cls, method)
            # A class method is already bound to its class, so the first parameter does not show.
            found[method] = complaints(getattr(cls, method), reference, bound=isinstance(raw, classmethod))
    assert not {method: what for method, what in found.items() if what}
