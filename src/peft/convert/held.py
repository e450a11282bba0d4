"""An adapter outside of any model: its config and the tensors of its file; a LoRA as pairs by module."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peft.config import PeftConfig
from peft.core.files.io import PREFIX, load_peft_weights, write_adapter
from peft.errors import ConfigError, some
from peft.tuners.lora.config import LoraConfig, divisor, rank_fields
from peft.tuners.lora.initialize import rewrites


GATED = "the adapter has gates (use_gating), which depend on the sample, so no pair of matrices does what it does"
_PARTS = {
    ("lora_A", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_embedding_A",): "down",
    ("lora_embedding_B",): "up",
    ("lora_magnitude_vector",): "magnitude",
    ("lora_B", "bias"): "bias",
}


@dataclass
class Held:
    """A config and the tensors that belong to it, by their names in files."""

    config: Any
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Held:
        """Read an adapter of this library from a folder or the hub.

        Raises:
            ValueError: if there is none, or its file is damaged.
        """
        return cls(PeftConfig.from_pretrained(os.fspath(folder)), load_peft_weights(folder))

    @property
    def method(self) -> str:
        """The name of its method, such as "LORA"."""
        return self.config.method_name

    @property
    def by_module(self) -> dict[str, dict[str, torch.Tensor]]:
        """Its tensors by the name of the module and the last part of their own."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            module, _, part = name.removeprefix(PREFIX).rpartition(".")
            found.setdefault(module, {})[part] = tensor
        return found

    def write(self, folder: str | os.PathLike) -> None:
        """Write it into a folder."""
        write_adapter(folder, self.tensors, self.config)


@dataclass
class Pair:
    """A LoRA at one module: dW = scale * up @ down.

    Attributes:
        down, up: A ``[r, in, *kernel]`` and B ``[out, r, 1...]``. alpha: scale times r, or times sqrt(r) for rsLoRA.
        magnitude: DoRA's norms. bias: of B. table: the module is an embedding.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    table: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is in a file, by its name there below the module's."""
        a, b = ("lora_embedding_A", "lora_embedding_B") if self.table else ("lora_A.weight", "lora_B.weight")
        named = {a: self.down, b: self.up, "lora_magnitude_vector": self.magnitude, "lora_B.bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass
class Pairs:
    """A LoRA as pairs by module, and what else its file holds.

    Attributes:
        others: tensors of no pair, by their names in the file. base: the base model's name. extra: further fields of
            the config.
    """

    pairs: dict[str, Pair]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    rslora: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        pair = self.pairs[module]
        return pair.alpha / divisor(pair.rank, self.rslora)


def is_lora(held: Held) -> bool:
    """Whether an adapter is a LoRA."""
    return isinstance(held.config, LoraConfig) and held.method == "LORA"


def modules_of(held: Held) -> list[str]:
    """The modules that an adapter is on, as far as the names of its tensors tell; of a LoRA exactly."""
    if is_lora(held) and not held.config.use_gating:
        return list(pairs_of(held).pairs)
    return list(held.by_module)


_VARIANTS = {
    "use_qalora": "A reads means of the inputs (QA-LoRA)",
    "kasa_config": "the products have singular values of their own (KaSA)",
    "use_bdlora": "A or B is kept as blocks (BD-LoRA)",
    "alora_invocation_tokens": "the update begins at its invocation tokens (aLoRA)",
    "arrow_config": "it routes between experts (Arrow)",
    "layer_replication": "the base has layers several times (layer_replication)",
}


def beyond_pairs(config: LoraConfig) -> dict[str, str]:
    """What a LoRA is beyond its A and B, by the fields of its config that say so: a reader of A and B misses it."""
    found = {name: why for name, why in _VARIANTS.items() if getattr(config, name, None)}
    if rewrites(config.init_lora_weights):
        found["init_lora_weights"] = (
            f"the start {config.init_lora_weights!r} has changed the base model; save the adapter with "
            "path_initial_model_for_weight_conversion, or merge it"
        )
    return found


def pairs_of(held: Held) -> Pairs:
    """A LoRA's file as pairs.

    Raises:
        ValueError: the adapter is no LoRA, or a pair lacks its half, or A and B are of different ranks.
    """
    config = held.config
    if not is_lora(held):
        raise ValueError(
            f"the adapter is of the method {held.method}, not LORA; peft.save_as_lora makes a LoRA of it first."
        )
    if config.use_gating:
        raise ValueError(GATED)
    found: dict[str, dict[str, torch.Tensor]] = {}
    others, tables = {}, set()
    stacks = tuple(f".{path}".rpartition(".")[0] for path in config.target_parameters or ())
    for name, tensor in held.tensors.items():
        words = name.removeprefix(PREFIX).split(".")
        part, size = next(((_PARTS[tail], n) for n in (1, 2) if (tail := tuple(words[-n:])) in _PARTS), ("", 0))
        # Between the pairs of a stack.
        place = ".".join(("", *(word for word in words[:-size] if word != "base_layer")))
        if not part or (stacks and place.endswith(stacks)):  # pairs of stacked experts are no pairs of a module
            others[name] = tensor
            continue
        module = ".".join(words[:-size])
        found.setdefault(module, {})[part] = tensor
        if words[-1] == "lora_embedding_A":
            tables.add(module)
    pairs = {}
    for module, parts in found.items():
        check_pair(module, parts)
        alpha = config.alpha_at(module)
        pairs[module] = Pair(alpha=alpha, table=module in tables, **parts)
    if not config.use_bdlora:  # keeps one factor as blocks
        _check_ranks(pairs)
    return Pairs(pairs, others, config.use_rslora)


def check_pair(module: str, parts: Collection[str], names: Collection[str] = ("down", "up")) -> None:
    """Raise ConfigError where a file lacks a factor of a LoRA; ``names`` are what it calls the two."""
    if not {*names} <= {*parts}:
        raise ConfigError(f"the file has only {', '.join(parts)} of a LoRA at {module}: it is incomplete.")


def _check_ranks(pairs: Mapping[str, Pair]) -> None:
    """Raise ConfigError where A and B are of different ranks; B of a grouped convolution has a part of the rank."""
    for module, pair in pairs.items():
        a, b = list(pair.down.shape), list(pair.up.shape)
        if pair.rank != b[1] and (len(a) == 2 or pair.rank % b[1]):
            raise ConfigError(f"{module}: A is {a} and B {b}, whose ranks differ: the file is damaged.")


def held_of(found: Pairs, like: LoraConfig | None = None) -> Held:
    """Pairs as an adapter of this library: the config that says each pair's rank and alpha, and the tensors.

    Args:
        like: whose other fields are kept; by default the config targets the modules of the pairs by their names.
    """
    pairs, tensors = found.pairs, dict(found.others)
    if like is None:
        _check_ranks(pairs)
    for module, pair in pairs.items():
        tensors.update({f"{PREFIX}{module}.{part}": tensor for part, tensor in pair.tensors().items()})
    fields = rank_fields({m: pair.rank for m, pair in pairs.items()}, {m: pair.alpha for m, pair in pairs.items()})
    if like is None:
        fields["target_modules"] = sorted(pairs)
        fields["use_rslora"] = found.rslora
        fields["use_dora"] = any(pair.magnitude is not None for pair in pairs.values())
        fields["lora_bias"] = any(pair.bias is not None for pair in pairs.values())
        fields["inference_mode"] = True
        return Held(LoraConfig(**fields, **found.extra), tensors)
    config = type(like)(**{**like.to_dict(), **fields, **found.extra})
    return Held(config, tensors)


def alpha_and_rank(held: Held, module: str) -> tuple[float, int]:
    """Alpha and rank of a LoHa or LoKr at a module."""
    return held.config.alpha_at(module), held.config.rank_at(module)


def on_modules(
    held: Held, modules: Mapping[str, Mapping[str, torch.Tensor]], scales: Mapping[str, tuple[float, int]]
) -> Held:
    """A LoHa or LoKr like another, on other modules, with their alphas and ranks."""
    alphas, ranks = ({module: scale[i] for module, scale in scales.items()} for i in (0, 1))
    fields: dict[str, Any] = rank_fields(ranks, alphas, "alpha")  # type: ignore[arg-type]
    return Held(replace(held.config, **fields, target_modules=sorted(modules)), as_saved(modules))


def without_whole_modules(held: Held, model: str) -> Held:
    """The same adapter.

    Raises:
        ConfigError: it trains whole modules, which are called otherwise in the other of a model's two sets of names.
    """
    if saved := getattr(held.config, "modules_to_save", None):
        raise ConfigError(f"whole modules have other names in {model}'s two sets: {some(saved)}; take them out first.")
    return held


def renames_no(held: Held, model: str) -> ConfigError:
    """The error for an adapter of a method that is not changed from one set of a model's names to the other."""
    return ConfigError(
        f"{model}'s two sets of names are changed in LoRA, LoHa and LoKr, and this adapter is {held.method}: make a "
        "LoRA of it by save_as_lora first."
    )


def as_saved(modules: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by module, see :attr:`Held.by_module`, under their names in a file."""
    return {f"{PREFIX}{module}.{part}": tensor for module, parts in modules.items() for part, tensor in parts.items()}


def magnitude_of(scale: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A magnitude of DoRA as files of PEFT have it beside A: ``[out]``, or ``[1, out, 1, ...]`` at a convolution."""
    return scale.flatten() if down.dim() == 2 else scale.reshape(1, -1, *[1] * (down.dim() - 2))


def alpha_of_scale(scale: float, rank: int) -> float:
    """The alpha that over the rank is a scale: a whole number where one is, which the product may miss by a bit."""
    near = round(scale * rank)
    return near if near / rank == scale else scale * rank
