"""Load an adapter together with its base model, in one call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from peft._lazy import also_known
from peft.config import PeftConfig
from peft.core.files.io import TOKENIZER_CONFIG_NAME, hub_options, locate
from peft.errors import ConfigFileError, MissingFileError
from peft.options import value_of
from peft.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.tools.architecture import AUTO_CLASSES


# Packages that an adapter's config may name as the home of its base model's class: what the config says gets imported,
# and a config is a file from anywhere.
_IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")

# Options of `from_pretrained` that concern the adapter alone, and those that concern both downloads. All others are
# the base model's.
_FOR_ADAPTER = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "key_mapping", "low_cpu_mem_usage", "subfolder")
_FOR_BOTH = ("cache_dir", "force_download", "ignore_mismatched_sizes", "local_files_only", "proxies", "token")


def get_default_import_allowlist() -> list[str]:
    """The packages from which :class:`AutoPeftModel` imports base model classes unless told otherwise."""
    return list(_IMPORT_ALLOWLIST)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether the list has this module, or a package that holds it."""
    names = [allowlist] if isinstance(allowlist, str) else allowlist
    return any(parent_name == name or parent_name.startswith(f"{name}.") for name in names)


class _BaseAutoPeftModel:
    """Loads the base model that an adapter's config names, and puts the adapter around it.

    Attributes:
        auto_class: name of transformers' auto class that loads the base model; None: the config names the class.
        peft_class: the class of the result.
    """

    auto_class: ClassVar[str | None] = None
    peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            cls.auto_class, cls.peft_class = AUTO_CLASSES[task], MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} has no instances: call {name}.from_pretrained(name_or_path_of_the_adapter).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter and its base model.

        Where a tokenizer lies beside the adapter and has more tokens than the base model, the embeddings grow first.

        Args:
            pretrained_model_name_or_path: folder of the adapter, or its repository on the hub.
            is_trainable: go on training the adapter; otherwise it is frozen.
            config: instead of the saved one.
            revision: revision of the adapter; that of the base model is in the config.
            import_allowlist: packages from which the base model's class may be imported, where the config names it;
                by default those of :func:`get_default_import_allowlist`.
            kwargs: options of downloads, of :meth:`PeftModel.from_pretrained`, and of the base model's
                ``from_pretrained`` (``dtype``, ``device_map``, ``trust_remote_code``, ...).

        Raises:
            ValueError: if the config belongs to another task, names no class for the base model, or one that is not on
                the list. OSError: if it names no base model; and what loading the base model or the adapter raises.

        Examples:
            >>> base.save_pretrained("base")
            >>> base = AutoModelForCausalLM.from_pretrained("base")
            >>> get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
            >>> model = AutoPeftModelForCausalLM.from_pretrained("adapter")  # the base too
        """
        adapter_options = {name: kwargs.pop(name) for name in _FOR_ADAPTER if name in kwargs}
        adapter_options.update({name: kwargs[name] for name in _FOR_BOTH if name in kwargs})
        if revision is not None:
            adapter_options["revision"] = revision
        where = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config = PeftConfig.from_pretrained(where, **hub_options(dict(adapter_options)))
        cls._check_task(config, where)
        if not config.base_model_name_or_path:
            raise ConfigFileError(
                f"the config of {where} does not say which base model the adapter belongs to "
                "(base_model_name_or_path). Load that model and call PeftModel.from_pretrained(model, "
                f"{where!r}), or pass config= with the name filled in."
            )
        base_class = cls._base_class(config, where, import_allowlist)
        if config.revision is not None:
            kwargs["revision"] = config.revision
        base = base_class.from_pretrained(config.base_model_name_or_path, **kwargs)
        _grow_embeddings(base, where, adapter_options, bool(kwargs.get("trust_remote_code", False)))
        return cls.peft_class.from_pretrained(
            base, where, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **adapter_options
        )

    @classmethod
    def _check_task(cls, config: PeftConfig, where: str) -> None:
        """Raise ValueError where the adapter was made for another task than this class."""
        if config.task_type is None:
            return
        right = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
        if right is None or (cls.auto_class is not None and right is cls.peft_class):
            return
        task = str(value_of(config.task_type))
        raise ValueError(
            f"{where} is an adapter for the task {task}, which {cls.__name__} is not made for; use "
            f"Auto{right.__name__}."
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, where: str, allowlist: list[str] | None) -> Any:
        """The class whose ``from_pretrained`` loads the base model."""
        if cls.auto_class is not None:
            import transformers

            return getattr(transformers, cls.auto_class)
        mapping = config.auto_mapping or {}
        parent, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not parent or not name:
            raise ValueError(
                f"the config of {where} has neither a task_type nor an auto_mapping, so the class of its base model "
                "is unknown. Use the class for the task, such as AutoPeftModelForCausalLM, or load the base model "
                "yourself and call PeftModel.from_pretrained."
            )
        allowed = get_default_import_allowlist() if allowlist is None else allowlist
        if not check_import_allowlist(allowed, parent):
            raise ValueError(
                f"the config of {where} wants to import {parent!r}, which is in none of the packages allowed "
                f"({', '.join(allowed) or 'none'}). If importing it is safe, pass import_allowlist=[{parent!r}]."
            )
        try:
            return getattr(importlib.import_module(parent), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"the base model of {where} is a {name} of {parent}, which cannot be imported ({error}). Install what "
                "has it, or load the base model yourself and call PeftModel.from_pretrained."
            ) from error


def _grow_embeddings(base: nn.Module, where: str, adapter_options: dict[str, Any], trust_remote_code: bool) -> None:
    """Make room for the tokens of a tokenizer that was saved with the adapter."""
    if not hasattr(base, "resize_token_embeddings"):
        return
    options = hub_options(dict(adapter_options))
    try:
        locate(where, TOKENIZER_CONFIG_NAME, **options)
    except MissingFileError:
        return
    from transformers import AutoTokenizer

    count = len(AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options))
    if count > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(count)


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task: the config names the class of the base model."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel, task="CAUSAL_LM"):
    """For ``TaskType.CAUSAL_LM``."""


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel, task="SEQ_2_SEQ_LM"):
    """For ``TaskType.SEQ_2_SEQ_LM``."""


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel, task="SEQ_CLS"):
    """For ``TaskType.SEQ_CLS``."""


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel, task="TOKEN_CLS"):
    """For ``TaskType.TOKEN_CLS``."""


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel, task="QUESTION_ANS"):
    """For ``TaskType.QUESTION_ANS``."""


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel, task="FEATURE_EXTRACTION"):
    """For ``TaskType.FEATURE_EXTRACTION``."""


also_known(__name__)
