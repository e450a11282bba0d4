"""KaSA, MiCA, BD-LoRA, QA-LoRA, VeLoRA and MonteCLoRA against computations from their formulas."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import shards
import torch
import torch.multiprocessing
import torch.nn.functional as F
from quantised import BASES, IN
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Dirichlet, Normal, Wishart, kl_divergence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.core.layer.weight import base_weight, folded_weight
from peft.helpers import KasaTrainerMixin, MontecloraTrainerMixin
from peft.tuners.lora import BdLoraConfig, Lora
from peft.tuners.lora.bdlora import side_of
from peft.tuners.lora.monteclora import deviation, divergence, mixture, variances
from peft.utils.error import ConfigError
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap


VARIANTS: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": {"beta": 0.1, "gamma": 0.2}},
    "mica": {"init_lora_weights": "mica"},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 3, "scale": 0.7}},
    "monteclora": {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.5}},
}


def base(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)


def adapted(variant: str, noise: float = 0.5, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    """Two layers with rank 4 and scale 2, all that trains moved away from its start."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]}
    model = get_peft_model(base(dtype), LoraConfig(**copy.deepcopy({**options, **VARIANTS[variant], **fields})))
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(torch.randn_like(p) * noise)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def first(model: PeftModel) -> Any:
    """The first layer's adapter."""
    return model.base_model.model[0].adapters["default"]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def functional(y: torch.Tensor) -> torch.Tensor:
    """A number that depends on all entries."""
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of all that trains."""
    own = list(trained(model).values())
    return list(torch.autograd.grad(functional(model(x)), own))


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for a backward pass, parameters and buffers of the model aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    y.sum().backward()
    return sum(seen.values())


# --- KaSA -------------------------------------------------------------------------------------------------------


def kasa_weight(layer: Any) -> torch.Tensor:
    """W without its four smallest singular components, and 2 B diag(sigma) A."""
    u, s, v = torch.linalg.svd(layer.base_layer.weight.detach())
    k = len(s) - 4
    truncated = u[:, :k] @ s[:k].diag() @ v[:k]
    a, b, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    return truncated + 2 * b @ sigma.diag() @ a


def test_kasa_is_its_formula_in_value_and_gradient() -> None:
    model, x = adapted("kasa"), inputs(5, 8)
    one, two = model.base_model.model[0], model.base_model.model[2]

    def by_formula(x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(F.linear(x, kasa_weight(one), one.base_layer.bias))
        return F.linear(h, kasa_weight(two), two.base_layer.bias)

    same(model(x), by_formula(x))
    found = gradients(model, x)
    y = by_formula(x)
    wanted = torch.autograd.grad(functional(y), list(trained(model).values()))
    for a, b in zip(found, wanted):
        same(a, b, 1e-4)
    assert {tuple(p.shape) for p in trained(model).values()} == {(4, 8), (12, 4), (4,), (4, 12), (6, 4)}


def test_kasa_drops_what_it_adds_but_not_what_it_takes_away() -> None:
    model, x = adapted("kasa", lora_dropout=0.5), inputs(5, 8)
    layer = model.base_model.model[0]
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    a, b, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    without = kasa_weight(layer) - 2 * b @ sigma.diag() @ a
    same(found, F.linear(x, without, layer.base_layer.bias) + 2 * dropped @ (b @ sigma.diag() @ a).T, 1e-4)


def test_kasa_leaves_the_base_as_it_is() -> None:
    wanted, model = base().state_dict(), adapted("kasa")
    with model.disable_adapter():
        assert torch.equal(model(inputs(2, 8)), base()(inputs(2, 8)))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("plain")
    same(model(inputs(2, 8)), base()(inputs(2, 8)))
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    found = model.unload().state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_kasa_finds_what_it_takes_away_again_when_it_is_loaded(tmp_path: Path) -> None:
    model, x = adapted("kasa").eval(), inputs(3, 8)
    model.save_pretrained(tmp_path)
    assert not any("kasa" in name for name in get_peft_model_state_dict(model))
    for options in ({}, {"low_cpu_mem_usage": True}):
        same(PeftModel.from_pretrained(base(), tmp_path, **options)(x), model(x))


def test_the_scale_turns_up_what_kasa_adds() -> None:
    model, x = adapted("kasa").eval(), inputs(3, 8)
    layer = model.base_model.model[0]
    a, b, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    for scale in (2.0, 0.25):
        layer.set_scale("default", scale)
        weight = kasa_weight(layer) + (layer.scaling["default"] - 2) * b @ sigma.diag() @ a
        same(layer(x), F.linear(x, weight, layer.base_layer.bias))
    layer.scaling["default"] = 0
    assert layer(x).isfinite().all()


def test_the_penalty_of_kasa() -> None:
    model = adapted("kasa")
    total = 0.0
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        a, b, sigma = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
        gram, other = b.T @ b - torch.eye(4), a @ a.T - torch.eye(4)
        total += 0.1 * (sigma**2).sum() + 0.2 * ((gram**2).sum().sqrt() + (other**2).sum().sqrt())
    found = model.base_model._get_kasa_loss()
    same(found, total)
    found.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(model).values())
    assert adapted("mica").base_model._get_kasa_loss() == 0.0 == model.base_model._get_monteclora_loss()


class Trainer:
    """The part of a trainer that the mixins extend."""

    model_accepts_loss_kwargs, current_gradient_accumulation_steps = True, 4

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        y = model(inputs)
        return (y.sum(), y) if return_outputs else y.sum()


@pytest.mark.parametrize(
    ("mixin", "variant", "helper"),
    [(KasaTrainerMixin, "kasa", "_get_kasa_loss"), (MontecloraTrainerMixin, "monteclora", "_get_monteclora_loss")],
)
def test_a_trainer_adds_the_penalty_in_training(mixin: type, variant: str, helper: str) -> None:
    model, x = adapted(variant), inputs(2, 8)
    trainer: Any = type("Mine", (mixin, Trainer), {})()
    for kwargs, parts in (({}, 1), ({"num_items_in_batch": 8}, 4)):
        loss, y = trainer.compute_loss(model, x, return_outputs=True, **kwargs)
        same(loss, y.sum() + getattr(model.base_model, helper)() / parts)
    model.eval()
    same(trainer.compute_loss(model, x), model(x).sum())


# --- MiCA -------------------------------------------------------------------------------------------------------


def test_mica_starts_at_the_minor_directions_and_changes_nothing() -> None:
    model = adapted("mica", noise=0)
    for i in (0, 2):
        layer, plain = model.base_model.model[i], base()[i]
        b, u = layer.lora_B["default"].weight, torch.linalg.svd(plain.weight, full_matrices=False)[0][:, -4:]
        same((b.T @ u).abs(), torch.eye(4))
        assert not layer.lora_A["default"].weight.any()
    assert torch.equal(model(inputs(2, 8)), base()(inputs(2, 8)))


@pytest.mark.parametrize("module", [nn.Embedding(11, 8), nn.Conv2d(3, 8, 2), nn.Conv1d(4, 8, 3)], ids=repr)
def test_mica_sees_a_table_transposed_and_a_kernel_as_a_matrix(module: Any) -> None:
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights="mica")
    adapter = first(get_peft_model(nn.Sequential(module), config))
    weight = module.weight.T if isinstance(module, nn.Embedding) else module.weight.flatten(1)
    u = torch.linalg.svd(weight, full_matrices=False)[0][:, -3:]
    same((adapter.held_pair()[1].flatten(1).T @ u).abs(), torch.eye(3))


def test_b_of_mica_never_trains(tmp_path: Path) -> None:
    def only_a(model: nn.Module) -> bool:
        return {name.split(".")[-3] for name in trained(model)} == {"lora_A"}

    model = adapted("mica")
    before = first(model).lora_B.weight.clone()
    assert only_a(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    assert len(trained(model)) == 2
    model.set_adapter("default")
    with model.disable_adapter():
        assert not trained(model)
    assert only_a(model)
    model.set_requires_grad("default", True)
    assert only_a(model)
    model(inputs(2, 8)).sum().backward()
    torch.optim.SGD(trained(model).values(), lr=0.1).step()
    assert torch.equal(first(model).lora_B.weight, before)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True, **options)
        assert only_a(loaded) and torch.equal(first(loaded).lora_B.weight, before)
    assert model.get_nb_trainable_parameters()[0] == 4 * 8 + 4 * 12


@pytest.mark.parametrize("widened", [True, False])
def test_b_of_mica_has_the_dtype_of_a(widened: bool) -> None:
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="mica")
    model = get_peft_model(base(torch.bfloat16), config, autocast_adapter_dtype=widened)
    a, b = first(model).held_pair()
    assert a.dtype == b.dtype == (torch.float32 if widened else torch.bfloat16)
    model(inputs(2, 8).bfloat16()).sum().backward()
    assert b.grad is None and a.grad is not None


def test_mica_wants_as_many_singular_vectors_as_there_are() -> None:
    with pytest.raises(ConfigError, match=r"\(12, 8\) has 8, fewer than r=9"):
        adapted("mica", r=9)


# --- BD-LoRA ----------------------------------------------------------------------------------------------------


def test_bdlora_is_the_dense_pair_with_zeros_outside_of_the_blocks() -> None:
    model, x = adapted("bdlora"), inputs(3, 5, 8)
    one, two = model.base_model.model[0], model.base_model.model[2]
    a, b = one.lora_A["default"].weight, two.lora_B["default"].weight
    assert a.shape == (4, 4) and b.shape == (6, 2)

    def by_formula(x: torch.Tensor) -> torch.Tensor:
        down = torch.block_diag(a[:2], a[2:])
        h = torch.tanh(one.base_layer(x) + 2 * x @ down.T @ one.lora_B["default"].weight.T)
        up = torch.block_diag(b[:3], b[3:])
        return two.base_layer(h) + 2 * h @ two.lora_A["default"].weight.T @ up.T

    same(model(x), by_formula(x))
    y = by_formula(x)
    wanted = torch.autograd.grad(functional(y), list(trained(model).values()))
    for found, other in zip(gradients(model, x), wanted):
        same(found, other, 1e-4)


def test_blocks_cost_less_than_a_dense_pair() -> None:
    def flops(**fields: Any) -> int:
        config = LoraConfig(r=8, target_modules=["0"], **fields)
        layer = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.adapters["default"].delta(torch.randn(16, 64))
        return counter.get_total_flops()

    down = up = 2 * 16 * 64 * 8
    assert flops() == down + up
    assert flops(use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 4}) == down // 4 + up
    assert flops(use_bdlora={"target_modules_bd_b": ["0"], "nblocks": 4}) == down + up // 4


@pytest.mark.parametrize(
    ("entry", "key", "named"),
    [
        ("q_proj", "layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "layers.0.self_attn.q_proj", True),
        ("self_attn", "layers.0.self_attn.q_proj", True),
        (".q_proj", "layers.0.self_attn.q_proj", True),
        (r"layers\.[01]\..*_proj", "layers.1.self_attn.q_proj", True),
        ("q_proj", "layers.0.seq_proj", False),
        ("attn.q_proj", "layers.0.self_attn.q_proj", False),
    ],
)
def test_entries_of_bdlora_are_names_not_parts_of_words(entry: str, key: str, named: bool) -> None:
    options = BdLoraConfig(target_modules_bd_b=[entry], match_strict=False)
    assert side_of(options, key) == ("B" if named else None)


def test_what_bdlora_cannot_cut_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"\['q'\] are in target_modules_bd_a and"):
        BdLoraConfig(target_modules_bd_a=["q"], target_modules_bd_b=["q", "k"])
    with pytest.raises(ConfigError, match="module '2' is adapted.*match_strict=False"):
        adapted("bdlora", use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 2})
    with pytest.raises(ConfigError, match="nblocks=3 does not divide the 8 inputs"):
        adapted("bdlora", use_bdlora={"target_modules_bd_a": ["0", "2"], "nblocks": 3})
    lax = adapted("bdlora", use_bdlora={"target_modules_bd_a": ["0"], "nblocks": 2, "match_strict": False})
    assert lax.base_model.model[2].lora_B["default"].weight.shape == (6, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hot_swapping_gives_what_the_other_adapter_gives(variant: str) -> None:
    model, other, x = adapted(variant).eval(), adapted(variant, noise=0.3).eval(), inputs(2, 8)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("variant", ["kasa", "bdlora", "monteclora"])
def test_zeros_cannot_fill_up_what_is_as_large_as_the_rank(variant: str) -> None:
    model, small = adapted(variant), adapted(variant, r=2)
    with pytest.raises(ValueError, match="of rank 4, cannot be filled up with zeros to, or from, rank 2"):
        hotswap_adapter_from_state_dict(
            model, get_peft_model_state_dict(small), "default", small.peft_config["default"]
        )
    with pytest.raises(ValueError, match="zeros cannot fill up to target_rank=8"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


@pytest.mark.parametrize("variant", ["mica", "qalora", "velora"])
def test_the_other_variants_take_smaller_ranks(variant: str) -> None:
    model, small, x = adapted(variant).eval(), adapted(variant, r=2).eval(), inputs(2, 8)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(small), "default", small.peft_config["default"])
    same(model(x), small(x))


@pytest.mark.parametrize("variant", ["kasa", "mica", "bdlora", "monteclora", "velora"])
def test_an_adapter_is_loaded_without_a_first_draw(variant: str, tmp_path: Path) -> None:
    """Onto a base that was built on the meta device and filled."""
    model, x = adapted(variant).eval(), inputs(2, 8)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    plain.load_state_dict(base().state_dict(), assign=True)
    same(PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=True)(x), model(x))


def test_two_shards_by_blocks_exchange_only_what_the_base_does(tmp_path: Path) -> None:
    """Column-parallel with a cut B, then row-parallel with a cut A: the one sum at the end is the base model's own."""
    blocks = {"target_modules_bd_b": ["0"], "target_modules_bd_a": ["2"], "nblocks": 2}
    model, x = adapted("bdlora", use_bdlora=blocks), inputs(5, 8)
    layers = [model.base_model.model[i] for i in (0, 2)]
    tensors = [(p.detach() for p in (x.weight, x.bias, *x.adapters["default"].held_pair())) for x in layers]
    torch.save((x, [list(each) for each in tensors]), tmp_path / "model.pt")
    torch.multiprocessing.spawn(shards.process, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        same(torch.load(tmp_path / f"{rank}.pt"), model(x).detach())


# --- QA-LoRA ----------------------------------------------------------------------------------------------------


def test_qalora_reads_groups_of_inputs() -> None:
    """The mean of each group, times the number of groups."""
    model, x = adapted("qalora"), inputs(3, 5, 8)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 2)
    pooled = torch.stack([x[..., :4].mean(-1), x[..., 4:].mean(-1)], -1) * 2
    wanted = layer.base_layer(x) + 2 * pooled @ a.T @ b.T
    same(layer(x), wanted)
    for one, other in zip(*(torch.autograd.grad(functional(y), [a, b]) for y in (layer(x), wanted))):
        same(one, other, 1e-4)
    assert model.get_nb_trainable_parameters()[0] == sum(4 * (i // 4) + o * 4 for i, o in ((8, 12), (12, 6)))
    delta = layer.get_delta_weight("default").detach()
    same(delta, delta[:, ::4].repeat_interleave(4, 1))


def test_qalora_keeps_less_than_lora() -> None:
    x = inputs(64, 8)
    plain = adapted("qalora", use_qalora=False)
    assert saved_bytes(adapted("qalora"), x) < saved_bytes(plain, x)


def test_a_full_pair_in_a_file_is_plain_lora(tmp_path: Path) -> None:
    """Others accept use_qalora on layers that are not quantised, train a plain pair, and save both."""
    plain = adapted("qalora", use_qalora=False).eval()
    plain.peft_config["default"].use_qalora = True
    plain.save_pretrained(tmp_path)
    loaded, x = PeftModel.from_pretrained(base(), tmp_path), inputs(2, 8)
    same(loaded(x), plain(x))
    loaded.merge_adapter()
    same(loaded(x), plain(x))


def test_group_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="qalora_group_size=5 does not divide the 8 inputs of '0'"):
        adapted("qalora", qalora_group_size=5)


def on_hqq(size: int, **fields: Any) -> PeftModel:
    options = {"r": 4, "target_modules": ["0", "2"], "use_qalora": True, "qalora_group_size": size, **fields}
    model = get_peft_model(BASES["hqq-4"](), LoraConfig(**options)).eval()
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_()
    return model


@pytest.mark.parametrize("size", [32, 64])
def test_merging_moves_zero_points_and_rounds_nothing(size: int) -> None:
    """W + dW = (q - (zero - d / scale)) * scale, the same codes, with d the change of a group."""
    pytest.importorskip("hqq")
    model, x = on_hqq(size), inputs(3, IN)
    layer, before = model.base_model.model[0], model(x)
    old, codes = dict(layer.base_layer.meta), layer.base_layer.W_q.data.clone()
    wanted = folded_weight(layer, [first(model)])
    a, b = first(model).held_pair()
    change = (b @ a) * (layer.scaling["default"] * (IN / size) / size)
    model.merge_adapter()
    zero = old["zero"] - change.repeat_interleave(size // 32, 1).view_as(old["zero"]) / old["scale"]
    same(layer.base_layer.meta["zero"], zero)
    assert torch.equal(layer.base_layer.W_q.data, codes) and torch.equal(layer.base_layer.meta["scale"], old["scale"])
    same(base_weight(layer), wanted)
    assert layer.merge_error < 1e-6
    same(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.meta["zero"], old["zero"]) and torch.equal(model(x), before)


class Unreadable(nn.Module):
    """A linear layer of a library whose kernels alone can read its codes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight, self.bias)


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> type[Unreadable]:
    """A class like that of gptqmodel's layers."""
    monkeypatch.setitem(sys.modules, "gptqmodel", ModuleType("gptqmodel"))
    return type("BaseQuantLinear", (Unreadable,), {"__module__": "gptqmodel.nn_modules"})


def test_qalora_on_gptq_is_that_of_the_reference(gptq: type[Unreadable], tmp_path: Path) -> None:
    """Recorded with version 0.21.2 on layers of gptqmodel 7.7.0 of 4 bits in groups of 32; it cannot merge there."""
    recorded = load_file(Path(__file__).parent / "data" / "qalora.safetensors")

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): t for key, t in recorded.items() if key.startswith(prefix)}

    def model() -> nn.Module:
        layers = {n: gptq(recorded[f"base.{n}.weight"], recorded[f"base.{n}.bias"]) for n in ("up", "down")}
        return nn.Sequential(OrderedDict(up=layers["up"], act=nn.Tanh(), down=layers["down"], norm=nn.LayerNorm(64)))

    x, config = recorded["x"], {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"], "qalora_group_size": 8}
    same(model()(x), recorded["base_y"])
    torch.manual_seed(3)
    fresh = get_peft_model(model(), LoraConfig(use_qalora=True, **config))
    assert fresh.get_nb_trainable_parameters()[0] == 432
    state = get_peft_model_state_dict(fresh)
    assert state.keys() == part("fresh.").keys()
    for name, t in part("fresh.").items():
        same(state[name], t, 1e-3)  # it was made in 16 bits there
    save_file(part("state."), tmp_path / "adapter_model.safetensors")
    LoraConfig(use_qalora=True, **config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    y = loaded(x)
    same(y, recorded["y"])
    y.square().mean().backward()
    for name, gradient in part("grad.").items():
        same(loaded.get_parameter(name).grad, gradient)
    saved = get_peft_model_state_dict(loaded)
    assert saved.keys() == part("state.").keys()
    assert all(torch.equal(saved[name], t) for name, t in part("state.").items())


def test_qalora_trains_on_codes_that_nobody_else_can_read(gptq: type[Unreadable]) -> None:
    config = {"r": 4, "target_modules": ["0"], "lora_alpha": 8}

    def made() -> Unreadable:
        return gptq((torch.arange(48).view(6, 8) % 5 - 2) * 0.1)

    model = get_peft_model(nn.Sequential(made()), LoraConfig(use_qalora=True, qalora_group_size=4, **config))
    layer, x = model.base_model.model[0], inputs(3, 8)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
    same(model(x), layer.base_layer(x) + 2 * (x.view(3, 2, 4).mean(-1) * 2) @ a.T @ b.T)
    model(x).sum().backward()
    assert a.grad.any() and b.grad.any()
    with pytest.raises(ValueError, match="gptq"):
        model.merge_adapter()
    for field in ({"init_lora_weights": "mica"}, {"kasa_config": {}}):
        with pytest.raises(ValueError, match="gptq cannot be read dense"):
            get_peft_model(nn.Sequential(made()), LoraConfig(**config, **field))


def test_smaller_groups_than_the_codes_are_merged_as_usual() -> None:
    pytest.importorskip("hqq")
    model = on_hqq(16)
    with pytest.warns(UserWarning, match="relative error"):
        model.merge_adapter()
    assert first(model).layer.merge_error > 0.01


# --- VeLoRA -----------------------------------------------------------------------------------------------------


def gradient_of_a(x: torch.Tensor, v: torch.Tensor, dh: torch.Tensor, width: int) -> torch.Tensor:
    """dh^T x', where each group of x is replaced by 0.7 (x_g v) v^T."""
    padded = F.pad(x, (0, 3 * width - x.shape[1])).view(len(x), 3, width)
    rebuilt = 0.7 * (padded @ v)[..., None] * v
    return dh.T @ rebuilt.flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velora_has_loras_forward_and_its_own_gradient_of_a(rate: float, dtype: torch.dtype) -> None:
    model, x = adapted("velora", lora_dropout=rate, dtype=dtype), inputs(6, 8).to(dtype)
    layer, tolerance = model.base_model.model[0], 1e-5 if dtype == torch.float32 else 0.05
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x.requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    gradient = torch.linspace(-1, 1, y.numel()).view_as(y)
    da, db, dx = torch.autograd.grad((y * gradient).sum(), [a, b, x])
    if rate == 0:
        same(y.float(), (layer.base_layer(x) + 2 * x.float() @ a.T @ b.T).float(), tolerance)
        same(db, 2 * gradient.T @ (x.float() @ a.T), 5 * tolerance)
        rows = x.detach().float()
    else:  # what was dropped is where A's part of dx is zero
        part = dx.float() - gradient.to(dtype).float() @ layer.base_layer.weight.float()
        kept = part.abs() > 1e-3
        assert 0.4 < kept.float().mean() < 0.8
        rows = torch.where(kept, x.detach().float() / 0.6, 0)
    v = F.normalize(F.pad(rows, (0, 1)).view(-1, 3).mean(0), dim=0)
    same(layer.lora_velora_embed["default"], v, 10 * tolerance)
    wanted = gradient_of_a(rows, v, 2 * gradient @ b, 3)
    assert (da - wanted).norm() < max(2 * tolerance, 1e-4) * wanted.norm()


def test_velora_keeps_one_number_for_each_group() -> None:
    """Of 256 numbers for each token, plain LoRA keeps all and A x; VeLoRA the projections of four groups and A x."""
    net = nn.Sequential(nn.Linear(256, 64))
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False}
    x = inputs(128, 256)
    plain = get_peft_model(copy.deepcopy(net), LoraConfig(**options))
    model = get_peft_model(copy.deepcopy(net), LoraConfig(velora_config={"num_groups": 4}, **options))
    kept = saved_bytes(model, x), saved_bytes(plain, x)
    assert kept[1] >= 128 * 256 * 4 and kept[0] <= 128 * (4 + 2 * 4) * 4 + 64 * 4, kept
    dropping = get_peft_model(net, LoraConfig(velora_config={"num_groups": 4}, lora_dropout=0.1, **options))
    assert saved_bytes(dropping, x) <= 128 * (4 + 2 * 4) * 4 + 64 * 4


class Gated(nn.Module):
    """Layers that read what a norm, a ReLU and a gate make: autograd keeps those, or what makes them again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.up, self.gate, self.down, self.out = (nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.out(F.relu(self.down(F.silu(self.gate(h)) * self.up(h))))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_velora_keeps_less_than_lora_where_lora_keeps_no_input(options: dict[str, Any]) -> None:
    """It keeps neither groups nor A x there, and its gradients are those with few rows, which keep both."""
    options |= {"r": 4, "target_modules": ["up", "gate", "down", "out"], "init_lora_weights": False}
    net, x = Gated(), inputs(512, 256).requires_grad_()
    plain = get_peft_model(copy.deepcopy(net), LoraConfig(**options))
    model = get_peft_model(net, LoraConfig(velora_config={"num_groups": 8, "init_type": "random"}, **options))
    assert saved_bytes(model, x) < saved_bytes(plain, x)

    torch.manual_seed(0)
    found = gradients(model, x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("peft.tuners.lora.velora.is_few", lambda x: True)
        torch.manual_seed(0)
        wanted = gradients(model, x)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_velora_under_autocast_and_checkpointing() -> None:
    model, x = adapted("velora"), inputs(6, 8).requires_grad_()
    wanted = gradients(model, x)
    own = list(trained(model).values())
    y = checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(functional(y), own)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    narrow = torch.autograd.grad(functional(y), own)
    for a, b in zip(narrow, wanted):
        assert (a - b).norm() < 0.05 * b.norm()


def test_velora_chooses_its_direction_as_asked_and_evaluates_as_lora() -> None:
    x, other = inputs(6, 8), inputs(6, 8).flip(0) * torch.linspace(-2, 1, 8)
    for how, moves in (("batch_average", True), ("batch_average_once", False), ("random", False)):
        model = adapted("velora", velora_config={"num_groups": 3, "init_type": how})
        embed = model.base_model.model[0].lora_velora_embed
        start = embed["default"].clone()
        assert bool(start.any()) == (how == "random")
        model.eval()(x)
        assert torch.equal(embed["default"], start)
        found = gradients(model, x)
        plain = adapted("velora", velora_config=None)
        plain.load_state_dict(model.state_dict(), strict=False)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, x)))
        model.train()(x)
        once = embed["default"].clone()
        model(other)
        assert torch.equal(embed["default"], once) != moves


# --- MonteCLoRA -------------------------------------------------------------------------------------------------


def test_a_is_drawn_as_the_formula_says() -> None:
    model, x = adapted("monteclora"), inputs(4, 8)
    layer = model.base_model.model[0]
    a, b, sampler = first(model).lora_A.weight, first(model).lora_B.weight, first(model).lora_monteclora_sampler
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    chi, z = (torch.randn(4, 4) ** 2).sum(1), torch.randn(3)
    e = torch.randn(3, 4, 8)
    var = (torch.exp(sampler.std_prior) ** 2 * chi).clamp(min=1e-3)
    alpha = sampler.expert_weights_prior.exp()
    mean = alpha.log() - alpha.log().mean()
    w = torch.softmax(mean + (1 / alpha * (1 - 2 / 3) + (1 / alpha).sum() / 9).sqrt() * z, 0)
    drawn = a + sum(w[n] * 0.5 * var.sqrt().diag() @ e[n] for n in range(3))
    same(found, layer.base_layer(x) + 2 * x @ drawn.T @ b.T)
    own = list(trained(layer).values())
    wanted = torch.autograd.grad((layer.base_layer(x) + 2 * x @ drawn.T @ b.T).square().sum(), own)
    for p, q in zip(torch.autograd.grad(found.square().sum(), own), wanted):
        same(p, q, 1e-3)
    same(sampler.gaussian_var_prior, var.diag())
    same(sampler.expert_weights, w)


def test_draws_repeat_under_a_seed_and_under_checkpointing_and_end_with_training() -> None:
    model, x = adapted("monteclora", lora_dropout=0.1), inputs(4, 8).requires_grad_()
    torch.manual_seed(5)
    wanted = gradients(model, x)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), wanted))
    torch.manual_seed(5)
    y = checkpoint(model, x, use_reentrant=False)
    loss = functional(y)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, trained(model).values()), wanted))
    assert not torch.equal(model(x), model(x))
    model.eval()
    plain = adapted("monteclora", monteclora_config=None).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert type(first(plain)) is Lora and torch.equal(model(x), plain(x))


def test_the_divergence_is_that_of_the_three_distributions() -> None:
    std, logits, var = torch.tensor([0.3, -0.2]), torch.tensor([0.5, -1.0, 0.1]), torch.tensor([0.4, 2.5])
    wishart = kl_divergence(Wishart(2.0, (2 * std).exp().diag()), Wishart(2.0, torch.eye(2)))
    gaussians = 3 * kl_divergence(Normal(0.0, var.sqrt()), Normal(0.0, torch.ones(2))).sum()
    dirichlet = kl_divergence(Dirichlet(logits.exp()), Dirichlet(torch.full((3,), 0.1)))
    assert abs(divergence(std, logits, var, 0.1) - (wishart + gaussians + dirichlet)) < 1e-4
    ones = torch.ones(2)
    assert divergence(torch.zeros(2), torch.full((3,), 0.1).log(), ones, 0.1).abs() < 1e-5


def test_the_draws_have_the_moments_that_they_are_meant_to_have() -> None:
    torch.manual_seed(0)
    std, logits = torch.tensor([0.2, -0.5]), torch.tensor([3.0, 2.0, 2.5])
    chi = (torch.randn(20000, 2, 2) ** 2).sum(2)
    same(torch.stack([variances(std, c) for c in chi[:4000]]).mean(0), 2 * (2 * std).exp(), 0.1)
    weights = torch.stack([mixture(logits, z) for z in torch.randn(4000, 3)])
    same(weights.sum(1), torch.ones(4000))
    same(weights.mean(0), Dirichlet(logits.exp()).mean, 0.02)
    noise = deviation(torch.randn(3, 2, 100000), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([4.0, 9.0]), 0.1)
    same(noise.var(1), 0.01 * torch.tensor([4.0, 9.0]) * (0.25 + 0.09 + 0.04), 0.02)


def test_the_loss_of_monteclora_reaches_what_it_learns_and_may_hold_the_weights_together() -> None:
    model = adapted("monteclora", monteclora_config={"num_samples": 3, "kl_loss_weight": 1.0})
    model(inputs(2, 8))
    loss = model.base_model._get_monteclora_loss()
    each = []
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        sampler = layer.lora_monteclora_sampler["default"]
        var = sampler.gaussian_var_prior.diag()
        each.append(divergence(sampler.std_prior, sampler.expert_weights_prior, var, 0.1))
    same(loss, torch.stack(each).mean())
    loss.backward()
    for name, p in trained(model).items():
        assert (p.grad is not None and bool(p.grad.any())) == ("sampler" in name), name
    model.eval()
    assert model.base_model._get_monteclora_loss() == 0.0
    held = adapted("monteclora", monteclora_config={"num_samples": 3, "kl_loss_weight": 0.0, "use_entropy": True})
    held(inputs(2, 8))
    weights = [held.base_model.model[i].lora_monteclora_sampler["default"].expert_weights for i in (0, 2)]
    same(held.base_model._get_monteclora_loss(), torch.stack([(w**2).sum() for w in weights]).mean())


# --- together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_dora_turns_the_variants_too(variant: str) -> None:
    """W' = m (W + dW) / |W + dW|, merged and unmerged, with dW of the variant alone."""
    model, x = adapted(variant, use_dora=True).eval(), inputs(3, 8)
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight + super(type(first(model)).made_of[0], first(model)).delta_weight()
    turned = layer.lora_magnitude_vector["default"].weight[:, None] * weight / weight.norm(dim=1, keepdim=True)
    same(layer(x), F.linear(x, turned, layer.base_layer.bias))
    before = model(x)
    model.merge_adapter()
    same(model(x), before, 1e-4)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 2), lambda: nn.Conv1d(4, 6, 2)], ids=["Conv2d", "Conv1d"])
def test_dora_with_dropout_trains_on_inputs_without_a_gradient(make: Any) -> None:
    """As those of a model's first layer are: m (V + B A) x, x with some entries dropped."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(make()), config)
    layer = model.base_model.model[0]
    x = inputs(3, 4, *[5] * (layer.base_layer.weight.dim() - 2))
    torch.manual_seed(3)
    found = gradients(model, x)
    torch.manual_seed(3)
    kept = F.dropout(torch.ones_like(x), 0.5)
    base, (a, b) = layer.base_layer.weight, first(model).held_pair()
    weight = base + layer.scaling["default"] * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    m = layer.lora_magnitude_vector["default"].weight.view(-1, *[1] * (base.dim() - 1))
    turned = m / weight.flatten(1).norm(dim=1).detach().view_as(m) * weight
    convolve = F.conv2d if base.dim() == 4 else F.conv1d
    y = layer.base_layer(x) + convolve(x * kept, turned - base)
    for one, other in zip(found, torch.autograd.grad(functional(y), list(trained(model).values())), strict=True):
        same(one, other, 1e-4)
