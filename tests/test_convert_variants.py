"""Files in other forms: LyCORIS' rarer algorithms, scales, shapes, dtypes, containers, architectures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert_formats import GOLDEN, IDS, golden, llama, loaded, lora, same_tensors
from torch import nn
from toys import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from peft import (
    Average,
    BottleneckConfig,
    Fuse,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from peft.convert import convert_adapter, format_of, resize_adapter
from peft.tools.inspection import inspect_adapter
from peft.tools.merging import merge_files
from peft.utils.error import ConfigError


class Net(nn.Module):
    """The layers of LyCORIS' cases, with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(12, 16)
        self.norm1 = nn.LayerNorm(16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, 8)
        self.conv1 = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 4, 3, 3] -> [batch, 16]."""
        return self.norm1(self.proj_in(self.conv1(self.norm2(self.conv(x))).flatten(1)[:, :12]))


FILES = load_file(GOLDEN / "lycoris_rest.safetensors")


def net() -> Net:
    base = Net()
    base.load_state_dict({name.removeprefix("base."): t for name, t in FILES.items() if name.startswith("base.")})
    return base.eval()


# --- LyCORIS ------------------------------------------------------------------------------------------------------

WHOLE = ("doha", "doha_in", "dokr", "dora_in", "tlora", "lokr_rest")


@pytest.mark.parametrize("case", ["norm", "norm_loha", "norm_only", "dylora", *WHOLE])
def test_lycoris_norms_and_what_is_read_by_what_it_does(case: str, tmp_path: Path) -> None:
    base, given = net(), golden("lycoris_rest")[case]
    wanted = given.pop("output")
    save_file(given, tmp_path / "file.safetensors")
    found = convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft", base=base)
    assert not found.lost and len(found.notes) == (
        len({name.partition(".")[0] for name in given}) if case in WHOLE else 0
    )
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(FILES["x"]), wanted, atol=3e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "kohya", tmp_path / "back.safetensors", base=base)
    back = load_file(tmp_path / "back.safetensors")
    if case in WHOLE:
        assert {name.partition(".")[2] for name in back} <= {"diff", "lora_down.weight", "lora_up.weight", "alpha"}
        return
    assert back.keys() == given.keys()
    for name, tensor in given.items():  # a norm is its base's and the change, in one dtype
        torch.testing.assert_close(back[name].to(tensor.dtype), tensor, atol=1e-6 if "norm" in name else 0, rtol=0)


@pytest.mark.parametrize("case", ["norm", "norm_only", "doha", "tlora"])
def test_what_needs_the_base_model_s_weights_says_so(case: str, tmp_path: Path) -> None:
    given = golden("lycoris_rest")[case]
    del given["output"]
    save_file(given, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=r"(norm's weight|factor of its weight): give the base model"):
        convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft")
    with pytest.raises(ConfigError, match="the weight of .* is needed, and base=the model has none"):
        convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft", base=net().to("meta"))
    assert not (tmp_path / "peft").exists()


def test_norms_are_not_written_without_the_base(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoHaConfig(target_modules=["proj_in"], modules_to_save=["norm1"]))
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ConfigError, match="norm1.*no tensor of LOHA .norms are written .* base="):
        convert_adapter(tmp_path / "peft", "kohya", tmp_path / "out.safetensors")


def test_tlora_of_a_kernel_is_refused(tmp_path: Path) -> None:
    parts = {"q_layer.weight": (2, 4, 1, 1), "p_layer.weight": (8, 2, 1, 1), "lambda_layer": (1, 2)}
    save_file(
        {f"lycoris_conv.{name}": torch.randn(shape) for name, shape in parts.items()}, tmp_path / "t.safetensors"
    )
    with pytest.raises(ConfigError, match=r"T-LoRA has no meaning on a kernel \[3, 3\]"):
        convert_adapter(tmp_path / "t.safetensors", "peft", tmp_path / "peft", base=net())


def test_a_file_of_two_methods_is_two_adapters(tmp_path: Path) -> None:
    """A LoRA and a LoHa, each of its own layers: named, written apart, and back into one file."""
    base, given = net(), golden("lycoris_rest")["norm"]
    loha = golden("lycoris_rest")["norm_loha"]
    mixed = {n: t for n, t in given.items() if "proj_in" in n} | {n: t for n, t in loha.items() if "_conv" in n}
    save_file(mixed, tmp_path / "mixed.safetensors")
    found = convert_adapter(tmp_path / "mixed.safetensors", "peft", tmp_path / "peft", base=base)
    assert sorted(found.components) == ["loha", "lora"] and "to be active together" in found.notes[0]
    names = found.components
    model = PeftMixedModel.from_pretrained(net(), tmp_path / "peft" / names[0], names[0])
    model.load_adapter(tmp_path / "peft" / names[1], names[1])
    model.set_adapter(names)
    assert not torch.allclose(model.eval()(FILES["x"]), base(FILES["x"]), atol=0.1)
    convert_adapter(tmp_path / "peft", "kohya", tmp_path / "back.safetensors")
    same_tensors(mixed, load_file(tmp_path / "back.safetensors"))


def test_names_of_two_tools_in_one_file_are_named(tmp_path: Path) -> None:
    odd = "unet.mid_block.attentions.0.proj_in.lora_A.weight"
    given = {n: t for n, t in golden("lycoris_rest")["norm"].items() if "proj_in" in n} | {odd: torch.ones(2, 4)}
    save_file(given, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=f"{odd}: it belongs to no component"):
        convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


# --- scales, dtypes, shapes ---------------------------------------------------------------------------------------


def kohya(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A LoRA on a matrix, a kernel and a 1 x 1 convolution, without alpha."""
    torch.manual_seed(0)
    shapes = {
        "proj_in": ((2, 12), (16, 2)),
        "conv": ((2, 4, 3, 3), (8, 2, 1, 1)),
        "conv1": ((2, 8, 1, 1), (4, 2, 1, 1)),
    }
    tensors = {}
    for module, (down, up) in shapes.items():
        tensors[f"lycoris_{module}.lora_down.weight"] = torch.randn(down).to(dtype)
        tensors[f"lycoris_{module}.lora_up.weight"] = torch.randn(up).to(dtype)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [None, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor(0.0)])
def test_alpha_in_any_form_and_weights_in_any_dtype(alpha: torch.Tensor | None, dtype: torch.dtype, tmp_path: Path):
    given = kohya(dtype)
    if alpha is not None:
        given |= {f"lycoris_{name}.alpha": alpha.clone() for name in ("proj_in", "conv", "conv1")}
    save_file(given, tmp_path / "file.safetensors", metadata={"ss_network_module": "networks.lora"})
    convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft", base=net())
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert said["lora_alpha"] == (3 if alpha is not None and alpha.any() else 2) and said["r"] == 2
    for target in ("kohya", "diffusers"):
        convert_adapter(tmp_path / "peft", target, tmp_path / f"{target}.safetensors", lossy=False)
        convert_adapter(tmp_path / f"{target}.safetensors", "peft", tmp_path / target, base=net())
        same_tensors(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", target)))
        assert json.loads((tmp_path / target / "adapter_config.json").read_text())["lora_alpha"] == said["lora_alpha"]
    back = load_file(tmp_path / "kohya.safetensors")
    same_tensors({k: v for k, v in back.items() if "lora_" in k}, {k: v for k, v in given.items() if "lora_" in k})


def test_matrices_and_one_by_one_convolutions_take_the_shape_of_the_base(tmp_path: Path) -> None:
    base, given = net(), kohya()
    save_file(given, tmp_path / "right.safetensors")
    convert_adapter(tmp_path / "right.safetensors", "peft", tmp_path / "right", base=base)
    for name in [*given]:
        if "conv1" in name:
            given[name] = given[name].flatten(1)
        if "proj_in" in name:
            given[name] = given[name][..., None, None]
    save_file(given, tmp_path / "file.safetensors")
    convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft", base=base)
    same_tensors(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("right", "peft")))


@pytest.mark.parametrize("target", ["kohya", "diffusers", "mlx", "torchtune", "gguf", "adapters"])
@pytest.mark.parametrize("what", ["lora_bias", "bias", "experts"])
def test_nothing_of_an_adapter_is_lost_in_silence(target: str, what: str, tmp_path: Path) -> None:
    if target == "gguf":
        pytest.importorskip("gguf")
    kind, fields = (
        ("mixtral", {"target_parameters": ["mlp.experts.down_proj"]}) if what == "experts" else ("qwen2", {})
    )
    base = causal(kind)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_bias=what == "lora_bias",
                        bias="all" if what == "bias" else "none", **fields)  # fmt: skip
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "lora")
    if (target, what) == ("diffusers", "lora_bias"):
        convert_adapter(tmp_path / "lora", target, tmp_path / "out", base=base)
        return
    with pytest.raises(ConfigError, match="cannot be carried over|one rank and one alpha|matrices of 'mixtral'"):
        convert_adapter(tmp_path / "lora", target, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


# --- containers ---------------------------------------------------------------------------------------------------

CONTAINERS: dict[str, Callable[[dict, str], None]] = {
    "file.safetensors": lambda tensors, path: save_file(tensors, path, metadata={"ss_network_dim": "2"}),
    "file.sft": save_file,
    "file": save_file,
    "file.pt": torch.save,
    "file.pth": torch.save,
    "file.bin": torch.save,
    "file.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    CONTAINERS[name](kohya(), str(tmp_path / name))
    assert format_of(tmp_path / name) == "kohya"
    convert_adapter(tmp_path / name, "kohya", tmp_path / "out" / "same.safetensors", base=net())
    back = load_file(tmp_path / "out" / "same.safetensors")
    same_tensors({k: v for k, v in back.items() if "alpha" not in k}, kohya())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_file(kohya(), tmp_path / "file.safetensors")
    whole = (tmp_path / "file.safetensors").read_bytes()
    for place, content in enumerate((whole[:-7], whole[:20], b"", b"some words", b"PK and no archive")):
        (tmp_path / f"{place}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{place}.safetensors"):
            format_of(tmp_path / f"{place}.safetensors")


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    """By whatever reads an adapter; saving one file over them takes the index away."""
    base, model = lora(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    places = {name: f"adapter_model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, parts / file)
    index = parts / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (parts / "adapter_config.json").write_bytes((tmp_path / "whole" / "adapter_config.json").read_bytes())
    convert_adapter(parts, "peft", tmp_path / "one")
    same_tensors(tensors, load_file(tmp_path / "one" / "adapter_model.safetensors"))
    same_tensors(tensors, load_peft_weights(parts))
    assert inspect_adapter(parts).parameters == sum(t.numel() for t in tensors.values())
    resize_adapter(parts, tmp_path / "small", rank=1)
    merge_files(tmp_path / "base", {"default": str(parts)}, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits)
    loaded = PeftModel.from_pretrained(base, parts)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    for damaged, words in (({"x": "../whole/adapter_model.safetensors"}, "not a file beside it"), (["x"], "no index")):
        index.write_text(json.dumps({"weight_map": damaged}))
        with pytest.raises(ValueError, match=words):
            load_peft_weights(parts)
    index.write_text(json.dumps({"weight_map": places}))
    (parts / places[next(iter(places))]).unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model-00001-of-00002"):
        inspect_adapter(parts)
    loaded.save_pretrained(parts, save_embedding_layers=False)
    assert not index.exists() and load_peft_weights(parts).keys() == tensors.keys()


def test_components_come_back_into_one_file(tmp_path: Path) -> None:
    names = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "unet",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2",
    }
    given = {}
    for name in names:
        given |= {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
        given[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(given, tmp_path / "file.safetensors")
    found = convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft")
    assert sorted(found.components) == sorted(names.values()) and format_of(tmp_path / "peft") == "peft"
    for target in ("kohya", "diffusers"):
        convert_adapter(tmp_path / "peft", target, tmp_path / f"{target}.safetensors")
    convert_adapter(tmp_path / "diffusers.safetensors", "kohya", tmp_path / "again.safetensors")
    for name in ("kohya", "again"):
        same_tensors(given, load_file(tmp_path / f"{name}.safetensors"))


# --- GGUF by architecture -----------------------------------------------------------------------------------------


def causal(kind: str) -> nn.Module:
    """A small model of a type."""
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


# type -> whether llama.cpp keeps the rows of q and k in pairs, as its converters of these models write them. With each
# it gave the adapted model's logits.
PAIRED = {"llama": True, "mistral": True, "mixtral": True, "granite": True, "smollm3": True, "olmo": True,
          "olmo2": False, "qwen2": False, "qwen3": False, "gemma": False, "gemma2": False, "gemma3_text": False,
          "phi": False, "phi3": False, "stablelm": False, "starcoder2": False, "cohere": False, "arcee": True,
          "granitemoe": True, "olmo3": False, "olmoe": False, "glm4": False, "nemotron": False, "exaone4": False,
          "ernie4_5": False, "hunyuan_v1_dense": False, "seed_oss": False, "apertus": False,
          "gpt_oss": False}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRED)
def test_gguf_of_an_architecture(kind: str, tmp_path: Path) -> None:
    """The update of q, read by gguf alone, is the adapter's with its rows in the order of the base's file."""
    gguf = pytest.importorskip("gguf")
    base = causal(kind)
    query = "qkv_proj" if kind == "phi3" else "q_proj"
    others = [] if "moe" in kind else ["down_proj", "fc1"]  # of experts
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[query, *others], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "lora")
    convert_adapter(tmp_path / "lora", "gguf", tmp_path / "lora.gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    name = f"blk.1.attn_{'qkv' if kind == 'phi3' else 'q'}.weight"
    update = read[f"{name}.lora_b"] @ read[f"{name}.lora_a"] * reader.fields["adapter.lora.alpha"].contents() / 2
    layer = model.base_model.model.model.layers[1].self_attn.get_submodule(query)
    wanted = layer.get_delta_weight("default").detach().numpy()
    if PAIRED[kind]:
        wanted = wanted.reshape(4, 2, -1, wanted.shape[1]).swapaxes(1, 2).reshape(wanted.shape)
    np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-6)
    convert_adapter(tmp_path / "lora.gguf", "peft", tmp_path / "back", base=base)
    torch.testing.assert_close(loaded(base, tmp_path / "back")(IDS).logits, model(IDS).logits)


# --- Flux, whatever the method ------------------------------------------------------------------------------------

WIDTH = 4
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (4, 4), "transformer_blocks.0.attn.to_k": (4, 4),
    "transformer_blocks.0.attn.to_v": (4, 4), "single_transformer_blocks.0.attn.to_q": (4, 4),
    "single_transformer_blocks.0.attn.to_k": (4, 4), "single_transformer_blocks.0.attn.to_v": (4, 4),
    "single_transformer_blocks.0.proj_mlp": (16, 4), "single_transformer_blocks.0.proj_out": (4, 20),
    "norm_out.linear": (8, 4),
}  # fmt: skip
ORIGINAL = {"double_blocks.0.img_attn.qkv": [0, 1, 2], "single_blocks.0.linear1": [3, 4, 5, 6],
            "single_blocks.0.linear2": [7], "final_layer.adaLN_modulation.1": [8]}  # fmt: skip


def tree(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Linear layers by their names."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        parent = root
        for word in path:
            if word not in parent._modules:
                parent.add_module(word, nn.Module())
            parent = parent._modules[word]
        parent.add_module(leaf, nn.Linear(*weight.T.shape, bias=False))
        parent._modules[leaf].weight.data = weight.clone()
    return root


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers' matrices as the authors', whose last one has its halves the other way round."""
    parts = [weights[name] for name in DIFFUSERS]
    found = {name: torch.cat([parts[place] for place in places]) for name, places in ORIGINAL.items()}
    return {**found, [*ORIGINAL][-1]: found[[*ORIGINAL][-1]].roll(4, 0)}


def flux_tensors(kind: str, out: int, inner: int) -> dict[str, torch.Tensor]:
    """The tensors of a module, as LyCORIS names them."""
    shapes = {
        "lora": {"lora_up.weight": (out, 2), "lora_down.weight": (2, inner)},
        "loha": {"hada_w1_a": (out, 2), "hada_w1_b": (2, inner), "hada_w2_a": (out, 2), "hada_w2_b": (2, inner)},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 1), "lokr_w2_b": (1, inner // 2)},
        "lokr_whole": {"lokr_w1": (2, 2), "lokr_w2": (out // 2, inner // 2)},
        "oft": {"oft_blocks": (out // 2, 2, 2)},
    }
    made = {name: torch.randn(shape) for name, shape in shapes[kind.partition("+")[0]].items()}
    return made | ({"dora_scale": torch.rand(out, 1)} if "dora" in kind else {})


@pytest.mark.parametrize("kind", ["lora", "lora+dora", "loha", "loha+dora", "lokr", "lokr_whole", "oft"])
def test_flux_of_any_method_does_the_same_under_both_sets_of_names(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in DIFFUSERS.items()}
    given = {}
    for name, weight in fused(weights).items():
        key = "lora_unet_" + name.replace(".", "_")
        given |= {f"{key}.{part}": t for part, t in flux_tensors(kind, *weight.shape).items()}
        given |= {} if "oft" in kind else {f"{key}.alpha": torch.tensor(3.0)}
    save_file(given, tmp_path / "file.safetensors")
    merged = {}
    for which, base in (("original", tree(fused(weights))), ("diffusers", tree(weights))):
        convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / which, base=base)
        plain = loaded(base, tmp_path / which).merge_and_unload()
        merged[which] = {name.removesuffix(".weight"): t for name, t in plain.state_dict().items()}
    assert not torch.allclose(merged["diffusers"]["norm_out.linear"], weights["norm_out.linear"], atol=0.1)
    for name, found in fused(merged["diffusers"]).items():
        torch.testing.assert_close(found, merged["original"][name], atol=2e-5, rtol=1e-4, msg=name)
    convert_adapter(tmp_path / "diffusers", "kohya", tmp_path / "back.safetensors")
    if kind in ("lora", "lora+dora", "loha"):
        return same_tensors(given, load_file(tmp_path / "back.safetensors"))
    convert_adapter(tmp_path / "back.safetensors", "peft", tmp_path / "again", base=tree(fused(weights)))
    again = loaded(tree(fused(weights)), tmp_path / "again").merge_and_unload().state_dict()
    for name, wanted in merged["original"].items():
        torch.testing.assert_close(again[f"{name}.weight"], wanted, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("config_cls", [LoHaConfig, LoraConfig])
@pytest.mark.parametrize(
    "adapted, whole, there",
    [
        ("input_blocks.4.1.proj_in", "middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
        ("double_blocks.0.img_attn.proj", "img_in", "single_transformer_blocks.0.proj_out"),
        ("single_transformer_blocks.0.proj_out", "x_embedder", "double_blocks.0.img_attn.proj"),
    ],
    ids=["UNet", "Flux", "Flux, back"],
)
def test_whole_modules_are_not_left_under_names_of_the_other_set(
    config_cls: type, adapted: str, whole: str, there: str, tmp_path: Path
) -> None:
    config = config_cls(r=2, target_modules=[adapted], modules_to_save=[whole])
    get_peft_model(tree({adapted: torch.randn(4, 4), whole: torch.randn(4, 4)}), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"whole modules have other names.*{whole}"):
        convert_adapter(tmp_path, "peft", tmp_path / "out", base=tree({there: torch.randn(4, 4)}))
    assert not (tmp_path / "out").exists()


def test_lohas_of_parts_that_differ_become_a_lora_of_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in DIFFUSERS.items()}
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"]
    config = LoHaConfig(r=2, alpha=3, target_modules=names, init_weights=False)
    model = get_peft_model(tree(weights), config)
    model.save_pretrained(tmp_path / "loha")
    convert_adapter(tmp_path / "loha", "peft", tmp_path / "lora", base=tree(fused(weights)))
    wanted = fused({n.removesuffix(".weight"): t for n, t in model.merge_and_unload().state_dict().items()})
    found = loaded(tree(fused(weights)), tmp_path / "lora").merge_and_unload()
    for name, weight in wanted.items():
        torch.testing.assert_close(found.get_submodule(name).weight, weight, atol=1e-5, rtol=1e-4)


def part(name: str, out: int = 8, inner: int = 8, down: str = "lora_down") -> dict[str, torch.Tensor]:
    """A LoRA of a module, under a full name."""
    up = down.replace("down", "up").replace("A", "B")
    return {f"{name}.{down}.weight": torch.randn(2, inner), f"{name}.{up}.weight": torch.randn(out, 2)}


CLIP, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
PIPELINES = {
    "flux, kohya": {
        "lora_unet_double_blocks_0_img_attn_proj": "transformer",
        "lora_unet_final_layer_linear": "transformer",
        f"lora_te1_{CLIP}": "text_encoder",
        f"lora_te3_{T5}": "text_encoder_2",
    },
    "flux, ComfyUI": {
        "diffusion_model.double_blocks.0.img_attn.proj": "diffusion_model",
        f"text_encoders.clip_l.transformer.{CLIP}": "text_encoder",
        f"text_encoders.t5xxl.transformer.{T5}": "text_encoder_2",
    },
    "flux, diffusers": {
        "transformer.single_transformer_blocks.0.attn.to_q": "transformer",
        f"text_encoder.{CLIP}": "text_encoder",
    },
    "sd3, kohya": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": "transformer",
        f"lora_te1_{CLIP}": "text_encoder",
        f"lora_te2_{CLIP}": "text_encoder_2",
        f"lora_te3_{T5}": "text_encoder_3",
    },
    "sd, kohya": {"lora_unet_mid_block_attentions_0_proj_in": "unet", f"lora_te_{CLIP}": "text_encoder"},
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_components_of_a_pipeline_are_known_by_any_names(pipeline: str, tmp_path: Path) -> None:
    given: dict[str, torch.Tensor] = {}
    for name in PIPELINES[pipeline]:
        kohya = name.startswith("lora_")
        given |= part(name.replace(".", "_") if kohya else name, down="lora_down" if kohya else "lora_A")
    save_file(given, tmp_path / "file.safetensors")
    found = convert_adapter(tmp_path / "file.safetensors", "peft", tmp_path / "peft")
    assert sorted(found.components) == sorted(set(PIPELINES[pipeline].values())) and not found.lost
    target = "kohya" if "kohya" in pipeline else "diffusers"
    convert_adapter(tmp_path / "peft", "kohya", tmp_path / "kohya.safetensors")
    back = load_file(tmp_path / "kohya.safetensors")
    if target == "kohya":
        same_tensors(given, {name: tensor for name, tensor in back.items() if "alpha" not in name})
    elif "ComfyUI" in pipeline:
        wanted = {"lora_unet_double_blocks_0_img_attn_proj", "lora_te1_" + CLIP.replace(".", "_")}
        assert {name.partition(".")[0] for name in back} == wanted | {"lora_te3_" + T5.replace(".", "_")}


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_other_algorithms_under_names_with_dots(kind: str, tmp_path: Path) -> None:
    """As trainers for ComfyUI write them, beside LoRAs of other modules: what comes of kohya's names, to the bit."""
    torch.manual_seed(0)
    base = tree(fused({name: torch.randn(shape) for name, shape in DIFFUSERS.items()}))
    files: dict[str, dict[str, torch.Tensor]] = {"dots": {}, "flat": {}}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            tensors = flux_tensors("lora" if "final" in name else kind, *module.weight.shape)
            tensors |= {} if "oft_blocks" in tensors else {"alpha": torch.tensor(3.0)}
            files["dots"] |= {f"diffusion_model.{name}.{part}": t for part, t in tensors.items()}
            files["flat"] |= {f"lora_unet_{name.replace('.', '_')}.{part}": t for part, t in tensors.items()}
    found = {}
    for form, tensors in files.items():
        save_file(tensors, tmp_path / f"{form}.safetensors")
        report = convert_adapter(tmp_path / f"{form}.safetensors", "peft", tmp_path / form, base=base)
        found[form] = {n: t for file in (tmp_path / form).rglob("*.safetensors") for n, t in load_file(file).items()}
        assert not report.lost and len(report.components) == (1 if kind == "oft" and form == "flat" else 2)
    assert format_of(tmp_path / "dots.safetensors") == "diffusers"
    same_tensors(found["dots"], found["flat"])


def test_flux_attention_processors_as_diffusers_reads_them(tmp_path: Path) -> None:
    """The names of x-flux, whose single blocks adapt query, key and value, and not the rest of their matrix."""
    diffusers = pytest.importorskip("diffusers")
    given = {}
    for name in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
        key = f"double_blocks.0.processor.{name}"
        given |= {f"{key}.down.weight": torch.randn(2, 3072)}
        given |= {f"{key}.up.weight": torch.randn(3072 * (3 if "qkv" in name else 1), 2)}
    for name, inner, out in (("qkv_lora", 3072, 9216), ("proj_lora", 15360, 3072)):
        key = f"single_blocks.0.processor.{name}"
        given |= {f"{key}.down.weight": torch.randn(2, inner), f"{key}.up.weight": torch.randn(out, 2)}
    save_file(given, tmp_path / "file.safetensors")
    convert_adapter(tmp_path / "file.safetensors", "diffusers", tmp_path / "out.safetensors")
    same_tensors(load_file(tmp_path / "out.safetensors"), diffusers.FluxPipeline.lora_state_dict(dict(given)))
    convert_adapter(tmp_path / "file.safetensors", "kohya", tmp_path / "kohya.safetensors")
    rows = load_file(tmp_path / "kohya.safetensors")["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert torch.equal(rows[:9216], given["single_blocks.0.processor.qkv_lora.up.weight"])
    assert rows.shape == (7 * 3072, 2) and not rows[9216:].any()


# --- unions and gates of adapters ---------------------------------------------------------------------------------


def of_adapters(case: str, folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """(base, tensors, output) of a recorded case, whose files are written to a folder."""
    base = llama(golden("adapters")["base"], num_hidden_layers=2, num_attention_heads=2)
    given = golden("adapters_unions")[case]
    wanted = given.pop("output")
    folder.mkdir()
    torch.save(given, folder / "pytorch_adapter.bin")
    with safe_open(GOLDEN / "adapters_unions.safetensors", "pt") as file:
        (folder / "adapter_config.json").write_text(file.metadata()[case])
    return base, given, wanted


@pytest.mark.parametrize("case", ["union", "union_prefix", "unipelt", "lora_gated", "prefix_gated", "bn_gated"])
def test_unions_and_gates_of_adapters(case: str, tmp_path: Path) -> None:
    base, given, wanted = of_adapters(case, tmp_path / "there")
    found = convert_adapter(tmp_path / "there", "peft", tmp_path / "peft", base=base)
    assert not found.lost and found.components == [""]
    with torch.no_grad():
        torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "adapters", tmp_path / "back", base=base)
    said = [json.loads((tmp_path / name / "adapter_config.json").read_text())["config"] for name in ("there", "back")]
    for one, other in zip(*(config.get("configs", [config]) for config in said), strict=True):
        assert {key for key in one.keys() & other.keys() if one[key] != other[key]} == set()
    back = torch.load(tmp_path / "back" / "pytorch_adapter.bin")
    back = {name.replace(".adapter.", ".x."): tensor for name, tensor in back.items()}
    assert back.keys() == given.keys()
    for name, tensor in given.items():  # the keys of a prefix are turned there and back
        torch.testing.assert_close(back[name], tensor, atol=1e-6 if "control_trans" in name else 0, rtol=0, msg=name)
    convert_adapter(tmp_path / "back", "peft", tmp_path / "again", base=base)
    with torch.no_grad():
        torch.testing.assert_close(loaded(base, tmp_path / "again")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)


def fusion_files(case: str, folder: Path) -> torch.Tensor:
    """The files of a fusion and its members, as adapters wrote them; the outputs."""
    cases = golden("adapters_fusion")
    with safe_open(GOLDEN / "adapters_fusion.safetensors", "pt") as file:
        said = file.metadata()
    for part in ("a", "b", "fused"):
        fused = part == "fused"
        (folder / part).mkdir(parents=True)
        weights = "pytorch_model_adapter_fusion.bin" if fused else "pytorch_adapter.bin"
        torch.save(cases[f"{case}.{part}"], folder / part / weights)
        config = folder / part / f"adapter_{'fusion_' if fused else ''}config.json"
        config.write_text(said[f"{case}.{part}"])
    return cases[case]["output"]


@pytest.mark.parametrize("case", ["dynamic", "static"])
def test_a_fusion_of_adapters(case: str, tmp_path: Path) -> None:
    wanted = fusion_files(case, tmp_path / "there")
    base = llama(golden("adapters")["base"], num_hidden_layers=2, num_attention_heads=2)
    found = convert_adapter(tmp_path / "there", "peft", tmp_path / "peft", base=base)
    assert found.components == ["a", "b", "fused"] and "beside its members" in found.notes[0]
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft" / "fused", adapter_name="fused").eval()
    torch.testing.assert_close(model(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "adapters", tmp_path / "back", base=base)
    for part in ("a", "b", "fused"):
        there, back = ([*(tmp_path / side / part).iterdir()] for side in ("there", "back"))
        assert {file.name for file in there} == {file.name for file in back}
        configs = [json.loads(next(f for f in files if f.suffix == ".json").read_text()) for files in (there, back)]
        assert [c["name"] for c in configs] == [configs[0]["name"]] * 2
        if part == "fused":
            differing = {k for k, v in configs[0]["config"].items() if bool(configs[1]["config"][k]) != bool(v)}
            assert (differing, configs[0]["adapter_names"]) == (set(), configs[1]["adapter_names"])
        same_tensors(*(torch.load(next(f for f in files if f.suffix == ".bin")) for files in (there, back)))


def test_what_a_fusion_has_beyond_the_formula_is_named(tmp_path: Path) -> None:
    fusion_files("static", tmp_path)
    config = tmp_path / "fused" / "adapter_fusion_config.json"
    said = json.loads(config.read_text())
    said["config"] |= {"residual_before": True, "temperature": True}
    config.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"residual_before: .*temperature: a fusion here is as with"):
        convert_adapter(tmp_path / "fused", "peft", tmp_path / "x")
    model = get_peft_model(tiny_llama(), BottleneckConfig(), "a")
    model.add_composition("mean", Average("a", "__base__"))
    model.save_pretrained(tmp_path / "mean")
    model.add_adapter("b", BottleneckConfig(preset="houlsby"))
    model.delete_adapter("mean")
    model.add_composition("fused", Fuse("a", "b"))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="members: adapters fuses what stands at the same places of a block"):
        convert_adapter(tmp_path / "ours", "adapters", tmp_path / "x", base=tiny_llama())
    with pytest.raises(ConfigError, match=r"files of fusions of adapters alone, and this is Average\('a'"):
        convert_adapter(tmp_path / "mean" / "mean", "adapters", tmp_path / "x", base=tiny_llama())


def test_heads_of_adapters_are_named(tmp_path: Path) -> None:
    base, _, _ = of_adapters("bn_gated", tmp_path / "there")
    torch.save({"heads.x.1.weight": torch.ones(2, 2)}, tmp_path / "there" / "pytorch_model_head.bin")
    with pytest.raises(ConfigError, match="pytorch_model_head.bin: a prediction head"):
        convert_adapter(tmp_path / "there", "peft", tmp_path / "peft", base=base)
    convert_adapter(tmp_path / "there", "peft", tmp_path / "peft", base=base, lossy=True)


def test_matrices_without_a_place_in_adapters_are_named(tmp_path: Path) -> None:
    """adapters would pass over them when it loads the file; blocks without any are left out in its config."""
    base, _ = lora(tmp_path / "one", target_modules=["q_proj", "o_proj"])
    with pytest.raises(ConfigError, match="o_proj: adapters has no place"):
        convert_adapter(tmp_path / "one", "adapters", tmp_path / "x", base=base)
    lora(tmp_path / "two", target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    convert_adapter(tmp_path / "two", "adapters", tmp_path / "out", base=base)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]
    assert (said["leave_out"], said["attn_matrices"], said["intermediate_lora"], said["output_lora"]) == (
        [0],
        ["q"],
        True,
        False,
    )
    lora(tmp_path / "odd", target_modules=r".*(0.self_attn.q_proj|1.self_attn.[qk]_proj)")
    with pytest.raises(ConfigError, match="blocks 0: adapters has the same matrices in all blocks"):
        convert_adapter(tmp_path / "odd", "adapters", tmp_path / "x", base=base)
