"""What bad input gets: an exception that names the thing and the way out, and a model and files that are unchanged."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import ConvNet, Mlp, Volume, tiny_llama
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

import peft
from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    NoMatchingPeftModuleError,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> tuple:
    """Everything that a failed call should leave alone."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        list(getattr(model, "peft_config", None) or ()),
        getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
    )


def same(left: tuple, right: tuple) -> None:
    """Two snapshots are equal."""
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=0, atol=0, equal_nan=True)
    assert left[2:] == right[2:]


@contextmanager
def refused(error: type[Exception], *models: nn.Module, says: list[str]) -> Iterator[Any]:
    """The block raises ``error`` with all of these words, and leaves the models as they were."""
    before = [snapshot(model) for model in models]
    with pytest.raises(error) as caught:
        yield caught
    missing = [word for word in says if word not in str(caught.value)]
    assert not missing, f"{missing} missing in: {caught.value}"
    for model, old in zip(models, before):
        same(old, snapshot(model))


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def adapted(config: PeftConfig | None = None) -> PeftModel:
    """An Mlp with an adapter that has an effect."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), config or LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved LoRA of an Mlp."""
    model = adapted(
        LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=False, base_model_name_or_path="the/base")
    )
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- targets --------------------------------------------------------------------------------------------------


METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": LoraConfig,
    "ia3": lambda **k: IA3Config(feedforward_modules=[], **k),
    "oft": lambda **k: OFTConfig(oft_block_size=2, **k),
    "vera": VeraConfig,
    "hira": HiraConfig,
    "ln": LNTuningConfig,
}


class TestTargets:
    @pytest.mark.parametrize("method", METHODS)
    def test_nothing_matches(self, method):
        model = Mlp()
        says = ["lln0", "lin0", "Linear"]  # what was asked, the closest name, the kinds of layers there are
        with refused(NoMatchingPeftModuleError, model, says=says):
            get_peft_model(model, METHODS[method](target_modules=["lln0"]))

    def test_a_regex_that_matches_nothing(self):
        model = Mlp()
        with refused(NoMatchingPeftModuleError, model, says=["lin", "whole name", "lin0", "lin1", "Linear"]):
            get_peft_model(model, LoraConfig(target_modules=r"lin\d\d"))

    def test_the_closest_name_has_as_many_parts_as_asked_for(self):
        model = tiny_llama()
        with refused(NoMatchingPeftModuleError, model, says=["self_attn.qproj", "self_attn.q_proj"]):
            get_peft_model(model, LoraConfig(target_modules=["self_attn.qproj"]))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"exclude_modules": ["q_proj"]}, ["exclude_modules={'q_proj'}"]),
            ({"layers_to_transform": 7}, ["layers_to_transform=7", "in the layers 0, 1"]),
            ({"layers_to_transform": [0], "layers_pattern": "h"}, ["layers_pattern='h'"]),
            ({"modules_to_save": ["q_proj"]}, ["modules_to_save=['q_proj']"]),
        ],
    )
    def test_all_that_matched_is_ruled_out(self, options, words):
        model = tiny_llama()
        with refused(NoMatchingPeftModuleError, model, says=["q_proj", *words]) as caught:
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
        others = {"exclude_modules", "layers_to_transform", "modules_to_save"} - options.keys()
        assert not [field for field in (*others, "Change target_modules") if field in str(caught.value)]

    @pytest.mark.parametrize(
        ("targets", "words"),
        [
            ("q_proj", ["['q_proj']"]),
            ("q_proj, v_proj", ["['q_proj', 'v_proj']"]),
            ("all_linear", ["all-linear"]),
        ],
    )
    def test_a_string_that_was_meant_otherwise(self, targets, words):
        with refused(NoMatchingPeftModuleError, base := tiny_llama(), says=[repr(targets), *words]):
            get_peft_model(base, LoraConfig(target_modules=targets))

    def test_modules_as_parameters(self):
        with refused(NoMatchingPeftModuleError, base := Mlp(), says=["lin0", "target_modules adapts"]):
            get_peft_model(base, LoraConfig(target_parameters=["lin0"]))

    @pytest.mark.parametrize(
        ("field", "says"),
        [("rank", "'r'?"), ("learning_rate", "optimizer"), ("lr", "optimizer"), ("dropout", "'lora_dropout'?")],
    )
    def test_fields_as_they_are_called_elsewhere(self, field, says):
        with refused(TypeError, says=[repr(field), says]):
            LoraConfig(**{field: 1})

    def test_a_number_as_a_string(self):
        with refused(TypeError, says=["lora_alpha='16'", "number"]):
            LoraConfig(lora_alpha="16")
        assert LoraConfig(lora_alpha=1.5).lora_alpha == 1.5

    def test_a_task_whose_head_the_model_lacks(self):
        with pytest.warns(UserWarning, match="'SEQ_CLS'.*LlamaForCausalLM.*'classifier' or 'score'.*modules_to_save"):
            get_peft_model(tiny_llama(), LoraConfig(task_type="SEQ_CLS"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get_peft_model(tiny_llama(), LoraConfig(task_type="SEQ_CLS", modules_to_save=["lm_head"]))

    def test_part_of_the_list_matches_nothing(self):
        with pytest.warns(UserWarning, match="lln1.*lin1"):
            model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0", "lln1"]))
        assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lin0"}

    def test_no_parameter_matches(self):
        model = Mlp()
        with refused(NoMatchingPeftModuleError, model, says=["lin0.weihgt", "lin0.weight"]):
            get_peft_model(model, LoraConfig(target_parameters=["lin0.weihgt"]))

    def test_no_targets_and_an_unknown_architecture(self):
        model = Mlp()
        with refused(ValueError, model, says=["Mlp", "target_modules", "lin0", "all-linear"]):
            get_peft_model(model, LoraConfig())

    @pytest.mark.parametrize(
        ("base", "config", "says"),
        [
            (Mlp, LoraConfig(target_modules=["lin0", "act"]), ["act", "ReLU", "Linear", "exclude_modules"]),
            (Mlp, IA3Config(target_modules=["lin0", "norm"], feedforward_modules=[]), ["norm", "LayerNorm"]),
            (Mlp, HiraConfig(target_modules=["lin0", "norm"]), ["norm", "LayerNorm"]),
            (Mlp, TrainableTokensConfig(target_modules=["norm"], token_indices=[1]), ["norm", "LayerNorm"]),
            (Volume, TrainableTokensConfig(target_modules=["conv"], token_indices=[1]), ["conv", "token"]),
            (ConvNet, LoraConfig(target_modules=["emb", "lin0"], lora_bias=True), ["emb", "lora_bias"]),
        ],
    )
    def test_a_layer_that_cannot_be_adapted(self, base, config, says):
        model = base()
        with refused(ValueError, model, says=says):
            get_peft_model(model, config)

    def test_the_second_layer_fails_while_the_first_is_wrapped(self):
        """A failure in the middle of the allocation takes back what was done."""
        model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(4, 4, 1, groups=4))
        with refused(ValueError, model, says=["rank 2", "4 groups"]):
            get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))

    def test_the_same_for_a_further_adapter(self):
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 6), nn.Conv2d(4, 4, 1, groups=4)), LoraConfig(target_modules=["0"])
        )
        with refused(ValueError, model, says=["rank 2", "4 groups"]):
            model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"]))
        with refused(NoMatchingPeftModuleError, model, says=["lin9"]):
            model.add_adapter("other", LoraConfig(target_modules=["lin9"]))
        model.add_adapter("other", LoraConfig(target_modules=["1"], r=4))  # the name is still free

    def test_tokens_outside_the_table(self):
        for config in (
            TrainableTokensConfig(token_indices=[3, 30]),
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 30]),
        ):
            model = tiny_llama()
            with refused(ValueError, model, says=["30"]):
                get_peft_model(model, config)

    def test_modules_to_save_without_match(self):
        with pytest.warns(UserWarning, match="lin_1.*lin1"):
            get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"], modules_to_save=["lin_1"]))


# --- configs --------------------------------------------------------------------------------------------------


class TestConfigs:
    @pytest.mark.parametrize("cls", [LoraConfig, HiraConfig, VeraConfig])
    @pytest.mark.parametrize("r", [0, -1, 1.5])
    def test_a_rank_below_one(self, cls, r):
        with pytest.raises(ValueError, match=rf"r={r}"):
            cls(r=r, target_modules=["lin0"])

    def test_a_rank_below_one_in_a_pattern(self):
        with pytest.raises(ValueError, match="lin1"):
            LoraConfig(target_modules=["lin0"], rank_pattern={"lin1": 0})

    def test_an_unknown_field(self):
        with pytest.raises(TypeError, match="lora_alpah.*lora_alpha"):
            LoraConfig(lora_alpah=8)

    def test_an_unknown_field_in_a_file(self, saved):
        content = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps({**content, "from_the_future": 1, "another": 2, "peft_version": "7.0"}))
        with pytest.warns(UserWarning, match=r"another.*from_the_future.*7\.0") as caught:
            model = PeftModel.from_pretrained(Mlp(), saved)
        assert len([w for w in caught if "from_the_future" in str(w.message)]) == 1
        assert not hasattr(model.peft_config["default"], "from_the_future")

    @pytest.mark.parametrize(
        ("method", "says"),
        [("LROA", ["LROA", "LORA"]), (None, ["peft_type", "LORA"])],
    )
    def test_an_unknown_method_in_a_file(self, saved, method, says):
        content = {**json.loads((saved / CONFIG).read_text()), "peft_type": method}
        (saved / CONFIG).write_text(json.dumps(content))
        base = Mlp()
        with refused(ValueError, base, says=[*says, str(saved)]):
            PeftModel.from_pretrained(base, saved)

    @pytest.mark.parametrize("text", ["", "{", '{"peft_type": "LORA", "r": ', "[]", "null", "\x00\x01"])
    def test_a_damaged_config(self, saved, text):
        (saved / CONFIG).write_text(text)
        base, model = Mlp(), adapted()
        with refused(ValueError, base, says=[str(saved / CONFIG)]):
            PeftModel.from_pretrained(base, saved)
        with refused(ValueError, model, says=[str(saved / CONFIG)]):
            model.load_adapter(saved, "other")

    def test_bytes_that_are_no_text(self, saved):
        (saved / CONFIG).write_bytes(b"\xff\xfe\x00\x80")
        with refused(ValueError, base := Mlp(), says=[str(saved / CONFIG)]):
            PeftModel.from_pretrained(base, saved)

    def test_a_value_in_the_file_that_is_not_valid(self, saved):
        content = {**json.loads((saved / CONFIG).read_text()), "r": 0}
        (saved / CONFIG).write_text(json.dumps(content))
        with refused(ValueError, base := Mlp(), says=[str(saved / CONFIG), "r=0"]):
            PeftModel.from_pretrained(base, saved)

    def test_no_config(self, saved):
        os.remove(saved / CONFIG)
        with refused(ValueError, base := Mlp(), says=[CONFIG, str(saved)]):
            PeftModel.from_pretrained(base, saved)

    def test_a_config_of_another_kind(self, saved):
        with refused(ValueError, base := Mlp(), says=["PeftConfig", "dict"]):
            PeftModel.from_pretrained(base, saved, config={"r": 8})

    def test_the_sub_folder_is_forgotten(self, saved, tmp_path):
        model = PeftModel.from_pretrained(Mlp(), saved, adapter_name="mine")
        model.save_pretrained(tmp_path / "outer")
        with refused(ValueError, base := Mlp(), says=[CONFIG, "mine", "subfolder"]):
            PeftModel.from_pretrained(base, tmp_path / "outer")
        with refused(FileNotFoundError, base, says=["'mein'", "Did you mean 'mine'?"]):
            PeftModel.from_pretrained(base, tmp_path / "outer", subfolder="mein")

    def test_a_folder_of_nearly_this_name(self, saved):
        with refused(FileNotFoundError, base := Mlp(), says=["savd", f"In {saved.parent}: Did you mean 'saved'?"]):
            PeftModel.from_pretrained(base, saved.parent / "savd")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_file_instead_of_its_folder(self, saved, name):
        with refused(
            FileNotFoundError, base := Mlp(), says=[str(saved / name), f"folder that it is in: {str(saved)!r}"]
        ):
            PeftModel.from_pretrained(base, saved / name)


# --- files of weights -----------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def scramble(path: Path) -> None:
    path.write_bytes(b"no tensors at all" * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


class TestFiles:
    @pytest.mark.parametrize("harm", [truncate, scramble, empty])
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
    def test_a_damaged_file(self, tmp_path, harm, safe):
        adapted().save_pretrained(tmp_path, safe_serialization=safe)
        path = tmp_path / (WEIGHTS if safe else "adapter_model.bin")
        harm(path)
        base, model = Mlp(), adapted()
        for call, target in (
            (lambda: PeftModel.from_pretrained(base, tmp_path), base),
            (lambda: model.load_adapter(tmp_path, "other"), model),
            (lambda: model.load_adapter(tmp_path, "default"), model),
        ):
            with refused(ValueError, target, says=[str(path), "damaged"]):
                call()

    def test_a_pickle_with_code_is_not_run(self, saved, tmp_path):
        class Evil:
            def __reduce__(self) -> tuple:
                return os.mkdir, (str(tmp_path / "pwned"),)

        os.remove(saved / WEIGHTS)
        torch.save({"base_model.model.lin0.lora_A.weight": Evil()}, saved / "adapter_model.bin")
        with refused(ValueError, base := Mlp(), says=["adapter_model.bin"]):
            PeftModel.from_pretrained(base, saved)
        assert not (tmp_path / "pwned").exists()

    def test_no_file(self, saved):
        os.remove(saved / WEIGHTS)
        base, model = Mlp(), adapted()
        with refused(FileNotFoundError, base, says=[str(saved), WEIGHTS, "adapter_model.bin"]):
            PeftModel.from_pretrained(base, saved)
        with refused(FileNotFoundError, model, says=[str(saved), WEIGHTS]):
            model.load_adapter(saved, "other")

    def test_no_folder(self, tmp_path):
        with refused((ValueError, OSError), base := Mlp(), says=["nowhere"]):
            PeftModel.from_pretrained(base, tmp_path / "nowhere")

    @pytest.mark.parametrize("lean", [False, True])
    def test_a_base_that_does_not_fit(self, saved, lean):
        class Wide(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.lin0, self.norm, self.lin1 = nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 4)

        base = Wide()
        base.lin1.weight.requires_grad_(False)
        says = ["lin0.lora_A", "[2, 6]", "[2, 7]", "the/base"]
        with refused(ValueError, base, says=says):
            PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=lean)
        model = get_peft_model(Wide(), LoraConfig(r=2, target_modules=["lin1"]))
        with refused(ValueError, model, says=says):
            model.load_adapter(saved, "other", low_cpu_mem_usage=lean)
        with refused(ValueError, model, says=["lin1", "[2, 8]", "[2, 9]"]):
            model.load_adapter(saved, "default")  # new values for an adapter that is there

    def test_a_size_that_does_not_fit_in_a_module_to_save(self, tmp_path):
        adapted(LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"])).save_pretrained(tmp_path)
        base = Mlp()
        base.lin1 = nn.Linear(8, 5)
        with refused(ValueError, base, says=["lin1.bias", "[4]", "[5]"]):
            PeftModel.from_pretrained(base, tmp_path)

    def test_mismatched_sizes_can_be_left_out(self, tmp_path):
        adapted(LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"])).save_pretrained(tmp_path)
        stored = load_file(tmp_path / WEIGHTS)
        base = Mlp()
        base.lin1 = nn.Linear(8, 5)
        with pytest.warns(UserWarning, match="lin1.weight"):
            model = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
        key = "base_model.model.lin0.lora_A.weight"
        assert torch.equal(get_peft_model_state_dict(model)[key], stored[key])

    def test_the_base_lacks_a_module(self, saved):
        base = nn.Sequential()
        base.lin2 = nn.Linear(3, 3)
        with refused(NoMatchingPeftModuleError, base, says=["lin0", "lin1", "lin2"]):
            PeftModel.from_pretrained(base, saved)

    def test_tensors_are_missing(self, saved):
        stored = load_file(saved / WEIGHTS)
        lost = "base_model.model.lin1.lora_B.weight"
        save_file({k: v for k, v in stored.items() if k != lost}, saved / WEIGHTS)
        with pytest.warns(UserWarning, match=r"missing.*lin1\.lora_B"):
            PeftModel.from_pretrained(Mlp(), saved)
        model = adapted()
        with pytest.warns(UserWarning, match="missing"):
            result = model.load_adapter(saved, "other")
        assert [k for k in result.missing_keys if "lora" in k] and result.unexpected_keys == []
        with refused(ValueError, base := Mlp(), says=["lin1.lora_B", "low_cpu_mem_usage"]):
            PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=True)

    def test_tensors_are_unexpected(self, saved):
        stored = {key: t.clone() for key, t in load_file(saved / WEIGHTS).items()}  # the file is written anew
        save_file({**stored, "base_model.model.lin7.lora_A.weight": torch.ones(2, 2)}, saved / WEIGHTS)
        with pytest.warns(UserWarning, match=r"lin7\.lora_A"):
            torch.manual_seed(0)
            model = PeftModel.from_pretrained(Mlp(), saved)
        assert torch.equal(model(X), adapted_from(stored)(X))

    def test_set_peft_model_state_dict(self):
        model = adapted()
        good = get_peft_model_state_dict(model)
        bad = {k: torch.zeros(9, 9) if "lora_B" in k else torch.zeros_like(v) for k, v in good.items()}
        with refused(ValueError, model, says=["lin0.lora_B.weight", "[9, 9]", "[8, 2]"]):
            set_peft_model_state_dict(model, bad)
        with refused(ValueError, model, says=["nobody", "default"]):
            set_peft_model_state_dict(model, good, adapter_name="nobody")
        with refused(ValueError, model, says=["nobody", "default"]):
            get_peft_model_state_dict(model, adapter_name="nobody")


def llama(**sizes: int) -> LlamaForCausalLM:
    """A llama that is tiny in every respect but those given."""
    config = copy.deepcopy(tiny_llama().config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config)


def opt() -> OPTForCausalLM:
    """Another architecture, whose attention has the same names as llama's."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=30, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    )  # fmt: skip


def wide() -> LlamaForCausalLM:
    return llama(hidden_size=24, head_dim=12)


def shallow() -> LlamaForCausalLM:
    return llama(num_hidden_layers=1)


OTHER_BASES: list[tuple[PeftConfig, Callable[[], nn.Module], list[str]]] = [
    (LoraConfig(target_modules=["q_proj"]), wide, ["layers.0.self_attn.q_proj.lora_A", "[8, 16]", "[8, 24]"]),
    (LoraConfig(target_modules=["q_proj"]), opt, ["OPTForCausalLM", "model.layers.0", "model.decoder.layers.0"]),
    (LoraConfig(target_modules=["q_proj"]), Mlp, ["q_proj", "lin0", "lin1"]),
    (IA3Config(), opt, ["OPTForCausalLM", "layers.0.mlp.down_proj", "layers.0.self_attn.k_proj"]),
    (PrefixTuningConfig(num_virtual_tokens=3), wide, ["token_dim=16", "24", "LlamaForCausalLM"]),
    (PrefixTuningConfig(num_virtual_tokens=3), shallow, ["num_layers=2", "1", "LlamaForCausalLM"]),
    (PrefixTuningConfig(num_virtual_tokens=3), Mlp, ["Mlp", "get_input_embeddings"]),
    (PromptTuningConfig(num_virtual_tokens=3), wide, ["token_dim=16", "24"]),
    (PromptEncoderConfig(num_virtual_tokens=3), Mlp, ["Mlp", "get_input_embeddings"]),
    (AdaptionPromptConfig(adapter_len=3, adapter_layers=2), wide, ["adaption_prompt", "[1, 3, 16]", "[1, 3, 24]"]),
    (AdaptionPromptConfig(adapter_len=3, adapter_layers=2), shallow, ["adapter_layers=2", "has 1 self-attentions"]),
    (AdaptionPromptConfig(adapter_len=3, adapter_layers=2), Mlp, ["adapter_layers=2", "Mlp"]),
    (BottleneckConfig(), wide, ["layers.0.bottleneck_feedforward", "[1, 16]", "[1, 24]"]),
    (BottleneckConfig(), opt, ["OPTForCausalLM", "model.layers.0", "model.decoder.layers.0"]),
    (BottleneckConfig(), Mlp, ["Mlp", "0 transformer blocks"]),
]


@pytest.mark.parametrize(
    ("config", "build", "says"),
    OTHER_BASES,
    ids=[f"{type(config).__name__}-{build.__name__}" for config, build, _ in OTHER_BASES],
)
def test_an_adapter_of_another_base_model(config, build, says, tmp_path):
    """Wider, shallower, of another architecture, or no transformer at all."""
    model = get_peft_model(tiny_llama(), copy.deepcopy(config))
    model.save_pretrained(tmp_path)
    base = build()
    with refused(ValueError, base, says=says):
        PeftModel.from_pretrained(base, tmp_path)
    assert not hasattr(base, "peft_config")
    PeftModel.from_pretrained(tiny_llama(), tmp_path)  # the files are what they were


def adapted_from(tensors: dict[str, torch.Tensor]) -> PeftModel:
    """The adapter of `saved` with these tensors."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    set_peft_model_state_dict(model, tensors)
    return model


# --- names of adapters ----------------------------------------------------------------------------------------


class TestNames:
    def two(self) -> PeftModel:
        model = adapted()
        model.add_adapter("other", LoraConfig(r=3, target_modules=["lin1"], init_lora_weights=False))
        return model

    def test_a_name_that_is_taken(self, saved):
        model = self.two()
        with refused(ValueError, model, says=["other", "already exists", "delete_adapter"]):
            model.add_adapter("other", LoraConfig(target_modules=["lin0"]))

    @pytest.mark.parametrize("name", ["", "a.b", ".", "keys", "pop", "items", 3, None])
    def test_a_name_that_cannot_be_one(self, name, saved):
        base, model = Mlp(), self.two()
        with refused(ValueError, base, says=[repr(name)]):
            get_peft_model(base, LoraConfig(target_modules=["lin0"]), adapter_name=name)
        with refused(ValueError, base, says=[repr(name)]):
            inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), base, adapter_name=name)
        with refused(ValueError, model, says=[repr(name)]):
            model.add_adapter(name, LoraConfig(target_modules=["lin0"]))
        with refused(ValueError, model, says=[repr(name)]):
            model.load_adapter(saved, name)

    @pytest.mark.parametrize(
        "name", ["lin0", "0", "lora_A", "o", "weight", "base_layer", "a b", "ü", "model", "A-1_2"]
    )
    def test_a_name_that_looks_odd_but_is_one(self, name, tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False), name)
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
        assert set(get_peft_model_state_dict(model, adapter_name=name)) == {
            f"base_model.model.lin0.lora_{letter}.weight" for letter in "AB"
        }
        expected = model(X)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Mlp(), tmp_path / name, adapter_name=name)
        assert torch.equal(again(X), expected)

    def test_name_and_config_in_the_wrong_order(self):
        with refused(ValueError, model := self.two(), says=["LoraConfig(", "strings", "add_adapter", "before"]):
            model.add_adapter(LoraConfig(target_modules=["lin0"]), "third")

    def test_one_name_where_a_list_is_asked_for(self, tmp_path):
        model = self.two()
        with refused(ValueError, model, says=["'nobody'", "'other'"]):
            model.save_pretrained(tmp_path, selected_adapters="nobody")
        model.save_pretrained(tmp_path, selected_adapters="other")
        assert os.listdir(tmp_path / "other") and not (tmp_path / CONFIG).exists()

    def test_an_attribute_that_there_is_not(self):
        with refused(AttributeError, model := self.two(), says=["PeftModel", "Mlp", "'print_trainable_parameters'?"]):
            model.print_trainable_params()
        assert not hasattr(model, "merge_and_unlod") and getattr(model, "nothing_at_all", 3) == 3

    def test_set_adapter(self):
        model = self.two()
        with refused(ValueError, model, says=["nobody", "'default'", "'other'", "add_adapter"]):
            model.set_adapter("nobody")
        with refused(ValueError, model, says=["nobody", "'default'"]):
            model.base_model.set_adapter(["default", "nobody"])
        with refused(ValueError, model, says=["nobody"]):
            model.set_requires_grad("nobody")

    def test_delete_adapter(self):
        model = self.two()
        with refused(ValueError, model, says=["nobody", "'default'", "'other'"]):
            model.delete_adapter("nobody")

    def test_adapter_names(self):
        model = self.two().eval()
        with refused(ValueError, model, says=["nobody", "default", "other", "__base__"]):
            model(X, adapter_names=["default", "other", "nobody", "__base__"])
        with refused(ValueError, model, says=["3", "4"]):
            model(X, adapter_names=["default", "other", "default"])
        with refused(ValueError, model, says=["5", "4"]):
            model(X, adapter_names=["default"] * 5)
        with refused(ValueError, model, says=["0", "4"]):
            model(X, adapter_names=[])
        expected = model(X)
        assert torch.equal(model(X, adapter_names=["default"] * 4), expected)
        model.merge_adapter()
        with refused(ValueError, model, says=["merged", "unmerge_adapter"]):
            model(X, adapter_names=["default"] * 4)

    def test_adapter_names_of_generate(self):
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
        ids = torch.tensor([[1, 2], [3, 4]])
        options = {"max_new_tokens": 2, "pad_token_id": 0}
        with refused(ValueError, model, says=["nobody", "default"]):
            model.generate(input_ids=ids, adapter_names=["default", "nobody"], **options)
        with refused(ValueError, model, says=["1", "2"]):
            model.generate(input_ids=ids, adapter_names=["default"], **options)
        assert model.generate(input_ids=ids, **options).shape == (2, 4)

    def test_merging(self):
        model = self.two()
        with refused(ValueError, model, says=["nobody", "'default'"]):
            model.merge_adapter(["default", "nobody"])
        with refused(ValueError, model, says=["nobody", "'default'"]):
            model.merge_and_unload(adapter_names=["nobody"])

    def test_saving(self, tmp_path):
        model = self.two()
        with refused(ValueError, model, says=["nobody", "'default'", "'other'"]):
            model.save_pretrained(tmp_path / "out", selected_adapters=["default", "nobody"])
        assert not (tmp_path / "out").exists()

    def test_another_method(self, tmp_path):
        model = self.two()
        adapted(IA3Config(target_modules=["lin0"], feedforward_modules=[])).save_pretrained(tmp_path)
        with refused(ValueError, model, says=["LORA", "IA3", "mixed=True"]):
            model.add_adapter("third", IA3Config(target_modules=["lin0"], feedforward_modules=[]))
        with refused(ValueError, model, says=["LORA", "IA3", "mixed=True"]):
            model.load_adapter(tmp_path, "third")
        with refused(ValueError, model, says=["LORA", "IA3"]):
            model.load_adapter(tmp_path, "default")


# --- merging --------------------------------------------------------------------------------------------------


NAN = {
    "lora": LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["lin0", "lin1"], use_dora=True, init_lora_weights=False),
    "ia3": IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=[], init_ia3_weights=False),
    "oft": OFTConfig(target_modules=["lin0", "lin1"], oft_block_size=2, init_weights=False),
    "vera": VeraConfig(target_modules=["lin0", "lin1"], r=2, init_weights=False),
    "hira": HiraConfig(target_modules=["lin0", "lin1"], r=2, init_weights=False),
    "ln": LNTuningConfig(target_modules=["norm", "lin1"]),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["first", "last"])
@pytest.mark.parametrize("method", NAN)
class TestSafeMerge:
    def broken(self, method: str, layer: str, value: float) -> PeftModel:
        model = adapted(copy.deepcopy(NAN[method]))
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            trained[0 if layer == "first" else -1].view(-1)[0] = value
        return model

    def test_no_layer_stays_merged(self, method, layer, value):
        model = self.broken(method, layer, value)
        with refused(ValueError, model, says=["default"]):
            model.merge_adapter(safe_merge=True)
        assert not any(getattr(module, "merged", False) for module in model.modules())
        with refused(ValueError, model, says=["default"]):
            model.merge_and_unload(safe_merge=True)
        with model.disable_adapter():
            assert model(X).isfinite().all()


class TestMerge:
    def test_an_adapter_that_no_weight_equals(self):
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
            LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False),
        )
        with refused(ValueError, model, says=["1", "groups", "unmerged"]):
            model.merge_adapter()
        with refused(NotImplementedError, model, says=["groups"]):  # what the ecosystem catches
            model.merge_and_unload()
        assert not any(getattr(module, "merged", False) for module in model.modules())

    def test_adapter_names_as_a_text(self):
        model = adapted()
        with refused(ValueError, model, says=["default"]):
            model.merge_adapter("default")


# --- interrupted saves ----------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The disk is full."""


def fail(*args: Any, **kwargs: Any) -> None:
    raise Interrupted


class TestInterruptedSave:
    """Whatever fails, the files of before are there, whole, and nothing else is."""

    def prepare(self, folder: Path) -> tuple[PeftModel, dict[str, bytes], torch.Tensor]:
        model = adapted()
        model.add_adapter("other", LoraConfig(r=3, target_modules=["lin1"], init_lora_weights=False))
        model.save_pretrained(folder)
        before, expected = files(folder), model(X)
        assert {CONFIG, WEIGHTS, "README.md", f"other/{CONFIG}", f"other/{WEIGHTS}"} <= set(before)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        model.peft_config["default"].lora_alpha = 99
        return model, before, expected

    def check(self, folder: Path, before: dict[str, bytes], expected: torch.Tensor) -> None:
        assert files(folder) == before
        torch.manual_seed(0)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), folder)(X), expected)

    def test_while_the_weights_are_written(self, tmp_path, monkeypatch):
        model, before, expected = self.prepare(tmp_path)

        def half(tensors: Any, filename: Any, metadata: Any = None) -> None:
            Path(filename).write_bytes(b"half a file")
            raise Interrupted

        monkeypatch.setattr(safetensors.torch, "save_file", half)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path)
        self.check(tmp_path, before, expected)

    def test_while_a_pickle_is_written(self, tmp_path, monkeypatch):
        model, before, expected = self.prepare(tmp_path)
        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path, safe_serialization=False)
        self.check(tmp_path, before, expected)

    def test_while_the_config_is_written(self, tmp_path, monkeypatch):
        model, before, expected = self.prepare(tmp_path)
        monkeypatch.setattr(json, "dumps", fail)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path)
        monkeypatch.undo()
        self.check(tmp_path, before, expected)

    def test_a_config_that_cannot_be_written(self, tmp_path):
        model, before, expected = self.prepare(tmp_path)
        model.peft_config["default"].revision = object()
        with pytest.raises(ValueError, match="revision"):
            model.save_pretrained(tmp_path)
        self.check(tmp_path, before, expected)

    @pytest.mark.parametrize("call", range(4))
    def test_while_files_are_renamed(self, tmp_path, monkeypatch, call):
        """The n-th rename fails: each adapter's files are the old ones or the new ones, and each of them is whole."""
        model, before, _ = self.prepare(tmp_path)
        true, count = os.replace, [0]

        def replace(*args: Any, **kwargs: Any) -> None:
            count[0] += 1
            if count[0] > call:
                raise Interrupted
            true(*args, **kwargs)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path)
        monkeypatch.undo()
        after = files(tmp_path)
        assert set(after) == set(before)
        if call == 0:
            assert after == before
        for folder in ("", "other/"):
            load_file(tmp_path / f"{folder}{WEIGHTS}")
            json.loads(after[f"{folder}{CONFIG}"])

    def test_in_the_middle_of_a_state_dict(self, tmp_path, monkeypatch):
        """An adapter that cannot be gathered leaves the files of the others alone, too."""
        model, before, expected = self.prepare(tmp_path)
        monkeypatch.setattr(type(model.get_base_model().lin1), "adapter_state", fail)
        with pytest.raises(Interrupted):
            model.save_pretrained(tmp_path)
        monkeypatch.undo()
        self.check(tmp_path, before, expected)

    def test_a_file_where_a_folder_should_be(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("mine")
        with refused(ValueError, model := adapted(), says=[str(path), "folder"]):
            model.save_pretrained(path)
        assert path.read_text() == "mine"

    def test_a_save_that_succeeds_leaves_no_temporary_files(self, tmp_path):
        model, before, _ = self.prepare(tmp_path)
        model.save_pretrained(tmp_path)
        after = files(tmp_path)
        assert set(after) == set(before)
        assert after[WEIGHTS] != before[WEIGHTS] and after[CONFIG] != before[CONFIG]


# --- missing names --------------------------------------------------------------------------------------------


def test_a_name_that_the_package_does_not_have():
    with pytest.raises(AttributeError, match="LoraConfig"):
        getattr(peft, "Lora" + "Confg")


def test_get_peft_model_with_something_else_than_a_config():
    base = Mlp()
    with refused((TypeError, ValueError), base, says=["PeftConfig", "dict"]):
        get_peft_model(base, {"peft_type": "LORA"})


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(init_lora_weights="pissa"),
        LoraConfig(init_lora_weights="mica"),
        peft.AdamssConfig(),
        peft.FrodConfig(),
    ],
    ids=["pissa", "mica", "adamss", "frod"],
)
def test_a_base_without_values_is_named_where_the_adapter_is_made_of_them(config):
    with torch.device("meta"):
        base = tiny_llama()
    before = {name: type(module) for name, module in base.named_modules()}
    config.target_modules = {"q_proj"}
    with pytest.raises(ValueError, match="no values yet"):
        get_peft_model(base, config)
    assert {name: type(module) for name, module in base.named_modules()} == before


@pytest.mark.parametrize("how", ["merged", "frozen"])
def test_a_training_loss_without_a_gradient_says_why(how, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    ids = torch.tensor([[1, 2, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids)
    if how == "merged":
        model.merge_adapter()
    else:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(model.unload(), tmp_path).train()
    with pytest.warns(UserWarning, match={"merged": "unmerge_adapter", "frozen": "is_trainable=True"}[how]):
        model(input_ids=ids, labels=ids)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(input_ids=ids, labels=ids)
        model.eval()(input_ids=ids, labels=ids)
