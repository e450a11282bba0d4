"""AdapterFusion of the library ``adapters``, a file beside those of the adapters that it fuses.

Its formula is that of :class:`peft.Fuse`; ``V`` before or after the mean is the same. The tensors of a place are
``<block>.output_adapters.adapter_fusion_layer.a,b.query.weight``, with the members' names in theirs.
"""

from __future__ import annotations

from typing import Any

import torch

from peft.composition.config import CompositionConfig
from peft.composition.expressions import Fuse
from peft.convert.held import Held
from peft.convert.source import Job, Source
from peft.core.files.io import PREFIX
from peft.errors import ConfigError


CONFIG_NAME = "adapter_fusion_config.json"
WEIGHTS_NAME = "pytorch_model_adapter_fusion.bin"
_LAYER = "adapter_fusion_layer"
# What a fusion here is, in the words of its config there; whether there is a V, and a term for it, can be said.
_FIXED = {"key": True, "query": True, "query_before_ln": False, "residual_before": False, "temperature": False}


def is_fusion(config: dict[str, Any]) -> bool:
    """Whether a config beside the weights is of a fusion."""
    return "adapter_names" in config


def read_fusion(source: Source, places: dict[str, str], job: Job) -> Held:
    """A fusion as a composition.

    Args:
        places: lists of adapters in a block there -> the part here.
    """
    said, names = source.config["config"], source.config["adapter_names"]
    for field, value in _FIXED.items():
        if bool(said.get(field, value)) != value:
            job.lost[field] = f"a fusion here is as with {field}={value}"
    if said.get("dropout_prob"):
        job.lost["dropout_prob"] = "a fusion here has no dropout"
    fuse = Fuse(
        *names,
        kind="dynamic" if said.get("value") else "static",
        regularization=0.01 if said.get("regularization") else 0.0,
    )
    tensors = {}
    for key, tensor in source.tensors.items():
        block, _, rest = key.partition(f".{_LAYER}.{source.config['name']}.")
        block, _, place = block.rpartition(".")
        if place not in places or not rest:
            job.lost[key] = "it is no part of a fusion that is known here"
            continue
        tensors[f"{PREFIX}{block}.fusion.{places[place]}.{rest}"] = tensor
    job.notes.append(f"it is loaded from beside its members, whose folders are called {', '.join(names)}")
    return Held(CompositionConfig(expression=fuse, inference_mode=True), tensors)


def write_fusion(
    held: Held, places: dict[str, str], job: Job
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """The config, tensors and members of a fusion there.

    Raises:
        ConfigError: the composition is no fusion of adapters.
    """
    fuse, tensors = held.config.expression, {}
    if not isinstance(fuse, Fuse) or not all(isinstance(member, str) for member in fuse.members):
        raise ConfigError(f"adapters has files of fusions of adapters alone, and this is {fuse!r}.")
    names = [str(member) for member in fuse.members]
    theirs = {here: there for there, here in places.items()}
    for name, tensor in held.tensors.items():
        block, found, rest = name.removeprefix(PREFIX).partition(".fusion.")
        place, _, rest = rest.partition(".")
        if not found or place not in theirs:
            job.lost[name] = "adapters fuses what stands in blocks"
            continue
        tensors[f"{block}.{theirs[place]}.{_LAYER}.{','.join(names)}.{rest}"] = tensor
    dynamic = fuse.kind == "dynamic"
    if fuse.regularization not in (0, 0.01):
        job.lost["regularization"] = "adapters has a term of 0.01 for V in the loss, or none"
    said = {**_FIXED, "value": dynamic, "value_before_softmax": True, "value_initialized": dynamic,
            "regularization": dynamic and bool(fuse.regularization), "dropout_prob": None}  # fmt: skip
    return said, tensors, names
