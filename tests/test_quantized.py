"""Quantised bases in use: loaded by transformers, prepared, trained, saved, reloaded, merged; LoftQ; errors."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantised import BASES, IN, pack, plain
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer
from transformers import TrainingArguments as Arguments

from peft import (
    ArrowConfig,
    HiraConfig,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
    set_peft_model_state_dict,
)
from peft.core.base import storage as storages
from peft.core.layer.weight import base_weight, folded_weight
from peft.tuners import lora
from peft.tuners.lora.loftq import loftq_init, round_to_bits


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

FOUR = {
    "load_in_4bit": True,
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
EIGHT = {"load_in_8bit": True}
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) * 5 % 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder: Path, options: dict | None = None, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    quantization = BitsAndBytesConfig(**options) if options else None
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tuned(base: nn.Module, **fields) -> PeftModel:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **fields)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize(("options", "layer"), [(FOUR, lora.Linear4bit), (EIGHT, lora.Linear8bitLt)])
def test_layers_carry_the_names_that_others_test_for(folder, options, layer):
    model = tuned(load(folder, options))
    adapted = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(adapted, layer) and isinstance(adapted, lora.LoraLayer)
    assert adapted.lora_A["default"].weight.dtype == torch.float32
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    assert layer in (Linear4bit, Linear8bitLt)
    assert model.get_layer_status()[0].quantization_backend == "bitsandbytes"
    assert isinstance(model.get_base_model(), LlamaForCausalLM)


def test_packed_weights_count_as_what_they_hold(folder):
    dense, quantised = tuned(load(folder)), tuned(load(folder, FOUR))
    assert quantised.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()


@pytest.mark.parametrize("options", [FOUR, EIGHT], ids=["4bit", "8bit"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_a_prepared_model_trains(folder, options, checkpointing, dora):
    base = prepare_model_for_kbit_training(load(folder, options), checkpointing is not None, checkpointing)
    assert base.model.norm.weight.dtype == base.lm_head.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in base.parameters())
    model = tuned(base, use_dora=dora, lora_dropout=0.1).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and g.isfinite().all() and g.any() for g in grads.values())


def test_trained_saved_and_reloaded_on_four_and_on_sixteen_bits(folder, tmp_path):
    base = prepare_model_for_kbit_training(load(folder, FOUR), gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = Arguments(
        output_dir=str(tmp_path / "trainer"), max_steps=3, learning_rate=0.05, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    losses = [h["loss"] for h in _train(model, arguments, rows) if "loss" in h]
    assert losses[-1] < losses[0]
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")

    base = prepare_model_for_kbit_training(load(folder, FOUR))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert distance(logits(again), wanted) < 1e-6
    sixteen = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    taken = distance(logits(load(folder)), logits(load(folder, FOUR)))  # by four bits, from the base alone
    assert distance(logits(sixteen), wanted) < 1.5 * taken

    merged = again.merge_and_unload(dequantize=True)
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32  # as the norms before it
    assert isinstance(merged.model.layers[0].self_attn.k_proj, bnb.nn.Linear4bit)  # not adapted, so left alone
    assert distance(logits(merged), wanted) < 0.02
    rounded = PeftModel.from_pretrained(load(folder, FOUR), tmp_path / "adapter").eval().merge_and_unload()
    assert isinstance(rounded.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
    assert distance(logits(rounded), wanted) < 1.5 * taken


def _train(model: nn.Module, arguments: Arguments, rows: list) -> list[dict]:
    arguments.logging_steps = 1
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("options", [FOUR, EIGHT], ids=["4bit", "8bit"])
def test_the_dequantisation_of_transformers_keeps_working(folder, options):
    merged = tuned(load(folder, options)).merge_and_unload()
    wanted = logits(merged)
    dense = merged.dequantize()
    assert not any(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in dense.modules())
    assert distance(logits(dense), wanted) < 0.05

    model = tuned(load(folder, options))
    wanted = logits(model)
    model.base_model.model.dequantize()  # below the adapters, which then sit on dense layers
    assert distance(logits(model), wanted) < 0.05
    assert distance(logits(model.merge_and_unload()), wanted) < 0.05

    model = tuned(load(folder, options))
    wanted = logits(model)
    model.merge_adapter()
    model.base_model.model.dequantize()  # with the adapter inside: taking it out brings the codes back
    model.unmerge_adapter()
    assert distance(logits(model), wanted) < 0.05


@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
def test_a_failed_dense_merge_leaves_the_quantised_model(method):
    config = {
        "lora": LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False),
        "dora": LoraConfig(r=4, target_modules=["0", "2"], use_dora=True),
        "hira": HiraConfig(r=4, target_modules=["0", "2"], init_weights=False),
    }[method]
    model = get_peft_model(BASES["bnb-nf4-double"](), config).eval()
    old = model.base_model.model[0].base_layer
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_A.default.weight") or name.endswith("_A.default"):
                p[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True, dequantize=True)
    assert model.base_model.model[0].base_layer is old


# --- LoftQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftq_starts_closer_to_the_weight_than_rounding(bits):
    weight = plain()[0].weight.detach()
    rounded, a, b = loftq_init(weight, bits, 8, 5)
    plainly = (weight - round_to_bits(weight, bits)).norm()
    assert (weight - rounded - b @ a).norm() < 0.95 * plainly
    assert len((rounded[0] / rounded[0].abs().max()).unique()) <= 2**bits

    model = get_peft_model(
        plain(),
        LoraConfig(
            r=8, lora_alpha=16, target_modules=["0"], init_lora_weights="loftq",
            loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=5),
        ),
    )  # fmt: skip
    layer = model.base_model.model[0]
    assert torch.allclose(base_weight(layer), rounded, atol=1e-5)
    whole = folded_weight(layer, [layer.adapters["default"]])  # the scale of 2 is in the pair
    assert (weight - whole).norm() < 0.95 * plainly


NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip
"""The codes of QLoRA (arXiv 2305.14314, appendix E)."""


@pytest.mark.parametrize("turns", [1, 3])
def test_loftq_is_its_algorithm(turns):
    """Q = nf4(W - B A) and B A = SVD_r(W - Q) in turns (arXiv 2310.08659, algorithm 1); output, gradient, counts."""
    net, r, x = plain(), 8, torch.randn(5, plain()[0].in_features)
    weight = net[0].weight.detach().clone()
    product = torch.zeros_like(weight)
    for _ in range(turns):
        blocks = (weight - product).reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        rounded = (NF4[(blocks / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale).view_as(weight)
        u, s, vt = torch.linalg.svd(weight - rounded)
        product = u[:, :r] * s[:r] @ vt[:r]
    options = LoftQConfig(loftq_bits=4, loftq_iter=turns)
    config = LoraConfig(r=r, lora_alpha=16, target_modules=["0"], init_lora_weights="loftq", loftq_config=options)
    model = get_peft_model(net, config)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(base_weight(layer), rounded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(2 * b @ a, product, atol=1e-4, rtol=1e-3)
    y = F.linear(x, rounded + product, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-3)
    whole = (rounded + product).requires_grad_()
    F.linear(x, whole).square().sum().backward()
    (F.linear(x, layer.base_layer.weight) + (layer(x) - layer.base_layer(x))).square().sum().backward()
    torch.testing.assert_close(b.grad, 2 * whole.grad @ a.detach().T, atol=1e-2, rtol=1e-2)
    assert model.get_nb_trainable_parameters()[0] == r * sum(weight.shape)
    model.merge_adapter()
    torch.testing.assert_close(base_weight(layer), rounded + product, atol=1e-4, rtol=1e-3)


def test_loftq_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="2, 4 or 8 bits, not 3"):
        round_to_bits(torch.ones(4, 4), 3)
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        get_peft_model(BASES["bnb-nf4-double"](), LoraConfig(target_modules=["0"], init_lora_weights="loftq"))


def test_loftq_fits_a_model_that_is_quantised_already(folder):
    full, ordinary = logits(load(folder)), load(folder, FOUR)
    before = distance(logits(ordinary), full)
    model = get_peft_model(ordinary, LoraConfig(r=16, lora_alpha=8, target_modules="all-linear"))
    replace_lora_weights_loftq(model)
    assert distance(logits(model), full) < 0.9 * before
    fitted = logits(model)
    replace_lora_weights_loftq(model, str(folder / "model.safetensors"), callback=lambda m, name: False)
    assert torch.equal(logits(model), fitted)
    with pytest.raises(ValueError, match="load_in_4bit"):
        replace_lora_weights_loftq(get_peft_model(load(folder), LoraConfig(target_modules=TARGETS)))


@pytest.mark.parametrize("base", BASES)
def test_loftq_fits_every_storage(base, tmp_path):
    full = plain()
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    model = get_peft_model(BASES[base](), LoraConfig(r=16, lora_alpha=8, target_modules=["0", "2"]))
    layers = [model.base_model.model[i] for i in (0, 2)]
    lost = [(full[i].weight - base_weight(layer).float()).norm() for i, layer in zip((0, 2), layers)]
    replace_lora_weights_loftq(model, str(tmp_path))
    for i, layer, before in zip((0, 2), layers, lost):
        folded = base_weight(layer).float() + layer.get_delta_weight("default").float()
        assert (full[i].weight - folded).norm() < 0.9 * before


# --- adapters that choose their tokens ------------------------------------------------------------------------------


def dense_twin(folder: Path) -> LlamaForCausalLM:
    """The model whose weights are those that the four bits stand for."""
    codes, dense = load(folder, FOUR), load(folder)
    for name, module in dense.named_modules():
        held = codes.get_submodule(name)
        if isinstance(held, bnb.nn.Linear4bit):
            module.weight.data = storages.storage_of(held, "weight").read(held, "weight").to(module.weight)
    return dense


def test_an_adapter_that_waits_for_its_tokens(folder):
    dense, quantised = (tuned(base, alora_invocation_tokens=[5]) for base in (dense_twin(folder), load(folder, FOUR)))
    set_peft_model_state_dict(quantised, get_peft_model_state_dict(dense))
    found, wanted = logits(quantised), logits(dense)
    with quantised.disable_adapter():
        plain = logits(quantised)
    start = IDS[0].tolist().index(5)
    assert torch.equal(found[0, :start], plain[0, :start]) and not torch.equal(found[0, start:], plain[0, start:])
    assert distance(found, wanted) < 0.02


def test_arrow_over_experts(folder, tmp_path):
    for seed in range(3):
        torch.manual_seed(seed)
        tuned(load(folder)).save_pretrained(tmp_path / str(seed))
    paths = [str(tmp_path / str(seed)) for seed in range(3)]
    models = [
        create_arrow_model(base, paths, ArrowConfig(top_k=2)) for base in (dense_twin(folder), load(folder, FOUR))
    ]
    dense, quantised = (logits(model.eval()) for model in models)
    assert distance(quantised, dense) < 0.02
    assert distance(dense, logits(dense_twin(folder))) > 0.1


# --- errors -----------------------------------------------------------------------------------------------------


class Sealed(nn.Module):
    """A linear layer of a library whose weight only its own kernels can read."""

    def __init__(self) -> None:
        super().__init__()
        inner = plain()[0]
        self.in_features, self.out_features, self.bias = inner.in_features, inner.out_features, inner.bias
        self.register_buffer("packed", inner.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


@pytest.fixture
def sealed(monkeypatch) -> nn.Module:
    class Storage(storages.ForwardOnly):
        name = "sealed"
        linears = ((Sealed.__module__, "Sealed"),)
        slots = ("packed",)

    monkeypatch.setattr(storages, "_STORAGES", [Storage(), *storages._STORAGES])
    return nn.Sequential(Sealed())


def test_a_forward_only_base_trains_but_does_not_merge(sealed):
    model = get_peft_model(sealed, LoraConfig(target_modules=["0"], init_lora_weights=False))
    model(torch.randn(3, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"sealed cannot be written.*load the base model unquantised"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="sealed cannot be read"):
        model.merge_and_unload(dequantize=True)
    assert isinstance(model.base_model.model[0], lora.LoraLayer)


@pytest.mark.parametrize(
    "config", [HiraConfig(target_modules=["0"]), LoraConfig(target_modules=["0"], use_dora=True)], ids=["hira", "dora"]
)
def test_a_method_that_needs_the_weight_is_refused_on_a_forward_only_base(sealed, config):
    with pytest.raises(ValueError, match=r"sealed cannot be read.*(bitsandbytes|BitsAndBytesConfig)"):
        get_peft_model(sealed, config)
    assert isinstance(sealed[0], Sealed)


def test_a_library_that_is_gone_is_named(monkeypatch):
    model = BASES["bnb-nf4-double"]()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r"bitsandbytes.*pip install -U 'bitsandbytes"):
        storages.storage_of(model[0], "weight").read(model[0], "weight")


@pytest.mark.parametrize("rounded", [False, True])
def test_training_through_weights_of_torchao_that_round_their_inputs_is_warned_of(rounded):
    """Their product has no gradient for its input, and torchao does not say so."""
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    config = torchao.Int8DynamicActivationInt8WeightConfig if rounded else torchao.Int8WeightOnlyConfig
    torchao.quantize_(model, config())
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            model(torch.ones(1, 32))
        assert not caught
        output = model(torch.ones(1, 32))
    assert any("no gradient" in str(w.message) for w in caught) == rounded
    assert output.requires_grad != rounded


def test_a_weight_whose_class_cannot_be_made_anew_is_named():
    pytest.importorskip("torchao")
    model = BASES["torchao-int8"]()
    storage, weight = storages.storage_of(model[0], "weight"), model[0].weight
    maker = type(weight.data).from_hp
    try:
        type(weight.data).from_hp = None
        with pytest.raises(ValueError, match=r"torchao.*Int8Tensor.*dequantize=True"):
            storage.write(model[0], "weight", storage.read(model[0], "weight"))
    finally:
        type(weight.data).from_hp = maker


@pytest.mark.parametrize(
    ("module", "cls", "attributes"),
    [
        ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear", {"in_features": 64, "out_features": 128}),
        ("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear", {"infeatures": 64, "outfeatures": 128}),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", {"in_features": 64, "out_features": 128}),
        ("transformers.integrations.eetq", "EetqLinear", {"weight": torch.zeros(64, 128, dtype=torch.int8)}),
        ("aqlm.inference", "QuantizedLinear", {"in_features": 64, "out_features": 128}),
    ],
)
def test_layers_of_libraries_that_are_not_here_are_known_by_their_names(monkeypatch, module, cls, attributes):
    """Stand-ins: what is tested is that such a class is a linear layer, of this size, that runs forward only."""
    monkeypatch.setitem(sys.modules, module.partition(".")[0], sys.modules.get(module.partition(".")[0], sys))
    made = type(cls, (nn.Module,), {"__module__": module, "forward": lambda self, x: x @ torch.ones(64, 128)})()
    for name, value in attributes.items():
        setattr(made, name, value)
    made.bias = None
    made.register_buffer("codes", torch.zeros(4, dtype=torch.int32))
    model = get_peft_model(nn.Sequential(made), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.shape == (4, 64) and layer.lora_B["default"].weight.shape == (128, 4)
    model(torch.randn(2, 64)).sum().backward()
    with pytest.raises(ValueError, match=f"weights kept by {layer.storage.name} cannot be written"):
        model.merge_adapter()


def test_training_after_an_evaluation_that_repacked_the_codes() -> None:
    """On some CPUs bitsandbytes repacks codes for inference, and its product has no gradient from then on."""
    model = get_peft_model(BASES["bnb-nf4-double"](), LoraConfig(target_modules=["2"], init_lora_weights=False))
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))

    def gradient() -> torch.Tensor:
        y = x.clone().requires_grad_()
        model.train()(y).square().sum().backward()
        return y.grad

    pack(model)  # what was packed before the first step, and what evaluation does between two
    first = gradient()
    with torch.no_grad():
        model.eval()(x)
    assert not any(
        getattr(m.quant_state, "packing_format_for_cpu", False) for m in model.modules() if hasattr(m, "quant_state")
    )
    torch.testing.assert_close(gradient(), first)
    dense = model.merge_and_unload(dequantize=True)
    z = x.clone().requires_grad_()
    dense(z).square().sum().backward()
    assert (z.grad - first).norm() < 0.1 * first.norm()
