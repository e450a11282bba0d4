"""Files of MLX-LM and llama.cpp beside the outputs that these tools compute with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert_formats import GOLDEN, IDS, golden, loaded, lora, same_tensors
from toys import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from peft import LoraConfig, get_peft_model
from peft.convert import convert_adapter, format_of
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
