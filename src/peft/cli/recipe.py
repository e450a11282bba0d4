"""What a training is made of: model, method, data, trainer. A recipe has these fields as YAML, flags their names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from peft.config import ORIGIN, Options, PeftConfig, option
from peft.core.files.io import replacing
from peft.errors import ConfigError, nearest
from peft.options import value_of
from peft.tools.catalogue import methods


NOT_IN_A_RECIPE = ("peft_type", *ORIGIN)
"""Fields of an adapter's config that follow from the rest of a recipe."""

TASKS = {"sft": "CAUSAL_LM", "dpo": "CAUSAL_LM", "classify": "SEQ_CLS"}
"""Task of a recipe -> task type of the adapter."""


VARIANTS = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
}
"""Names that papers gave to settings of a method -> that method and its fields."""


def resolve(method: str) -> tuple[str, dict[str, Any]]:
    """A registered method and the fields that a name asks for, which may be that of a variant."""
    name = str(method).lower().replace("-", "_")
    return VARIANTS.get(name, (name, {}))


def config_class(method: str) -> type[PeftConfig]:
    """The config class of a method.

    Raises:
        ConfigError: there is no such method; the message has the nearest.
    """
    known = {each.key: each.config for each in methods()}
    name = resolve(method)[0]
    if name not in known:
        hint = nearest(name, [*known, *VARIANTS])
        raise ConfigError(f"there is no method {method!r}.{hint} `peft methods` lists them.")
    return known[name]


def near_file(path: object) -> str:
    """A hint at a file beside a path that there is none at, of a similar name."""
    folder, name = os.path.split(str(path))
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return nearest(path, [os.path.join(folder, other) for other in there], cutoff=0.75) if name else ""


@dataclass
class ModelOptions(Options):
    """The base model, and how it is loaded."""

    name: str | None = option(None, "Base model: a folder, or a name on the hub.")
    revision: str | None = option(None, "Revision of a model on the hub.")
    dtype: str = option("auto", "Its dtype; auto: as its files have it.",
                        choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    quantization: str | None = option(
        None, "Load its linear layers quantised by bitsandbytes.", choices=("nf4", "fp4", "int8")
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")


@dataclass
class DataOptions(Options):
    """What is trained on, and how rows become samples."""

    train: str | None = option(None, "Data to train on: a .jsonl, .json, .csv or .parquet file, or a name on the hub.")
    eval: str | None = option(None, "Data to evaluate on, likewise.")
    split: str = option("train", "Split of a data set on the hub to train on.")
    eval_split: str = option("test", "Split of a data set on the hub to evaluate on.")
    held_out: int = option(0, "So many rows at the end of the training data are for evaluation instead.", minimum=0)
    rows: int | None = option(None, "Train on the first so many rows only.", minimum=1)
    prompt: str | None = option(None, "Makes prompts of rows, as in 'Review: {text}'; goes with completion.")
    completion: str | None = option(None, "Makes the answers to learn, as in ' {label}'; goes with prompt.")
    text: str | None = option(None, "Column of the texts, or a template with columns in braces; 'text' if left out.")
    replace: dict = option(dict, "Values that stand for others in templates, as in {positive: up, negative: down}.")
    label: str = option("label", "Column of the classes, for the task classify.")


@dataclass
class TrainerOptions(Options):
    """How it is trained."""

    steps: int | None = option(None, "Steps in all; left out, as many as the epochs take.", minimum=1)
    epochs: float = option(1.0, "Times through the data, where steps are not given.", above=0)
    batch_size: int = option(8, "Samples of a step in each process.", minimum=1)
    accumulate: int = option(1, "Batches that make up a step.", minimum=1)
    learning_rate: float | str = option("auto", "Highest learning rate; auto: that of the method.")
    schedule: str = option("cosine", "How it falls: cosine, linear, constant_with_warmup, ...")
    warmup: float = option(0.1, "Share of the steps in which it rises.", minimum=0, below=1)
    weight_decay: float = option(0.0, "Weight decay.", minimum=0)
    optimizer: str = option("adamw_torch", "Optimizer, by the name that transformers gives it.")
    max_length: int = option(1024, "Tokens at most in a sample; what is beyond is cut off.", minimum=2)
    packing: bool = option(False, "Put several short samples in one row (task sft).")
    answers_only: bool = option(True, "Count the loss on answers alone, where the data tell prompts from answers.")
    beta: float = option(0.1, "Strength of the pull to the base model (task dpo).", above=0)
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass: less memory.")
    precision: str = option(
        "auto", "Autocast; auto: bf16 on GPUs that have it.", choices=("auto", "no", "bf16", "fp16")
    )
    shard: bool = option(False, "Share the base model out among the processes (FSDP2).")
    log_every: int = option(10, "Steps between two lines of the log.", minimum=1)
    eval_every: int | None = option(None, "Steps between two evaluations; left out, one at the end.", minimum=1)
    save_every: int | None = option(None, "Steps between two checkpoints; left out, a tenth of all.", minimum=1)
    keep: int = option(2, "Checkpoints to keep.", minimum=1)
    seed: int = option(0, "Seed of all that is random.")
    device: str | None = option(None, "Device; left out, the first there is.", choices=("cpu", "cuda"))


@dataclass
class Recipe(Options):
    """A training: what `peft train` reads."""

    SHORT: ClassVar[dict[str, str]] = {"--model": "--model.name", "--data": "--data.train"}

    task: str = option("sft", "sft: supervised fine-tuning; dpo: preferences; classify: classes of texts.",
                       choices=tuple(TASKS))  # fmt: skip
    method: str = option("lora", "Method of the adapter; `peft methods` lists them.")
    model: ModelOptions = option(ModelOptions, "The base model.", nested=ModelOptions)
    adapter: dict = option(dict, "Fields of the method's config.")
    data: DataOptions = option(DataOptions, "The data.", nested=DataOptions)
    trainer: TrainerOptions = option(TrainerOptions, "How it is trained.", nested=TrainerOptions)
    output: str = option("runs/peft", "Folder of the run. A run that was interrupted goes on by itself.")
    restart: bool = option(False, "Begin anew, although there is an interrupted or a finished run in the folder.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapter_config()  # its errors come before anything is loaded
        rate = self.trainer.learning_rate
        if isinstance(rate, str) and rate != "auto":
            try:
                self.trainer.learning_rate = float(rate)
            except ValueError:
                raise ConfigError(f"trainer.learning_rate={rate!r} is neither a number nor auto.") from None
        if (self.data.prompt is None) != (self.data.completion is None):
            raise ConfigError("data.prompt and data.completion go together: give both, or none.")

    def adapter_config(self) -> PeftConfig:
        """The config of the adapter."""
        fields = {**resolve(self.method)[1], **self.adapter}
        return config_class(self.method)(**fields, task_type=TASKS[self.task])

    def require(self, *names: str) -> None:
        """Make sure that fields have values.

        Raises:
            ConfigError: one has none.
        """
        for name in names:
            section, _, field = name.rpartition(".")
            if getattr(getattr(self, section) if section else self, field) is None:
                raise ConfigError(f"{name} is missing: say it in the recipe, or with --{name} VALUE.")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, as a recipe has them; those that do nothing for a run are left out."""
        values = _plain(dataclasses.asdict(self))
        values.pop("restart")
        return values

    def save(self, folder: str) -> None:
        """Write ``recipe.yaml`` into a folder."""
        with replacing(folder) as path, open(path("recipe.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(self.to_dict(), file, sort_keys=False)

    @classmethod
    def load(cls, folder: str) -> Recipe:
        """The recipe of a run, from its folder or the file itself.

        Raises:
            ConfigError: there is none.
        """
        file = os.path.join(folder, "recipe.yaml") if os.path.isdir(folder) else folder
        if not os.path.isfile(file):
            raise ConfigError(f"there is no recipe {file!r}.{near_file(file)}")
        return cls(**read_yaml(file))


def read_yaml(file: str) -> dict[str, Any]:
    """The fields in a recipe.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            found = yaml.safe_load(stream) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {file!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"the recipe {file!r} holds a {type(found).__name__}, and not fields with values.")
    return found


def _plain(value: Any) -> Any:
    """The same without sets and enums, which YAML has no words for."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return value_of(value)
