"""The code blocks of a tour through the library, as a user would type them, on models that take no time to train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40,
}  # fmt: skip
SMALL_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
IDS = torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(1))


def bert() -> BertForSequenceClassification:
    """A classifier of two classes."""
    return BertForSequenceClassification(BertConfig(**ENCODER, num_labels=2))


def t5() -> T5ForConditionalGeneration:
    """An encoder and a decoder."""
    return T5ForConditionalGeneration(T5Config(**SMALL_T5, decoder_start_token_id=0))


@pytest.fixture
def llama_path(tmp_path: Path) -> str:
    """A folder with a saved decoder: what a tour has the name of a model on the hub for."""
    tiny_llama().save_pretrained(tmp_path / "tiny-llama")
    return str(tmp_path / "tiny-llama")


@pytest.fixture
def bert_path(tmp_path: Path) -> str:
    """A folder with a saved classifier."""
    bert().save_pretrained(tmp_path / "tiny-bert")
    return str(tmp_path / "tiny-bert")


def falls(model: nn.Module, rate: float = 1e-2, steps: int = 6, **batch: torch.Tensor) -> None:
    """The loop that a tour shows. The loss falls, and nothing but the adapter has moved."""
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    with torch.no_grad():
        before = model.eval()(**batch).loss
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(**batch).loss < before
    for name, p in model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name


def logits(model: nn.Module) -> torch.Tensor:
    """What a decoder answers."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- one method after the other -------------------------------------------------------------------------------


def test_lora(llama_path: str, capsys: pytest.CaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_path)
    peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()

    assert capsys.readouterr().out == "trainable params: 1,024 || all params: 6,416 || trainable%: 15.9601\n"
    assert isinstance(model, PeftModelForCausalLM) and peft_config.target_modules == {"q_proj", "v_proj"}
    falls(model, input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    ("build", "task_type", "labels"),
    [
        (tiny_llama, "CAUSAL_LM", IDS),
        (t5, "SEQ_2_SEQ_LM", IDS),
        (bert, "SEQ_CLS", torch.tensor([0, 1, 0, 1])),
    ],
)
def test_prefix_tuning(build, task_type: str, labels: torch.Tensor, projection: bool) -> None:
    model = build()
    peft_config = PrefixTuningConfig(
        task_type=task_type, num_virtual_tokens=10, encoder_hidden_size=512, prefix_projection=projection
    )
    model = get_peft_model(model, peft_config)

    assert peft_config.num_virtual_tokens == 10 and peft_config.encoder_hidden_size == 512
    falls(model, input_ids=IDS, labels=labels)


def test_prefix_tuning_with_the_two_fields_alone() -> None:
    peft_config = PrefixTuningConfig(num_virtual_tokens=10, encoder_hidden_size=512)
    model = get_peft_model(tiny_llama(), peft_config)

    layers, width = 2, 16  # keys and values of each layer
    assert model.get_nb_trainable_parameters()[0] == 10 * layers * 2 * width
    assert type(model) is PeftModel
    falls(model, input_ids=IDS, labels=IDS)


def test_prompt_tuning() -> None:
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    model = get_peft_model(tiny_llama(), peft_config)

    assert model.get_nb_trainable_parameters()[0] == 8 * 16
    falls(model, rate=3e-2, input_ids=IDS, labels=IDS)


def test_llama_adapter() -> None:
    base = tiny_llama()
    before = logits(base)
    config = AdaptionPromptConfig(adapter_layers=2, adapter_len=4)
    model = get_peft_model(base, config)

    torch.testing.assert_close(logits(model), before)  # the gates are closed at first
    falls(model, rate=0.1, input_ids=IDS, labels=IDS)


@pytest.mark.parametrize(
    ("build", "task_type", "names"),
    [
        (tiny_llama, "CAUSAL_LM", {"k_proj", "v_proj", "down_proj"}),
        (t5, "SEQ_2_SEQ_LM", {"k", "v", "wo"}),
        (bert, "SEQ_CLS", {"key", "value", "output.dense"}),
    ],
)
def test_ia3(build, task_type: str, names: set[str]) -> None:
    peft_config = IA3Config(task_type=task_type)
    model = get_peft_model(build(), peft_config)

    assert peft_config.target_modules == names and peft_config.feedforward_modules < names
    falls(model, rate=0.1, input_ids=IDS, labels=torch.tensor([0, 1, 0, 1]) if task_type == "SEQ_CLS" else IDS)


def test_ia3_with_targets() -> None:
    peft_config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(tiny_llama(), peft_config)

    assert model.get_nb_trainable_parameters()[0] == 2 * (16 + 16 + 24)
    falls(model, rate=0.1, input_ids=IDS, labels=IDS)


def test_bottleneck_adapter() -> None:
    model = get_peft_model(bert(), BottleneckConfig(preset="houlsby", reduction_factor=4, task_type="SEQ_CLS"))

    falls(model, input_ids=IDS, labels=torch.tensor([0, 1, 0, 1]))


# --- what is adapted when nothing is said ---------------------------------------------------------------------

DECODER = {**ENCODER, "num_key_value_heads": 2}
BUILD = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), {"q_proj", "v_proj"}),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**DECODER)), {"q_proj", "v_proj"}),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)), {"q_proj", "v_proj"}),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=40)),
        {"c_attn"},
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=40, word_embed_proj_dim=16,
            )
        ),
        {"q_proj", "v_proj"},
    ),
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
        {"query_key_value"},
    ),
    "bert": (bert, {"query", "value"}),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)), {"query", "value"}),
    "t5": (t5, {"q", "v"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILD)
def test_target_modules_may_be_left_out(name: str) -> None:
    build, names = BUILD[name]
    config = LoraConfig(r=4)
    model = get_peft_model(build(), config)

    assert config.target_modules == names
    trained = {key.partition(".lora_")[0].rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad}
    assert trained == names


def test_where_no_table_knows_the_architecture() -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
    config = LoraConfig(r=4)
    model = get_peft_model(model, config)

    assert len(config.target_modules) == 2
    pixels = torch.randn(4, 3, 8, 8)
    falls(model, pixel_values=pixels, labels=torch.tensor([0, 1, 0, 1]))


# --- save, load, several adapters -----------------------------------------------------------------------------


@pytest.fixture
def two_tasks(llama_path: str, tmp_path: Path) -> tuple[str, str]:
    """Folders of two trained adapters of the saved decoder."""
    for seed, name in enumerate(("task1", "task2")):
        torch.manual_seed(seed)
        base_model = AutoModelForCausalLM.from_pretrained(llama_path)
        model = get_peft_model(base_model, LoraConfig(r=4 + seed, lora_alpha=16, task_type="CAUSAL_LM"))
        falls(model, rate=0.05, input_ids=IDS, labels=IDS.roll(seed))
        model.save_pretrained(tmp_path / name)
    return str(tmp_path / "task1"), str(tmp_path / "task2")


def test_save_and_load(two_tasks: tuple[str, str], llama_path: str) -> None:
    assert {path.name for path in Path(two_tasks[0]).iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    config = PeftConfig.from_pretrained(two_tasks[0])
    assert isinstance(config, LoraConfig) and config.base_model_name_or_path == llama_path

    base_model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    model = PeftModel.from_pretrained(base_model, two_tasks[0])
    assert not any(p.requires_grad for p in model.parameters())
    differ = logits(model)

    again = AutoPeftModelForCausalLM.from_pretrained(two_tasks[0])
    assert torch.equal(logits(again), differ)


def test_training_goes_on(two_tasks: tuple[str, str], llama_path: str) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(llama_path)
    model = PeftModel.from_pretrained(base_model, two_tasks[0], is_trainable=True)

    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    falls(model, input_ids=IDS, labels=IDS)


def test_several_adapters(two_tasks: tuple[str, str], llama_path: str) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(llama_path)
    plain = logits(base_model)
    model = PeftModel.from_pretrained(base_model, two_tasks[0], adapter_name="task1")
    model.load_adapter(two_tasks[1], adapter_name="task2")
    assert list(model.peft_config) == ["task1", "task2"] and model.active_adapters == ["task1"]

    found = {}
    for name in ("task1", "task2"):
        model.set_adapter(name)
        found[name] = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for name, folder in zip(found, two_tasks):
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_path), folder)
        assert torch.equal(found[name], logits(alone))
    assert (found["task1"] - found["task2"]).abs().max() > 1e-3

    names = ["task1", "task2", "__base__", "task2"]
    mixed = model(input_ids=IDS, adapter_names=names).logits
    wanted = {**found, "__base__": plain}
    torch.testing.assert_close(mixed, torch.stack([wanted[name][row] for row, name in enumerate(names)]))

    model.delete_adapter("task2")
    assert list(model.peft_config) == ["task1"]


def test_add_weighted_adapter(two_tasks: tuple[str, str], llama_path: str) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(llama_path)
    model = PeftModel.from_pretrained(base_model, two_tasks[0], adapter_name="task1")
    model.load_adapter(two_tasks[1], adapter_name="task2")
    model.add_weighted_adapter(
        adapters=["task1", "task2"], weights=[0.7, 0.3], adapter_name="both", combination_type="cat"
    )
    model.set_adapter("both")

    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    parts = {name: layer.get_delta_weight(name) for name in ("task1", "task2", "both")}
    torch.testing.assert_close(parts["both"], 0.7 * parts["task1"] + 0.3 * parts["task2"])
    assert logits(model).isfinite().all()


def test_merge(two_tasks: tuple[str, str], llama_path: str, tmp_path: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(two_tasks[0])
    before = logits(model)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()

    merged_model = model.merge_and_unload()
    assert isinstance(merged_model, LlamaForCausalLM)
    merged_model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM"),
        IA3Config(task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=10, encoder_hidden_size=512, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM"),
        BottleneckConfig(task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_generate_save_and_load_with_each_method(config: PeftConfig, llama_path: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_path), config)
    falls(model, rate=0.05, input_ids=IDS, labels=IDS)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "adapter")

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_path), tmp_path / "adapter")
    again = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert outputs.shape == (4, 11) and torch.equal(again, outputs)


# --- the Trainer ----------------------------------------------------------------------------------------------


def reviews() -> list[dict]:
    """Sentences that are positive where their words are of the upper half of the vocabulary."""
    labels = torch.arange(48) % 2
    rows = torch.randint(4, 22, (48, 6), generator=torch.Generator().manual_seed(2)) + 18 * labels[:, None]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": y} for row, y in zip(rows, labels)]


def test_trainer_with_metrics(bert_path: str, tmp_path: Path) -> None:
    dataset = reviews()

    def compute_metrics(eval_pred):
        predictions, labels = eval_pred
        predictions = np.argmax(predictions, axis=1)
        return {"accuracy": (predictions == labels).mean()}

    model = AutoModelForSequenceClassification.from_pretrained(bert_path, num_labels=2)
    peft_config = LoraConfig(task_type=TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1)
    model = get_peft_model(model, peft_config)
    training_args = TrainingArguments(
        output_dir=str(tmp_path / "bert-lora"),
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        num_train_epochs=6,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset[:32],
        eval_dataset=dataset[32:],
        compute_metrics=compute_metrics,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    metrics = trainer.evaluate()
    model.save_pretrained(tmp_path / "output_dir")

    assert metrics["eval_accuracy"] >= 0.75 and metrics["eval_loss"] < start
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "output_dir", num_labels=2)
    assert isinstance(model, PeftModelForSequenceClassification)
    again = Trainer(model=model, args=training_args, eval_dataset=dataset[32:], compute_metrics=compute_metrics)
    assert again.evaluate()["eval_accuracy"] == metrics["eval_accuracy"]  # the classifier's head is in the file


def test_sequence_to_sequence() -> None:
    peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32)
    model = get_peft_model(t5(), peft_config)
    assert isinstance(model, PeftModelForSeq2SeqLM)
    falls(model, input_ids=IDS, labels=IDS)
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape[0] == 4


# --- a base in four or eight bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(llama_path: str, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    bnb_config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(llama_path, quantization_config=bnb_config, device_map="cpu")

    model = load()
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    falls(model, input_ids=IDS, labels=IDS)
    trained = logits(model)
    model.save_pretrained(tmp_path / "qlora")

    model = PeftModel.from_pretrained(load(), tmp_path / "qlora")
    torch.testing.assert_close(logits(model), trained, rtol=0.05, atol=0.05)
    dense = model.merge_and_unload(dequantize=True)
    torch.testing.assert_close(logits(dense).float(), trained.float(), rtol=0.05, atol=0.05)
