"""One training by a recipe: model, trainer, checks before the first step, going on after an interruption."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch

from peft.cli import data as datasets
from peft.cli import models
from peft.cli.command import Failure, need
from peft.cli.output import Output
from peft.cli.recipe import TASKS, Recipe
from peft.core.files.io import replacing
from peft.errors import ConfigError
from peft.tools.learning_rates import learning_rate_of


CHECKPOINTS = "checkpoints"


@dataclass
class Training:
    """A training that is ready to run.

    Attributes:
        trainer: of transformers or TRL; its model is adapted.
        recipe: as it runs, with the learning rate as a number.
        remarks: what was seen before the first step, and what would change it.
        memory: what it takes by estimate, in bytes; None where there is no estimate.
    """

    trainer: Any
    recipe: Recipe
    remarks: list[str]
    memory: int | None = None


def prepare(recipe: Recipe, output: Output) -> Training:
    """Load model and data, make the trainer, and look at it before the first step."""
    need("train", "datasets", *(["trl"] if recipe.task != "classify" else []))
    import transformers

    from peft.mapping_func import get_peft_model

    recipe.require("model.name", "data.train")
    choose_rate(recipe, output)
    data = datasets.load(recipe.data, recipe.task)
    output.say(f"{len(data.train):,} samples to train on, {len(data.eval or ()):,} to evaluate on")
    tokenizer = models.load_tokenizer(recipe.model)
    transformers.set_seed(recipe.trainer.seed)  # a new head is drawn from it
    more = {} if data.labels is None else class_names(data.labels)
    base = models.load_base(recipe.model, TASKS[recipe.task], recipe.trainer.device, **more)
    if recipe.model.quantization is not None:
        from peft.tools.preparation import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(base, recipe.trainer.gradient_checkpointing)
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    transformers.set_seed(recipe.trainer.seed)  # and the adapter, whatever loading has drawn
    model = get_peft_model(base, recipe.adapter_config())
    memory, remarks = _of_memory(model, recipe)
    if recipe.trainer.shard and not _shards(recipe):
        remarks.append("trainer.shard does nothing on CPUs and in a single process: each keeps the whole base.")
    trainer = make_trainer(model, tokenizer, data, recipe)
    remarks += _of_lost(len(data.train), len(trainer.train_dataset), recipe)
    return Training(trainer, recipe, remarks + _of_training(trainer, recipe), memory)


def choose_rate(recipe: Recipe, output: Output) -> None:
    """Put a number in the place of the learning rate "auto"."""
    if recipe.trainer.learning_rate == "auto":
        rate = learning_rate_of(recipe.adapter_config(), recipe.task)
        output.say(f"learning rate {rate.value:g} ({rate.source})")
        recipe.trainer.learning_rate = rate.value


def class_names(labels: list[str]) -> dict[str, Any]:
    """What a model's config has to know of its classes."""
    names = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": names, "label2id": {name: i for i, name in names.items()}}


# --- trainers ----------------------------------------------------------------------------------------------------


def make_trainer(model: Any, tokenizer: Any, data: datasets.Data, recipe: Recipe) -> Any:
    """The trainer of a recipe's task, for a model and its data."""
    import transformers

    arguments = _arguments(recipe, len(data.train), data.eval is not None)
    given = {"train_dataset": data.train, "eval_dataset": data.eval}
    if recipe.task == "classify":
        limit = recipe.trainer.max_length

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            return dict(tokenizer(row["text"], truncation=True, max_length=limit, return_token_type_ids=False))

        given = {k: None if d is None else d.map(encode, remove_columns=["text"]) for k, d in given.items()}
        return transformers.Trainer(
            model,
            transformers.TrainingArguments(**arguments),
            **given,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
        )
    import trl

    if recipe.task == "dpo":
        options = trl.DPOConfig(**arguments, max_length=recipe.trainer.max_length, beta=recipe.trainer.beta)
        return trl.DPOTrainer(model, args=options, processing_class=tokenizer, **given)
    chats = "messages" in data.train.column_names
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the data are chats (messages), and the tokenizer of {recipe.model.name} has no chat template. Take a "
            "model made for chats, or data with prompt and completion."
        )
    options = trl.SFTConfig(
        **arguments,
        max_length=recipe.trainer.max_length,
        packing=recipe.trainer.packing,
        completion_only_loss=None if recipe.trainer.answers_only else False,
        assistant_only_loss=chats and recipe.trainer.answers_only,
    )
    return trl.SFTTrainer(model, args=options, processing_class=tokenizer, **given)


def _accuracy(predictions: Any) -> dict[str, float]:
    logits = predictions.predictions[0] if isinstance(predictions.predictions, tuple) else predictions.predictions
    return {"accuracy": float((logits.argmax(-1) == predictions.label_ids).mean())}


def _arguments(recipe: Recipe, samples: int, evaluates: bool) -> dict[str, Any]:
    """What all trainers take."""
    t = recipe.trainer
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    each = math.ceil(samples / (t.batch_size * t.accumulate * processes))
    steps = t.steps or max(1, math.ceil(each * t.epochs))
    on_gpu = models.device_of(t.device).type == "cuda"
    bf16 = t.precision == "bf16" or (t.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    arguments = {
        "output_dir": os.path.join(recipe.output, CHECKPOINTS),
        "max_steps": steps,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.accumulate,
        "learning_rate": float(t.learning_rate),
        "lr_scheduler_type": t.schedule,
        "warmup_steps": int(t.warmup * steps),
        "weight_decay": t.weight_decay,
        "optim": t.optimizer,
        "gradient_checkpointing": t.gradient_checkpointing,
        "bf16": bf16,
        "fp16": t.precision == "fp16",
        "logging_steps": t.log_every,
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluates and t.eval_every else "no",
        "eval_steps": t.eval_every,
        "save_strategy": "steps",
        "save_steps": t.save_every or max(1, steps // 10),
        "save_total_limit": t.keep,
        "seed": t.seed,
        "data_seed": t.seed,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if _shards(recipe):
        arguments.update(fsdp=True, fsdp_config={"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"})
    return arguments


def _shards(recipe: Recipe) -> bool:
    """Whether the base is shared out among processes; accelerate does so on accelerators only."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return recipe.trainer.shard and several and models.device_of(recipe.trainer.device).type != "cpu"


# --- before the first step -----------------------------------------------------------------------------------------


def _of_memory(model: Any, recipe: Recipe) -> tuple[int | None, list[str]]:
    """What the training takes by estimate, and what would take less where there is not enough."""
    from peft.tools.footprint import readable
    from peft.tools.memory import estimate_memory

    t = recipe.trainer
    try:
        found = estimate_memory(
            model, None, t.batch_size, t.max_length, gradient_checkpointing=t.gradient_checkpointing or None
        )
    except Exception as error:  # a model for which none can be made trains all the same
        return None, [f"no estimate of memory: {str(error).splitlines()[0]}"]
    remarks = [f"memory by estimate, with samples of {t.max_length} tokens: {readable(found.total)}"]
    free = free_memory(models.device_of(t.device))
    if free is not None and found.total - found.weights > free:
        ways = ["trainer.max_length"] + ["trainer.batch_size with trainer.accumulate"] * (t.batch_size > 1)
        ways += ["trainer.gradient_checkpointing=true"] * (not t.gradient_checkpointing)
        ways += ["model.quantization=nf4"] * (recipe.model.quantization is None)
        remarks.append(
            f"that is more than is free ({readable(free)}, the model loaded). It would take less with a smaller "
            f"{ways[0]}, {', '.join(ways[1:])}."
        )
    return found.total, remarks


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, AttributeError, OSError):
        return None


def _of_lost(before: int, after: int, recipe: Recipe) -> list[str]:
    """How many samples were left out because nothing of their answers was left."""
    limit = recipe.trainer.max_length
    if not after:
        raise ConfigError(f"no sample has its answer within trainer.max_length={limit} tokens: raise it.")
    if recipe.trainer.packing or after >= before:
        return []
    return [f"{before - after} of {before} samples have no answer within trainer.max_length={limit} tokens: left out."]


def _of_training(trainer: Any, recipe: Recipe) -> list[str]:
    """What keeps the loss from falling, as far as one batch shows."""
    from peft.tools.check_training import check_training

    batch = None
    if recipe.task != "dpo":  # whose loss is the trainer's
        batch = next(iter(trainer.get_train_dataloader()))
        batch = {name: t.to(trainer.model.device) for name, t in batch.items() if isinstance(t, torch.Tensor)}
    found = check_training(trainer.model, batch, learning_rate=float(recipe.trainer.learning_rate))
    return [str(finding) for finding in found]


# --- going on ------------------------------------------------------------------------------------------------------


def unfinished(recipe: Recipe, output: Output) -> str | None:
    """The checkpoint from which a run goes on; None for a new one. The folder is ready for it afterwards.

    Raises:
        Failure: the folder holds a finished run, or one of another recipe.
    """
    folder = recipe.output
    old = os.path.join(folder, "recipe.yaml")
    if recipe.restart or not os.path.isfile(old):
        if output.first:
            shutil.rmtree(os.path.join(folder, CHECKPOINTS), ignore_errors=True)
            for name in ("metrics.json", "history.json"):
                if os.path.exists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            recipe.save(folder)
        return None
    check_same(recipe)
    if os.path.isfile(os.path.join(folder, "metrics.json")):
        raise Failure(f"{folder} holds this run, finished. Give another --output, or --restart true to begin anew.")
    last = last_checkpoint(os.path.join(folder, CHECKPOINTS))
    if last is not None:
        output.say(f"going on from {last}")
    return last


def check_same(recipe: Recipe) -> None:
    """Make sure that a folder holds a run of this very recipe.

    Raises:
        Failure: it is another; what differs is named.
    """
    if changes := _differences(Recipe.load(recipe.output).to_dict(), recipe.to_dict()):
        raise Failure(
            f"{recipe.output} holds a run of another recipe ({'; '.join(changes[:3])}). Give another --output, or "
            "--restart true to begin anew."
        )


def last_checkpoint(folder: str) -> str | None:
    """The last checkpoint in a folder that is complete: one during which the process was killed does not count."""
    names = [name for name in os.listdir(folder) if name.startswith("checkpoint-")] if os.path.isdir(folder) else []
    whole = [name for name in names if _is_complete(os.path.join(folder, name))]
    return os.path.join(folder, max(whole, key=lambda name: int(name.partition("-")[2]))) if whole else None


def _is_complete(folder: str) -> bool:
    """Whether the trainer's state, which is written last, can be read, and each process has left its random state."""
    # One for each process.
    states = sum(name.startswith("rng_state") for name in os.listdir(folder))
    try:
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return states >= int(os.environ.get("WORLD_SIZE", "1"))


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new and (prefix + name) not in ("output", "trainer.keep"):
            found.append(f"{prefix}{name} {old!r} -> {new!r}")
    return found


def write_json(folder: str, name: str, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(folder) as path, open(path(name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
