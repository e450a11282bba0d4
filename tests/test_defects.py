"""Defects that other implementations have, as tests that they are absent here."""

from __future__ import annotations

import dataclasses
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Attention, Mlp, tiny_llama

from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftModel,
    PolyConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.core.layer.weight import base_bias, base_weight
from peft.core.model.walk import layers_of
from peft.kernels import plain


IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4]])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def disturb(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """Move every tensor of an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    moved = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    set_peft_model_state_dict(model, moved, adapter)
    return model.eval()


class TestNamesOfAdaptersAreNoPatterns:
    """Tensors of an adapter used to be picked by looking for ".name." in their keys."""

    @pytest.mark.parametrize("name", ["0", "1", "layers", "self_attn", "q_proj", "weight", "model", "lora_A"])
    def test_an_adapter_called_like_a_part_of_a_path(self, name, tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        alone = disturb(model) and get_peft_model_state_dict(model)
        assert len(alone) == 4
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
        disturb(model, name, seed=2)
        both = get_peft_model_state_dict(model)
        assert both.keys() == alone.keys() and all(torch.equal(both[k], alone[k]) for k in alone)
        second = get_peft_model_state_dict(model, adapter_name=name)
        assert len(second) == 8 and {v.shape[0] for k, v in second.items() if "lora_A" in k} == {3}
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        again.load_adapter(tmp_path / name, name)
        for adapter in ("default", name):
            model.set_adapter(adapter)
            again.set_adapter(adapter)
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_modules_to_save_and_biases_too(self):
        model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"], bias="all"))
        before = set(get_peft_model_state_dict(model))
        model.add_adapter("lin0", LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
        model.add_adapter("lin1", LoraConfig(target_modules=["lin0"]))
        assert set(get_peft_model_state_dict(model)) == before
        prefix = "base_model.model."
        assert set(get_peft_model_state_dict(model, adapter_name="lin0")) == {
            f"{prefix}lin0.lora_A.weight",
            f"{prefix}lin0.lora_B.weight",
            f"{prefix}lin1.weight",
            f"{prefix}lin1.bias",
        }


class TestSharedTensorsAreWrittenOnce:
    """A matrix that all layers share used to be written once for each layer."""

    def model(self, **kwargs: Any) -> PeftModel:
        torch.manual_seed(0)
        config = VeraConfig(r=32, target_modules=["q_proj", "v_proj", "up_proj"], **kwargs)
        return disturb(get_peft_model(tiny_llama(), config))

    def test_the_file_is_as_large_as_its_distinct_tensors(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert [k for k in stored if "vera_A" in k] == ["base_model.vera_A"]
        assert [k for k in stored if "vera_B" in k] == ["base_model.vera_B"]
        assert len(stored) == 2 + 2 * 6
        size = (tmp_path / "adapter_model.safetensors").stat().st_size
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        shared = stored["base_model.vera_A"].numel() + stored["base_model.vera_B"].numel()
        assert size < 4 * (trained + shared) + 200 * len(stored) + 200

    def test_a_file_that_repeats_them_still_loads(self, tmp_path):
        model = self.model()
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        stored = load_file(path)
        repeated = {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.vera_A": stored["base_model.vera_A"].clone()
            for i in range(2)
        }
        save_file({**stored, **repeated}, path)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        with torch.no_grad():  # one of the two would train, and training rounds differently
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_bases_of_full_rank_are_written_once_for_the_model(self, tmp_path):
        """Where the reference writes them for each layer; it loads such a file as well."""
        torch.manual_seed(0)
        config = RandLoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
        model = disturb(get_peft_model(tiny_llama(), config))
        model.save_pretrained(tmp_path)
        # Copies, since older releases of safetensors map the file, which is written anew below.
        stored = {key: t.clone() for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
        assert [key for key in stored if "randlora_A" in key] == ["base_model.randlora_A"]
        assert [key for key in stored if "randlora_B" in key] == ["base_model.randlora_B"]
        layers = [key.removesuffix(".randlora_lambda") for key in stored if key.endswith(".randlora_lambda")]
        parts = ("randlora_A", "randlora_B")
        repeated = {f"{layer}.{part}": stored[f"base_model.{part}"].clone() for layer in layers for part in parts}
        alone = {key: value for key, value in stored.items() if key.removeprefix("base_model.") not in parts}
        for tensors in ({**stored, **repeated}, {**alone, **repeated}):
            save_file(tensors, tmp_path / "adapter_model.safetensors")
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_parts_of_neighbours_are_written_under_the_first_of_them(self, tmp_path):
        """Files that repeat them for each layer load as well."""
        torch.manual_seed(0)
        config = LilyConfig(r=3, stride_A=2, num_B=2, target_modules=["q_proj", "up_proj"])
        model = disturb(get_peft_model(tiny_llama(), config))
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        places = {name: f"base_model.model.model.layers.{{}}.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")}
        parts = ("lily_A.weight", "lily_B.weight")
        routers = {f"{place.format(i)}.lily_router.weight" for place in places.values() for i in range(2)}
        first = {f"{place.format(0)}.{part}" for place in places.values() for part in parts}
        assert set(stored) == routers | first
        repeated = {
            f"{place.format(1)}.{part}": stored[f"{place.format(0)}.{part}"].clone()
            for place in places.values()
            for part in parts
        }
        save_file({**stored, **repeated}, tmp_path / "adapter_model.safetensors")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        with torch.no_grad():  # one of the two would train, and training rounds differently
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_without_them_they_are_drawn_again(self, tmp_path):
        model = self.model(save_projection=False, projection_prng_key=5)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert not any("vera_A" in k or "vera_B" in k for k in stored)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        # `disturb` moved the shared matrices of the first model only if they were among its saved tensors
        with torch.no_grad():  # one of the two would train, and training rounds differently
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_in_memory_they_are_one_tensor(self):
        model = self.model()
        layers = [m for m in model.modules() if hasattr(m, "vera_lambda_d") and "default" in m.vera_A]
        assert len({id(layer.vera_A["default"]) for layer in layers}) == 1 and len(layers) == 6
        model.add_adapter("other", VeraConfig(r=32, target_modules=["q_proj", "v_proj", "up_proj"]))
        again = get_peft_model(tiny_llama(), VeraConfig(r=32, target_modules=["q_proj"]))
        again.add_adapter("other", VeraConfig(r=32, target_modules=["q_proj"]))
        layer = again.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.vera_A["other"] is layer.vera_A["default"]


class TestTokensOfALinearLayerKeepTheBias:
    """Trained rows of an output layer used to drop its bias."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_bias_of_trained_rows(self, bias):
        base = nn.Sequential(nn.Linear(6, 10, bias=bias))
        x = torch.randn(4, 6)
        before = base(x).detach()
        model = get_peft_model(base, TrainableTokensConfig(target_modules=["0"], token_indices=[7, 2]))
        torch.testing.assert_close(model(x), before)
        disturb(model)
        layer = model.get_base_model()[0]
        weight = layer.base_layer.weight.detach().clone()
        weight[[7, 2]] = layer.trainable_tokens_delta["default"].detach()
        expected = F.linear(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


class TestGeometryOfConvolutions:
    """Dilation used to crash, and padding modes to be ignored by the unmerged adapter."""

    @pytest.mark.parametrize("method", ["lora", "dora"])
    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 2, 2), (2, 1, 1), (2, 3, 2), (1, 2, 0)])
    def test_merged_equals_unmerged(self, method, padding_mode, dims, stride, dilation, padding):
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": padding_mode}
        base = nn.Sequential(cls(3, 5, 3, **options))
        x = torch.randn(2, 3, *[9] * dims)
        before = base(x).detach()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=method == "dora")).eval()
        torch.testing.assert_close(model(x), before, **CLOSE)
        disturb(model)
        expected = model(x).detach()
        assert expected.shape == before.shape and not torch.allclose(expected, before, atol=1e-2)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)

    def test_padding_by_name(self):
        base = nn.Sequential(nn.Conv2d(3, 5, (3, 4), padding="same", dilation=2))
        x = torch.randn(2, 3, 8, 8)
        model = disturb(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])))
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)


MIXED = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    "dora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], r=2, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(target_modules=["q_proj", "embed_tokens"], oft_block_size=4),
    "vera": lambda: VeraConfig(target_modules=["q_proj", "up_proj"], r=4),
    "hira": lambda: HiraConfig(target_modules=["q_proj", "up_proj"], r=2),
    "ln": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 9]),
    "poly": lambda: PolyConfig(target_modules=["q_proj", "up_proj"], r=2, n_skills=2),
    "lily": lambda: LilyConfig(target_modules=["q_proj", "up_proj"], r=2),
}


@pytest.mark.parametrize("method", MIXED)
class TestMixedBatchesOfEveryMethod:
    """Every method but a few used to ignore `adapter_names` without a word."""

    def two(self, method: str) -> PeftModel:
        torch.manual_seed(0)
        model = disturb(get_peft_model(tiny_llama(), MIXED[method]()))
        model.add_adapter("other", MIXED[method]())
        return disturb(model, "other", seed=2)

    def test_each_row_has_its_adapter(self, method):
        model = self.two(method)
        names = ["other", "__base__", "default"]
        mixed = model(IDS, adapter_names=names).logits
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(IDS).logits
        with model.disable_adapter():
            alone["__base__"] = model(IDS).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)
        assert not torch.allclose(alone["default"], alone["other"], atol=1e-3)
        assert not torch.allclose(alone["default"], alone["__base__"], atol=1e-3)


class TestTiedEmbedding:
    """Merging an adapter of a tied embedding used to change the output head as well."""

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("ensure", [False, True])
    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_merged_equals_unmerged(self, target, ensure):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=[target], ensure_weight_tying=ensure)
        model = disturb(get_peft_model(tiny_llama(tie=True), config))
        expected = model(IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, **CLOSE)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == ensure
        assert merged.config.tie_word_embeddings == ensure


class TestMergedLayerReplication:
    """Copies share one weight, which used to get the updates of all copies when merged."""

    def test_merged_equals_unmerged(self):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [0, 2]])
        model = disturb(get_peft_model(tiny_llama(), config))
        expected = model(IDS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected, **CLOSE)
        weights = [layer.self_attn.q_proj.weight for layer in merged.model.layers]
        assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[1], weights[3])


class TestAttention:
    """The update of `out_proj` used to be added twice, and `out_proj` targeted alone to have no effect."""

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))

    def reference(self, model: PeftModel, scale: float = 1.0) -> torch.Tensor:
        """The output computed from the weights by hand; ``scale`` multiplies the update of out_proj."""
        toy = Attention()
        attn = model.get_base_model().attn
        out = attn.base_layer.out_proj
        with torch.no_grad():
            toy.attn.in_proj_weight.copy_(attn.base_layer.in_proj_weight + attn.get_delta_weight("default"))
            toy.attn.in_proj_bias.copy_(attn.base_layer.in_proj_bias)
            toy.attn.out_proj.weight.copy_(out.base_layer.weight + scale * out.get_delta_weight("default"))
            toy.attn.out_proj.bias.copy_(out.base_layer.bias)
            toy.head.load_state_dict(model.get_base_model().head.state_dict())
            return toy.eval()(self.x)

    def model(self) -> PeftModel:
        torch.manual_seed(0)
        return disturb(get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attn"])))

    def test_the_update_is_added_once(self):
        model = self.model()
        expected = self.reference(model)
        torch.testing.assert_close(model(self.x), expected, **CLOSE)
        model.train()
        torch.testing.assert_close(model(self.x), expected, **CLOSE)
        model.eval().merge_adapter()
        torch.testing.assert_close(model(self.x), expected, **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload()(self.x), expected, **CLOSE)

    @pytest.mark.parametrize("version", ["0.21.2", "0.9", None, "current"])
    def test_files_of_old_versions_mean_it_twice(self, tmp_path: Path, version):
        model = self.model()
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        if version != "current":
            content["peft_version"] = version
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        torch.manual_seed(0)
        base = Attention()
        again = PeftModel.from_pretrained(base, tmp_path)
        expected = self.reference(model, scale=1.0 if version == "current" else 2.0)
        torch.testing.assert_close(again(self.x), expected, **CLOSE)
        again.load_adapter(tmp_path, "other")
        again.set_adapter("other")
        torch.testing.assert_close(again(self.x), expected, **CLOSE)
        # once loaded it is an adapter of this version: saving and loading change it no more
        again.save_pretrained(tmp_path / "new", selected_adapters=["default"])
        torch.manual_seed(0)
        torch.testing.assert_close(PeftModel.from_pretrained(Attention(), tmp_path / "new")(self.x), expected, **CLOSE)

    def test_out_proj_alone(self, tmp_path: Path):
        torch.manual_seed(0)
        base = Attention().eval()
        before = base(self.x).detach()
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["out_proj"]))
        torch.testing.assert_close(model(self.x), before)
        disturb(model)
        out = model.get_base_model().attn.out_proj
        toy = Attention().eval()
        with model.disable_adapter():
            torch.testing.assert_close(model(self.x), before)
        plain = {
            k.replace("out_proj.base_layer", "out_proj"): v for k, v in base.state_dict().items() if "lora" not in k
        }
        toy.load_state_dict(plain)
        with torch.no_grad():
            toy.attn.out_proj.weight.add_(out.get_delta_weight("default"))
        expected = toy(self.x)
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(model(self.x), expected, **CLOSE)
        model(self.x).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
            "base_model.model.attn.out_proj.lora_A.weight",
            "base_model.model.attn.out_proj.lora_B.weight",
        }
        torch.testing.assert_close(model.merge_and_unload()(self.x), expected, **CLOSE)

    def test_both_asked_for_is_the_same_as_the_whole(self):
        torch.manual_seed(0)
        both = disturb(get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attn", "out_proj"])))
        assert get_peft_model_state_dict(both).keys() == get_peft_model_state_dict(self.model()).keys()
        torch.testing.assert_close(both(self.x), self.model()(self.x))


class TestRotationsOfConvolutions:
    """Rotations of kernels larger than 1 used to move a fresh adapter away from the base."""

    @pytest.mark.parametrize("groups", [1, 2])
    def test_identity_and_merge(self, groups):
        base = nn.Sequential(nn.Conv2d(4, 8, (3, 2), padding=1, groups=groups))
        x = torch.randn(2, 4, 6, 6)
        before = base(x).detach()
        model = get_peft_model(base, OFTConfig(target_modules=["0"], oft_block_size=4))
        torch.testing.assert_close(model(x), before, **CLOSE)
        disturb(model)
        expected = model(x)
        assert not torch.allclose(expected, before, atol=1e-2)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)

    @pytest.mark.parametrize(
        "config",
        [HRAConfig(target_modules=["0"], r=4), BOFTConfig(target_modules=["0"], boft_block_size=5)],
        ids=["reflections", "butterflies"],
    )
    def test_kernels_that_are_no_square(self, config: Any) -> None:
        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Conv2d(2, 6, (3, 5), padding=(1, 2))), torch.randn(2, 2, 5, 6)
        before = base(x)
        model = get_peft_model(base, config)
        torch.testing.assert_close(model(x), before, **CLOSE)
        disturb(model)
        expected = model(x)
        assert not torch.allclose(expected, before, atol=1e-2)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)


class TestMethodsThatChangeTheModelAtTheStart:
    """Some methods are not the identity when fresh, by their definition: their configs say so."""

    @pytest.mark.parametrize("config_cls", [VBLoRAConfig, UniLoraConfig])
    def test_it_is_documented(self, config_cls):
        assert "not the identity" in " ".join(config_cls.__doc__.split())
        torch.manual_seed(0)
        base = tiny_llama()
        before = base(IDS).logits
        model = get_peft_model(base, config_cls(target_modules=["q_proj"])).eval()
        assert not torch.equal(model(IDS).logits, before)

    @pytest.mark.parametrize("config_cls", [VeraConfig, PveraConfig, RandLoraConfig, TinyLoraConfig])
    def test_the_others_are(self, config_cls):
        torch.manual_seed(0)
        base = tiny_llama()
        before = base(IDS).logits
        model = get_peft_model(base, config_cls(r=2, target_modules=["q_proj"])).eval()
        torch.testing.assert_close(model(IDS).logits, before, **CLOSE)


class TestBasesAreFlattenedInTwoOrders:
    """RandLoRA pairs column n r + p of B with row p N + n of A, which is not the paper's sum; it is documented."""

    @pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
    def test_the_update_is_that_of_the_files(self, shape):
        from peft.tuners.randlora import RandLoraLayer

        torch.manual_seed(0)
        out, inner = shape
        model = get_peft_model(nn.Sequential(nn.Linear(inner, out)), RandLoraConfig(r=3, target_modules=["0"]))
        layer = model.base_model.model[0]
        with torch.no_grad():
            layer.randlora_lambda["default"].normal_()
            layer.randlora_gamma["default"].normal_()
        weights, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        a, b, (r, bases) = layer.randlora_A["default"], layer.randlora_B["default"], weights.shape
        assert bases == -(-min(shape) // r)
        wanted = torch.zeros(max(shape), min(shape))
        for n in range(bases):
            for p in range(r):
                column = n * r + p
                rho, nu = divmod(column, bases)
                wanted += torch.outer(b[:, n, p], weights[rho, nu] * a[rho, 0] * gamma[nu])
        wanted = (wanted.T if out < inner else wanted) * 640 / r
        torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-4, atol=1e-3)
        assert "not the paper's" in RandLoraLayer.__doc__


class TestSmallFilesOfVectorBanks:
    """`save_only_topk_weights`: what is loaded computes the same, and cannot be trained further."""

    @pytest.mark.parametrize(("vectors", "dtype"), [(200, torch.uint8), (300, torch.int16)])
    def test_the_file(self, vectors, dtype, tmp_path):
        torch.manual_seed(0)
        fields = {
            "num_vectors": vectors,
            "vector_length": 8,
            "topk": 3,
            "r": 2,
            "target_modules": ["q_proj", "up_proj"],
        }
        model = get_peft_model(tiny_llama(), VBLoRAConfig(save_only_topk_weights=True, **fields)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape) if p.requires_grad else 0)
        wanted = model(IDS).logits
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert not any(key.endswith(("logits_A", "logits_B")) for key in stored)
        indices = [value for key, value in stored.items() if key.endswith("_topk_indices")]
        weights = [value for key, value in stored.items() if key.endswith("_topk_weights")]
        assert len(indices) == len(weights) == len(stored) // 2 and {v.dtype for v in indices} == {dtype}
        assert {v.shape[-1] for v in indices} == {3} and {v.shape[-1] for v in weights} == {2}
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
        torch.testing.assert_close(again.eval()(IDS).logits, wanted, **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(again.train()(IDS).logits, wanted, **CLOSE)
        with pytest.raises(RuntimeError, match="adapter 'default' comes from a file with save_only_topk_weights=True"):
            again(IDS)
        whole = get_peft_model(tiny_llama(), VBLoRAConfig(**fields))
        set_peft_model_state_dict(again, get_peft_model_state_dict(whole))  # all weights: it may train again
        again(IDS).logits.square().mean().backward()
        gradients = [p.grad for p in again.parameters() if p.requires_grad]
        assert gradients and all(g.isfinite().all() and g.any() for g in gradients)


class TestRotationsOfInputs:
    """What the conventions of the file format mean, and what a training step keeps."""

    def test_the_exact_cayley_transform_is_the_transpose_of_the_series(self) -> None:
        rotations = []
        for series in (True, False):
            torch.manual_seed(0)
            config = OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=series, init_weights=False)
            model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
            rotations.append(model.base_model.model[0].adapters["default"].rotation().detach())
        series, exact = rotations
        torch.testing.assert_close(exact @ exact.T, torch.eye(8), **CLOSE)
        assert (series - exact.T).abs().max() < 0.05 < 0.3 < (series - exact).abs().max()

    def test_butterflies_use_the_exact_convention(self) -> None:
        torch.manual_seed(0)
        config = BOFTConfig(target_modules=["0"], boft_block_size=4, init_weights=False)
        layer = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).base_model.model[0]
        q, eye = layer.boft_R["default"][0].detach(), torch.eye(4)
        skew = (q - q.mT) / 2
        blocks = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
        torch.testing.assert_close(layer.adapters["default"].rotation().detach(), blocks, **CLOSE)

    def test_a_butterfly_reaches_features_that_its_blocks_do_not(self) -> None:
        torch.manual_seed(0)
        reached = []
        for factors in (1, 2, 3):
            config = BOFTConfig(target_modules=["0"], boft_n_butterfly_factor=factors, init_weights=False)
            layer = get_peft_model(nn.Sequential(nn.Linear(16, 6)), config).base_model.model[0]
            rotation = layer.adapters["default"].rotation().detach()
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), **CLOSE)
            reached.append(int((rotation.abs() > 1e-9).sum(1).max()))
        assert reached == [4, 8, 16]

    @pytest.mark.parametrize("r", [3, 4])
    def test_only_an_even_number_of_reflections_starts_as_the_identity(self, r: int) -> None:
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), HRAConfig(target_modules=["0"], r=r))
        distance = (model.base_model.model[0].adapters["default"].rotation() - torch.eye(8)).abs().max()
        assert (distance < 1e-6) == (r % 2 == 0)

    @pytest.mark.parametrize("config", [HRAConfig, OFTConfig, BOFTConfig, HiraConfig, GloraConfig])
    def test_a_training_step_keeps_no_square_matrix_of_the_inputs(self, config: type) -> None:
        features, sizes = 256, []
        outputs = features if config in (HiraConfig, GloraConfig) else 8  # these could keep one of the weight's size
        model = get_peft_model(nn.Sequential(nn.Linear(features, outputs)), config(target_modules=["0"]))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.randn(2, features, requires_grad=True)).sum()
        loss.backward()
        assert sizes and max(sizes) < features * features

    def test_blocks_are_not_repeated_for_each_sample(self) -> None:
        batch, features, sizes = 64, 64, []
        model = get_peft_model(nn.Sequential(nn.Linear(features, 8)), OFTConfig(target_modules=["0"]))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(batch, features, requires_grad=True)).sum().backward()
        assert sizes and max(sizes) <= batch * features


class TestRoutingDependsOnTheSampleAlone:
    """Lily's weights of the experts used to be averaged over the whole batch."""

    def model(self, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        config = LilyConfig(r=4, num_B=3, scaling=4.0, target_modules=["q_proj", "v_proj", "down_proj"], **fields)
        return disturb(get_peft_model(tiny_llama(), config))

    @torch.no_grad()
    def test_a_sample_does_not_depend_on_its_neighbours(self) -> None:
        model = self.model()
        whole = model(IDS).logits
        for row in range(3):
            torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], whole[row], **CLOSE)

    @torch.no_grad()
    def test_nor_on_its_padding(self) -> None:
        model = self.model()
        ids, mask = IDS.clone(), torch.ones_like(IDS)
        ids[1, 4:], mask[1, 4:] = 0, 0
        padded = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[1, :4], model(IDS[1:2, :4]).logits[0], **CLOSE)

    @torch.no_grad()
    def test_with_weights_for_each_token_not_on_later_ones(self) -> None:
        model = self.model(routing="token")
        torch.testing.assert_close(model(IDS[:, :3]).logits, model(IDS).logits[:, :3], **CLOSE)

    @torch.no_grad()
    def test_files_that_do_not_say_are_computed_as_they_were_trained(self, tmp_path: Path) -> None:
        model = self.model(routing="batch")
        whole = model(IDS).logits
        assert (model(IDS[:1]).logits - whole[:1]).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text())
        del config["routing"]
        path.write_text(json.dumps(config))
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert again.peft_config["default"].routing == "batch"
        assert torch.equal(again(IDS).logits, whole)
        assert LilyConfig().routing == "sample"


class TestTasksOfTheSamples:
    """Poly needs to know the task of each sample."""

    def model(self, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        config = PolyConfig(r=4, n_skills=3, target_modules=["q_proj", "v_proj", "down_proj"], **fields)
        return disturb(get_peft_model(tiny_llama(), config))

    @torch.no_grad()
    @pytest.mark.parametrize("splits", [1, 2])
    def test_each_sample_has_its_task(self, splits: int) -> None:
        model = self.model(n_tasks=3, n_splits=splits)
        whole = model(IDS, task_ids=torch.tensor([2, 0, 2])).logits
        for row, task in enumerate((2, 0, 2)):
            alone = model(IDS[row : row + 1], task_ids=torch.tensor([task])).logits[0]
            torch.testing.assert_close(alone, whole[row], **CLOSE)
        assert (model(IDS, task_ids=torch.tensor([0, 0, 0])).logits[0] - whole[0]).abs().max() > 1e-3
        ids = model.generate(input_ids=IDS, task_ids=torch.tensor([2, 0, 2]), max_new_tokens=2, do_sample=False)
        assert ids.shape == (3, IDS.shape[1] + 2)

    def test_missing_and_unknown_tasks_are_named(self) -> None:
        model = self.model(n_tasks=3)
        with pytest.raises(ValueError, match="needs task_ids"):
            model(IDS)
        with pytest.raises(ValueError, match=r"outside 0\.\.2"):
            model(IDS, task_ids=torch.tensor([0, 1, 3]))
        with pytest.raises(ValueError, match="2 entries, but the batch has 3"):
            model(IDS, task_ids=torch.tensor([0, 1]))
        assert self.model()(IDS).logits.isfinite().all()


class TestSeveralCirculantAdapters:
    """A second C3A adapter used to read the output of the first one in place of the input, and crashed."""

    def test_two_are_active(self):
        torch.manual_seed(0)
        config = C3AConfig(block_size=4, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), config)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        layer, x = model.base_model.model[0], torch.randn(5, 12)
        weight = base_weight(layer) + sum(layer.get_delta_weight(name) for name in ("default", "other"))
        torch.testing.assert_close(model(x), F.linear(x, weight, base_bias(layer)), **CLOSE)

    def test_the_gradient_of_the_input_is_that_of_the_forward_pass(self):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(12, 8)), C3AConfig(block_size=4, target_modules=["0"]))
        layer, x = model.base_model.model[0], torch.randn(5, 12, requires_grad=True)
        gradient = torch.randn(5, 8)
        model(x).backward(gradient)
        weight = base_weight(layer) + layer.get_delta_weight("default")
        torch.testing.assert_close(x.grad, gradient @ weight, **CLOSE)


class TestInputsWithoutRows:
    """No row, as an expert sees that gets no token: transforms and drawn masks used to fail on it. One vector, too."""

    @pytest.mark.parametrize(
        "config",
        [
            C3AConfig(block_size=4),
            FourierFTConfig(n_frequency=20),
            FrodConfig(frod_dropout=0.5, progressbar=False),
            LoraConfig(r=2, lora_dropout=0.5),
        ],
        ids=lambda config: config.peft_type.value,
    )
    @pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,)], ids=str)
    @pytest.mark.parametrize("way", [nullcontext, plain], ids=["fast", "plain"])
    def test_the_output_has_their_shape_and_a_gradient(self, config, shape, way):
        torch.manual_seed(0)
        config.target_modules = {"0"}
        model = get_peft_model(nn.Sequential(nn.Linear(32, 64)), config)
        for training in (True, False):
            x = torch.randn(shape, requires_grad=True)
            with way():
                y = model.train(training)(x)
            y.sum().backward()
            assert y.shape == (*shape[:-1], 64) and x.grad.shape == shape
            if not x.numel():
                assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
        alone, row = model(x), model(x.unsqueeze(0))
        torch.testing.assert_close(alone, row.squeeze(0), **CLOSE)


class TestStartsThatAreNotTheIdentity:
    """Methods whose default start changes the model's output say so in their config, and in the help of the field."""

    @pytest.mark.parametrize("config", [C3AConfig(block_size=8), FourierFTConfig(n_frequency=50)])
    def test_it_is_documented(self, config):
        cls = type(config)
        field = next(f for f in dataclasses.fields(cls) if f.name == "init_weights")
        assert "identity" in field.metadata["help"] and "init_weights=True" in cls.__doc__
        config.target_modules = {"q_proj"}
        torch.manual_seed(0)
        base = tiny_llama()
        wanted = base(IDS).logits
        model = get_peft_model(base, config)
        assert (model(IDS).logits - wanted).abs().max() > 1e-4
        config.init_weights = True
        model.add_adapter("still", config)
        model.set_adapter("still")
        torch.testing.assert_close(model(IDS).logits, wanted, **CLOSE)


class TestNoDenseUpdateIsKept:
    """Updates as large as the weight used to be made in the forward pass, and kept for the backward pass."""

    @pytest.mark.parametrize(
        "config",
        [
            C3AConfig(block_size=16),
            DeloraConfig(r=2),
            FourierFTConfig(n_frequency=20),
            GraloraConfig(r=2, gralora_k=2),
            HiraConfig(r=2),
            LoHaConfig(r=2),
            LoKrConfig(r=2),
            MissConfig(r=2),
            MissConfig(r=2, init_weights="bat"),
            PeanutConfig(r=2),
            PsoftConfig(r=2, psoft_alpha=2),
            ShiraConfig(r=1),
            SupertuningConfig(sparsity=0.99),
            WaveFTConfig(n_frequency=20),
            WaveFTConfig(n_frequency=20, wavelet_family="db2"),
        ],
        ids=lambda config: config.peft_type.value,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_autograd_keeps_is_smaller_than_the_weight(self, config, dtype):
        size = 256
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(size, size, dtype=dtype))
        config.target_modules = {"0"}
        model = get_peft_model(base, config).train()
        x, kept = torch.randn(2, size, dtype=dtype, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = model(x)
        own = {t.untyped_storage().data_ptr() for t in model.state_dict(keep_vars=True).values()}
        assert kept and all(t.numel() <= size * size // 4 for t in kept if t.untyped_storage().data_ptr() not in own)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class TestConventionsOfTheCayleyTransform:
    """PSOFT's rotation of a skew-symmetric Q is (I + Q)(I - Q)^-1, the transpose of OFT's exact one: files hold Q."""

    def test_the_two(self):
        from peft.tuners.oft import OFTRotation
        from peft.tuners.psoft import PsoftRotation

        torch.manual_seed(0)
        psoft = PsoftRotation(4, PsoftConfig(psoft_mag_a=False, psoft_mag_b=False))
        oft = OFTRotation(1, 4, terms=None, radius=None, dropout=0.0)
        with torch.no_grad():
            psoft.weight.normal_()
            oft.weight.copy_(psoft.weight)
        q, eye = oft.skew()[0], torch.eye(4)
        torch.testing.assert_close(psoft(), (eye + q) @ torch.linalg.inv(eye - q), **CLOSE)
        torch.testing.assert_close(psoft(), oft()[0].T, **CLOSE)
        assert "transpose" in PsoftRotation.__doc__


class TestRankBudgets:
    """Convolutions with groups used to crash in the forward; pruned ranks used to be computed with until reloaded."""

    def test_a_grouped_convolution(self) -> None:
        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2, padding=1)), torch.randn(2, 4, 5, 5)
        before = base(x)
        model = get_peft_model(base, AdaLoraConfig(init_r=4, target_r=2, total_step=4, target_modules=["0"]))
        torch.testing.assert_close(model(x), before, **CLOSE)
        disturb(model)
        expected = model(x)
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)

    def train(self, steps: int = 12) -> tuple[PeftModel, list[int]]:
        """A model trained under a budget of 8, then 4 ranks; how many are not zero after each step."""
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        budget = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}
        model = get_peft_model(base, AdaLoraConfig(target_modules=["0", "2"], lora_alpha=16, **budget))
        x, wanted = torch.randn(16, 8), torch.randn(16, 8)
        optimizer, ranks = torch.optim.SGD(model.parameters(), lr=1.0), []
        for step in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x), wanted).backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            ranks.append(sum(int(layer.lora_E["default"].count_nonzero()) for _, layer in layers_of(model)))
        return model, ranks

    def test_the_schedule(self) -> None:
        _, ranks = self.train()
        assert ranks == [8, 8, 8, 8, 5, 8, 4, 8, 4, 4, 4, 4]

    def test_settled_ranks_are_all_that_is_computed_and_saved(self, tmp_path: Path) -> None:
        model, _ = self.train()
        x = torch.randn(3, 8)
        pairs = [layer.adapters["default"].pair() for _, layer in layers_of(model)]
        assert sum(len(a) for a, _ in pairs) == sum(b.shape[1] for _, b in pairs) == 4
        wanted = model.eval()(x)
        model.save_pretrained(tmp_path)
        pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
        assert list(pattern) == ["0.lora_E", "2.lora_E"] and sum(map(sum, pattern.values())) == 4
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert stored["base_model.model.0.lora_A"].shape == (sum(pattern["0.lora_E"]), 8)
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        again = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(again(x), wanted, **CLOSE)
        torch.testing.assert_close(model.merge_and_unload()(x), wanted, **CLOSE)

    def test_the_loss_keeps_the_factors_orthogonal(self) -> None:
        torch.manual_seed(0)
        config = AdaLoraConfig(total_step=9, orth_reg_weight=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
        base = tiny_llama()
        plain = base(IDS, labels=IDS).loss
        model = get_peft_model(base, config)
        found = model(input_ids=IDS, labels=IDS).loss
        penalties = torch.stack([layer.adapters["default"].loss_term() for _, layer in layers_of(model)])
        torch.testing.assert_close(found, plain + 0.5 * penalties.mean())
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, plain)

    def test_beside_adapters_of_another_method(self) -> None:
        """In a model of several methods, too, the loss has its penalty and the budget shrinks."""
        torch.manual_seed(0)
        budget = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "total_step": 3, "deltaT": 1}
        config = AdaLoraConfig(orth_reg_weight=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM", **budget)
        base = tiny_llama()
        plain = base(IDS, labels=IDS).loss
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), "other", mixed=True)
        model.add_adapter("default", config)
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, plain)
        model.set_adapter(["other", "default"])
        budgeted = [layer.adapters["default"] for _, layer in layers_of(model) if "default" in layer]
        penalties = torch.stack([adapter.loss_term() for adapter in budgeted])
        loss = model(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(loss, plain + 0.5 * penalties.mean())
        loss.backward()
        model.base_model.update_and_allocate(2)
        assert sum(len(adapter.pair()[0]) for adapter in budgeted) == len(budgeted)
        model.delete_adapter("default")
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, plain)


class TestSubspaces:
    """Pairs of a rank above their number of directions crashed, and a budget of n pairs left n - 1."""

    @staticmethod
    def model(**fields: Any) -> PeftModel:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24, bias=False))
        fields = {"target_modules": ["0", "1"], "r": 8, "num_subspaces": 3} | fields
        return get_peft_model(base, AdamssConfig(**fields))

    @staticmethod
    def ranks(model: PeftModel) -> list[int]:
        return [len(a) for _, layer in layers_of(model) for a in layer.adamss_A["default"]]

    def test_ranks(self) -> None:
        assert self.ranks(self.model(subspace_rank=20)) == [8, 8, 8, 8, 8, 5]
        assert self.ranks(self.model(subspace_rank=6, use_dynamic_rank=True, svd_threshold=0.3)) == [5, 5, 4, 4, 5, 4]
        assert self.ranks(self.model(subspace_rank=6, use_dynamic_rank=True, svd_threshold=0.6)) == [3, 3, 2, 2, 4, 1]
        model, x = self.model(subspace_rank=20), torch.randn(3, 24)
        disturb(model)
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)

    def test_the_budget(self) -> None:
        fields = {"asa_target_subspaces": 2, "init_warmup": 4, "final_warmup": 24, "mask_interval": 2}
        model = self.model(num_subspaces=12, use_asa=True, **fields)
        x, wanted = torch.randn(20, 24), torch.randn(20, 24)
        optimizer, trained = torch.optim.AdamW(model.parameters(), lr=0.1), []
        for step in range(27):
            optimizer.zero_grad()
            F.mse_loss(model(x), wanted).backward()
            optimizer.step()
            before = get_peft_model_state_dict(model)
            model.base_model.update_and_allocate(step)
            assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())
            trained.append([n for n, p in model.named_parameters() if p.requires_grad and "adamss_A" in n])
        counts = [len(names) for names in trained]
        assert counts[:5] == [24] * 5 and counts[24:] == [2] * 3
        assert counts[6:24:2] == [int(22 * (1 - share / 20) ** 3 + 2) for share in range(2, 20, 2)]
        assert all(set(after) <= set(before) for before, after in zip(trained, trained[1:]))

    def test_what_matters_most_goes_on_training(self) -> None:
        fields = {"asa_target_subspaces": 1, "init_warmup": 0, "final_warmup": 3, "mask_interval": 1}
        model = self.model(target_modules=["1"], use_asa=True, **fields)
        rows = model.get_base_model()[1].adamss_places["default"].argsort()[-5:]  # those of the last pair
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(9, 24))[:, rows].square().sum().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        left = [n for n, p in model.named_parameters() if p.requires_grad]
        assert left == [f"base_model.model.1.adamss_{part}.default.2" for part in "AB"]
        with pytest.raises(ValueError, match="after loss.backward"):
            model.zero_grad()
            model.base_model.update_and_allocate(2)

    def test_random_numbers_go_on_as_if_nothing_had_been_drawn(self) -> None:
        base = nn.Sequential(nn.Linear(8, 6))
        torch.manual_seed(3)
        expected = torch.randn(2)
        torch.manual_seed(3)
        get_peft_model(base, AdamssConfig(target_modules=["0"]))
        assert torch.equal(torch.randn(2), expected)


class TestFrozenSingularDirections:
    """What was merged used to stay merged, switched off or not, and layers other than linear ones were left out."""

    @staticmethod
    def model() -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(30, 8)), torch.randn(3, 4, 5)
        before = base(x).detach()
        return get_peft_model(base, OSFConfig(target_modules=["0", "2"], effective_rank=2)), x, before

    @torch.no_grad()
    def test_what_is_merged_comes_out_again(self) -> None:
        model, x, before = self.model()
        weights = [p.clone() for p in model.get_base_model()[0].base_layer.parameters()]
        disturb(model)
        expected = model(x)
        assert not torch.allclose(expected, before, atol=1e-2)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, **CLOSE)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before, **CLOSE)
        model.unmerge_adapter()
        assert all(map(torch.equal, model.get_base_model()[0].base_layer.parameters(), weights))
        torch.testing.assert_close(model(x), expected, **CLOSE)

    def test_a_convolution_is_adapted(self) -> None:
        model, x, before = self.model()
        assert [key for key in get_peft_model_state_dict(model) if ".0." in key and "U_low" in key]
        model(x).square().sum().backward()
        for layer in (model.get_base_model()[i] for i in (0, 2)):
            low, u, v = layer.osf_svd_params["default"], layer.osf_U_high["default"], layer.osf_V_high["default"]
            assert all(low[part].grad.norm() > 1e-3 for part in low)
            assert (u.T @ low["U_low"].grad).norm() < 1e-5 * low["U_low"].grad.norm()
            assert (low["V_low"].grad @ v.T).norm() < 1e-5 * low["V_low"].grad.norm()

    def test_ranks(self) -> None:
        base, ranks = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 10)), {"^0$": 0.4, "1": 9}
        model = get_peft_model(base, OSFConfig(target_modules=["0", "1"], rank_pattern=ranks))
        assert [len(layer.osf_V_high["default"]) for layer in (base[0], base[1])] == [3, 9]
        assert model.get_nb_trainable_parameters()[0] == (12 + 1 + 8) * 5 + (10 + 1 + 12) * 1
        with pytest.raises(ValueError, match="effective_rank=10 freezes all of the 10 singular values of '1'"):
            model.add_adapter("all", OSFConfig(target_modules=["1"], effective_rank=10))
        for wrong in (0, 1.0, -0.5, "8", True):
            with pytest.raises(ValueError, match="effective_rank.*whole number of at least 1"):
                OSFConfig(effective_rank=wrong)
        with pytest.warns(UserWarning, match="target_svd_config=.*does nothing: rank_pattern"):
            OSFConfig(target_svd_config={"0": 3})


class TestTensorsGivenForOneCall:
    """`torch.func.functional_call` takes its tensors away before the backward pass, which remakes large weights."""

    @pytest.mark.parametrize("config", [LoHaConfig, HiraConfig, FourierFTConfig, LoKrConfig], ids=lambda c: c.__name__)
    def test_gradients_are_those_of_the_given_tensors(self, config: Any) -> None:
        torch.manual_seed(0)
        own = {"n_frequency": 20} if config is FourierFTConfig else {"r": 4}
        model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), config(target_modules=["0"], **own))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        given = {name: torch.randn_like(p).requires_grad_() for name, p in trained.items()}
        x = torch.randn(2, 32)
        found = torch.autograd.grad(
            torch.func.functional_call(model, given, (x,)).square().sum(), list(given.values())
        )
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(given[name])
        expected = torch.autograd.grad(model(x).square().sum(), list(trained.values()))
        for name, a, b in zip(trained, found, expected, strict=True):
            assert b.abs().max() > 0, name
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
