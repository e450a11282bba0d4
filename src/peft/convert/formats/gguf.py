"""llama.cpp's GGUF LoRAs: tensors ``blk.0.attn_q.weight.lora_a`` and ``.lora_b``, one alpha, each pair its own rank.

LLaMA's q and k have their rows in pairs there, so the rows of B move; the A of the token table stands transposed.
The tokens that an aLoRA begins at have a key of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from peft.convert.held import Held, Pair, Pairs, check_pair, held_of, pairs_of
from peft.convert.rotary import as_halves, as_pairs
from peft.convert.source import Base, Bundle, Files, Format, Job, Source, one
from peft.errors import CheckpointError, ConfigError


# transformers' model types -> llama.cpp's architecture, where matrices are kept as they are, but for q, k of ROTARY.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "phi": "phi2", "phi3": "phi3", "starcoder2": "starcoder2", "gpt2": "gpt2", "stablelm": "stablelm", "olmo": "olmo",
    "olmo2": "olmo2", "olmo3": "olmo2", "olmoe": "olmoe", "granite": "granite", "granitemoe": "granitemoe",
    "smollm3": "smollm3", "cohere": "command-r", "glm4": "glm4", "nemotron": "nemotron", "gpt_oss": "gpt-oss",
    "exaone4": "exaone4", "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense", "seed_oss": "seed_oss",
    "apertus": "apertus", "arcee": "arcee", "gpt_bigcode": "starcoder",
}  # fmt: skip
ROTARY = {"llama", "olmo", "granite", "granitemoe", "smollm3", "arcee"}
_KEPT = {"F16": "float16", "BF16": "bfloat16"}  # other kinds are read as float32
_TIED = "llama.cpp stops at a LoRA of an embedding that is the head's weight too; merge the adapter instead"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are read and written by the package gguf: pip install gguf") from error
    return gguf


def _matches(source: Source) -> bool:
    return source.gguf


def _architecture(base: Base) -> str:
    kind = base.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"how llama.cpp keeps the weights of {kind!r} is not known here; there are {', '.join(ARCHITECTURES)}. "
            "Merge the adapter and convert the model instead."
        )
    return ARCHITECTURES[kind]


def _tensor_names(base: Base, arch: str) -> dict[str, str]:
    """Module -> its tensor in GGUF files."""
    gguf = _gguf()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(number, base.number("num_hidden_layers", "n_layer"))
    found = {name: table.get_name(name) for name in base.names}
    return {name: f"{tensor}.weight" for name, tensor in found.items() if tensor is not None}


def _heads(module: str, base: Base, arch: str) -> int | None:
    """The heads by which the rows of a module are ordered otherwise, or None."""
    leaf = module.rpartition(".")[2]
    if arch not in ROTARY or leaf not in ("q_proj", "k_proj"):
        return None
    if leaf == "q_proj":
        return base.number("num_attention_heads")
    return base.number("num_key_value_heads", "num_attention_heads")


def _write(bundle: Bundle, job: Job) -> Files:
    _gguf()
    held, base = one(bundle, "a GGUF file"), job.need_base("GGUF names tensors by the architecture")
    found, arch = pairs_of(held), _architecture(base)
    names, alpha = _tensor_names(base, arch), _common_alpha(found)
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in found.pairs.items():
        for part, what in (("magnitude", "llama.cpp computes no DoRA"), ("bias", "llama.cpp's B has no bias")):
            if getattr(pair, part) is not None:
                job.lost[f"{module}.{part}"] = what
        if module in (base.tied or ()):
            job.lost[module] = _TIED
            continue
        if module not in names:
            job.lost[module] = f"llama.cpp has no such matrix in {arch}"
            continue
        down, up = _wide(pair.down), _wide(pair.up)
        own = found.scale(module) * pair.rank
        if _as_kept(own) != alpha:
            up = up.float() * (own / alpha)
            job.notes.append(
                f"{module}: its scale is other than the file's alpha says, so B is multiplied by the rest"
            )
        if (heads := _heads(module, base, arch)) is not None:
            up = as_pairs(up, heads)
        tensors[f"{names[module]}.lora_a"] = down.T if pair.table else down
        tensors[f"{names[module]}.lora_b"] = up
    job.lost.update(dict.fromkeys(found.others, "llama.cpp's adapters hold LoRAs alone"))
    invocation = held.config.alora_invocation_tokens
    return {"adapter.gguf": lambda path: _save(path, arch, alpha, tensors, invocation)}


def _common_alpha(found: Pairs) -> float:
    """The most frequent alpha, with which the scale is alpha over the rank."""
    alphas = [_as_kept(found.scale(module) * pair.rank) for module, pair in found.pairs.items()]
    return max(dict.fromkeys(alphas), key=alphas.count)


def _as_kept(alpha: float) -> float:
    """A number as float32, which the file holds."""
    return float(torch.tensor(alpha, dtype=torch.float32))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16 as float32, which numpy has; the values stay."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _save(path: str, arch: str, alpha: float, tensors: dict[str, torch.Tensor], invocation: list[int] | None) -> None:
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if invocation:
        kinds = gguf.GGUFValueType
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, invocation, kinds.ARRAY, kinds.UINT32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(source: Source, job: Job) -> Bundle:
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(source.path)
    except Exception as error:
        raise CheckpointError(f"{source.path} is damaged, or no GGUF file that this gguf reads ({error}).") from error
    said = {key: field.contents() for key, field in reader.fields.items()}
    if said.get("general.type") != "adapter" or said.get(gguf.Keys.Adapter.TYPE) != "lora":
        raise ConfigError(f"{source.path} is a GGUF file, but no LoRA: it says {said.get('general.type')!r}.")
    base = job.need_base("GGUF names tensors by the architecture")
    arch = _architecture(base)
    if said["general.architecture"] != arch:
        raise ConfigError(f"{source.path} is for {said['general.architecture']!r}, and the base model is {arch!r}.")
    modules = {tensor: name for name, tensor in _tensor_names(base, arch).items()}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".")
        if name not in modules or part not in ("lora_a", "lora_b"):
            job.lost[tensor.name] = "it is no part of a LoRA of this base model"
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kept = getattr(torch, _KEPT.get(tensor.tensor_type.name, "float32"))
        parts.setdefault(modules[name], {})[part] = torch.from_numpy(values.copy()).to(kept)
    invocation = [int(token) for token in said.get(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, ())]
    extra = {"alora_invocation_tokens": invocation} if invocation else {}
    return {"": _held(parts, float(said[gguf.Keys.Adapter.LORA_ALPHA]), base, arch, extra)}


def _held(
    parts: dict[str, dict[str, torch.Tensor]], alpha: float, base: Base, arch: str, extra: dict[str, Any]
) -> Held:
    pairs = {}
    for module, pair in parts.items():
        check_pair(module, pair, ("lora_a", "lora_b"))
        table = isinstance(base.model.get_submodule(module), torch.nn.Embedding)
        down, up = pair["lora_a"].T.contiguous() if table else pair["lora_a"], pair["lora_b"]
        if (heads := _heads(module, base, arch)) is not None:
            up = as_halves(up, heads)
        pairs[module] = Pair(down, up, alpha or down.shape[0], table=table)
    return held_of(Pairs(pairs, extra=extra))


GGUF = Format("gguf", _matches, _read, _write, ".gguf", frozenset({"alora_invocation_tokens"}))
