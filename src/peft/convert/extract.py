"""A LoRA from two full models: what fine-tuning changed, layer by layer from their files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft.convert.resize import check_size
from peft.core.base.kinds import kind_of
from peft.core.files.io import PREFIX, write_adapter
from peft.core.layer.weight import wide
from peft.core.model.targeting import exact_targets
from peft.core.model.walk import embeddings_of, join, shares_embeddings
from peft.errors import nearest, some
from peft.kernels.decompositions import halves, leading_svd, randomized_svd, shared_ranks
from peft.tools.architecture import build
from peft.tools.footprint import meta_copy
from peft.tools.shards import Shards
from peft.tuners.lora.config import LoraConfig, rank_fields
from peft.tuners.lora.conversion import lora_tensors


_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Extraction:
    """What :func:`extract_adapter` has written.

    Attributes:
        output: the folder. ranks, errors: by module; an error is the norm of what the LoRA leaves out over that of the
            change. kept: the share of the energy of all changes that the LoRAs keep. saved: modules that changed in
            another way than by a matrix, and are kept whole. biases: whether biases changed, and are kept.
        unchanged: how many tensors are the same in both models.
    """

    output: str
    ranks: dict[str, int]
    errors: dict[str, float]
    kept: float
    saved: list[str] = field(default_factory=list)
    biases: bool = False
    unchanged: int = 0


def extract_adapter(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    output: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Extraction:
    """Write the LoRA that turns a base model into a fine-tuned one, as nearly as its rank allows.

    One layer's two matrices are in memory at a time; their difference is decomposed by a randomised SVD. Matrices,
    convolutions and tables become LoRAs, changed biases are kept as ``bias="all"``, other changed parameters (norms)
    whole, as ``modules_to_save``.

    Args:
        base, tuned: folders with safetensors files of one architecture. output: folder of the adapter.
        rank: the most that a layer has. energy: the share of the squared singular values of all changes to keep, in
            (0, 1]; ranks are then shared out among layers. Give one, or both.
        model: the architecture, also on the meta device; by default as the base's ``config.json`` says.
        dtype: of A and B; by default that of the fine-tuned weights.
        seed: of the random projections.

    Example::

        extract_adapter("SmolLM2-135M", "SmolLM2-135M-Instruct", "instruct-lora", energy=0.9, rank=64)

    Raises:
        ValueError: no rank; files that do not belong together; tensors of different shapes, such as a vocabulary that
            grew; quantised weights, or some that are not finite; nothing changed. Nothing is written then.
    """
    check_size(rank, energy)
    for what, folder in (
        ("base", base),
        ("fine-tuned", tuned),
    ):  # transformers loads an adapter beside a model with it
        if os.path.realpath(folder) == os.path.realpath(output):
            raise ValueError(f"the output {os.fspath(output)!r} is the folder of the {what} model: name another one.")
    job = _Extractor(Shards(base), Shards(tuned), skeleton(base, model), rank, energy, seed)
    job.read()
    config, tensors, report = job.adapter(os.fspath(base), os.fspath(output), dtype)
    write_adapter(output, tensors, config)
    return report


def skeleton(base: str | os.PathLike, model: nn.Module | None) -> nn.Module:
    """An architecture without memory: that of a model, or as the ``config.json`` of a folder says.

    Raises:
        ValueError: the folder has none.
    """
    if model is not None:
        return meta_copy(model)
    if not Path(base, "config.json").is_file():
        what = f"{base} is no folder with a config.json, which says the architecture of a base model"
        if Path(base, "adapter_config.json").is_file():
            what = f"{base} is the folder of an adapter, not of a base model"
        raise ValueError(f"{what}. In Python the model itself will do, also on meta.")
    import transformers

    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        made = build(config)
    made.tie_weights()
    return made


def _check_dense(key: str, *pair: torch.Tensor) -> None:
    for what, tensor in zip(("base", "fine-tuned model"), pair):
        if tensor.dtype not in _DENSE and tensor.dim() > 1:
            kept = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{key} is kept as {kept} in the {what}, which is quantised: save the dense weights first, of both "
                "models."
            )


class _Extractor:
    """Reads two models and makes the adapter."""

    def __init__(
        self, base: Shards, tuned: Shards, model: nn.Module, rank: int | None, energy: float | None, seed: int
    ) -> None:
        self.base, self.tuned, self.model, self.rank, self.energy = base, tuned, model, rank, energy
        self.generator = torch.Generator().manual_seed(seed)
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.norms: dict[str, float] = {}
        self.rests: dict[str, float] = {}
        self.dtypes: set[torch.dtype] = set()
        self.saved: dict[str, nn.Module] = {}
        self.biases: list[str] = []
        self.unchanged = 0

    def read(self) -> None:
        """Compare the two models, tensor by tensor."""
        seen: set[str] = set()
        for path, module, name, key in self._parameters():
            seen.add(key)
            before, after = self.base[key], self.tuned[key]
            _check_dense(key, before, after)
            if before.shape != after.shape:
                raise ValueError(
                    f"{key} is {list(before.shape)} in the base and {list(after.shape)} in the fine-tuned model; "
                    "resize the base model first (resize_token_embeddings) and save it."
                )
            if torch.equal(before, after):
                self.unchanged += 1
                continue
            kind = kind_of(module)
            if kind is not None and name == kind.weight and not kind.opaque and kind.refusal(module) is None:
                self.dtypes.add(after.dtype)
                change = wide(after)
                del after  # three of the matrix at once would be the peak
                change -= before
                del before
                self._decompose(path, kind, module, change)
                del change
            elif kind is not None and name == kind.bias:
                self.biases.append(key)
            else:
                self.saved[path] = module
        if new := self.tuned.entries.keys() - seen - self.base.entries.keys():
            raise ValueError(
                f"the fine-tuned model has tensors that the base lacks: {some(new)}. A LoRA cannot add them."
            )
        if not self.found and not self.saved and not self.biases:
            raise ValueError("the two models are equal: there is nothing to extract.")

    def _parameters(self) -> Iterator[tuple[str, nn.Module, str, str]]:
        """(path of the module, module, name in it, name in the files) of each parameter once, ties by their first."""
        given, done, absent = self._renaming(), set(), {}
        for path, module in self.model.named_modules():
            for name, p in module._parameters.items():
                if p is None or id(p) in done:
                    continue
                key = given(join(path, name))
                if key is None:
                    absent[id(p)] = join(path, name)
                    continue
                done.add(id(p))
                yield path, module, name, key
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        there = {name for key in self.base.entries for name in (key, prefix + key)}
        if lacks := [name for p, name in absent.items() if p not in done and name in there]:
            raise ValueError(f"the base has tensors that the fine-tuned model lacks: {some(lacks)}.")

    def _renaming(self) -> Any:
        """What a parameter is called in the files, where a part of the model may have been saved alone."""
        names = self.base.entries.keys() & self.tuned.entries.keys()
        own = [name for name, _ in self.model.named_parameters()]
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        if not any(name in names for name in own):
            near = nearest(own[0], names) if own else ""
            raise ValueError(f"the files have no tensor {own[0] if own else ''} of the model.{near}")

        def key(name: str) -> str | None:
            short = name.removeprefix(prefix) if len(prefix) > 1 else name
            return next((option for option in (name, short) if option in names), None)

        return key

    def _decompose(self, path: str, kind: Any, module: nn.Module, change: torch.Tensor) -> None:
        matrix = kind.orient(change, module).flatten(1)
        if getattr(module, "groups", 1) > 1:
            self.saved[path] = module  # the LoRA of a grouped convolution is made of blocks
            return
        self.norms[path] = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        if not math.isfinite(self.norms[path]):
            raise ValueError(f"{path} has NaN or infinite entries in one of the models.")
        if self.energy is None:
            u, s, vh = randomized_svd(matrix, self.rank or 1, generator=self.generator)
        else:
            u, s, vh = leading_svd(matrix, self.energy, self.rank, self.generator)
        self.found[path] = u.clone(), s, vh.clone()
        matrix.addmm_(u * s, vh, alpha=-1)  # what is left of the change, in its own memory
        self.rests[path] = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))

    def adapter(
        self, base: str, output: str, dtype: torch.dtype | None
    ) -> tuple[LoraConfig, dict[str, torch.Tensor], Extraction]:
        """Config, tensors and report."""
        ranks = {path: len(s) for path, (_, s, _) in self.found.items()}
        if self.energy is not None and self.found:
            total = sum(norm**2 for norm in self.norms.values())
            ranks = shared_ranks({path: s for path, (_, s, _) in self.found.items()}, self.energy, total)
        pairs, errors, lost = {}, {}, 0.0
        kept_as = dtype or next(iter(self.dtypes), torch.float32)
        for path, (u, s, vh) in self.found.items():
            r = ranks[path] = min(ranks[path], len(s))
            down, up = (factor[None].to(kept_as) for factor in halves(u, s, vh, r))
            pairs[path] = down, up
            rest = self.rests[path] ** 2 + float(s[r:].double().square().sum())
            errors[path] = rest**0.5 / self.norms[path]
            lost += rest
        config = self._config(ranks, base)
        tensors = lora_tensors(self.model, config, "default", pairs, {})
        for name, value in tensors.items():
            if value.is_meta:
                tensors[name] = self.tuned[self._file_name(name)]  # what is trained whole
        total = sum(norm**2 for norm in self.norms.values())
        report = Extraction(
            output,
            ranks,
            errors,
            1 - lost / total if total else 1.0,
            sorted(self.saved),
            bool(self.biases),
            self.unchanged,
        )
        return config, tensors, report

    def _file_name(self, name: str) -> str:
        words = name.removeprefix(PREFIX).split(".")
        key = self._renaming()(".".join(word for word in words if word != "base_layer"))
        if key is None:
            raise ValueError(f"the fine-tuned model's files have no tensor for {name}.")
        return key

    def _config(self, ranks: dict[str, int], base: str) -> LoraConfig:
        first = embeddings_of(self.model)[0]
        adapted = any(self.model.get_submodule(path) is first for path in ranks)
        targets = exact_targets(self.model, set(ranks))
        return LoraConfig(
            **(rank_fields(ranks, ranks) if ranks else {"r": 1, "lora_alpha": 1}),
            target_modules=list(targets) if isinstance(targets, set) else targets,
            modules_to_save=sorted(self.saved) or None,
            bias="all" if self.biases else "none",
            ensure_weight_tying=adapted and shares_embeddings(self.model),
            base_model_name_or_path=base,
            inference_mode=True,
        )
