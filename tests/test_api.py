"""Names and signatures are those of the API that the ecosystem is written against.

``data/reference_api.json`` has all of it: by module the functions (with parameters) and other names (null), by class
its methods (with parameters) and attributes (null).
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest
from torch import nn

from peft import LoraConfig, get_peft_model


REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_api.json").read_text())

# Where names or signatures differ on purpose: what a class says of its own is not what others call.
DIFFERENT = {
    ("peft.mixed_model:PeftMixedModel", "save_pretrained"): "safe_serialization defaults to True instead of False",
    ("peft.mixed_model:PeftMixedModel", "load_adapter"): "takes no *args",
    ("peft.tuners.trainable_tokens:TrainableTokensModel", "inject_adapter"): "takes no **kwargs",
    ("peft:AdaLoraModel", "add_weighted_adapter"): "takes no *args, takes no **kwargs",  # it refuses
    ("peft:OSFModel", "unmerge_adapter"): "takes no *args, takes no **kwargs",  # it refuses
    ("peft:PrefixEncoder", "forward"): "has no parameter prefix",  # a position for each token, as prompts have
    ("peft.tuners.lora:MultiheadAttention", "named_modules"): "takes no *args, takes no **kwargs",
    ("peft.tuners.lora:MultiheadAttention", "state_dict"): "takes no **kwargs",
    ("peft.tuners.lora:ParamWrapper", "get_delta_weight"):
        "has no parameter adapter_name, takes no *args, takes no **kwargs",
}  # fmt: skip
# Variants of LoRA are adapters of a class of their own here, see docs/add_a_method.md.
OTHERWISE = {"peft.tuners.lora:LoraVariant"}
# Methods of the classes of single kinds, for which this package has one class.
OF_ONE_KIND = {
    "peft.tuners.lora:MultiheadAttention": {"merge_masks"},  # an adapted layer reads it from its base
}


def default_text(value):
    """A default as the reference file writes it: classes and functions by name, everything else by its ``repr``."""
    return value.__name__ if inspect.isclass(value) or inspect.isfunction(value) else repr(value)


def complaints(function, reference, bound):
    """How the parameters of ``function`` fall short of ``reference``, e.g. ``"self, name, r=8, *, safe=True"``."""
    ours = inspect.signature(function).parameters
    expected = split_parameters(reference)[bound:]
    kinds = {parameter.kind for parameter in ours.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds and len(ours) <= 3:
        return []  # it hands everything on
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
        if default and actual != default:  # one where none is asked for is no harm
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


@pytest.mark.parametrize("path", sorted(set(REFERENCE["classes"]) - OTHERWISE))
def test_methods_of_classes(path):
    module, name = path.split(":")
    cls = getattr(importlib.import_module(module), name)
    found = {}
    for method, reference in REFERENCE["classes"][path].items():
        if reference is None or method in OF_ONE_KIND.get(path, ()):
            continue
        holder = cls
        if not hasattr(holder, method):
            found[method] = "missing"
        elif not inspect.isclass(getattr(holder, method)):
            raw = inspect.getattr_static(holder, method)
            # A class method is already bound to its class, so the first parameter does not show.
            what = complaints(getattr(holder, method), reference, bound=isinstance(raw, classmethod))
            found[method] = "" if ", ".join(what) == DIFFERENT.get((path, method)) else ", ".join(what)
    assert not {method: what for method, what in found.items() if what}


def test_attributes_of_models_and_layers():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    tuner, layer = model.base_model, model.base_model.model[0]
    names = {"peft.peft_model:PeftModel": model, "peft.tuners.lora:LoraModel": tuner, "peft.tuners.lora:Linear": layer}
    for path, thing in names.items():
        attributes = [name for name, reference in REFERENCE["classes"][path].items() if reference is None]
        absent = {"lora_variants"}  # here an adapter is of its variant's class
        assert attributes
        assert not [n for n in attributes if n not in absent and not hasattr(thing, n)]
