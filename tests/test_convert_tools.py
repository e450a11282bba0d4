"""Files of MLX-LM and llama.cpp beside the outputs that these tools compute with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert_formats import GOLDEN, IDS, golden, loaded, lora, same_tensors
from torch import nn
from toys import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from peft import LoraConfig, get_peft_model
from peft.convert import check_serving, convert_adapter, format_of
from peft.utils.error import ConfigError


# --- MLX-LM -------------------------------------------------------------------------------------------------------

MLX = {"lora": "llama", "dora": "llama", "table": "llama", "tied": "tied", "head": "llama", "gpt2": "gpt2"}


def mlx_base(name: str) -> PreTrainedModel:
    """The base model of a case."""
    if name == "gpt2":
        sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(**sizes))
        weights = {f"transformer.{key}": value for key, value in golden("mlx")["base.gpt2"].items()}
    else:
        model, weights = tiny_llama(tie=name == "tied"), golden("mlx")[f"base.{name}"]
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


def mlx_case(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors, outputs) of a case, whose files are written into a folder as MLX-LM wrote them."""
    given = golden("mlx")[case]
    output = given.pop("output")
    folder.mkdir()
    save_file(given, folder / "adapters.safetensors")
    with safe_open(GOLDEN / "mlx.safetensors", "pt") as file:
        (folder / "adapter_config.json").write_text(file.metadata()[case])
    return given, output


@pytest.mark.parametrize("case", MLX)
def test_mlx(case: str, tmp_path: Path) -> None:
    given, wanted = mlx_case(case, tmp_path / "mlx")
    base = mlx_base(MLX[case])
    assert format_of(tmp_path / "mlx") == "mlx"
    found = convert_adapter(tmp_path / "mlx", "peft", tmp_path / "peft", base=base)
    assert (found.lost, found.notes) == ({}, [])
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "mlx", tmp_path / "back", base=base)
    same_tensors(given, load_file(tmp_path / "back" / "adapters.safetensors"))


def test_dora_of_an_embedding_is_another_in_mlx(tmp_path: Path) -> None:
    mlx_case("dora_table", tmp_path / "mlx")
    with pytest.raises(ConfigError, match="embed_tokens.m: DoRA's norms of an embedding are of its rows in MLX-LM"):
        convert_adapter(tmp_path / "mlx", "peft", tmp_path / "peft", base=mlx_base("llama"))
    base, _ = lora(tmp_path / "dora", use_dora=True, target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="are of its rows in MLX-LM"):
        convert_adapter(tmp_path / "dora", "mlx", tmp_path / "out", base=base)


def test_mlx_adapts_a_head_with_the_embedding_whose_weight_it_shares(tmp_path: Path) -> None:
    base, config = tiny_llama(tie=True), LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(ConfigError, match="adapts the head with it"):
        convert_adapter(tmp_path / "lora", "mlx", tmp_path / "mlx", base=base)
    found = convert_adapter(tmp_path / "lora", "mlx", tmp_path / "mlx")
    assert "if the head shares its weight" in found.notes[0]


def test_whole_weights_of_mlx_are_no_adapter(tmp_path: Path) -> None:
    save_file({"model.layers.1.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 1}')
    with pytest.raises(ConfigError, match=r"fine_tune_type full.*extract_adapter"):
        convert_adapter(tmp_path, "peft", tmp_path / "peft")


def test_a_whole_alpha_stays_whole(tmp_path: Path) -> None:
    """1 / 49 times 49 is not 1."""
    base, _ = lora(tmp_path / "lora", r=49, lora_alpha=1, target_modules=["q_proj"])
    convert_adapter(tmp_path / "lora", "mlx", tmp_path / "mlx", base=base)
    convert_adapter(tmp_path / "mlx", "peft", tmp_path / "back", base=base)
    assert LoraConfig.from_pretrained(tmp_path / "back").lora_alpha == 1


# --- llama.cpp ----------------------------------------------------------------------------------------------------


def llama_cpp_base(kind: str) -> nn.Module:
    """The base model of a case."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2 if kind == "llama" else 1,
    }
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, tie_word_embeddings=False, **sizes)).eval()
    model.load_state_dict(golden("llama_cpp")[f"base.{kind}"])
    return model


@pytest.mark.parametrize(("kind", "near"), [("llama", 1e-5), ("qwen2", 2e-2)])
def test_llama_cpp(kind: str, near: float, tmp_path: Path) -> None:
    """Its own converter's file, of 8-bit integers for Qwen2, with the outputs that it computes; what is written."""
    gguf = pytest.importorskip("gguf")
    base, file, cases = llama_cpp_base(kind), GOLDEN / f"llama_cpp_{kind}.gguf", golden("llama_cpp")
    found = convert_adapter(file, "peft", tmp_path / "peft", base=base)
    assert (found.source_format, found.lost, found.notes) == ("gguf", {}, [])
    logits = loaded(base, tmp_path / "peft")(IDS).logits[0]
    torch.testing.assert_close(base(IDS).logits[0], cases[kind]["base"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, cases[kind]["output"], atol=near, rtol=near)
    assert (logits - cases[kind]["base"]).abs().max() > 100 * near
    if kind == "llama":
        same_tensors(load_file(tmp_path / "peft" / "adapter_model.safetensors"), cases["lora.llama"])
        convert_adapter(tmp_path / "peft", "gguf", tmp_path / "back.gguf", base=base)
        there, back = (gguf.GGUFReader(path) for path in (file, tmp_path / "back.gguf"))
        alpha = gguf.Keys.Adapter.LORA_ALPHA
        assert there.fields[alpha].contents() == back.fields[alpha].contents()
        same_tensors(*({t.name: torch.from_numpy(t.data.copy()) for t in one.tensors} for one in (there, back)))


def test_llama_cpp_stops_at_an_embedding_whose_weight_the_head_shares(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = tiny_llama(tie=True)
    for name in ("embed_tokens", "lm_head"):
        with pytest.warns(UserWarning, match="ensure_weight_tying"):
            model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=[name]))
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(ConfigError, match=f"{name}: llama.cpp stops at a LoRA of an embedding"):
            convert_adapter(tmp_path / name, "gguf", tmp_path / "x.gguf", base=base)
    assert "stops at LoRAs" in check_serving(tmp_path / "embed_tokens")["llama.cpp"].needs[0]


def test_where_an_alora_begins_is_kept_for_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base, model = lora(tmp_path / "lora", alora_invocation_tokens=[5, 2])
    convert_adapter(tmp_path / "lora", "gguf", tmp_path / "lora.gguf", base=base)
    convert_adapter(tmp_path / "lora.gguf", "peft", tmp_path / "back", base=base)
    assert LoraConfig.from_pretrained(tmp_path / "back").alora_invocation_tokens == [5, 2]
    torch.testing.assert_close(loaded(base, tmp_path / "back")(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert check_serving(tmp_path / "lora")["llama.cpp"].loads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_that_float32_rounds_changes_no_tensor_of_a_gguf_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """16 / sqrt(8) * 8 is no float32."""
    pytest.importorskip("gguf")
    base, model = lora(tmp_path / "lora", r=8, lora_alpha=16, use_rslora=True)
    model.to(dtype).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    assert convert_adapter(tmp_path / "lora", "gguf", tmp_path / "lora.gguf", base=base).notes == []
    convert_adapter(tmp_path / "lora.gguf", "peft", tmp_path / "back", base=base)
    there, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
    assert next(iter(back.values())).dtype == (torch.float16 if dtype == torch.float16 else torch.float32)
    same_tensors({name: tensor.to(back[name].dtype) for name, tensor in there.items()}, back)


# --- torchtune ----------------------------------------------------------------------------------------------------


def test_torchtune_keeps_the_rows_of_qwen2(tmp_path: Path) -> None:
    cases = golden("torchtune_qwen2")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes)).eval()
    base.load_state_dict(cases["base"])
    wanted = cases["lora"].pop("output")
    torch.save(cases["lora"], tmp_path / "adapter_model.pt")
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    convert_adapter(tmp_path, "peft", tmp_path / "peft", base=base)
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "torchtune", tmp_path / "back", base=base)
    same_tensors(cases["lora"], torch.load(tmp_path / "back" / "adapter_model.pt"))


def test_a_model_that_torchtune_keeps_in_a_way_unknown_here_is_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", hidden_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, intermediate_size=8, vocab_size=30))  # fmt: skip
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="matrices of 'olmo2' is not known here"):
        convert_adapter(tmp_path / "lora", "torchtune", tmp_path / "out", base=base)
