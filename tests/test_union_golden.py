"""MAM and UniPELT are what the library ``adapters`` computes of the same tensors, and what their formulas say.

`golden/unions/` was recorded by the `make.py` beside it. Tokens stand behind the prefix here, and not there: tables of
positions are moved for it, and keys turned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from in_blocks import gives
from safetensors import safe_open
from torch import nn

from peft import (
    BottleneckConfig,
    LoraConfig,
    MAMConfig,
    PeftModel,
    PrefixTuningConfig,
    UniPELTConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.convert.rotary import rotated
from peft.core.blocks.blocks import first_output


pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parent / "golden" / "unions"
BASES: dict[str, tuple[Any, Any]] = {
    "bert": (tf.BertModel, tf.BertConfig),
    "llama": (tf.LlamaModel, tf.LlamaConfig),
    "bart": (tf.BartModel, tf.BartConfig),
}
TOKENS = 3
POSITIONS = {
    "bert": {"embeddings.position_embeddings.weight": 0},
    "bart": {"decoder.embed_positions.weight": 2},
    "llama": {},
}
"""Tables of positions that tokens behind a prefix look up, and how many of their rows are no positions."""
PIECES = {"adapter_down.0": "down", "adapter_up": "up", "gate": "gate"}


def recorded(case: str) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The fields of the base's config, and what was recorded: "base", "adapter", "in" -> name -> tensor; "output"."""
    parts: dict[str, dict[str, torch.Tensor]] = {"base": {}, "adapter": {}, "in": {}, "output": {}}
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        for key in list(file.keys()):
            part, _, name = key.partition("|")
            parts[part][name] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), parts


def translated(base: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in files here."""
    found, prefix = {}, {}
    for key, tensor in given.items():
        module, _, rest = key.partition(".loras.a.")
        block, _, piece = key.partition(".adapters.a.")
        if rest:
            part = f"lora_{rest}" if rest.startswith("gate") else f"{rest}.weight"
            found[f"base_model.model.{module}.{part}"] = tensor
        elif piece:
            name, _, tail = piece.rpartition(".")
            block = block.removesuffix(".output").removesuffix(".output_adapters")
            found[f"base_model.model.{block}.bottleneck_feedforward.{PIECES[name]}.{tail}"] = tensor
        elif ".prefix_gates." in key:
            layer = next(part for part in key.split(".") if part.isdigit())
            if "encoder.layers" not in key and "encoder_attn" not in key:  # those without a prefix have gates there
                found[f"prefix_gates.{layer}.{key.rpartition('.')[2]}"] = tensor
        else:
            prefix[key.partition(".self_prefix.")[2]] = tensor
    if "control_trans" in prefix:
        heads = prefix["control_trans"].view(TOKENS, 2, 2, 1, 8)
        keys = rotated(heads[:, :, :1], TOKENS, 10000.0)
        return {**found, "prompt_embeddings": torch.cat([keys, heads[:, :, 1:]], 2).reshape(TOKENS, -1)}
    network = {key.replace("control_trans", "transform"): t for key, t in prefix.items() if key != "wte.weight"}
    network["embedding.weight"] = prefix["wte.weight"]
    return {**found, **{f"prompt_encoder.{key}": t for key, t in network.items()}}


def loaded(case: str) -> tuple[PeftModel, dict[str, dict[str, torch.Tensor]]]:
    """The recorded model with our union around it."""
    base, _, kind = case.partition("_")
    fields, parts = recorded(case)
    model_cls, config_cls = BASES[base]
    model = model_cls(config_cls(**fields, attn_implementation="eager")).eval()
    tensors = dict(parts["base"])
    for name, first in POSITIONS[base].items():
        tensors[name] = torch.cat([tensors[name][:first], tensors[name][first:].roll(TOKENS, 0)])
    model.load_state_dict(tensors, strict=False)
    networks = {} if base == "llama" else {"prefix_projection": True, "encoder_hidden_size": 5}
    prefix = PrefixTuningConfig(num_virtual_tokens=TOKENS, use_gating=kind == "unipelt", **networks)
    matrices = ["query", "value"] if base == "bert" else ["q_proj", "v_proj"]
    config = MAMConfig(prefix, BottleneckConfig(preset="parallel", reduction_factor=4))
    if kind == "unipelt":
        network = BottleneckConfig(reduction_factor=4, use_gating=True)
        lora = LoraConfig(r=4, lora_alpha=2, target_modules=matrices, use_gating=True)
        config = UniPELTConfig(prefix, network, lora)
    adapted = get_peft_model(model, config).eval()
    given = translated(base, parts["adapter"])
    result = set_peft_model_state_dict(adapted, given)
    assert not result.unexpected_keys and all("prompt_embeddings" in key for key in result.missing_keys)
    return adapted, parts


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_it_is_what_adapters_computes(case):
    model, parts = loaded(case)
    with torch.no_grad():
        found = model(**parts["in"]).last_hidden_state
        gives(found, parts["output"][""])
        with model.disable_adapter():
            assert (model(**parts["in"]).last_hidden_state - found).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mam", "unipelt"])
def test_it_is_what_the_formulas_say(kind):
    """A layer of BERT, head by head and sum by sum:

    K = [g P_K; x W_k], V = [g P_V; x W_v + g' x A B], h = x + attention, y = N(h + FFN(h) + u(h)), each g a mean over
    tokens of sigmoid(w h + b). MAM has no gates, and u of what the FFN reads, times 4.
    """
    model, parts = loaded(f"bert_{kind}")
    tensors = {key.replace(".default", ""): p for key, p in model.named_parameters()}
    seen: list[Any] = []
    block = next(m for name, m in model.named_modules() if name.endswith("layer.1"))
    handle = block.register_forward_hook(lambda module, args, out: seen.extend((args[0], first_output(out))))
    with torch.no_grad():
        model(**parts["in"])
        handle.remove()
        gives(seen[1], by_hand(tensors, seen[0], kind))


def by_hand(tensors: dict[str, torch.Tensor], x: torch.Tensor, kind: str) -> torch.Tensor:
    """The second block's output, from its input ``[batch, tokens, 16]`` and all tensors of the model."""
    held = {key.replace("base_layer.", "").partition("layer.1.")[2] or key: t for key, t in tensors.items()}
    held = {key.removeprefix("base_model.prompt_encoder."): t for key, t in held.items()}

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return h @ held[f"{name}.weight"].T + held[f"{name}.bias"]

    def gate(name: str, h: torch.Tensor) -> torch.Tensor:
        return (1 / (1 + torch.exp(-linear(name, h)))).mean(1, keepdim=True)

    def normed(name: str, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(z, (16,), held[f"{name}.weight"], held[f"{name}.bias"], 1e-12)

    def projected(name: str) -> torch.Tensor:
        out = linear(name, x)
        if f"{name}.lora_A.weight" not in held:
            return out
        return out + gate(f"{name}.lora_gate", x) * (
            x @ held[f"{name}.lora_A.weight"].T @ held[f"{name}.lora_B.weight"].T
        )

    def u(z: torch.Tensor) -> torch.Tensor:
        return linear("bottleneck_feedforward.up", torch.relu(linear("bottleneck_feedforward.down", z)))

    gated, attention = kind == "unipelt", "attention.self"
    table = linear("transform.2", torch.tanh(linear("transform.0", held["embedding.weight"])))
    table = table.view(TOKENS, 2, 2, 16)[:, 1]  # tokens, layers, keys and values, width
    g = gate("prefix_gates.1", x) if gated else torch.ones(len(x), 1, 1)
    keys, values = (
        torch.cat([g * table[:, part], projected(f"{attention}.{name}")], 1)
        for part, name in enumerate(("key", "value"))
    )
    query, heads = projected(f"{attention}.query"), []
    for head in (slice(0, 8), slice(8, 16)):
        heads.append(torch.softmax(query[..., head] @ keys[..., head].mT / 8**0.5, -1) @ values[..., head])
    h = normed("attention.output.LayerNorm", x + linear("attention.output.dense", torch.cat(heads, -1)))
    out = linear("output.dense", nn.functional.gelu(linear("intermediate.dense", h)))
    if not gated:
        return normed("output.LayerNorm", h + out + 4 * u(h))
    read = normed("output.LayerNorm", h + out)
    return normed("output.LayerNorm", h + out + gate("bottleneck_feedforward.gate", read) * u(read))
