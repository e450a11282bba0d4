"""``peft eval``: the base model and adapters side by side, on held-out data or on tasks of lm_eval."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.cli import data as datasets
from peft.cli import models, training
from peft.cli.command import Command, argument, need
from peft.cli.output import Output
from peft.cli.recipe import TASKS, DataOptions, ModelOptions, Recipe, TrainerOptions
from peft.config import Options, option
from peft.errors import ConfigError
from peft.tools.merging import with_adapters


@dataclass
class EvalOptions(Options):
    """What is evaluated, and on what."""

    SHORT: ClassVar[dict[str, str]] = {"--data": "--data.eval"}
    UNUSED: ClassVar[set[str]] = {
        f"trainer.{field.name}"
        for field in dataclasses.fields(TrainerOptions)
        if field.name not in ("batch_size", "max_length", "answers_only", "precision", "device", "seed")
    }

    adapters: list[str] | None = argument("Adapters: folders, each with a name before it if need be (one=a/b).", "*")
    base: str | None = option(None, "Base model; that of the first adapter if left out.")
    task: str = option("sft", "What the data are for.", choices=("sft", "classify"))
    data: DataOptions = option(
        DataOptions, "The data; --data.eval, or what --data.held_out leaves of --data.train.", nested=DataOptions
    )
    trainer: TrainerOptions = option(TrainerOptions, "Batch size, length, device.", nested=TrainerOptions)
    recipe: str | None = option(None, "A recipe or the folder of a run, whose data and task are taken.")
    tasks: list[str] | None = option(None, "Tasks of lm_eval instead of data, as in [hellaswag,arc_easy].")
    limit: int | None = option(None, "Questions of each task of lm_eval at most.", minimum=1)
    quantization: str | None = option(None, "Load the base quantised.", choices=("nf4", "fp4", "int8"))
    only_adapters: bool = option(False, "Leave the base model out of the table.")


def act(options: EvalOptions, output: Output) -> dict[str, Any]:
    """Measure the base and each adapter."""
    adapters = models.pairs(options.adapters or [])
    base = models.base_for(options.base, adapters)
    base.quantization = options.quantization
    if options.recipe is not None:
        recipe = Recipe.load(options.recipe)
        options.task, options.data = recipe.task, recipe.data
        options.trainer.max_length = recipe.trainer.max_length
    names = [*([] if options.only_adapters and adapters else ["base"]), *adapters]
    if options.tasks is not None:
        return {"ok": True, "results": _of_tasks(options, base, adapters, names, output)}
    if options.task not in ("sft", "classify"):
        raise ConfigError(f"a recipe of the task {options.task} has no answers to compare with; give --data.eval.")
    return {"ok": True, "results": _of_data(options, base, adapters, names, output)}


def _of_data(options: EvalOptions, base: ModelOptions, adapters: dict[str, str], names: list[str],
             output: Output) -> dict[str, dict[str, float]]:  # fmt: skip
    """Loss and accuracy, by the trainer that trains on such data."""
    from transformers.trainer_callback import PrinterCallback

    if options.data.train is None:
        options.data.train = options.data.eval  # loading wants some, and takes the classes from it
    data = datasets.load(options.data, options.task)
    if data.eval is None:
        raise ConfigError("there is nothing to evaluate on: say --data.eval FILE, or --data.held_out ROWS.")
    output.say(f"{len(data.eval):,} samples")
    more = {} if data.labels is None else training.class_names(data.labels)
    tokenizer = models.load_tokenizer(base)
    model = models.load_base(base, TASKS[options.task], options.trainer.device, **more)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model = with_adapters(model, adapters)
    with tempfile.TemporaryDirectory() as folder:
        options.trainer.learning_rate = 0.0  # nothing trains, so none has to be found
        recipe = Recipe(task=options.task, model=base, data=options.data, trainer=options.trainer, output=folder)
        trainer = training.make_trainer(model, tokenizer, data, recipe)
        trainer.remove_callback(PrinterCallback)  # stdout is for the results
        found = {}
        for name in names:
            with _active(model, name, bool(adapters)):
                metrics = trainer.evaluate()
            keep = {"eval_loss": "loss", "eval_accuracy": "accuracy", "eval_mean_token_accuracy": "token accuracy"}
            found[name] = {keep[key]: float(value) for key, value in metrics.items() if key in keep}
    return found


def _active(model: Any, name: str, adapted: bool) -> AbstractContextManager:
    """A context in which the model is its base, or has this adapter."""
    if not adapted:
        return nullcontext()
    if name == "base":
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()


def _of_tasks(options: EvalOptions, base: ModelOptions, adapters: dict[str, str], names: list[str],
              output: Output) -> dict[str, dict[str, float]]:  # fmt: skip
    """The main measure of each task of lm_eval."""
    need("clients", "lm_eval")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = with_adapters(models.load_base(base, device=options.trainer.device), adapters)
    tokenizer = models.load_tokenizer(base)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        output.say(f"{name}: {', '.join(options.tasks or [])}")
        with _active(model, name, bool(adapters)):
            asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.trainer.batch_size)
            results = lm_eval.simple_evaluate(asked, tasks=options.tasks, limit=options.limit)["results"]
        found[name] = {
            f"{task} {key.partition(',')[0]}": value
            for task, values in results.items()
            for key, value in values.items()
            if isinstance(value, float) and "stderr" not in key
        }
    return found


def show(found: dict[str, Any], output: Output) -> None:
    """A table, a row for each model."""
    results = found["results"]
    columns = list(dict.fromkeys(key for values in results.values() for key in values))
    output.table(None, ["", *columns], [[name, *(v.get(c) for c in columns)] for name, v in results.items()])


COMMAND = Command(
    "eval",
    "Loss and accuracy on held-out data, or tasks of lm_eval: the base model and adapters side by side.",
    "  peft eval runs/sentiment/adapter --recipe runs/sentiment\n"
    "  peft eval runs/a/adapter runs/b/adapter --data.eval test.jsonl\n"
    "  peft eval runs/a/adapter --tasks [hellaswag] --limit 100",
    EvalOptions,
    act,
    show,
)
