"""What scripts and files of 0.21.2 see: values here were recorded with it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Attention, Mlp, tiny_llama

import peft
from peft import (
    AdaLoraConfig,
    CartridgeConfig,
    CPTConfig,
    FrodConfig,
    HRAConfig,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    WaveFTConfig,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.optimizers.pairs import pairs_of
from peft.tuners.lora import LoraLayer


FILE = "adapter_model.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def disturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move everything that trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "config, name",
    [
        (LoraConfig(target_modules=["lin0"]), "lora.Linear"),
        (AdaLoraConfig(target_modules=["lin0"], total_step=9), "adalora.SVDLinear"),
        (HRAConfig(target_modules=["lin0"]), "hra.HRALinear"),
        (MissConfig(r=2, target_modules=["lin0"]), "miss.MissLinear"),
        (WaveFTConfig(n_frequency=3, target_modules=["lin0"]), "waveft.WaveFTLinear"),
    ],
)
def test_a_layer_has_one_name_in_print_and_in_reports(config: Any, name: str) -> None:
    model = get_peft_model(Mlp(), config)
    assert get_layer_status(model)[0].module_type == name
    assert f"(lin0): {name}(" in repr(model)
    cls = type(model.base_model.model.lin0)
    assert cls.__name__ == cls.__qualname__ == name.partition(".")[2]  # scripts compare what `str(type(layer))` says
    assert getattr(importlib.import_module(cls.__module__), cls.__name__) is cls


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", "__class__"])
@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_names_that_no_adapter_can_have(name: str, error: type[Exception]) -> None:
    config = LoraConfig(target_modules=["lin0"])
    model = get_peft_model(Mlp(), config)
    with pytest.raises(error, match="cannot be the name of an adapter"):
        get_peft_model(Mlp(), config, adapter_name=name)
    with pytest.raises(error, match="cannot be the name of an adapter"):
        model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]


PROMPTS = [
    CPTConfig(cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]),
    CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1),
    MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2),
    PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    PromptTuningConfig(num_virtual_tokens=3),
]


@pytest.mark.parametrize("config", PROMPTS, ids=lambda config: config.peft_type.value)
@pytest.mark.parametrize("trainable", [False, True])
def test_prompts_are_loaded_without_being_made_first(config: Any, trainable: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(config, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = disturb(get_peft_model(tiny_llama(), config))
    model.save_pretrained(str(tmp_path))
    task = {"task_ids": torch.tensor([0])} if config.peft_type == PeftType.MULTITASK_PROMPT_TUNING else {}
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=trainable, low_cpu_mem_usage=True)
    torch.testing.assert_close(again.eval()(ids, **task).logits, model(ids, **task).logits, **CLOSE)


def test_adalora_draws_what_0_21_2_draws() -> None:
    torch.manual_seed(1)
    config = AdaLoraConfig(init_r=2, total_step=9, target_modules=["0", "1"])
    layers = get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), config).base_model.model
    torch.manual_seed(1)
    nn.Linear(3, 4), nn.Linear(4, 3)
    for layer, (inner, out) in zip(layers, [(3, 4), (4, 3)], strict=True):
        torch.randn(2 * inner), torch.randn(2), torch.randn(2 * out), torch.randn(1)
        a, b = torch.empty(2, inner).normal_(0, 0.02), torch.empty(out, 2).normal_(0, 0.02)
        assert layer.lora_A["default"].equal(a) and layer.lora_B["default"].equal(b)


BY_HAND = {
    "adalora": (peft.AdaLoraConfig(total_step=9), {"r": 3, "lora_alpha": 6}, {"lora_A": (3, 12)}),
    "c3a": (peft.C3AConfig(block_size=1), {"block_size": 4}, {"c3a_kernel": (2, 3, 4)}),
    "fourierft": (peft.FourierFTConfig(), {"n_frequency": 5}, {"fourierft_spectrum": (5,)}),
    "hira": (peft.HiraConfig(), {"r": 3}, {"hira_A": (3, 12)}),
    "hra": (peft.HRAConfig(), {"r": 4}, {"hra_u": (12, 4)}),
    "ia3": (peft.IA3Config(), {"is_feedforward": True}, {"ia3_l": (1, 12)}),
    "loha": (peft.LoHaConfig(), {"r": 3, "alpha": 6}, {"hada_w1_b": (3, 12)}),
    "lora": (LoraConfig(r=2), {"r": 3, "lora_alpha": 6}, {"lora_A": (3, 12)}),
    "miss": (MissConfig(), {"r": 4}, {"miss_block": (4, 8)}),
    "waveft": (WaveFTConfig(), {"n_frequency": 5}, {"waveft_spectrum": (5,)}),
}


@pytest.mark.parametrize("by_position", [False, True], ids=["keyword", "position"])
@pytest.mark.parametrize("method", BY_HAND)
def test_what_stands_beside_the_config_of_a_layer_made_by_hand(method: str, by_position: bool) -> None:
    config, given, shapes = BY_HAND[method]
    before = config.to_dict()
    make = importlib.import_module(f"peft.tuners.{method}.layer").Linear
    base = nn.Linear(12, 8)
    layer = make(base, "a", config, *given.values()) if by_position else make(base, "a", config, **given)
    for name, shape in shapes.items():
        held = getattr(layer, name)["a"]
        assert tuple(getattr(held, "weight", held).shape) == shape
    if "lora_alpha" in given:
        assert layer.lora_alpha == {"a": 6}
    assert layer.active_adapters == ["a"]
    assert config.to_dict() == before
    with pytest.raises(TypeError, match="after the config"):
        make(base, "a", config, *given.values(), 1, 2)
    with pytest.raises(TypeError, match="takes a config"):
        make(base, "a", None, **given)


@pytest.mark.parametrize("device, error", [("nowhere", RuntimeError), ("meta", ValueError)])
def test_a_device_that_no_file_can_be_read_on(device: str, error: type[Exception], tmp_path: Path) -> None:
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(str(tmp_path))
    for read in (
        lambda: PeftModel.from_pretrained(Mlp(), str(tmp_path), torch_device=device),
        lambda: model.load_adapter(str(tmp_path), "more", torch_device=device),
        lambda: peft.load_peft_weights(str(tmp_path), device),
    ):
        with pytest.raises(error, match="device"):
            read()
    assert list(model.peft_config) == ["default"]


class _Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.q = nn.Linear(4, 3 + index % 2, bias=False)
        numbers = torch.arange(self.q.weight.numel()).reshape(self.q.weight.shape)
        self.q.weight.data = torch.sin(1.0 + numbers * (index + 1))


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(i) for i in range(3))


class TestFrod:
    """The basis, its places and the scales are those of 0.21.2, on which files without them depend."""

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        config = FrodConfig(target_modules=["q"], sparse_rate=0.2, projection_prng_key=3, progressbar=False)
        return get_peft_model_state_dict(get_peft_model(_Blocks(), config))

    def test_the_scales_are_those_recorded(self, tensors: dict[str, torch.Tensor]) -> None:
        recorded = [
            [0.2631, 0.0648, 0.8802, 0.9652],
            [0.9368, 0.7141, 0.2923, 0.2617],
            [0.2307, 0.6970, 0.3738, 0.0032],
        ]
        found = [tensors[f"base_model.model.layers.{i}.q.frod_lambda_l"].tolist() for i in range(3)]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), rtol=0, atol=2e-3)

    def test_v_v_t_is_the_sum_of_all_w_t_w(self, tensors: dict[str, torch.Tensor]) -> None:
        weights = [block.q.weight.detach() for block in _Blocks().layers]
        v = tensors["base_model.frod_V.q"]
        torch.testing.assert_close(v @ v.T, sum(w.T @ w for w in weights), **CLOSE)

    @pytest.mark.parametrize("n, rate, count", [(8, 0.01, 1), (8, 0.055, 3), (8, 0.0, 0), (8, 0.9, 56), (5, 0.5, 12)])
    def test_places_are_beside_the_diagonal(self, n: int, rate: float, count: int) -> None:
        config = FrodConfig(target_modules=["0"], sparse_rate=rate, progressbar=False)
        model = get_peft_model(nn.Sequential(nn.Linear(n, n), nn.Linear(n, 2)), config)
        rows, columns = get_peft_model_state_dict(model)["base_model.frod_s_indices.0"]
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows) == count
        assert (rows != columns).all()

    def test_one_generator_draws_the_places_in_the_order_of_names(self) -> None:
        model = get_peft_model(tiny_llama(), FrodConfig(target_modules=["v_proj", "k_proj"], progressbar=False))
        tensors, generator = get_peft_model_state_dict(model), torch.Generator().manual_seed(0)
        for name in ("self_attn_k_proj", "self_attn_v_proj"):
            rows, columns = tensors[f"base_model.frod_s_indices.{name}"]
            n = int(tensors[f"base_model.frod_s_size.{name}"][0])
            drawn = torch.randperm(n * (n - 1), generator=generator)[: len(rows)]
            assert (rows * (n - 1) + columns - (columns > rows).long()).tolist() == drawn.tolist()

    def test_a_basis_of_fewer_rows_than_columns_and_one_of_zeros(self) -> None:
        for weight in (torch.randn(2, 6), torch.zeros(6, 6)):
            base = nn.Sequential(nn.Linear(6, len(weight)))
            base[0].weight.data.copy_(weight)
            x = torch.randn(3, 6)
            wanted = base(x)
            model = get_peft_model(base, FrodConfig(target_modules=["0"], progressbar=False))
            torch.testing.assert_close(model(x), wanted, **CLOSE)


class TestCopiesOfModulesWithModules:
    """LN tuning on more than a norm: 0.21.2 leaves the adapter's name in the names of tensors further inside."""

    X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def trained(self, name: str) -> PeftModel:
        torch.manual_seed(0)
        return disturb(get_peft_model(Attention(), LNTuningConfig(target_modules=["attn"]), adapter_name=name))

    def test_names_in_files(self, tmp_path: Path) -> None:
        self.trained("mine").save_pretrained(str(tmp_path))
        assert sorted(load_file(tmp_path / "mine" / FILE)) == [
            f"base_model.model.attn.ln_tuning_layers.{name}"
            for name in ("default.out_proj.bias", "default.out_proj.weight", "in_proj_bias", "in_proj_weight")
        ]

    @pytest.mark.parametrize("written, read", [("mine", "mine"), ("mine", "default"), ("default", "other")])
    @pytest.mark.parametrize("low", [False, True])
    def test_a_file_is_read_under_any_name(self, tmp_path: Path, written: str, read: str, low: bool) -> None:
        model = self.trained(written)
        model.save_pretrained(str(tmp_path))
        folder = tmp_path if written == "default" else tmp_path / written
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            again = PeftModel.from_pretrained(Attention(), str(folder), read, low_cpu_mem_usage=low)
        torch.testing.assert_close(again(self.X), model(self.X), **CLOSE)

    @pytest.mark.parametrize("label", ["", "theirs."])
    def test_older_files_have_the_name_of_the_adapter_or_none(self, tmp_path: Path, label: str) -> None:
        model = self.trained("default")
        model.save_pretrained(str(tmp_path))
        tensors = load_file(tmp_path / FILE)
        save_file({k.replace("default.", label): v for k, v in tensors.items()}, tmp_path / FILE)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Attention(), str(tmp_path))
        torch.testing.assert_close(again(self.X), model(self.X), **CLOSE)


def _saved(folder: Path) -> Path:
    get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"], r=2)).save_pretrained(folder)
    return folder


def _with(folder: Path, file: str, content: str) -> Path:
    (_saved(folder) / file).write_text(content)
    return folder


def _config_with(folder: Path, **fields: Any) -> Path:
    return _with(
        folder, "adapter_config.json", json.dumps({"peft_type": "LORA", "target_modules": ["lin0"], **fields})
    )


def _lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0"], "r": 2, **fields})


def _two() -> Any:
    model = get_peft_model(Mlp(), _lora())
    model.add_adapter("b", _lora())
    return model


def _load(path: Any) -> Any:
    return PeftModel.from_pretrained(Mlp(), path)


def _combined(**how: Any) -> None:
    _two().add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", **how)


def _registered(**changed: Any) -> None:
    peft.utils.register_peft_method(name="lora", config_cls=LoraConfig, model_cls=peft.LoraModel, **changed)


FAILURES: dict[str, tuple[Any, tuple[type[Exception], ...]]] = {
    "a rank that is no number": (lambda _: get_peft_model(Mlp(), _lora(r="a")), (TypeError,)),
    "a rank that is not whole": (lambda _: get_peft_model(Mlp(), _lora(r=1.5)), (TypeError,)),
    "such a rank in a pattern": (lambda _: get_peft_model(Mlp(), _lora(rank_pattern={"lin0": "x"})), (TypeError,)),
    "no regular expression": (lambda _: get_peft_model(Mlp(), _lora(target_modules="(")), (re.error,)),
    "none to leave out": (lambda _: get_peft_model(Mlp(), _lora(exclude_modules="(")), (re.error,)),
    "none in a pattern": (lambda _: get_peft_model(Mlp(), _lora(rank_pattern={"(": 3})), (re.error,)),
    "a string of tokens": (lambda _: _lora(trainable_token_indices={"emb": "ab"}), (TypeError,)),
    "tokens of no table": (
        lambda _: get_peft_model(Mlp(), _lora(trainable_token_indices={"act": [1]})),
        (TypeError,),
    ),
    "layers that are not there": (
        lambda _: get_peft_model(tiny_llama(), _lora(target_modules=["q_proj"], layer_replication=[(0, 99)])),
        (IndexError,),
    ),
    "no megatron": (lambda _: get_peft_model(Mlp(), _lora(megatron_config={"a": 1})), (ModuleNotFoundError,)),
    "no length of a prompt": (
        lambda _: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM")),
        (TypeError,),
    ),
    "no length of an adaption prompt": (
        lambda _: get_peft_model(tiny_llama(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM")),
        (TypeError,),
    ),
    "a state dict of nothing": (
        lambda _: peft.inject_adapter_in_model(_lora(), Mlp(), state_dict={"x": torch.ones(1)}),
        (peft.NoMatchingPeftModuleError,),
    ),
    "an empty state dict": (
        lambda _: peft.inject_adapter_in_model(_lora(), Mlp(), state_dict={}),
        (peft.NoMatchingPeftModuleError,),
    ),
    "no name of an adapter": (lambda _: _two().set_adapter(None), (ValueError,)),
    "a number as such": (lambda _: _two().set_adapter(1), (ValueError,)),
    "a string for a list": (lambda _: _two().merge_adapter("default"), (TypeError,)),
    "no density": (lambda _: _combined(combination_type="ties"), (TypeError,)),
    "no such vote": (
        lambda _: _combined(combination_type="ties", density=0.5, majority_sign_method="x"),
        (RuntimeError,),
    ),
    "such a vote of tensors": (
        lambda _: importlib.import_module("peft.utils.merge_utils").calculate_majority_sign_mask(
            torch.ones(2, 2), "x"
        ),
        (RuntimeError,),
    ),
    "hot-swapping an adapter that is not there": (
        lambda f: importlib.import_module("peft.utils.hotswap").hotswap_adapter(_two(), str(_saved(f)), "x"),
        (RuntimeError,),
    ),
    "a rank to convert to": (lambda _: peft.convert_to_lora(_two(), rank="x"), (TypeError,)),
    "no tensors": (
        lambda _: peft.set_peft_model_state_dict(_two(), {"base_model.model.lin0.lora_A.weight": [1]}),
        (RuntimeError,),
    ),
    "a name of a method twice": (lambda _: _registered(prefix="x"), (KeyError,)),
    "no path": (lambda _: _load(None), (TypeError,)),
    "no config file": (lambda f: PeftConfig.from_json_file(str(f / "none.json")), (FileNotFoundError,)),
    "a file for a folder": (lambda f: _lora().save_pretrained(str(_saved(f) / FILE)), (AssertionError,)),
    "damaged weights": (lambda f: _load(_with(f, FILE, "xx")), (SafetensorError,)),
    "null as a rank": (lambda f: _load(_config_with(f, r=None)), (TypeError,)),
    "a string as a rank": (lambda f: _load(_config_with(f, r="2")), (TypeError,)),
    "null as alpha": (lambda f: _load(_config_with(f, lora_alpha=None)), (TypeError,)),
    "LoftQ without the adapter": (lambda _: peft.replace_lora_weights_loftq(_two(), adapter_name="x"), (KeyError,)),
    "LoftQ without a path": (lambda _: peft.replace_lora_weights_loftq(_two()), (ValueError,)),
    "LoftQ without the model": (
        lambda f: peft.replace_lora_weights_loftq(
            get_peft_model(tiny_llama(), _lora(target_modules=["q_proj"])), str(f / "none")
        ),
        (FileNotFoundError,),
    ),
}
"""What fails -> the classes of 0.21.2's exceptions, one of which a script may catch."""


@pytest.mark.parametrize("what", FAILURES)
def test_what_is_caught_with_0_21_2_is_caught_here(what: str, tmp_path: Path) -> None:
    fail, classes = FAILURES[what]
    for cls in (*classes, Exception):
        with pytest.raises(cls) as caught:
            fail(tmp_path)
        assert str(caught.value)


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_token_that_is_given_twice_trains_as_one_that_is_given_once(where: str, tie: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return tiny_llama(tie)

    ids, outputs = torch.tensor([[5, 7, 9, 5]]), []
    for number, tokens in enumerate(([5, 7], [5, 7, 5], [7, 5, 7, 7])):
        config = _lora(target_modules=["q_proj"], trainable_token_indices={where: tokens})
        model = get_peft_model(base(), config)
        (rows,) = {id(p): p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}.values()
        assert len(rows) == len(tokens)  # as in files of 0.21.2
        optimizer = torch.optim.Adam([rows], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        assert torch.allclose(rows[0], rows[2]) if number == 1 else True
        outputs.append(model(ids).logits)
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(base(), tmp_path / str(number))
        merged = loaded.merge_and_unload()(ids).logits
        assert torch.allclose(merged, outputs[-1], **CLOSE)
        assert torch.allclose(outputs[-1], outputs[0], **CLOSE)


class _Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.n = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.e = nn.Embedding(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.k(self.q(x)).tanh()) + self.e(x.argmax(-1))


def _sharing(what: str) -> nn.Module:
    """Steps of which the first two share single modules, or are one and the same."""
    torch.manual_seed(0)
    model = nn.Sequential(_Step(), _Step(), _Step())
    if what == "block":
        model[1] = model[0]
    for name in "qne" if what == "modules" else "":
        setattr(model[1], name, getattr(model[0], name))
    return model


class TestModulesThatStandTwice:
    """0.21.2 wraps what is trained whole at each place, and fails on a file that lacks one: KeyError."""

    BESIDE = {
        "copies": {"modules_to_save": ["q", "n"]},
        "tokens": {"trainable_token_indices": {"e": [1, 2, 3]}},
        "biases": {"bias": "all"},
    }
    WRITTEN = {  # by 0.21.2, without the LoRA and without the third step; its base has the biases, so all their names
        ("modules", "copies"): ["0.n.bias", "0.n.weight", "0.q.bias", "0.q.weight"],
        ("modules", "tokens"): ["0.e.token_adapter.trainable_tokens_delta"],
        ("modules", "biases"): ["0.k.base_layer.bias", "0.n.bias", "0.q.bias"],
    }
    X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))

    def adapted(self, what: str, beside: str) -> Any:
        config = LoraConfig(r=2, target_modules=["k"], init_lora_weights=False, **self.BESIDE[beside])
        return disturb(get_peft_model(_sharing(what), config))

    @pytest.mark.parametrize("beside", ["copies", "tokens"])
    @pytest.mark.parametrize("what", ["modules", "block"])
    def test_files_have_what_0_21_2_reads(self, what: str, beside: str, tmp_path: Path) -> None:
        self.adapted(what, beside).save_pretrained(tmp_path)
        names = {n.removeprefix("base_model.model.") for n in load_file(tmp_path / FILE) if "lora_" not in n}
        first = self.WRITTEN["modules", beside]
        steps = "012" if what == "modules" else "02"  # a block that stands twice is adapted once there, too
        assert names == {step + name[1:] for step in steps for name in first}

    @pytest.mark.parametrize("beside", BESIDE)
    @pytest.mark.parametrize("what", ["modules", "block"])
    @pytest.mark.parametrize("low", [False, True])
    def test_files_that_have_it_at_each_place(
        self, what: str, beside: str, low: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        model = self.adapted(what, beside)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / FILE)
        for name in self.WRITTEN["modules", beside]:
            other = f"base_model.model.1{name.replace('.base_layer', '')[1:] if what == 'modules' else name[1:]}"
            if other not in tensors and (what == "block" or ".k." not in other):
                tensors[other] = tensors[f"base_model.model.{name}"].clone()
        save_file(tensors, tmp_path / FILE)
        recwarn.clear()
        again = PeftModel.from_pretrained(_sharing(what), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(again(self.X), model(self.X))
        assert not [str(w.message) for w in recwarn]

    def test_of_copies_that_differ_the_first_is_taken_and_named(self, tmp_path: Path) -> None:
        model = self.adapted("modules", "copies")
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / FILE)
        tensors["base_model.model.1.q.weight"] += 1
        save_file(tensors, tmp_path / FILE)
        with pytest.warns(UserWarning, match="1.q.weight' and 'base_model.model.0.q.weight' are one tensor"):
            again = PeftModel.from_pretrained(_sharing("modules"), tmp_path).eval()
        assert torch.equal(again(self.X), model(self.X))

    def test_tied_weights_are_written_once(self) -> None:
        model = get_peft_model(tiny_llama(True), _lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
        assert len([name for name in get_peft_model_state_dict(model) if "lora_" not in name]) == 1


# What layers of 0.21.2 say of an adapter, with nn.Linear(8, 6); recorded with it.
READ_ON_LAYERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("AdaLora", {"init_r": 4, "total_step": 10}, {"lora_embedding_A": None, "lora_variant": None, "use_dora": None}),
    ("BOFT", {"boft_block_size": 4}, {"boft_block_size": 4, "boft_block_num": 2}),
    ("BOFT", {"boft_block_size": 0, "boft_block_num": 4}, {"boft_block_size": 2, "boft_block_num": 4}),
    (
        "Deft",
        {"r": 3, "decomposition_method": "qr"},
        {"deft_r": 3, "deft_scaling": 1.0, "deft_decomposition": "qr"},
    ),
    (
        "FourierFT",
        {"n_frequency": 4, "scaling": 7.0},
        {"fourierft_scaling": 7.0, "indices": torch.tensor([[2, 2, 4, 3], [7, 6, 1, 2]])},
    ),
    ("Gralora", {"r": 2, "gralora_k": 2, "hybrid_r": 2}, {"r": 2, "gralora_k": 2, "hybrid_r": 2}),
    ("Miss", {"r": 2}, {"miss_mini_r": 1}),
    ("Miss", {"r": 2, "init_weights": "mini", "mini_r": 3}, {"miss_mini_r": 3}),
    ("Peanut", {"r": 2, "depth": 1}, {"r": 2, "depth": 1}),
    ("Shira", {"r": 2}, {"r": 2}),
    ("Supertuning", {"sparsity": 0.5, "r": 2}, {"supertuning_rank": 2}),
    (
        "WaveFT",
        {"n_frequency": 4, "scaling": 3.0, "use_idwt": False},
        {
            "waveft_scaling": 3.0,
            "waveft_indices": torch.tensor([[2, 2, 4, 3], [7, 6, 1, 2]]),
            "waveft_use_idwt": False,
            "waveft_wavelet_family": "db1",
        },
    ),
]


@pytest.mark.parametrize("method, given, said", READ_ON_LAYERS, ids=[f"{m}-{[*g]}" for m, g, _ in READ_ON_LAYERS])
def test_what_scripts_read_on_layers(method: str, given: dict[str, Any], said: dict[str, Any]) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), getattr(peft, f"{method}Config")(**given, target_modules="0")
    )
    layer: Any = model.base_model.model[0]
    for name, value in said.items():
        found = getattr(layer, name)
        if value is None:
            assert found == {}, name
        else:
            assert (
                torch.equal(torch.as_tensor(found["default"]), value)
                if isinstance(value, torch.Tensor)
                else (found == {"default": value})
            ), name
    model.add_adapter("second", model.peft_config["default"])
    assert all(
        list(getattr(layer, name)) == (["default", "second"] if v is not None else []) for name, v in said.items()
    )
    assert not layer.is_target_conv_1d_layer and not layer.ephemeral_gpu_offload


def test_dropouts_and_original_rows_are_read_on_layers() -> None:
    for share, kind in ((0.25, nn.Dropout), (0.0, nn.Identity)):
        config = peft.OFTConfig(oft_block_size=4, module_dropout=share, target_modules="0")
        model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
        assert isinstance(model.base_model.model[0].oft_dropout["default"], kind)
    base = nn.Sequential(nn.Embedding(16, 8))
    rows = base[0].weight[[1, 3]].clone()
    config = peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["0"])
    layer = get_peft_model(base, config).base_model.model[0]
    assert torch.equal(layer.trainable_tokens_original["default"], rows)


@pytest.mark.parametrize("method", ["LoHa", "IA3", "Hira", "Miss"])
def test_a_layer_is_given_an_adapter_by_its_update_layer(method: str) -> None:
    given = {"feedforward_modules": []} if method == "IA3" else {}
    config = getattr(peft, f"{method}Config")(target_modules="0", **given)
    layer: Any = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).base_model.model[0]
    layer.update_layer("second", config=config)
    assert layer.adapter_names == ["default", "second"] and layer.active_adapters == ["default"]
    if method in ("LoHa", "Miss"):
        layer.update_layer("third", 3, config=config)
        assert [*layer.r.values()][-1] == 3 if method == "LoHa" else len(layer.miss_block["third"]) == 3


@pytest.mark.parametrize(
    "below, above",
    [
        ("adalora.AdaLoraLayer", "lora.LoraLayer"),
        ("adalora.SVDLinear", "lora.LoraLayer"),
        ("adalora.SVDConv2d", "lora.LoraLayer"),
        ("adalora.SVDQuantLinear", "adalora.AdaLoraLayer"),
        ("adalora.AdaLoraModel", "lora.LoraModel"),
        ("adalora.AdaLoraConfig", "lora.LoraConfig"),
        ("lora.gptq.GPTQLoraLinear", "lora.LoraLayer"),
        ("lora.torchao.TorchaoLoraLinear", "lora.Linear"),
        ("multitask_prompt_tuning.MultitaskPromptTuningConfig", "prompt_tuning.PromptTuningConfig"),
        ("multitask_prompt_tuning.MultitaskPromptEmbedding", "prompt_tuning.PromptEmbedding"),
        ("adaption_prompt.config.ModelTypeConfig", "builtins.tuple"),
    ],
)
def test_classes_are_below_those_that_they_are_below_there(below: str, above: str) -> None:
    def found(name: str) -> type:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module if module == "builtins" else f"peft.tuners.{module}"), attribute)

    assert issubclass(found(below), found(above))


def test_adalora_is_lora_by_class_alone() -> None:
    """What LoRA does with its own layers leaves AdaLoRA's alone, which hold adapters of another form."""
    torch.manual_seed(0)
    adalora = AdaLoraConfig(target_modules=["lin0"], total_step=9, init_r=2)
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"], r=2), mixed=True)
    model.add_adapter("ada", adalora)
    outer = model.base_model.model.lin0
    assert isinstance(outer, LoraLayer) and isinstance(outer.base_layer, LoraLayer)
    assert {*outer.adapters} | {*outer.base_layer.adapters} == {"default", "ada"} and len(outer.adapters) == 1
    model.add_adapter("second", LoraConfig(target_modules=["lin0"], r=2))
    lora = outer if "default" in outer else outer.base_layer
    assert "second" in lora and len([m for m in model.modules() if isinstance(m, LoraLayer)]) == 2

    alone = disturb(get_peft_model(Mlp(), adalora))
    layer = alone.base_model.model.lin0
    assert layer.lora_variant == {} and layer.resolve_lora_variant(config=adalora) is None
    left, right, scale = layer.get_delta_factors("default")
    torch.testing.assert_close((left @ right * scale)[0].T, layer.get_delta_weight("default"))
    assert not list(pairs_of(alone)) and alone.base_model._get_kasa_loss() == 0
    with pytest.raises(ValueError, match="one update"):
        layer.pissa_init("default", "pissa")
    layer.reset_lora_parameters("default")
    assert not layer.get_delta_weight("default").any() and layer.lora_A["default"].any()


UNSCALED = [
    peft.OFTConfig(oft_block_size=3, target_modules=["lin0"]),
    peft.BOFTConfig(boft_block_size=3, target_modules=["lin0"]),
    HRAConfig(target_modules=["lin0"]),
    MissConfig(r=2, target_modules=["lin0"]),
    peft.DeftConfig(r=2, target_modules=["lin0"]),
]


@pytest.mark.parametrize("config", UNSCALED, ids=lambda config: config.peft_type.value)
def test_scaling_what_has_no_scale_changes_nothing_and_says_so(config: Any) -> None:
    model = disturb(get_peft_model(Mlp(), config))
    layer, x = model.base_model.model.lin0, torch.randn(2, model.base_model.model.lin0.in_features)
    before = layer(x)
    for call, value in ((layer.scale_layer, 2.0), (layer.unscale_layer, 2.0)):
        with pytest.warns(UserWarning, match=f"{config.peft_type.value.lower()}.*no scale"):
            call(value)
    with pytest.warns(UserWarning, match="no scale"):
        layer.set_scale("default", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1), layer.unscale_layer(), layer.set_scale("other", 2.0)
    assert torch.equal(layer(x), before)
