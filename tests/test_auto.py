"""Loading an adapter together with its base model."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from toys import tiny_llama
from transformers import PreTrainedTokenizerFast

from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    TaskType,
    get_peft_model,
)
from peft.auto import check_import_allowlist, get_default_import_allowlist


IDS = torch.arange(8)[None]


@pytest.fixture
def saved(tmp_path):
    """Save a base model and an adapter of the given task; returns a function task -> folder of the adapter."""

    def save(task, **kwargs):
        base = tiny_llama()
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(task_type=task, init_lora_weights=False, **kwargs))
        model.save_pretrained(tmp_path / "adapter")
        save.output = model.eval()(IDS).logits
        return tmp_path / "adapter"

    return save


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_task_has_a_class():
    assert set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING) == {task.value for task in TaskType}
    assert MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType.CAUSAL_LM] is PeftModelForCausalLM


def test_the_class_for_the_task(saved):
    model = AutoPeftModelForCausalLM.from_pretrained(saved("CAUSAL_LM"))
    assert type(model) is PeftModelForCausalLM
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, saved.output)


def test_options_reach_the_adapter_and_the_base_model(saved):
    model = AutoPeftModelForCausalLM.from_pretrained(
        saved("CAUSAL_LM"), adapter_name="mine", is_trainable=True, dtype=torch.bfloat16, autocast_adapter_dtype=False
    )
    assert list(model.peft_config) == ["mine"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_config_instead_of_the_saved_one(saved):
    folder = saved("CAUSAL_LM")
    config = PeftConfig.from_pretrained(str(folder))
    config.lora_alpha = 0
    edit(folder, base_model_name_or_path=None)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, config=config)
    torch.testing.assert_close(model(IDS).logits, model.get_base_model().float()(IDS).logits)
    assert (model(IDS).logits - saved.output).abs().max() > 1e-3


def test_an_adapter_without_a_task_names_its_class(saved):
    folder = saved(None)
    model = AutoPeftModel.from_pretrained(folder)
    assert type(model) is PeftModel
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(model(IDS).logits, saved.output)
    assert type(AutoPeftModelForCausalLM.from_pretrained(folder)) is PeftModelForCausalLM


def test_feature_extraction_loads_the_model_without_a_head(tmp_path):
    base = tiny_llama().model
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="FEATURE_EXTRACTION")).save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    assert type(model) is PeftModelForFeatureExtraction
    assert type(model.get_base_model()).__name__ == "LlamaModel"


@pytest.mark.parametrize("cls", [AutoPeftModel, AutoPeftModelForSequenceClassification])
def test_another_task_is_refused(saved, cls):
    with pytest.raises(ValueError, match=f"task CAUSAL_LM, which {cls.__name__} .*AutoPeftModelForCausalLM"):
        cls.from_pretrained(saved("CAUSAL_LM"))


def test_an_adapter_that_does_not_know_its_base(saved):
    folder = saved("CAUSAL_LM")
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(OSError, match="does not say which base model"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_what_the_config_names_is_imported_only_if_allowed(saved):
    folder = saved(None)
    edit(folder, auto_mapping={"parent_library": "os", "base_model_class": "system"})
    with pytest.raises(ValueError, match=r"wants to import 'os'.*import_allowlist=\['os'\]"):
        AutoPeftModel.from_pretrained(folder)
    edit(folder, auto_mapping={"parent_library": "transformers.nowhere", "base_model_class": "A"})
    with pytest.raises(ValueError, match="cannot be imported"):
        AutoPeftModel.from_pretrained(folder)
    edit(folder, auto_mapping=None)
    with pytest.raises(ValueError, match="neither a task_type nor an auto_mapping"):
        AutoPeftModel.from_pretrained(folder)


def test_a_list_of_one_s_own_replaces_the_default(saved):
    folder = saved(None)
    with pytest.raises(ValueError, match="packages allowed \\(other\\)"):
        AutoPeftModel.from_pretrained(folder, import_allowlist=["other"])
    model = AutoPeftModel.from_pretrained(folder, import_allowlist=["transformers.models.llama"])
    torch.testing.assert_close(model(IDS).logits, saved.output)


def test_allowlist():
    default = get_default_import_allowlist()
    assert {"transformers", "diffusers"} <= set(default)
    default.append("os")
    assert "os" not in get_default_import_allowlist()
    assert check_import_allowlist(["transformers"], "transformers")
    assert check_import_allowlist(["transformers"], "transformers.models.llama")
    assert not check_import_allowlist(["transformers"], "transformers_but_not_really")
    assert not check_import_allowlist(["os.path"], "os")
    assert not check_import_allowlist([], "os")


@pytest.mark.parametrize("count, rows", [(20, 30), (33, 33)])
def test_embeddings_grow_for_a_tokenizer_beside_the_adapter(saved, count, rows):
    folder = saved("CAUSAL_LM")
    vocabulary = {f"t{i}": i for i in range(count)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == count
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape == (rows, 16)
    torch.testing.assert_close(model(IDS).logits[..., :30], saved.output)


def test_there_are_no_instances():
    with pytest.raises(OSError, match=r"AutoPeftModel.from_pretrained\("):
        AutoPeftModel()
