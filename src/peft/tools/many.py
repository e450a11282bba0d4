"""K adapters trained on K data sets over one frozen base, in one run: each as if it were trained alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from peft.core.files.entries import entries
from peft.core.model.walk import bare


class Rounds(Dataset):
    """What the steps of a run read: item t holds the next batch of each adapter that has not come to its end.

    An adapter's own steps are the first of the run, without gaps, so that its learning rate falls as it would alone.

    Args:
        datasets: adapter -> its samples.
        size: samples of a batch of one adapter. epochs: how often each data set is gone through.
        seed: of the order of the samples, which is that of the data set if None.
    """

    def __init__(self, datasets: Mapping[str, Any], size: int, epochs: float, seed: int | None) -> None:
        self.datasets, self.size, self.seed = dict(datasets), size, seed
        self.batches = {name: math.ceil(len(data) / size) for name, data in self.datasets.items()}
        self.steps = {name: math.ceil(epochs * count) for name, count in self.batches.items()}
        self.stopped: set[str] = set()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(self.batches.values())

    def __getitem__(self, t: int) -> list[tuple[str, Any]]:
        t += self.epoch * len(self)
        return [(name, self.datasets[name][i]) for name in self.going(t) for i in self._rows(name, t)]

    def going(self, t: int) -> list[str]:
        """The adapters that train in step t."""
        return [name for name in self.datasets if name not in self.stopped and t < self.steps[name]]

    def _rows(self, name: str, t: int) -> list[int]:
        epoch, batch = divmod(t, self.batches[name])
        count = len(self.datasets[name])
        order = range(count)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(count, generator=generator).tolist()  # type: ignore[assignment]
        return list(order[batch * self.size : (batch + 1) * self.size])


class MultiAdapterTrainer(Trainer):
    """transformers' ``Trainer`` for several adapters of one model, each with a data set of its own.

    A step computes the batches of all adapters in one forward and backward, each row with its adapter
    (``adapter_names``). The base is read once for all of them, which is what makes it faster than one run after
    another. What an adapter learns is what it would learn alone: its loss is the mean over its own rows, and gradient
    clipping, optimizer state, learning rate, schedule, early stopping and checkpoints are its own.

    Args:
        model: a :class:`PeftModel` with the adapters.
        args: of the run; ``per_device_train_batch_size`` is that of each adapter, and ``num_train_epochs`` goes
            through each data set.
        train_datasets: adapter -> samples, of which there can be any number (``len`` and ``[i]``).
        eval_datasets: adapter -> samples; its metrics are called ``eval_NAME_loss`` and so on.
        learning_rates: adapter -> its rate; ``args.learning_rate`` for those that are not named.
        early_stopping_patience: an adapter stops after so many evaluations without a lower loss; None: never. Its best
            state is saved under ``args.output_dir/best/NAME`` whenever there is a new one.
        compute_loss_func: ``(outputs, labels, num_items_in_batch=None) -> loss`` of the rows of one adapter, for tasks
            other than causal language modelling and sequence classification.
        kwargs: what else ``Trainer`` takes.

    Raises:
        ValueError: for names that are no adapters of the model, and for settings that would mix the adapters' steps.

    Example::

        trainer = MultiAdapterTrainer(model, args, train_datasets={"de": german, "fr": french},
                                      learning_rates={"fr": 3e-4}, data_collator=collator)
        trainer.train()
        model.save_pretrained("adapters")  # adapters/de, adapters/fr
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        train_datasets: Mapping[str, Any],
        eval_datasets: Mapping[str, Any] | None = None,
        learning_rates: Mapping[str, float] | None = None,
        early_stopping_patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._check(model, args, train_datasets, eval_datasets or {}, learning_rates or {})
        names = list(train_datasets)
        model.set_requires_grad(list(model.peft_config), False)
        model.set_requires_grad(names, True)
        args.remove_unused_columns = False  # a collator may need what the model's forward does not name
        self.rates = {name: (learning_rates or {}).get(name, args.learning_rate) for name in names}
        self.patience, self.waited = early_stopping_patience, dict.fromkeys(names, 0)
        self.best: dict[str, float] = {}
        self.last_losses: dict[str, float] = {}
        self._own = {
            name: [e.tensor for e in entries(model, name) if e.tensor.requires_grad and e.tensor.is_leaf]
            for name in names
        }
        shuffled = getattr(args, "train_sampling_strategy", "random") != "sequential"
        seed = args.seed if args.data_seed is None else args.data_seed
        rounds = Rounds(
            train_datasets, args.per_device_train_batch_size, args.num_train_epochs, seed if shuffled else None
        )
        given = None if eval_datasets is None else dict(eval_datasets)
        super().__init__(model, args, train_dataset=rounds, eval_dataset=given, **kwargs)
        self.loss_is_scaled_for_ga = True  # the Trainer leaves the sum as it is
        self._evaluated: str | None = None
        self.add_callback(_StopWhenAllHave(rounds))

    @staticmethod
    def _check(model: Any, args: Any, *named: Mapping[str, Any]) -> None:
        known = list(getattr(model, "peft_config", ()))
        unknown = sorted({name for given in named for name in given} - set(known))
        if unknown or not named[0]:
            raise ValueError(
                f"MultiAdapterTrainer needs data for adapters of the model. It has {known}; unknown: {unknown}. Add "
                "one with model.add_adapter(name, config)."
            )
        if extra := sorted({name for given in named[1:] for name in given} - set(named[0])):
            raise ValueError(f"these adapters have no train_datasets: {extra}.")
        if args.gradient_accumulation_steps != 1:
            raise ValueError("gradient_accumulation_steps has to be 1: a step holds a batch of each adapter.")

    # --- data ---------------------------------------------------------------------------------------------------
    def get_train_dataloader(self) -> DataLoader:
        """One item a step; the batch has the number of its adapter for each row, ``adapter_index``."""
        names, collate = list(self.rates), self.data_collator

        def together(items: list[list[tuple[str, Any]]]) -> dict[str, Any]:
            rows = items[0]
            batch = collate([sample for _, sample in rows]) if rows else {}  # the loader reads one step ahead
            return {**batch, "adapter_index": torch.tensor([names.index(name) for name, _ in rows])}

        loader = DataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=together,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # --- losses -------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the adapters' losses, each the mean over its own rows."""
        names, inputs = list(self.rates), dict(inputs)
        labels = inputs.pop("labels")
        index = inputs.pop("adapter_index", None)
        if index is None:
            index = torch.full((len(labels),), names.index(str(self._evaluated)), device=labels.device)
        outputs = model(**inputs, adapter_names=[names[i] for i in index.tolist()])
        losses = {}
        for number in index.unique().tolist():
            rows = (index == number).nonzero()[:, 0]
            losses[names[number]] = self._loss(model, outputs, labels, rows)
        self.last_losses = {name: loss.item() for name, loss in losses.items()}
        total = torch.stack(list(losses.values())).sum()
        return (total, outputs) if return_outputs else total

    @property
    def _rounds(self) -> Rounds:
        return self.train_dataset

    def _loss(self, model: Any, outputs: Any, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        own = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == labels.shape[:1] else value
            for name, value in outputs.items()
        }
        if self.compute_loss_func is not None:
            return self.compute_loss_func(type(outputs)(**own), labels[rows])
        base = self.accelerator.unwrap_model(model).get_base_model()
        kind = str(getattr(base, "loss_type", None))
        if "CausalLM" in kind:
            return base.loss_function(own["logits"], labels[rows], vocab_size=own["logits"].shape[-1])
        if "SequenceClassification" in kind:
            return base.loss_function(pooled_logits=own["logits"], labels=labels[rows], config=base.config)
        raise ValueError(
            f"the loss of {type(base).__name__} is computed inside of its forward, for all rows at once. Give "
            "compute_loss_func: (outputs, labels) -> the loss of one adapter's rows."
        )

    # --- optimizer ----------------------------------------------------------------------------------------------
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimizer with groups of its own for each adapter."""
        if self.optimizer is None:
            decays = self.get_decay_parameter_names(self.model)
            names = {id(p): name for name, p in self.model.named_parameters()}
            groups = []
            for name, own in self._own.items():
                for decayed in (True, False):
                    params = [p for p in own if (names[id(p)] in decays) is decayed]
                    decay = self.args.weight_decay if decayed else 0.0
                    if params:
                        groups.append({"params": params, "lr": self.rates[name], "weight_decay": decay, "name": name})
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule over the steps of each adapter."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            curves = {}
            for name, steps in self._rounds.steps.items():
                steps = min(steps, num_training_steps)
                scratch = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # of which only the curve is wanted
                made = get_scheduler(
                    self.args.lr_scheduler_type,
                    scratch,
                    self.args.get_warmup_steps(steps),
                    steps,
                    self.args.lr_scheduler_kwargs or {},
                )
                if not isinstance(made, torch.optim.lr_scheduler.LambdaLR):
                    raise ValueError(f"lr_scheduler_type={self.args.lr_scheduler_type} is no function of the step.")
                curves[name] = made.lr_lambdas[0]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, [curves[group["name"]] for group in optimizer.param_groups]
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        # Each adapter on its own: no other one's spike shrinks its step.
        norms = [self.accelerator.clip_grad_norm_(own, self.args.max_grad_norm) for own in self._own.values()]
        return max(norms)

    # --- evaluation ---------------------------------------------------------------------------------------------
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """The metrics of each adapter on its own data; an adapter whose loss no longer falls stops."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, Mapping):
            self._evaluated = metric_key_prefix.partition("_")[2]
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.is_in_train:
            for name in given:
                self._compare(name, metrics.get(f"eval_{name}_loss"))
        return metrics

    def _compare(self, name: str, loss: float | None) -> None:
        if self.patience is None or loss is None or name in self._rounds.stopped:
            return
        if loss < self.best.get(name, math.inf):
            self.best[name], self.waited[name] = loss, 0
            folder = os.path.join(self.args.output_dir, "best")
            bare(self.model).save_pretrained(folder, selected_adapters=[name], is_main_process=self.args.should_save)
            return
        self.waited[name] += 1
        if self.waited[name] >= self.patience:
            self._rounds.stopped.add(name)
            self.model.set_requires_grad([name], False)

    @property
    def stopped(self) -> set[str]:
        """The adapters that early stopping has stopped."""
        return self._rounds.stopped


class _StopWhenAllHave(TrainerCallback):
    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= not self.rounds.going(state.global_step)

    on_evaluate = on_step_end
