"""Which class of GPTQModel keeps weights of a given quantisation."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from peft.import_utils import is_gptqmodel_available


WHERE = ("gptqmodel.utils.importer", "hf_select_quant_linear")
"""The module of GPTQModel, and its function that chooses a class for transformers' configs."""


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type | None:
    """The class of linear layers that GPTQModel would use, or None without a config or without GPTQModel.

    Args:
        gptq_quantization_config: a ``GPTQConfig`` of transformers, or a dict of its fields.
        device_map: where the layers go; GPTQModel chooses the kernel by it.

    Raises:
        ValueError: if the installed GPTQModel asks for a field that the config does not have.
    """
    if gptq_quantization_config is None or not is_gptqmodel_available():
        return None
    choose = getattr(importlib.import_module(WHERE[0]), WHERE[1])
    config = gptq_quantization_config
    known = dict(config if isinstance(config, dict) else config.to_dict())
    known.update(pack=False, device_map=device_map)
    given, lacking = {}, []
    for name, parameter in inspect.signature(choose).parameters.items():  # releases differ in what they take
        if known.get(name) is not None:
            given[name] = known[name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            lacking.append(name)
    if lacking:
        raise ValueError(f"GPTQModel's {WHERE[1]} needs {', '.join(lacking)}, which the quantisation config lacks.")
    return choose(**given)
