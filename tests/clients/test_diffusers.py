"""LoRA files in diffusers: on a small UNet, a small Flux transformer and a pipeline with a text encoder."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import fill
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer


diffusers = pytest.importorskip("diffusers")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> nn.Module:
    """Two levels, cross attention in the lower one."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    return fill(model, scale=0.1).eval()


def flux() -> nn.Module:
    """One double and one single block of Flux."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=False,
    )
    return fill(model, scale=0.1).eval()


def text_encoder() -> nn.Module:
    """CLIP's, of two layers."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return fill(CLIPTextModel(CLIPTextConfig(vocab_size=40, **shape, **ends)), scale=0.1).eval()


def pipeline() -> Any:
    """Stable Diffusion of these parts."""
    down, up = ["DownEncoderBlock2D"], ["UpDecoderBlock2D"]
    vae = diffusers.AutoencoderKL(block_out_channels=[16], norm_num_groups=8, down_block_types=down, up_block_types=up)
    made = diffusers.StableDiffusionPipeline(
        vae=fill(vae, scale=0.1),
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One evaluation of a model on fixed inputs; the outputs, flat."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if isinstance(model, CLIPTextModel):
        return model(torch.tensor([[1, 7, 9, 2], [1, 5, 8, 2]])).last_hidden_state.flatten()
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(noise(2, 4, 8, 8), torch.tensor([3, 3]), noise(2, 5, 16)).sample.flatten()
    inputs = {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 5, 32)}
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    inputs |= {"pooled_projections": noise(1, 32), "timestep": torch.tensor([0.5]).to(dtype)}
    return model(**inputs, **places).sample.flatten()


def lora(**kwargs: Any) -> LoraConfig:
    """On all projections of attention."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), **kwargs})


def adapted(model: nn.Module, name: str = "one", seed: int = 5, **kwargs: Any) -> nn.Module:
    """Add an adapter that has an effect."""
    model.add_adapter(lora(**kwargs), adapter_name=name)
    return fill(model, seed, only=f".{name}.")


def file(path: Any, make: Any, seed: int = 5, **kwargs: Any) -> torch.Tensor:
    """Save an adapter as diffusers does; returns the outputs of the model that wears it."""
    model = adapted(make(), seed=seed, **kwargs)
    model.save_lora_adapter(path, adapter_name="one")
    return run(model)


def load(model: nn.Module, folder: Any, **kwargs: Any) -> None:
    """Load what `file` saved."""
    name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(folder, prefix=None, weight_name=name, use_safetensors=True, **kwargs)


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the rounding of merged weights."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


MODELS = pytest.mark.parametrize("make", [unet, flux])


@MODELS
class TestModels:
    def test_adapters_are_added_switched_weighted_and_deleted(self, make, as_reference):
        model = adapted(make())
        found = {"one": run(model)}
        adapted(model, "two", 6, r=2, target_modules=["to_q", "to_v"])
        model.set_adapter("two")
        found["two"] = run(model)
        model.set_adapters(["one", "two"], [0.5, 2.0])
        assert model.active_adapters() == ["one", "two"]
        found["weighted"] = run(model)
        model.disable_adapters()
        same(run(model), run(make()))
        model.enable_adapters()
        same(run(model), found["weighted"])
        model.delete_adapters("two")
        model.set_adapters(["one"], [1.0])
        same(run(model), found["one"])
        as_reference(**found, tolerance=1e-4)

    def test_the_fourth_argument_of_attention_scales(self, make, as_reference):
        model = adapted(make())
        plain = run(model)
        key = "cross_attention_kwargs" if make is unet else "joint_attention_kwargs"
        original = model.forward
        model.forward = lambda *args, **kwargs: original(*args, **kwargs, **{key: {"scale": 0.25}})
        scaled = run(model)
        model.forward = original
        same(run(model), plain)
        as_reference(scaled=scaled, tolerance=1e-4)

    def test_weights_by_block(self, make, as_reference):
        if make is flux:
            pytest.skip("diffusers gives blocks of their own to UNets only")
        model = adapted(make())
        found = {}
        for i, scales in enumerate([{"mid": 0.3}, {"down": 0.5, "up": {"block_0": [0.1, 2.0]}}]):
            model.set_adapters(["one"], [scales])
            found[str(i)] = run(model)
            found[f"scales {i}"] = {
                name: float(layer.scaling["one"])
                for name, layer in model.named_modules()
                if isinstance(layer, BaseTunerLayer) and name.endswith("attn1.to_q")
            }
        as_reference(**found, tolerance=1e-4)

    @pytest.mark.parametrize("low", [False, True])
    def test_files(self, make, low, tmp_path):
        want = file(tmp_path, make)
        model = make()
        load(model, tmp_path, adapter_name="x", low_cpu_mem_usage=low)
        same(run(model), want)
        assert not any(p.is_meta for p in model.parameters())
        model.unload_lora()
        same(run(model), run(make()))
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def test_a_file_with_ranks_and_alphas_of_its_own(self, make, tmp_path, as_reference):
        patterns = {"rank_pattern": {"to_q": 2, "to_v": 6}, "alpha_pattern": {"to_q": 3}}
        want = file(tmp_path, make, **patterns)
        model = make()
        load(model, tmp_path, adapter_name="x")
        same(run(model), want)
        tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        as_reference(shapes={name: list(t.shape) for name, t in sorted(tensors.items())}, logits=want, tolerance=1e-4)

    @pytest.mark.parametrize("safe", [False, True])
    def test_fusing(self, make, safe, as_reference):
        model = adapted(adapted(make()), "two", 6)
        model.set_adapters(["one", "two"], [0.5, 1.5])
        want = run(model)
        model.fuse_lora(safe_fusing=safe)
        same(run(model), want)
        model.unfuse_lora()
        same(run(model), want)
        model.set_adapters(["one"], [0.5])
        model.fuse_lora(lora_scale=0.5, adapter_names=["one"])
        fused = run(model)
        model.unfuse_lora()
        as_reference(want=want, fused=fused, after=run(model), tolerance=1e-3)

    @pytest.mark.parametrize("rank", [2, 4, 7])
    @pytest.mark.parametrize("pattern", [{}, pytest.param({"to_v": 3}, marks=pytest.mark.beyond)])
    def test_hot_swapping(self, make, rank, pattern, tmp_path):
        first = file(tmp_path / "a", make)
        second = file(tmp_path / "b", make, 6, r=rank, lora_alpha=3, rank_pattern=pattern)
        model = make()
        model.enable_lora_hotswap(target_rank=8)
        load(model, tmp_path / "a", adapter_name="x")
        modules = [id(module) for module in model.modules()]
        for folder, want in (("b", second), ("a", first), ("b", second)):
            load(model, tmp_path / folder, adapter_name="x", hotswap=True)
            same(run(model), want)
        assert [id(module) for module in model.modules()] == modules

    @pytest.mark.beyond
    @pytest.mark.parametrize("rank", [2, 7])
    def test_an_adapter_that_was_swapped_in_is_saved_as_it_is(self, make, rank, tmp_path):
        file(tmp_path / "a", make)
        second = file(tmp_path / "b", make, 6, r=rank, lora_alpha=3)
        model = make()
        model.enable_lora_hotswap(target_rank=8)
        for folder, swap in (("a", False), ("b", True)):
            load(model, tmp_path / folder, adapter_name="x", hotswap=swap)
        model.save_lora_adapter(tmp_path / "c", adapter_name="x")
        again = make()
        load(again, tmp_path / "c", adapter_name="x")
        same(run(again), second)

    def test_hot_swapping_what_does_not_fit_names_it(self, make, tmp_path):
        file(tmp_path / "a", make)
        file(tmp_path / "b", make, 6, target_modules=["to_q", "proj_out"])
        model = make()
        load(model, tmp_path / "a", adapter_name="x")
        with pytest.raises(RuntimeError, match="proj_out"):
            load(model, tmp_path / "b", adapter_name="x", hotswap=True)
        with pytest.raises(ValueError, match="no existing adapter"):
            load(model, tmp_path / "b", adapter_name="y", hotswap=True)

    @pytest.mark.parametrize("low", [False, True])
    def test_missing_and_unexpected_tensors_are_warned_of_by_name(self, make, low, tmp_path, caplog):
        file(tmp_path, make)
        tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        gone = next(name for name in sorted(tensors) if "lora_B" in name)
        tensors.pop(gone)
        stranger = gone.replace("lora_B", "lora_C")
        tensors[stranger] = torch.zeros(2)
        logger = logging.getLogger("diffusers")
        logger.addHandler(caplog.handler)
        try:
            make().load_lora_adapter(tensors, prefix=None, adapter_name="x")
        finally:
            logger.removeHandler(caplog.handler)
        assert "missing keys" in caplog.text
        assert gone.replace("lora_B", "lora_B.x") in caplog.text

    def test_shapes_that_do_not_fit_are_refused_and_leave_the_model(self, make, tmp_path):
        file(tmp_path, make)
        tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        wrong = next(name for name in sorted(tensors) if "lora_A" in name)
        tensors[wrong] = torch.zeros(4, 3)
        model = make()
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_lora_adapter(tensors, prefix=None, adapter_name="x")
        assert "x" not in getattr(model, "peft_config", {})
        same(run(model), run(make()))

    @pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
    def test_layer_wise_casting(self, make, compute):
        """Weights in 8 bits, computation in another type: the adapter's are cast like the base's."""
        plain = run(adapted(make()).to(compute), compute)
        model = adapted(make().to(compute))
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
        found = run(model, compute)
        assert found.dtype == compute
        assert torch.nn.functional.cosine_similarity(found.float(), plain.float(), dim=0) > 0.9

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtypes_of_new_tensors(self, make, dtype, tmp_path, as_reference):
        file(tmp_path, make)
        found = {}
        for low in (False, True):
            model = make().to(dtype)
            load(model, tmp_path, adapter_name="x", low_cpu_mem_usage=low)
            found[str(low)] = sorted({str(p.dtype) for name, p in model.named_parameters() if "lora_" in name})
        model = make().to(dtype)
        model.add_adapter(lora())
        found["added"] = sorted({str(p.dtype) for name, p in model.named_parameters() if "lora_" in name})
        as_reference(**found)

    def test_training(self, make, as_reference):
        model = adapted(make().train())
        assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = run.__wrapped__(model).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        as_reference(losses=losses, tolerance=1e-4)

    @pytest.mark.parametrize("method", ["loha", "lokr"])
    def test_other_methods(self, make, method, as_reference):
        cls = {"loha": LoHaConfig, "lokr": LoKrConfig}[method]
        model = make()
        model.add_adapter(cls(r=2, alpha=4, target_modules=["to_q", "to_v"]), adapter_name="one")
        fill(model, 5, only=".one")
        found = run(model)
        model.fuse_lora()
        same(run(model), found)
        as_reference(found=found, tolerance=1e-4)

    def test_only_the_modules_that_a_file_names_are_adapted(self, make):
        """`proj_out` or `conv_out` at the root is also the end of other names."""
        root = {unet: "conv_out", flux: "proj_out"}[make]
        model = make()
        layer = model.get_submodule(root)
        generator = torch.Generator().manual_seed(2)
        inner, outer = (
            ((layer.in_channels, 3, 3), (layer.out_channels, 4, 1, 1))
            if make is unet
            else (
                (layer.in_features,),
                (layer.out_features, 4),
            )
        )
        tensors = {
            f"{root}.lora_A.weight": torch.randn(4, *inner, generator=generator),
            f"{root}.lora_B.weight": torch.randn(*outer, generator=generator),
        }
        model.load_lora_adapter(tensors, prefix=None, adapter_name="x")
        assert [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)] == [root]

    @pytest.mark.beyond
    def test_biases_beside_pairs_in_a_file_reach_the_adapted_layers(self, make):
        """As in the Control LoRAs of Stability AI, with the names of the plain model."""
        model = make()
        layer = next(n for n, m in model.named_modules() if n.endswith("to_out.0") and m.bias is not None)
        shape = model.get_submodule(layer).weight.shape
        bias = torch.arange(float(shape[0]))
        pair = {"lora_A.weight": torch.ones(2, shape[1]), "lora_B.weight": torch.ones(shape[0], 2)}
        tensors = {f"{layer}.{name}": tensor for name, tensor in {**pair, "bias": bias}.items()}
        model.load_lora_adapter(tensors, prefix=None, adapter_name="x")
        want = make()
        with torch.no_grad():
            want.get_submodule(layer).weight += 2
            want.get_submodule(layer).bias.copy_(bias)
        same(run(model), run(want))


class TestPipeline:
    def files(self, folder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A file with adapters of both parts; returns the outputs of the two."""
        made = pipeline()
        adapted(made.unet, "one", 5)
        made.text_encoder.add_adapter(lora(target_modules=["q_proj", "v_proj"]), adapter_name="one")
        fill(made.text_encoder, 6, only=".one.")
        from diffusers.utils import convert_state_dict_to_diffusers

        from peft import get_peft_model_state_dict

        parts = [
            convert_state_dict_to_diffusers(get_peft_model_state_dict(part, adapter_name="one"))
            for part in (made.unet, made.text_encoder)
        ]
        made.save_lora_weights(folder, unet_lora_layers=parts[0], text_encoder_lora_layers=parts[1])
        return run(made.unet), run(made.text_encoder)

    def test_a_file_loads_into_both_parts(self, tmp_path, as_reference):
        wants = self.files(tmp_path)
        made = pipeline()
        made.load_lora_weights(tmp_path, adapter_name="x")
        assert made.get_list_adapters() == {"unet": ["x"], "text_encoder": ["x"]}
        found = run(made.unet), run(made.text_encoder)
        made.load_lora_weights(tmp_path, adapter_name="y")
        made.set_adapters(["x", "y"], adapter_weights=[0.5, {"unet": 0.3, "text_encoder": 0.0}])
        assert made.get_active_adapters() == ["x", "y"]
        both = run(made.unet), run(made.text_encoder)
        made.disable_lora()
        same(run(made.unet), run(unet()))
        made.enable_lora()
        made.delete_adapters("y")
        made.fuse_lora(adapter_names=["x"])
        fused = run(made.unet), run(made.text_encoder)
        made.unfuse_lora()
        made.unload_lora_weights()
        same(run(made.unet), run(unet()))
        same(run(made.text_encoder), run(text_encoder()))
        as_reference(found=found, both=both, fused=fused, wants=wants, tolerance=1e-3)

    @pytest.mark.parametrize("alphas", [False, True])
    def test_a_file_of_kohya_trainers(self, tmp_path, as_reference, alphas):
        """`lora_down`, `lora_up` and `alpha`, names joined by underscores."""
        want = file(tmp_path, unet)
        renamed = {}
        for name, tensor in load_file(tmp_path / "pytorch_lora_weights.safetensors").items():
            path, _, leaf = name.partition(".lora_")
            stem = f"lora_unet_{path.replace('.', '_')}"
            renamed[f"{stem}.lora_{ {'A': 'down', 'B': 'up'}[leaf[0]] }.weight"] = tensor
            if alphas:
                renamed[f"{stem}.alpha"] = torch.tensor(8.0)
        save_file(renamed, tmp_path / "kohya.safetensors")
        made = pipeline()
        made.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="x")
        assert torch.allclose(run(made.unet), want, atol=1e-4) == alphas
        as_reference(unet=run(made.unet), tolerance=1e-3)


def test_several_adapters_in_every_order(tmp_path):
    """The sum of adapters does not depend on the order in which they were loaded."""
    for seed, name in enumerate("abc"):
        file(tmp_path / name, unet, seed + 5, r=2 + seed)
    outputs = []
    for order in itertools.permutations("abc"):
        model = unet()
        for name in order:
            load(model, tmp_path / name, adapter_name=name)
        model.set_adapters(list("abc"), [0.3, 0.6, 0.9])
        outputs.append(run(model))
    for output in outputs[1:]:
        same(output, outputs[0])


def test_a_compiled_unet_takes_adapters_of_other_ranks_without_compiling_again(tmp_path: Any) -> None:
    """Linear layers and convolutions, with the larger and the smaller rank in turn, and one of fewer modules."""
    x = {"sample": fill(nn.Linear(8, 8)).weight.detach().expand(1, 4, 8, 8), "timestep": torch.tensor(10)}
    x["encoder_hidden_states"] = torch.linspace(-1, 1, 48).view(1, 3, 16)
    convolutions = ["conv_in", "conv1", "conv2", "conv_shortcut"]
    wanted = []
    for i, (rank, targets) in enumerate(
        [(4, [*ATTENTION, *convolutions]), (8, ["conv1", *ATTENTION]), (2, ["conv2"])]
    ):
        one = unet()
        torch.manual_seed(i)
        config = LoraConfig(r=rank, lora_alpha=2 * rank + i, target_modules=targets, init_lora_weights=False)
        one.add_adapter(config)
        one.save_lora_adapter(tmp_path / str(i))
        with torch.no_grad():
            wanted.append(one(**x).sample)
    model = unet()
    model.enable_lora_hotswap(target_rank=8)
    load(model, tmp_path / "0", adapter_name="default")
    torch._dynamo.reset()
    model.compile(backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for place, i in enumerate((0, 1, 2, 0)):
            if place:
                load(model, tmp_path / str(i), adapter_name="default", hotswap=True)
            same(model(**x).sample, wanted[i])
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2)
