"""The library ``adapters``: ``pytorch_adapter.bin`` with a config, of LoRA, IA3, prefixes and what is in blocks.

In blocks are bottlenecks, Compacter and invertible adapters. A file that has one of the latter beside the others is
read as two adapters, ``bottleneck`` (or ``compacter``) and ``invertible``, to be active together in a mixed model; a
union of configs (MAM, UniPELT) as a union; a fusion as a composition, with its members if they stand beside it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from peft.config import PeftConfig
from peft.convert.formats.fusion import CONFIG_NAME, WEIGHTS_NAME, is_fusion, read_fusion, write_fusion
from peft.convert.formats.mlx import as_json
from peft.convert.held import Held, Pair, Pairs, held_of, pairs_of
from peft.convert.rotary import rotated
from peft.convert.source import Base, Bundle, Files, Format, Job, Source, one
from peft.core.blocks.blocks import find_blocks
from peft.core.files.io import PREFIX
from peft.errors import ConfigError
from peft.tuners.bottleneck import BottleneckConfig
from peft.tuners.compacter import CompacterConfig
from peft.tuners.ia3 import IA3Config
from peft.tuners.invertible import InvertibleConfig
from peft.tuners.prefix_tuning import PrefixTuningConfig
from peft.tuners.union import UnionConfig


_PARTS = {"lora_A": "down", "lora_B": "up"}
# Lists of bottlenecks in a block there -> the part here; pieces of a bottleneck there -> here.
_PLACES = {"attention_adapters": "attention", "output_adapters": "feedforward", "cross_adapters": "cross"}
_PIECES = {"adapter_down.0": "down", "adapter_up": "up", "gate": "gate", "adapter_norm_before": "norm_before",
           "adapter_norm_after": "norm_after"}  # fmt: skip
_RULES = {"phm_rule": "rule", "phm_rule_left": "left", "phm_rule_right": "right"}  # of Compacter, there -> here
_TAILS = {"b": "bias", **{there: f"rule.{here}" for there, here in _RULES.items()}}  # of a matrix of Compacter
_NETWORKS = {"F": "first", "G": "second"}  # of NICE, there -> here
_GLOW = {"s2": "first", "s1": "second"}
_CONFIGS: dict[str, Any] = {"bottleneck": BottleneckConfig, "compacter": CompacterConfig}
_OWN = {
    kind: {field.name for field in dataclasses.fields(config)}
    - {"preset", "modules_to_save", *(field.name for field in dataclasses.fields(PeftConfig))}
    for kind, config in _CONFIGS.items()
}
_AT, _IN_BLOCKS = ("mh_adapter", "output_adapter", "cross_adapter"), ("BOTTLENECK", "COMPACTER")
_NORMALISES_LAST = ("albert", "bart", "bert", "bert-generation", "deberta", "deberta-v2", "distilbert", "electra",
                    "plbart", "roberta", "xlm-roberta")  # fmt: skip


# What stands in the names of a kind's tensors, there and here.
_HOLDERS = {"lora": (".loras.",), "ia3": (".loras.",), "bottleneck": (".adapters.",), "invertible":
            (".invertible_adapters.",), "compacter": (".adapters.", ".shared_parameters."),
            "prefix_tuning": ("prefix_tuning.",)}  # fmt: skip
_OURS = {"LORA": (".lora_",), "IA3": (".ia3_l",), "BOTTLENECK": (".bottleneck_",), "INVERTIBLE":
         (".invertible_coupling.",), "COMPACTER": (".compacter_",), "PREFIX_TUNING":
         ("prompt_embeddings", "prefix_gates.")}  # fmt: skip


def _matches(source: Source) -> bool:
    return "config" in source.config and "model_class" in source.config


def _kind(config: dict[str, Any]) -> str:
    kind = config.get("architecture")
    if kind is None and "reduction_factor" in config:
        if not any(config.get(place) for place in _AT):
            return "invertible"
        return "compacter" if config.get("phm_layer") else "bottleneck"
    if kind == "lora":
        return "ia3" if config.get("composition_mode") == "scale" else "lora"
    return str(kind)


def _read(source: Source, job: Job) -> Bundle:
    if is_fusion(source.config):
        return {"": read_fusion(source, _PLACES, job)}
    _name_what_stands_beside(source, job)
    config = source.config["config"]
    if config.get("architecture") != "union":
        found = _read_one(source, config, job)
        return found if len(found) > 1 else {"": next(iter(found.values()))}
    parts, left = {}, dict(source.tensors)
    for one_of in config["configs"]:
        holders = tuple(h for kind in _kinds(one_of) for h in _HOLDERS.get(kind, ()))
        own = {key: left.pop(key) for key in [*left] if any(holder in key for holder in holders)}
        parts.update(_read_one(dataclasses.replace(source, tensors=own), one_of, job))
    job.lost.update(dict.fromkeys(left, "it is of no part of the union"))
    union = UnionConfig({kind: held.config for kind, held in parts.items()}, inference_mode=True)
    return {"": Held(union, {key: tensor for held in parts.values() for key, tensor in held.tensors.items()})}


def _name_what_stands_beside(source: Source, job: Job) -> None:
    """A prediction head in a file of its own, which is not read."""
    head = source.path.with_name("pytorch_model_head.bin")
    if head.is_file():
        job.lost[head.name] = "a prediction head of adapters is a module of its own; train or load it beside the model"


def _kinds(config: dict[str, Any]) -> list[str]:
    """The methods of a config: its own, and an invertible adapter that is named with it."""
    kind = _kind(config)
    return [kind, "invertible"] if kind in _CONFIGS and config.get("inv_adapter") else [kind]


def _read_one(source: Source, config: dict[str, Any], job: Job) -> Bundle:
    """The adapters of one config, by kind."""
    name, bundle = source.config["name"], {}
    readers: dict[str, Callable[[Source, dict[str, Any], str, Job], Held]] = {
        "lora": _lora, "ia3": _ia3, "bottleneck": _network, "compacter": _network, "invertible": _invertible,
        "prefix_tuning": _prefix}  # fmt: skip
    for kind in (kinds := _kinds(config)):
        if kind not in readers:
            raise ConfigError(
                f"adapters of the architecture {kind!r} have no counterpart; there are {', '.join(readers)}, union."
            )
        for field in ("use_gating", "vera_d", "cross_adapter", "shared_W_phm"):
            gated = field == "use_gating" and kind in ("lora", "prefix_tuning")
            if config.get(field) and field not in _OWN.get(kind, ()) and not gated:
                job.lost[field] = f"{kind} here has no such thing ({config[field]!r})"
        inverse = {key for key in source.tensors if f".invertible_adapters.{name}." in key}
        own = source.tensors.keys() & inverse if kind == "invertible" else source.tensors.keys() - inverse
        tensors = {key: t for key, t in source.tensors.items() if key in own or len(kinds) == 1}
        bundle[kind] = readers[kind](dataclasses.replace(source, tensors=tensors), config, name, job)
    return bundle


def _split(key: str, holder: str, name: str) -> tuple[str, str] | None:
    """(module, what follows the adapter's name) of ``<module>.<holder>.<name>.<rest>``."""
    module, found, rest = key.partition(f".{holder}.{name}.")
    return (module, rest) if found else None


def _lora(source: Source, config: dict[str, Any], name: str, job: Job) -> Held:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    gates: dict[str, torch.Tensor] = {}
    for key, tensor in source.tensors.items():
        place = _split(key, "loras", name)
        if place is not None and place[1].startswith("gate."):
            gates[f"{PREFIX}{place[0]}.lora_{place[1]}"] = tensor
        elif place is None or place[1] not in _PARTS:
            job.lost[key] = "it is no part of a LoRA"
        else:
            parts.setdefault(place[0], {})[_PARTS[place[1]]] = tensor
    pairs = {module: Pair(alpha=config["alpha"], **found) for module, found in parts.items()}
    return held_of(Pairs(pairs, gates, extra={"use_gating": bool(gates)}))


def _ia3(source: Source, config: dict[str, Any], name: str, job: Job) -> Held:
    tensors, modules = {}, []
    for key, tensor in source.tensors.items():
        place = _split(key, "loras", name)
        if place is None or place[1] != "lora_B":
            job.lost[key] = "it is no vector of IA3"
            continue
        modules.append(place[0])
        tensors[f"{PREFIX}{place[0]}.ia3_l"] = tensor * config["alpha"] if config["alpha"] != 1 else tensor
    return Held(IA3Config(target_modules=sorted(modules), feedforward_modules=[], inference_mode=True), tensors)


def _network(source: Source, config: dict[str, Any], name: str, job: Job) -> Held:
    """A bottleneck adapter or Compacter."""
    kind = "compacter" if config.get("phm_layer") else "bottleneck"
    fields = {key: value for key, value in config.items() if key in _OWN[kind] and value is not None}
    _tell_what_is_read(fields, source.config.get("model_type"), job)
    tensors = {}
    for key, tensor in source.tensors.items():
        _, common, rule = key.partition(f".shared_parameters.{name}.")
        if common and kind == "compacter" and rule in _RULES:
            tensors[f"base_model.compacter_rule.{_RULES[rule]}"] = tensor
            continue
        block, _, rest = key.partition(f".adapters.{name}.")
        block, _, place = block.rpartition(".")
        piece, _, tail = rest.rpartition(".")
        if place not in _PLACES or piece not in _PIECES:
            job.lost[key] = f"it is no part of a {kind} that is known here"
            continue
        tail = _TAILS.get(tail, tail) if kind == "compacter" else tail
        tensors[f"{PREFIX}{block}.{kind}_{_PLACES[place]}.{_PIECES[piece]}.{tail}"] = tensor
    return Held(_CONFIGS[kind](**fields, inference_mode=True), tensors)


def _tell_what_is_read(fields: dict[str, Any], model_type: str | None, job: Job) -> None:
    if fields.get("is_parallel") and model_type not in _NORMALISES_LAST:
        job.lost["is_parallel"] = (
            "where blocks normalise first, parallel adapters of adapters read the stream before that, and here what "
            "the feed-forward network reads"
        )


def _invertible(source: Source, config: dict[str, Any], name: str, job: Job) -> Held:
    base = job.need_base("an invertible adapter stands at the first block, whose name the file does not say")
    if base.config.get("is_encoder_decoder"):
        raise ConfigError("in adapters an invertible adapter changes an encoder alone, and here a decoder as well.")
    place = f"{PREFIX}{find_blocks(base.model)[0].key}.invertible_coupling"
    networks, tensors = _GLOW if config["inv_adapter"] == "glow" else _NETWORKS, {}
    for key, tensor in source.tensors.items():
        network, _, rest = key.partition(f".invertible_adapters.{name}.")[2].partition(".")
        if network not in networks:
            job.lost[key] = "it is no part of an invertible adapter that is known here"
            continue
        tensors[f"{place}.{networks[network]}.{rest}"] = tensor
    inverts = source.config["model_class"].endswith("AdapterModel")
    if not inverts:
        job.notes.append("the inverse is left out before the head, as adapters has it in heads of its own alone")
    fields = {"coupling": config["inv_adapter"], "reduction_factor": config["inv_adapter_reduction_factor"],
              "non_linearity": config["non_linearity"], "invert_output": inverts}  # fmt: skip
    return Held(InvertibleConfig(**fields, inference_mode=True), tensors)


def _prefix(source: Source, config: dict[str, Any], name: str, job: Job) -> Held:
    if not config.get("flat"):
        raise ConfigError("the prefix is made by a network (flat=False); eject it first (eject_prefix_tuning).")
    base = job.need_base("a prefix is cut by the layers and heads")
    gates = {}
    for key, value in source.tensors.items():
        if ".prefix_gates." in key:
            layer = next((word for word in key.split(".") if word.isdigit()), "0")
            gates[f"prefix_gates.{layer}.{key.rpartition('.')[2]}"] = value
    found = {key: value for key, value in source.tensors.items() if key.startswith("model.prefix_tuning.") or
             ".pool." in key}  # fmt: skip
    values = {tuple(value.shape): value for value in found.values()}
    if len(found) + len(gates) != len(source.tensors) or len(values) != 1:
        raise ConfigError(
            f"{source.path} holds several prefixes (cross attention, an encoder), and one is known here."
        )
    layers, length = base.number("num_hidden_layers", "n_layer"), config["prefix_length"]
    table = next(iter(values.values())).reshape(length, -1)
    heads = base.number("num_key_value_heads", "num_attention_heads", "n_head")
    table = _turned(table, length, length, layers, heads, base)
    job.notes.append(f"the prefix's keys are turned by {length} positions, as tokens stand that much later here")
    fields = {
        "num_virtual_tokens": length, "num_layers": layers, "num_attention_heads": heads,
        "token_dim": table.shape[1] // (2 * layers), "num_transformer_submodules": 1, "inference_mode": True,
        "task_type": "CAUSAL_LM", "use_gating": bool(gates), "shared_gating": config.get("shared_gating", True),
    }  # fmt: skip
    return Held(PrefixTuningConfig(**fields), {"prompt_embeddings": table, **gates})


def _turned(table: torch.Tensor, by: int, length: int, layers: int, heads: int, base: Base) -> torch.Tensor:
    """A prefix ``[tokens, layers * 2 * width]`` with its keys turned by some positions.

    Raises:
        ConfigError: the base model's positions are not plain rotary ones.
    """
    rope = base.config.get("rope_parameters") or base.config
    if "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        raise ConfigError("a prefix moves the positions of tokens here and not there: only plain rotary ones bear it.")
    parts = table.reshape(length, layers, 2, heads, -1)  # keys and values of each layer
    keys = rotated(parts[:, :, :1], by, rope["rope_theta"])
    return torch.cat([keys, parts[:, :, 1:]], 2).reshape(table.shape)


# --- writing ------------------------------------------------------------------------------------------------------


def _write(bundle: Bundle, job: Job) -> Files:
    base = job.need_base("adapters names the model's class in its config")
    if len(bundle) == 2 and "invertible" in bundle:  # as they are read, see above
        parts = UnionConfig({name: held.config for name, held in bundle.items()})
        bundle = {"": Held(parts, {name: t for held in bundle.values() for name, t in held.tensors.items()})}
    if all(held.method != "COMPOSITION" for held in bundle.values()):
        bundle = {"": one(bundle, "an adapter of adapters")}
    elif (
        len({tuple(getattr(h.config, place) for place in _AT) for h in bundle.values() if h.method in _IN_BLOCKS}) > 1
    ):
        job.lost["members"] = f"adapters fuses what stands at the same places of a block, and {', '.join(_AT)} differ"
    files: Files = {}
    for component, held in bundle.items():  # a fusion and its members have a folder each, which is their name
        job.name = component or job.name
        for name, write in _files_of(held, base, job).items():
            files[os.path.join(component, name)] = write
    return files


def _files_of(held: Held, base: Base, job: Job) -> Files:
    weights, config_name, more, name = "pytorch_adapter.bin", "adapter_config.json", {}, job.name
    if held.method == "COMPOSITION":
        config, tensors, names = write_fusion(held, _PLACES, job)
        weights, config_name, more, name = WEIGHTS_NAME, CONFIG_NAME, {"adapter_names": names}, ",".join(names)
    else:
        config, tensors = _write_union(held, job) if held.method == "UNION" else _write_one(held, job)
    said = {
        **more, "config": config, "hidden_size": base.number("hidden_size", "n_embd"),
        "model_class": type(base.model).__name__,
        "model_name": base.config.get("_name_or_path", ""), "model_type": base.config.get("model_type"),
        "name": name, "version": "adapters.1.3.0",
    }  # fmt: skip
    return {weights: lambda path: torch.save(tensors, path), config_name: as_json(said)}


def _write_one(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    writers: dict[str, Callable[[Held, Job], tuple[dict[str, Any], dict[str, torch.Tensor]]]] = {
        "LORA": _write_lora, "IA3": _write_ia3, "BOTTLENECK": _write_network, "COMPACTER": _write_network,
        "INVERTIBLE": _write_invertible, "PREFIX_TUNING": _write_prefix}  # fmt: skip
    if held.method not in writers:
        raise ConfigError(
            f"of {held.method} no file of adapters can be written; there are {', '.join(writers)}, and UNION of these."
        )
    return writers[held.method](held, job)


def _write_union(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    configs, tensors, left = [], {}, dict(held.tensors)
    for config in held.config.members:
        part = Held(config, {})
        marks = _OURS.get(part.method, ())
        part.tensors = {name: left.pop(name) for name in [*left] if any(mark in name for mark in marks)}
        said, written = _write_one(part, job)
        configs.append(said)
        tensors.update(written)
    job.lost.update(dict.fromkeys(left, "it is of no part of the union"))
    configs = _with_inverse(configs)
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}, tensors


def _with_inverse(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The configs with an invertible adapter in that of the bottlenecks, where adapters has both in one."""
    inverse = next((config for config in configs if config.get("inv_adapter")), None)
    network = next((c for c in configs if "reduction_factor" in c and c is not inverse), None)
    if inverse is None or network is None:
        return configs
    if inverse["non_linearity"] != network["non_linearity"]:
        raise ConfigError("adapters has one non_linearity for bottlenecks and the invertible adapter beside them.")
    both = {key: inverse[key] for key in ("inv_adapter", "inv_adapter_reduction_factor")}
    return [{**config, **both} if config is network else config for config in configs if config is not inverse]


_LORA: dict[str, Any] = {
    "architecture": "lora", "attn_matrices": ["q", "k", "v"], "selfattn_lora": True, "intermediate_lora": True,
    "output_lora": True, "leave_out": [], "dropout": 0.0, "init_weights": "lora", "use_gating": False,
    "vera_b": None, "vera_d": None, "dtype": None, "init_weights_seed": None, "use_dora": False,
}  # fmt: skip


def _write_lora(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    gates = {name: tensor for name, tensor in held.tensors.items() if ".lora_gate." in name}
    if gates:
        plain = {name: tensor for name, tensor in held.tensors.items() if name not in gates}
        held = Held(dataclasses.replace(held.config, use_gating=False), plain)
    found, tensors = pairs_of(held), {}
    for name, tensor in gates.items():
        module, _, tail = name.removeprefix(PREFIX).partition(".lora_gate.")
        tensors[f"{module}.loras.{job.name}.gate.{tail}"] = tensor
    ranks = {pair.rank for pair in found.pairs.values()}
    scales = {found.scale(module) for module in found.pairs}
    if len(ranks) > 1 or len(scales) > 1:
        raise ConfigError(
            "adapters has one rank and one alpha for all layers; resize_adapter(rank=...) can make them."
        )
    for module, pair in found.pairs.items():
        if pair.table or pair.down.dim() > 2 or _place(module) is None:
            job.lost[module] = _NO_PLACE
            continue
        for part in ("magnitude", "bias"):
            if getattr(pair, part) is not None:
                job.lost[f"{module}.{part}"] = "LoRAs of adapters are A and B alone in these files"
        for part, tensor in (("lora_A", pair.down), ("lora_B", pair.up)):
            tensors[f"{module}.loras.{job.name}.{part}"] = tensor
    job.lost.update(dict.fromkeys(found.others, "adapters keeps heads and embeddings in other files"))
    rank = ranks.pop()
    return {
        **_LORA,
        **_sites(found.pairs, job),
        "composition_mode": "add",
        "use_gating": bool(gates),
        "r": rank,
        "alpha": scales.pop() * rank,
    }, tensors


# The matrices that adapters can give a LoRA or a vector, by the ends of their names, and what its config calls them.
_PLACED = {
    **{name: name[0] for name in ("q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "query", "key", "value",
                                  "query_proj", "key_proj", "value_proj", "q", "k", "v")},
    **dict.fromkeys(("down_proj", "fc1", "lin1", "fc_in", "ffn", "wi", "wi_1", "intermediate.dense"), "intermediate"),
    **dict.fromkeys(("up_proj", "fc2", "lin2", "fc_out", "ffn_output", "wo", "output.dense"), "output"),
}  # fmt: skip


def _place(module: str) -> str | None:
    """What adapters calls a matrix of a block; None for one that it has no place for."""
    words = module.split(".")
    ends = (".".join(words[-2:]), words[-1])
    return None if "attention.output" in module else next((_PLACED[end] for end in ends if end in _PLACED), None)


def _sites(modules: Iterable[str], job: Job) -> dict[str, Any]:
    """Which matrices of which blocks are adapted, in the words of adapters, which has the same in all of them."""
    placed = {module: _place(module) for module in modules}
    found = set(placed.values()) - {None}
    layers: dict[int, set[str | None]] = {}
    for module, place in placed.items():
        number = next((int(word) for word in module.split(".") if word.isdigit()), 0)
        layers.setdefault(number, set()).add(place)
    odd = [f"{number}" for number, places in layers.items() if places - {None} != found]
    if odd:
        job.lost[f"blocks {', '.join(odd)}"] = "adapters has the same matrices in all blocks, or none in a block"
    every = job.need_base("adapters counts blocks").number("num_hidden_layers", "n_layer", "num_layers")
    matrices = [letter for letter in "qkv" if letter in found]
    return {
        "attn_matrices": matrices,
        "selfattn_lora": bool(matrices),
        "intermediate_lora": "intermediate" in found,
        "output_lora": "output" in found,
        "leave_out": [number for number in range(every) if number not in layers],
    }


_NO_PLACE = "adapters has no place for one at this matrix"


def _write_ia3(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors, modules = {}, []
    for name, tensor in held.tensors.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".")
        if part != "ia3_l" or tensor.shape[-1] != 1:
            job.lost[name] = "adapters' IA3 scales outputs, and this is something else"
            continue
        if _place(module) is None:
            job.lost[module] = _NO_PLACE
            continue
        modules.append(module)
        tensors[f"{module}.loras.{job.name}.lora_B"] = tensor
    return {**_LORA, **_sites(modules, job), "composition_mode": "scale", "r": 1, "alpha": 1}, tensors


def _write_network(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    kind = "compacter" if isinstance(held.config, CompacterConfig) else "bottleneck"
    places, pieces, tails = ({here: there for there, here in table.items()} for table in (_PLACES, _PIECES, _TAILS))
    tensors = {}
    for name, tensor in held.tensors.items():
        if name.startswith("base_model.compacter_rule."):
            base = job.need_base("adapters keeps what layers share in the base model").model.base_model_prefix
            rule = tails[f"rule.{name.rpartition('.')[2]}"]
            tensors[f"{base}.shared_parameters.{job.name}.{rule}"] = tensor
            continue
        block, found, rest = name.removeprefix(PREFIX).partition(f".{kind}_")
        role, _, rest = rest.partition(".")
        piece, _, tail = rest.partition(".")
        if not found or role not in places or piece not in pieces:
            job.lost[name] = f"it is no part of a {kind}"
            continue
        tail = tails.get(tail, tail) if kind == "compacter" else tail
        tensors[f"{block}.{places[role]}.adapters.{job.name}.{pieces[piece]}.{tail}"] = tensor
    config = {key: value for key, value in held.config.to_dict().items() if key in _OWN[kind]}
    _tell_what_is_read(config, job.need_base("adapters names the model").config.get("model_type"), job)
    factor = config["reduction_factor"]
    config["reduction_factor"] = factor["default"] if len(factor) == 1 else factor
    return {**config, "phm_layer": kind == "compacter", "inv_adapter": None}, tensors


def _write_invertible(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    base = job.need_base("adapters keeps an invertible adapter in the base model").model.base_model_prefix
    config, tensors = held.config, {}
    networks = {here: there for there, here in (_GLOW if config.coupling == "glow" else _NETWORKS).items()}
    for name, tensor in held.tensors.items():
        network, _, rest = name.partition(".invertible_coupling.")[2].partition(".")
        tensors[f"{base}.invertible_adapters.{job.name}.{networks[network]}.{rest}"] = tensor
    if config.invert_output:
        job.lost["invert_output"] = "adapters applies the inverse before heads of its own alone"
    said = BottleneckConfig(mh_adapter=False, output_adapter=False, non_linearity=config.non_linearity).to_dict()
    fields = {key: value for key, value in said.items() if key in _OWN["bottleneck"]}
    return {**fields, "reduction_factor": 16, "phm_layer": False, "inv_adapter": config.coupling,
            "inv_adapter_reduction_factor": config.reduction_factor}, tensors  # fmt: skip


def _write_prefix(held: Held, job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, table = held.config, held.tensors["prompt_embeddings"]
    if config.prefix_projection or config.num_transformer_submodules != 1:
        raise ConfigError("only a flat prefix of a decoder can be written.")
    base, length = job.need_base("a prefix is cut by the layers and heads"), config.num_virtual_tokens
    table = _turned(table, -length, length, config.num_layers, config.num_attention_heads, base)
    own = [name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in ("self_attn", "attention")]
    holders = [*(f"{name}.prefix_tuning.pool" for name in own), "model.prefix_tuning"]
    tensors = {f"{holder}.prefix_tunings.{job.name}.self_prefix.control_trans": table.flatten() for holder in holders}
    for name, tensor in held.tensors.items():
        if name.startswith("prefix_gates."):
            _, layer, tail = name.split(".")
            tensors[f"{own[int(layer)]}.prefix_tuning.prefix_gates.{job.name}.{tail}"] = tensor
    said = {"architecture": "prefix_tuning", "flat": True, "prefix_length": length, "bottleneck_size": 512,
            "cross_prefix": True, "encoder_prefix": True, "dropout": 0.0, "leave_out": [], "non_linearity": "tanh",
            "shared_gating": config.shared_gating, "use_gating": config.use_gating,
            "init_weights_seed": None}  # fmt: skip
    return said, tensors


ADAPTERS = Format("adapters", _matches, _read, _write)
