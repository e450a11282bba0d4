"""`estimate_memory` against bytes measured in a real step, and what an error says when memory runs out."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from toys import Mlp, tiny_llama
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen3MoeConfig, T5Config, ViTConfig

from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    estimate_memory,
    explain_out_of_memory,
    get_peft_model,
)


TOLERANCE = 0.05  # of the bytes saved by autograd, as the docstring of estimate_memory says
WIDE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, tuple[str, Any, str | None]] = {
    "llama": ("LlamaForCausalLM", LlamaConfig(**WIDE, num_key_value_heads=2), "CAUSAL_LM"),
    "mixture": (
        "Qwen3MoeForCausalLM",
        Qwen3MoeConfig(
            **WIDE, num_key_value_heads=2, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
        ),
        "CAUSAL_LM",
    ),
    "bert": ("BertForSequenceClassification", BertConfig(**WIDE), "SEQ_CLS"),
    "gpt2": ("GPT2LMHeadModel", GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "CAUSAL_LM"),
    "t5": (
        "T5ForConditionalGeneration",
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
        "SEQ_2_SEQ_LM",
    ),
    "vit": (
        "ViTModel",
        ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32),
        None,
    ),
}
METHODS = {
    "lora": lambda task: LoraConfig(r=4, target_modules="all-linear", task_type=task),
    "dropout": lambda task: LoraConfig(r=4, lora_dropout=0.1, task_type=task),
    "ia3": lambda task: IA3Config(task_type=task),
    "bottleneck": lambda task: BottleneckConfig(preset="houlsby", reduction_factor=4, task_type=task),
    "prefix": lambda task: PrefixTuningConfig(num_virtual_tokens=3, task_type=task),
    "prompt": lambda task: PromptTuningConfig(num_virtual_tokens=3, task_type=task),
    "llama_adapter": lambda task: AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type=task),
}
MEANINGLESS = {("vit", "prefix"), ("vit", "prompt"), ("vit", "llama_adapter")}
MEANINGLESS |= {("bert", "llama_adapter"), ("t5", "llama_adapter")}
MEANINGLESS |= {("mixture", method) for method in METHODS if method not in ("lora", "prompt")}  # enough of it


def stored(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


class Saved:
    """Counts the bytes of what autograd saves in a block of code, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self.held = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
        self.bytes = 0

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        """Note a tensor, once for each storage."""
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.held:
            self.held[storage.data_ptr()] = t
            self.bytes += storage.nbytes()
        return t

    def step(self, model: nn.Module, inputs: dict[str, Any]) -> int:
        """Bytes saved by the forward of one step."""
        with saved_tensors_hooks(self.pack, lambda t: t):
            model(**inputs)
        return self.bytes


def inputs(name: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A batch with labels."""
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}
    ids = torch.randint(1, 64, (batch, length))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if name == "bert" else ids}


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in CASES for method in METHODS if (name, method) not in MEANINGLESS]
)
def test_the_estimate_is_what_is_measured(name: str, method: str) -> None:
    """Gradients and optimizer states exactly, activations within the stated tolerance; from a config alone."""
    class_name, config, task = CASES[name]
    estimate = estimate_memory(config, METHODS[method](task), 3, 12, device="cpu")
    model = get_peft_model(getattr(transformers, class_name)(config), METHODS[method](task)).train()
    measured = Saved(model).step(model, inputs(name, 3, 12))
    assert estimate.activations == pytest.approx(measured, rel=TOLERANCE)
    assert estimate.weights == pytest.approx(stored(model), rel=0.02)  # a config does not say which head is added
    loss = model(**inputs(name, 3, 12))
    (loss.loss if "loss" in loss else loss.pooler_output.sum()).backward()
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert estimate.optimizer == sum(t.nbytes for t in states)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer + estimate.activations


def test_a_model_is_left_as_it_is() -> None:
    """Adapted or not, the estimate is the same, and the model and the config stay untouched."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    base = tiny_llama()
    before = {name: (id(p), p.requires_grad) for name, p in base.named_parameters()}
    first = estimate_memory(base, config, 2, 8)
    assert {name: (id(p), p.requires_grad) for name, p in base.named_parameters()} == before
    assert config.target_modules is None and not hasattr(base, "peft_config")
    model = get_peft_model(base, config)
    assert estimate_memory(model, None, 2, 8) == first
    with pytest.raises(ValueError, match="has adapters already"):
        estimate_memory(model, config)


@pytest.mark.parametrize("name", CASES)
def test_without_a_cache(name: str) -> None:
    """As trainers have it: then models look at their positions, and keep the same."""
    class_name, config, task = CASES[name]
    config = copy.deepcopy(config)
    first = estimate_memory(config, LoraConfig(r=4, task_type=task), 2, 8, device="cpu")
    config.use_cache = False
    assert estimate_memory(config, LoraConfig(r=4, task_type=task), 2, 8, device="cpu") == first


def test_all_parameters_train_without_an_adapter() -> None:
    estimate = estimate_memory(LlamaConfig(**WIDE), None, 2, 8, optimizer="sgd")
    assert estimate.trained == estimate.parameters and estimate.optimizer == 0
    assert estimate.gradients == 4 * estimate.trained


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    """Measured: what the forward keeps, and the most that the backward keeps while it computes one block again."""
    config = LlamaConfig(**{**WIDE, "num_hidden_layers": 6})
    plain, less = (
        estimate_memory(config, LoraConfig(r=4, task_type="CAUSAL_LM"), 3, 12, gradient_checkpointing=on, device="cpu")
        for on in (False, True)
    )
    assert less.activations < 0.6 * plain.activations and less.weights == plain.weights
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=4, task_type="CAUSAL_LM")).train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    saved = Saved(model)
    with saved_tensors_hooks(saved.pack, lambda t: t):
        loss = model(**inputs("llama", 3, 12)).loss
        forward = saved.bytes
        loss.backward()  # computes all blocks again, one at a time
    measured = forward + (saved.bytes - forward) / 6
    assert less.activations == pytest.approx(measured, rel=TOLERANCE)
    assert estimate_memory(model, None, 3, 12).activations == less.activations  # as the model has it
    with pytest.raises(ValueError, match="no blocks"):
        estimate_memory(Mlp(), None, gradient_checkpointing=True, inputs={"x": torch.zeros(2, 6)})


@pytest.mark.parametrize("bits", [4, 8])
def test_bits(bits: int) -> None:
    """As a model that bitsandbytes has quantised; and such a model is counted as it is stored."""
    bnb = pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**{**WIDE, "hidden_size": 128, "intermediate_size": 256})
    model = transformers.LlamaForCausalLM(config)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    estimate = estimate_memory(config, adapter, 2, 8, bits=bits)
    dense = estimate_memory(config, adapter, 2, 8)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            cls = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
            options = {"quant_type": "nf4", "compress_statistics": False} if bits == 4 else {"has_fp16_weights": False}
            new = cls(layer.in_features, layer.out_features, bias=False, **options)
            new.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to("cpu"))
    model.requires_grad_(False)
    held = estimate_memory(model, adapter, 2, 8)
    assert held.weights == pytest.approx(estimate.weights, rel=0.02)
    assert estimate.weights < (0.6 if bits == 8 else 0.5) * dense.weights
    assert estimate.activations == dense.activations and held.activations > 0
    assert held.parameters == dense.parameters and held.trained == dense.trained


def test_other_inputs_are_given() -> None:
    estimate = estimate_memory(Mlp(), LoraConfig(r=2, target_modules=["lin0"]), inputs={"x": torch.zeros(4, 6)})
    assert estimate.activations > 0 and estimate.batch_size is None
    with pytest.raises(ValueError, match=r"Mlp cannot be guessed.*inputs="):
        estimate_memory(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))


@pytest.mark.parametrize(
    "options, says",
    [({"optimizer": "adam"}, "adamw"), ({"bits": 3}, "4, 8 or None"), ({}, "a config of transformers")],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        estimate_memory(LlamaConfig(**WIDE) if options else "a/name", None, **options)


def test_the_table() -> None:
    text = str(estimate_memory(LlamaConfig(**WIDE), LoraConfig(r=4, task_type="CAUSAL_LM"), 2, 8))
    assert [line.split()[0] for line in text.splitlines()] == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "total",
    ]
    assert "batch of 2 x 8" in text and re.search(r"\d kB", text)


class _FailsInBackward(torch.autograd.Function):
    """Gives what it gets, and cannot allocate in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def _fail(error: Exception) -> None:
    raise error


class TestOutOfMemory:
    """The error keeps its class and message, and gets figures and ways out."""

    def failing(self, error: Exception) -> PeftModel:
        """A model that cannot allocate, except where nothing has to be."""
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not output.is_meta:
                raise error

        model.get_base_model().model.layers[1].mlp.register_forward_hook(hook)
        return model

    def note(self, model: nn.Module, error: type[Exception], **kwargs: Any) -> str:
        with pytest.raises(error) as caught:
            model(**kwargs)
        return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
        ],
    )
    def test_figures(self, error: Exception) -> None:
        model = self.failing(error)
        ids = torch.ones(4, 8, dtype=torch.long)
        text = self.note(model, type(error), input_ids=ids, attention_mask=ids, labels=ids)
        assert str(error) in text and "batch of 4" in text and "estimate_memory" in text
        for way in ("2 takes", "gradient_accumulation_steps", "gradient_checkpointing_enable", "load_in_4bit"):
            assert way in text
        assert len(re.findall(r"\d (?:B|kB|MB)\b", text)) >= 7

    def test_what_is_done_already_is_not_advised(self) -> None:
        model = self.failing(torch.OutOfMemoryError("CUDA out of memory."))
        model.get_base_model().gradient_checkpointing_enable()
        text = self.note(model.train(), torch.OutOfMemoryError, input_ids=torch.ones(1, 8, dtype=torch.long))
        assert "gradient_checkpointing_enable" not in text and "a smaller batch" not in text

    def test_the_allocator_of_the_cpu(self) -> None:
        """A real failure: more than the address space holds."""
        model = get_peft_model(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
        text = self.note(model, RuntimeError, x=torch.zeros(1, 6).expand(2**44, 6))
        assert "DefaultCPUAllocator" in text and "What helps" in text

    def test_a_step_of_the_trainer(self, tmp_path: Any) -> None:
        """The model's forward is what the Trainer calls, so its error has the note with nothing asked for."""
        text = self.trained(self.failing(torch.OutOfMemoryError("CUDA out of memory.")), tmp_path)
        assert "batch of 2" in text and "1 takes" in text and text.count("What helps") == 1

    @pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
    def test_a_whole_training(self, where: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        error = torch.OutOfMemoryError("CUDA out of memory.")
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM"))
        if where == "forward":
            model = self.failing(error)
        elif where == "backward":
            layer = model.get_base_model().model.layers[1].mlp
            layer.register_forward_hook(lambda module, args, output: _FailsInBackward.apply(output))
        else:
            monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: _fail(error))
        text = self.trained(model, tmp_path, context=True)
        assert "batch of 2" in text and text.count("What helps") == 1
        for way in ("1 takes", "gradient_checkpointing_enable", "load_in_4bit"):
            assert way in text
        assert not model._forward_pre_hooks

    def trained(self, model: PeftModel, folder: Any, context: bool = False) -> str:
        """The notes of the error in a training by the Trainer, within the context or not."""
        ids = torch.randint(0, 30, (8, 6))
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        explaining = explain_out_of_memory(model) if context else nullcontext()
        with pytest.raises(torch.OutOfMemoryError) as caught, explaining:
            trainer.train()
        return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])

    def test_nothing_has_been_called_yet(self) -> None:
        with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(Mlp()):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])  # notes from Python 3.11 on
        assert "What helps" in told and "No figures" in told

    def test_other_errors_are_left_alone(self) -> None:
        text = self.note(self.failing(RuntimeError("shapes differ")), RuntimeError, input_ids=torch.ones(1, 2).long())
        assert text == "shapes differ"

    def test_without_figures(self) -> None:
        """An error in the estimate itself hides nothing and stops nothing."""
        model = self.failing(torch.OutOfMemoryError("CUDA out of memory."))

        def fail(module: nn.Module, args: tuple) -> None:
            if args and args[0].is_meta:
                raise ValueError("not on meta")

        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(fail)
        text = self.note(model, torch.OutOfMemoryError, input_ids=torch.ones(4, 8, dtype=torch.long))
        assert "a smaller batch" in text and "ValueError: not on meta" in text
