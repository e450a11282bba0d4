"""Which inference servers load an adapter, and why not, by the rules that they document."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from peft.convert.formats.gguf import GGUF
from peft.convert.held import GATED, Held, Pairs, beyond_pairs, pairs_of
from peft.errors import some
from peft.tuners.lora.config import divisor


@dataclass(frozen=True)
class Serving:
    """What a server makes of an adapter.

    Attributes:
        server: its name. loads: whether it serves the adapter, with the outputs that it has here.
        problems: why not. needs: what it has to be started with, or done with the adapter first.
    """

    server: str
    loads: bool
    problems: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass
class _Facts:
    """What the rules ask of an adapter."""

    config: Any
    found: Pairs
    problems: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> set[int]:
        return {pair.rank for pair in self.found.pairs.values()}

    @property
    def scales(self) -> set[float]:
        return {self.found.scale(module) for module in self.found.pairs}

    @property
    def leaves(self) -> set[str]:
        return {module.rpartition(".")[2] for module in self.found.pairs}

    def any(self, part: str) -> bool:
        return any(getattr(pair, part) is not None for pair in self.found.pairs.values())

    def refuse(self, if_so: Any, why: str) -> None:
        if if_so:
            self.problems.append(why)


def check_serving(adapter: str | os.PathLike) -> dict[str, Serving]:
    """Say for vLLM, SGLang, TGI, LoRAX and llama.cpp whether they serve an adapter, and why not.

    Only the adapter's files are read. Whether a server knows the base model's architecture, or LoRAs on a base that is
    quantised in some way, is not said.

    Args:
        adapter: a folder, or a name on the hub.

    Example::

        for name, found in check_serving("runs/tone/adapter").items():
            print(name, found.loads, *found.problems, *found.needs)

    Raises:
        ValueError: there is no such adapter.
    """
    held = Held.read(adapter)
    kind = held.method
    if kind != "LORA":
        why = f"it serves LoRAs, and this is {kind}; peft.save_as_lora makes a LoRA of what a weight equals"
        return {server: Serving(server, False, (why,)) for server in RULES}
    if held.config.use_gating:
        return {server: Serving(server, False, (GATED,)) for server in RULES}
    result = {}
    for server, rules in RULES.items():
        facts = _Facts(held.config, pairs_of(held))
        for rule in rules:
            rule(facts)
        result[server] = Serving(server, not facts.problems, tuple(facts.problems), tuple(facts.needs))
    return result


# --- rules --------------------------------------------------------------------------------------------------------


def _no_dora(facts: _Facts) -> None:
    dora = facts.config.use_dora or facts.any("magnitude")
    facts.refuse(dora, "it does not compute DoRA; save_as_lora makes a plain LoRA of it, for this base model")


def _no_modules(facts: _Facts) -> None:
    saved = facts.config.modules_to_save
    facts.refuse(saved, f"it has no whole modules (modules_to_save: {some(saved or ())}); merge the adapter instead")


def _no_others(facts: _Facts) -> None:
    tokens = facts.config.trainable_token_indices
    facts.refuse(tokens, "it has no trained token vectors (trainable_token_indices); merge the adapter instead")
    biased = facts.config.bias != "none"
    facts.refuse(biased, f"it leaves the base model's biases as they are (bias={facts.config.bias!r})")
    facts.refuse(facts.any("bias"), "it has no bias of B (lora_bias=True)")
    stacks = getattr(facts.config, "target_parameters", None)
    facts.refuse(stacks, f"it reads no LoRAs of stacked parameters (target_parameters: {some(stacks or ())})")
    convolved = [module for module, pair in facts.found.pairs.items() if pair.down.dim() > 2]
    facts.refuse(convolved, f"it has no LoRAs of convolutions ({some(convolved, 3)})")


def _no_variants(facts: _Facts, but: Collection[str] = ()) -> None:
    """What servers pass over in a config: the outputs would be others, in silence."""
    for name, why in beyond_pairs(facts.config).items():
        facts.refuse(name not in but, f"it knows plain LoRAs alone, and of this one {why}")


def _one_scale(facts: _Facts) -> None:
    """The scale is lora_alpha / r of the config, whatever alpha_pattern and rank_pattern say."""
    top = facts.config.lora_alpha / divisor(facts.config.r, facts.config.use_rslora)
    other = [module for module in facts.found.pairs if abs(facts.found.scale(module) - top) > 1e-6 * abs(top)]
    facts.refuse(
        other,
        f"it scales every layer by lora_alpha / r = {top:g}, and these layers have another scale "
        f"(rank_pattern, alpha_pattern): {some(other, 3)}; resize_adapter or save_as_lora can even this out",
    )


def _vllm_rank(facts: _Facts) -> None:
    """--max-lora-rank is one of a few numbers, 16 by default; the config's r has to be within it."""
    sizes, top = (1, 8, 16, 32, 64, 128, 256, 320, 512), max(*facts.ranks, facts.config.r)
    facts.refuse(top > sizes[-1], f"its largest rank is {sizes[-1]}, and this adapter's {top}; use resize_adapter")
    if 16 < top <= sizes[-1]:
        facts.needs.append(f"start it with --max-lora-rank {next(size for size in sizes if size >= top)}")


def _vllm_modules(facts: _Facts) -> None:
    if tables := {m for m, pair in facts.found.pairs.items() if pair.table} | (facts.leaves & {"lm_head"}):
        facts.needs.append(f"only some of its models adapt embeddings and heads: {some(tables)}")


_SGLANG = {"qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj",
           "down_proj", "in_proj", "in_proj_qkv", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
           "embed_tokens", "word_embeddings", "lm_head"}  # fmt: skip


def _sglang(facts: _Facts) -> None:
    config = facts.config
    facts.refuse(
        config.use_rslora,
        "it scales by lora_alpha / r whatever use_rslora says: write use_rslora=False and "
        f"lora_alpha={config.lora_alpha * config.r**0.5:g} into adapter_config.json, which is the same scale",
    )
    targets = facts.config.target_modules
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        facts.problems.append(f"it reads target_modules as a list or 'all-linear', not as a pattern ({targets!r})")
    unknown = facts.leaves - _SGLANG
    facts.refuse(unknown, f"it has no LoRAs for modules called {some(unknown)}; there are {some(_SGLANG, 20)}")
    if facts.leaves & {"embed_tokens", "lm_head"}:
        facts.needs.append("start it with --lora-target-modules that name embed_tokens and lm_head")
    facts.needs.append(f"its pool is sized by the first adapters: --max-lora-rank {max(facts.ranks)} at least")


def _punica(facts: _Facts) -> None:
    """Layers of one kind are stacked in one tensor, in all layers of the model: one rank, and none may lack it."""
    by_leaf: dict[str, set[int]] = {}
    for module, pair in facts.found.pairs.items():
        by_leaf.setdefault(module.rpartition(".")[2], set()).add(pair.rank)
    mixed = [leaf for leaf, ranks in by_leaf.items() if len(ranks) > 1]
    facts.refuse(mixed, f"it stacks the layers' pairs, which have several ranks: {some(mixed)}; use resize_adapter")
    layers = {leaf: {_index(m) for m in facts.found.pairs if m.rpartition(".")[2] == leaf} for leaf in by_leaf}
    most = max(map(len, layers.values()))
    partial = [leaf for leaf, seen in layers.items() if len(seen) < most and None not in seen]
    facts.refuse(
        partial or facts.config.layers_to_transform is not None,
        "it leaves a kind of module out that not every layer adapts (layers_to_transform, per-layer targets)"
        + (f": {some(partial)}" if partial else ""),
    )
    tables = [module for module, pair in facts.found.pairs.items() if pair.table]
    facts.refuse(tables, f"it has no LoRAs of embeddings ({some(tables)})")


_TGI = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
        "fc1", "fc2", "lm_head"}  # fmt: skip
_LORAX = _TGI | {"c_attn", "c_proj", "c_fc", "w1", "w2", "dense", "Wqkv", "out_proj", "query_key_value",
                 "dense_h_to_4h", "dense_4h_to_h"}  # fmt: skip


def _only(known: set[str]) -> Callable[[_Facts], None]:
    def rule(facts: _Facts) -> None:
        unknown = facts.leaves - known
        facts.refuse(unknown, f"it ignores modules called {some(unknown)}; it knows {some(known, 20)}")

    return rule


def _llama_cpp(facts: _Facts) -> None:
    _no_variants(facts, but=GGUF.holds)
    if tables := [module for module, pair in facts.found.pairs.items() if pair.table]:
        facts.needs.append(f"it stops at LoRAs of {some(tables)} if the head of the base model shares that weight")
    facts.needs.append("convert_adapter(..., 'gguf', ..., base=...) makes its file; the base is a GGUF, too")


def _index(module: str) -> str | None:
    return next((word for word in module.split(".") if word.isdigit()), None)


# Sources: vLLM, "LoRA Adapters" and its check of adapter configs (version 0.11); SGLang, "LoRA Serving", its table of
# target modules, and its issue 40835 on rsLoRA; TGI, "LoRA" and its loader of adapters; LoRAX, "Adapters > LoRA >
# Target Modules"; llama.cpp, convert_lora_to_gguf, which knows A and B alone, and scales by alpha over each pair's own
# rank.
RULES: dict[str, tuple[Callable[[_Facts], None], ...]] = {
    "vllm": (_no_variants, _no_dora, _no_modules, _no_others, _one_scale, _vllm_rank, _vllm_modules),
    "sglang": (_no_variants, _no_dora, _no_modules, _no_others, _one_scale, _sglang),
    "tgi": (_no_variants, _no_dora, _no_modules, _no_others, _one_scale, _punica, _only(_TGI)),
    "lorax": (_no_variants, _no_dora, _no_modules, _no_others, _one_scale, _punica, _only(_LORAX)),
    "llama.cpp": (_no_dora, _no_modules, _no_others, _llama_cpp),
}
