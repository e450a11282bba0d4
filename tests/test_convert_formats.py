"""Files of other tools: their outputs, the way back bit for bit, and what cannot be carried over."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toys import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from peft import BottleneckConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.convert import convert_adapter, format_of
from peft.convert.formats.unet import diffusers_name
from peft.utils.error import ConfigError


GOLDEN = Path(__file__).parent / "golden" / "convert"
IDS = torch.tensor([[1, 5, 2, 9, 3, 7]])


class Net(nn.Module):
    """The layers of LyCORIS' cases."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(12, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 4, 3, 3] -> [batch, 16]."""
        return self.proj_in(self.conv1(self.conv(x)).flatten(1)[:, :12])


def golden(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a golden file by what stands before the bar."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        case, _, rest = key.partition("|")
        found.setdefault(case, {})[rest] = tensor
    return found


def llama(tensors: dict[str, torch.Tensor], **sizes: int) -> LlamaForCausalLM:
    """The base model of a golden case."""
    config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_key_value_heads=2, **sizes)
    config.rms_norm_eps = 1e-5 if sizes["num_hidden_layers"] == 1 else config.rms_norm_eps
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of the base with the adapter of a folder."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def lora(folder: Path, **fields) -> tuple[nn.Module, nn.Module]:
    """(base, with a LoRA of random numbers that is saved in the folder)."""
    torch.manual_seed(0)
    base = tiny_llama().eval()
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "down_proj"], **fields}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"init_lora_weights": False, **fields})).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return base, model


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names and the same bits."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# LyCORIS gives a LoKr of two whole factors no scale; here alpha says so.
ALPHA_ONLY = {"lokr", "lokr_full", "lokr_t"}


@pytest.mark.parametrize("case", ["lora", "locon", "dora", "loha", "loha_t", "lokr", "lokr_full", "lokr_t"])
def test_lycoris(case: str, tmp_path: Path) -> None:
    files = load_file(GOLDEN / "lycoris.safetensors")
    base = Net()
    base.load_state_dict({key.removeprefix("base."): value for key, value in files.items() if key.startswith("base.")})
    given = golden("lycoris")[case]
    wanted = given.pop("output")
    save_file(given, tmp_path / "lycoris.safetensors")
    found = convert_adapter(tmp_path / "lycoris.safetensors", "peft", tmp_path / "peft", base=base)
    assert (found.source_format, found.lost) == ("kohya", {})
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(files["x"]), wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "kohya", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    if case == "locon":  # the core is multiplied into A
        assert found.notes and "core" in found.notes[0]
        del given["lycoris_conv.lora_mid.weight"], given["lycoris_conv.lora_down.weight"]
        del back["lycoris_conv.lora_down.weight"]
    if case in ALPHA_ONLY:
        given, back = ({k: v for k, v in part.items() if not k.endswith("alpha")} for part in (given, back))
    same_tensors(given, back)


@pytest.mark.parametrize("case", ["full", "glora", "oft", "oft_constraint", "boft", "ia3", "lokr_both"])
def test_lycoris_by_what_it_does_to_the_weight(case: str, tmp_path: Path) -> None:
    """Algorithms that no method has in their form: what they do is carried over, by the base weight if need be."""
    files = load_file(GOLDEN / "lycoris.safetensors")
    base = Net()
    base.load_state_dict({key.removeprefix("base."): value for key, value in files.items() if key.startswith("base.")})
    if case == "ia3":
        base.conv1.bias = None  # whose outputs are scaled
    given = golden("lycoris" if case == "lokr_both" else "lycoris_more")[case]
    wanted = given.pop("output")
    save_file(given, tmp_path / "lycoris.safetensors")
    reads = case in ("glora", "oft", "oft_constraint", "boft")
    if reads:
        with pytest.raises(ConfigError, match="a factor of its weight"):
            convert_adapter(tmp_path / "lycoris.safetensors", "peft", tmp_path / "peft")
    found = convert_adapter(tmp_path / "lycoris.safetensors", "peft", tmp_path / "peft", base=base)
    assert found.lost == {} and len(found.notes) == (3 if reads or case == "lokr_both" else 0)
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(files["x"]), wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "kohya", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    if case == "full":
        same_tensors(given, back)
    if case == "ia3":  # 1 + w - 1
        assert given.keys() == back.keys()
        for name, tensor in back.items():
            torch.testing.assert_close(tensor.to(given[name].dtype), given[name], rtol=0, atol=1e-6)


def test_lycoris_ia3_of_outputs_with_a_bias_is_named(tmp_path: Path) -> None:
    given = golden("lycoris_more")["ia3"]
    del given["output"]
    save_file(given, tmp_path / "lycoris.safetensors")
    with pytest.raises(ConfigError, match="conv1.bias: LyCORIS' IA3 leaves the bias"):
        convert_adapter(tmp_path / "lycoris.safetensors", "peft", tmp_path / "peft", base=Net())


def test_weights_are_read_from_the_base_s_files(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    weight = base.model.layers[0].self_attn.q_proj.weight.detach()
    blocks = torch.randn(len(weight) // 2, 2, 2)
    save_file({"lycoris_model_layers_0_self_attn_q_proj.oft_blocks": blocks}, tmp_path / "oft.safetensors")
    convert_adapter(tmp_path / "oft.safetensors", "peft", tmp_path / "peft", base=tmp_path / "base")
    q = blocks - blocks.mT
    turned = torch.linalg.solve(torch.eye(2) - q, torch.eye(2) + q, left=False).mT @ weight.unflatten(0, (-1, 2))
    merged = loaded(base, tmp_path / "peft").merge_and_unload().model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, turned.flatten(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_torchtune(case: str, tmp_path: Path) -> None:
    cases = golden("torchtune")
    base = llama(cases[f"base.{case}"], num_hidden_layers=1, num_attention_heads=4)
    wanted = cases[case].pop("output")
    torch.save(cases[case], tmp_path / "adapter_model.pt")
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert format_of(tmp_path) == "torchtune"
    convert_adapter(tmp_path, "peft", tmp_path / "peft", base=base)
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "torchtune", tmp_path / "back", base=base)
    same_tensors(cases[case], torch.load(tmp_path / "back" / "adapter_model.pt"))


ADAPTERS = ("lora", "ia3", "bottleneck", "houlsby", "prefix", "compacter", "compacter++", "compacter_own", "nice")


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, tmp_path: Path) -> None:
    cases = golden("adapters")
    base = llama(cases["base"], num_hidden_layers=2, num_attention_heads=2)
    wanted = cases[case].pop("output")
    cases[case].pop("inverted", None)
    torch.save(cases[case], tmp_path / "pytorch_adapter.bin")
    with safe_open(GOLDEN / "adapters.safetensors", "pt") as file:
        (tmp_path / "adapter_config.json").write_text(file.metadata()[case])
    assert format_of(tmp_path) == "adapters"
    convert_adapter(tmp_path, "peft", tmp_path / "peft", base=base)
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    convert_adapter(tmp_path / "peft", "adapters", tmp_path / "back", base=base)
    back = torch.load(tmp_path / "back" / "pytorch_adapter.bin")
    if case != "prefix":  # its keys are turned there and back
        return same_tensors(cases[case], back)
    for name, tensor in cases[case].items():
        torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=1e-5)


def test_parallel_adapters_of_adapters_read_something_else_where_blocks_normalise_first(tmp_path: Path) -> None:
    base = llama(golden("adapters")["base"], num_hidden_layers=2, num_attention_heads=2)
    get_peft_model(base, BottleneckConfig(preset="parallel")).save_pretrained(tmp_path / "peft")
    with pytest.raises(ConfigError, match="read the stream before that"):
        convert_adapter(tmp_path / "peft", "adapters", tmp_path / "out", base=base)


def test_adapters_with_an_inverse_before_a_head_of_its_own(tmp_path: Path) -> None:
    cases = golden("adapters")
    base = llama(cases["base"], num_hidden_layers=2, num_attention_heads=2)
    wanted, forward = cases["nice"].pop("inverted"), cases["nice"].pop("output")
    assert (wanted - forward).abs().max() > 0.05
    torch.save(cases["nice"], tmp_path / "pytorch_adapter.bin")
    with safe_open(GOLDEN / "adapters.safetensors", "pt") as file:
        said = {**json.loads(file.metadata()["nice"]), "model_class": "LlamaAdapterModel"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    convert_adapter(tmp_path, "peft", tmp_path / "peft", base=base)
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="before heads of its own alone"):
        convert_adapter(tmp_path / "peft", "adapters", tmp_path / "back", base=base)


def test_adapters_with_an_invertible_one_beside_bottlenecks_are_two(tmp_path: Path) -> None:
    cases = golden("adapters")
    base = llama(cases["base"], num_hidden_layers=2, num_attention_heads=2)
    wanted = cases["seq_bn_inv"].pop("output")
    torch.save(cases["seq_bn_inv"], tmp_path / "pytorch_adapter.bin")
    with safe_open(GOLDEN / "adapters.safetensors", "pt") as file:
        (tmp_path / "adapter_config.json").write_text(file.metadata()["seq_bn_inv"])
    names = convert_adapter(tmp_path, "peft", tmp_path / "peft", base=base).components
    assert names == ["bottleneck", "invertible"]
    model = PeftMixedModel.from_pretrained(base, tmp_path / "peft" / names[0], names[0])
    model.load_adapter(tmp_path / "peft" / names[1], names[1])
    model.set_adapter(names)
    torch.testing.assert_close(model.eval()(IDS).logits, wanted, atol=2e-6, rtol=1e-5)
    base = llama(golden("adapters")["base"], num_hidden_layers=2, num_attention_heads=2)
    convert_adapter(tmp_path / "peft", "adapters", tmp_path / "back", base=base)
    same_tensors(cases["seq_bn_inv"], torch.load(tmp_path / "back" / "pytorch_adapter.bin"))
    said = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["config"]
    assert said["inv_adapter"] == "nice" and said["output_adapter"]


def test_diffusers_and_kohya_names(tmp_path: Path) -> None:
    source = GOLDEN / "diffusers.safetensors"
    given = load_file(source)
    assert format_of(source) == "diffusers"
    convert_adapter(source, "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (2, 3, {})
    convert_adapter(source, "kohya", tmp_path / "kohya.safetensors")
    flat = load_file(tmp_path / "kohya.safetensors")
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    key = "lora_unet_" + attention.replace(".", "_")
    assert torch.equal(flat[f"{key}.lora_down.weight"], given[f"unet.{attention}.lora_A.weight"])
    assert float(flat[f"{key}.alpha"]) == 3
    for file in (tmp_path / "peft", tmp_path / "kohya.safetensors"):  # without a base, by the parts of names
        convert_adapter(file, "diffusers", tmp_path / "back.safetensors")
        same_tensors(given, load_file(tmp_path / "back.safetensors"))


def test_old_names_of_diffusers(tmp_path: Path) -> None:
    """As attention processors had them, and text encoders."""
    block, text = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "text_model.encoder.layers.0.self_attn.q_proj",
    )
    given = {
        f"unet.{block}.processor.to_out_lora.down.weight": torch.randn(2, 8),
        f"unet.{block}.processor.to_out_lora.up.weight": torch.randn(8, 2),
        f"text_encoder.{text}.lora_linear_layer.down.weight": torch.randn(4, 8),
        f"text_encoder.{text}.lora_linear_layer.up.weight": torch.randn(8, 4),
    }
    save_file(given, tmp_path / "old.safetensors")
    found = convert_adapter(tmp_path / "old.safetensors", "peft", tmp_path / "peft")
    assert set(found.components) == {"unet", "text_encoder"}
    unet = load_file(tmp_path / "peft" / "unet" / "adapter_model.safetensors")
    assert torch.equal(unet[f"base_model.model.{block}.to_out.0.lora_B.weight"], [*given.values()][1])
    config = json.loads((tmp_path / "peft" / "text_encoder" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4  # without alpha the scale is 1


def test_mlx_by_its_formula(tmp_path: Path) -> None:
    """y = W x + scale * (x a) b, a ``[in, r]``, b ``[r, out]``."""
    torch.manual_seed(0)
    base = tiny_llama().eval()
    layer = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(16, 4), torch.randn(4, 16)
    save_file({f"{layer}.lora_a": a, f"{layer}.lora_b": b}, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert format_of(tmp_path) == "mlx"
    convert_adapter(tmp_path, "peft", tmp_path / "peft")
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        by_hand.get_submodule(layer).weight += 2.5 * (a @ b).T
    torch.testing.assert_close(loaded(base, tmp_path / "peft")(IDS).logits, by_hand(IDS).logits, atol=1e-5, rtol=1e-4)
    convert_adapter(tmp_path / "peft", "mlx", tmp_path / "back")
    same_tensors({f"{layer}.lora_a": a, f"{layer}.lora_b": b}, load_file(tmp_path / "back" / "adapters.safetensors"))
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_parameters"]
    assert (written["rank"], written["scale"], written["keys"]) == (4, 2.5, ["self_attn.q_proj"])


def _pairs(rows, heads):
    """LLaMA's rows as llama.cpp keeps them; numpy."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_gguf_by_plain_arithmetic(tmp_path: Path) -> None:
    """Read with gguf alone, on weights that were quantised by gguf: the logits are those of the adapted model."""
    gguf = pytest.importorskip("gguf")
    base, _ = lora(tmp_path / "lora", rank_pattern={"k_proj": 2})
    convert_adapter(tmp_path / "lora", "gguf", tmp_path / "lora.gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    dense, adapted = copy.deepcopy(base), copy.deepcopy(base)
    heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            head, rows = heads.get(name.rpartition(".")[2]), module.weight.detach().numpy()
            rows = rows if head is None else _pairs(rows, head)
            kind = gguf.GGMLQuantizationType.F16
            rows = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
            plus, key = rows, f"{table.get_name(name)}.weight"
            if f"{key}.lora_a" in read:
                a, b = read[f"{key}.lora_a"], read[f"{key}.lora_b"]
                plus = rows + alpha / len(a) * (b @ a)
            for model, weight in ((dense, rows), (adapted, plus)):
                back = weight if head is None else weight.reshape(head, -1, 2, weight.shape[1]).swapaxes(1, 2)
                model.get_submodule(name).weight.data = torch.from_numpy(back.reshape(weight.shape).copy())
    assert sum("lora_a" in name for name in read) == 6
    wanted = loaded(dense, tmp_path / "lora")(IDS).logits
    torch.testing.assert_close(adapted(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    assert (dense(IDS).logits - wanted).abs().max() > 1e-2


FIELDS = [{}, {"use_rslora": True, "r": 4}, {"alpha_pattern": {"k_proj": 7}}, {"target_modules": ["embed_tokens"]}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("target", ["gguf", "mlx", "kohya", "diffusers", "torchtune", "adapters"])
def test_there_and_back(target: str, fields: dict, tmp_path: Path) -> None:
    """The same function; the same bits and the same scale where the format has one for each layer."""
    if target == "gguf":
        pytest.importorskip("gguf")
    base, model = lora(tmp_path / "lora", **fields)
    uneven, table = "alpha_pattern" in fields, "embed_tokens" in fields.get("target_modules", ())
    if (uneven and target in ("torchtune", "adapters")) or (table and target not in ("gguf", "mlx")):
        with pytest.raises(ConfigError):
            convert_adapter(tmp_path / "lora", target, tmp_path / "other", base=base)
        assert not (tmp_path / "other").exists()
        return
    convert_adapter(tmp_path / "lora", target, tmp_path / "other", base=base)
    assert format_of(tmp_path / "other") == target
    convert_adapter(tmp_path / "other", "peft", tmp_path / "back", base=base)
    torch.testing.assert_close(
        loaded(base, tmp_path / "back")(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6, rtol=1e-5
    )
    if not (uneven and target in ("gguf", "mlx")):
        there, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
        same_tensors({k: v for k, v in there.items() if "lora_" in k}, back)


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    base, _ = lora(tmp_path / "lora", use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="magnitude.*DoRA|lm_head.*LoRAs alone"):
        convert_adapter(tmp_path / "lora", "mlx", tmp_path / "other", base=base)
    assert not (tmp_path / "other").exists()
    found = convert_adapter(tmp_path / "lora", "mlx", tmp_path / "other", base=base, lossy=True)
    assert [name for name in found.lost if "lm_head" in name] == [*found.lost]
    with pytest.raises(ConfigError, match=r"unknown format 'mlxx'.*mlx"):
        convert_adapter(tmp_path / "lora", "mlxx", tmp_path / "x")
    save_file({"nothing": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="no adapter of a format"):
        format_of(tmp_path / "odd.safetensors")
    save_file({"lora_unet_some_thing.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="give the base model"):
        convert_adapter(tmp_path / "odd.safetensors", "peft", tmp_path / "x")


# --- Flux ---------------------------------------------------------------------------------------------------------


def flux_file(width: int = 6) -> dict[str, torch.Tensor]:
    """A LoRA of kohya's on Flux's authors' modules: fused and single ones, and the one whose halves change places."""
    modules = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_0_txt_attn_proj": (width, width),
        "double_blocks_1_txt_mlp_0": (4 * width, width),
        "single_blocks_0_linear1": (7 * width, width),
        "single_blocks_0_linear2": (width, 5 * width),
        "single_blocks_0_modulation_lin": (3 * width, width),
    }
    torch.manual_seed(0)
    tensors = {}
    for name, (out, inner) in modules.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, inner)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    return tensors


def updates_of(tensors: dict[str, torch.Tensor], a: str, b: str) -> dict[str, torch.Tensor]:
    """B A by module."""
    return {n.removesuffix(a): tensors[n.removesuffix(a) + b] @ t for n, t in tensors.items() if n.endswith(a)}


def test_flux_by_its_authors_names_and_by_those_of_diffusers(tmp_path: Path) -> None:
    """What diffusers' own reader makes of the file is what is written for it; back, the tensors are the same bits."""
    diffusers = pytest.importorskip("diffusers")
    given = flux_file(3072)  # the only width that this reader takes
    save_file(given, tmp_path / "kohya.safetensors")
    convert_adapter(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "diffusers")
    wanted = diffusers.FluxPipeline.lora_state_dict({k: t.clone() for k, t in given.items()})
    found = load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    names = (".lora_A.weight", ".lora_B.weight")
    assert wanted.keys() == found.keys() and len(found) == 2 * (3 + 1 + 1 + 4 + 1 + 1)
    for name, tensor in found.items():  # alpha / r is in the header, and in their A
        assert torch.equal(tensor * 0.5 if name.endswith(names[0]) else tensor, wanted[name]), name
    found = convert_adapter(tmp_path / "diffusers", "kohya", tmp_path / "back.safetensors")
    assert "authors" in found.notes[0]
    same_tensors(given, load_file(tmp_path / "back.safetensors"))


RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
ATTENTION = ("norm", "proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj", "proj_out")
RESNETS = [*(f"input_blocks.{i}.0" for i in (1, 2, 4, 5, 7, 8)), *(f"output_blocks.{i}.0" for i in range(9))]
ATTENTIONS = [*(f"input_blocks.{i}.1" for i in (4, 5, 7, 8)), *(f"output_blocks.{i}.1" for i in range(6))]
SDXL = [
    *(f"{block}.{part}" for block in (*RESNETS, "middle_block.0", "middle_block.2") for part in RESNET),
    *(f"{block}.{part}" for block in (*ATTENTIONS, "middle_block.1") for part in ATTENTION),
    *(f"input_blocks.{i}.0.op" for i in (3, 6)),
    *(f"output_blocks.{i}.2.conv" for i in (2, 5)),
    *("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"),
]


def test_modules_of_stable_diffusion_by_its_authors_names() -> None:
    """All kinds of modules of SDXL's UNet have the names that diffusers gives their weights."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    whole = {
        f"model.diffusion_model.{module}.{part}": torch.tensor([i, k])
        for i, module in enumerate(SDXL)
        for k, part in enumerate(("weight", "bias"))
    }
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    found = {tuple(t.tolist()): name for name, t in utils.convert_ldm_unet_checkpoint(whole, config).items()}
    wanted = {module: found[i, 0].removesuffix(".weight") for i, module in enumerate(SDXL)}
    assert {module: diffusers_name(module) for module in SDXL} == wanted
    for odd in ("input_blocks.3.0.in_layers.2", "middle_block.3.norm", "output_blocks.1.2.proj_in", "out.1"):
        with pytest.raises(ConfigError, match="no module of a UNet"):
            diffusers_name(odd)


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_files_for_sdxl_by_its_authors_names(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = "transformer_blocks.0.attn1.to_q"
    modules = {"input_blocks_4_1_transformer_blocks_0_attn1_to_q": f"down_blocks.1.attentions.0.{attention}",
               "output_blocks_2_0_emb_layers_1": "up_blocks.0.resnets.2.time_emb_proj",
               "middle_block_1_proj_in": "mid_block.attentions.0.proj_in", "out_2": "conv_out"}  # fmt: skip
    halves = {"a": (4, 2), "b": (2, 4)}
    rows = {"lora": {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)},
            "loha": {f"hada_w{i}_{x}": halves[x] for i in (1, 2) for x in "ab"}}[kind]  # fmt: skip
    save_file(
        {f"lora_unet_{name}.{part}": torch.randn(shape) for name in modules for part, shape in rows.items()}
        | {f"lora_unet_{name}.alpha": torch.tensor(2.0 * i + 1) for i, name in enumerate(modules)},
        tmp_path / "kohya.safetensors",
    )
    base = nn.Module()
    for path in modules.values():
        *names, leaf = path.split(".")
        parent = base
        for name in names:
            parent = parent._modules.setdefault(name, nn.Module())
        parent.add_module(leaf, nn.Linear(4, 4, bias=False))
    convert_adapter(tmp_path / "kohya.safetensors", "peft", tmp_path / "peft", base=base)
    model = PeftModel.from_pretrained(base, tmp_path / "peft")
    given = load_file(tmp_path / "kohya.safetensors")
    for i, (name, path) in enumerate(modules.items()):
        parts = {part: given[f"lora_unet_{name}.{part}"] for part in rows}
        if kind == "lora":
            update = parts["lora_up.weight"] @ parts["lora_down.weight"]
        else:
            update = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        found = model.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
        torch.testing.assert_close(found, update * (2 * i + 1) / 2)
    if kind == "lora":
        convert_adapter(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "file.safetensors")
        names = {name.partition(".lora_")[0] for name in load_file(tmp_path / "file.safetensors")}
        assert names == {f"unet.{path}" for path in modules.values()}


def test_flux_parts_of_their_own_stand_side_by_side(tmp_path: Path) -> None:
    """Query and value alone, of unequal ranks, become rows of one matrix; the key's are zero."""
    torch.manual_seed(0)
    module, pairs = "single_transformer_blocks.0.attn", {"to_q": (2, 1.0), "to_v": (3, 6.0)}
    tensors = {}
    for name, (rank, alpha) in pairs.items():
        tensors[f"transformer.{module}.{name}.lora_A.weight"] = torch.randn(rank, 4)
        tensors[f"transformer.{module}.{name}.lora_B.weight"] = torch.randn(4, rank)
        tensors[f"transformer.{module}.{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "two.safetensors")
    convert_adapter(tmp_path / "two.safetensors", "kohya", tmp_path / "kohya.safetensors")
    found = load_file(tmp_path / "kohya.safetensors")
    key = "lora_unet_single_blocks_0_linear1"
    update = found[f"{key}.lora_up.weight"] @ found[f"{key}.lora_down.weight"] * found[f"{key}.alpha"] / 5
    q, v = (a * b for a, b in zip(updates_of(tensors, ".lora_A.weight", ".lora_B.weight").values(), (0.5, 2)))
    zero = torch.zeros(4, 4)
    torch.testing.assert_close(update, torch.cat([q, zero, v, torch.zeros(16, 4)]))


def test_a_flux_adapter_follows_the_names_of_the_base(tmp_path: Path) -> None:
    save_file(flux_file(), tmp_path / "kohya.safetensors")
    base = nn.ModuleDict({"single_transformer_blocks": nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(30, 6)})])})
    convert_adapter(tmp_path / "kohya.safetensors", "peft", tmp_path / "peft", base=base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "single_transformer_blocks.0.proj_mlp" in config["target_modules"]
    assert "transformer_blocks.0.attn.to_k" in config["target_modules"]
