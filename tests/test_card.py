"""README.md beside a saved adapter."""

import pytest
import yaml
from toys import Mlp, tiny_llama

from peft import IA3Config, LoraConfig, __version__, get_peft_model


def adapted(**kwargs):
    model = tiny_llama()
    model.name_or_path = "someone/base"
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **kwargs))


def card_of(model, folder):
    model.create_or_update_model_card(folder)
    return (folder / "README.md").read_text()


def parts(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_new_card(tmp_path):
    head, body = parts(card_of(adapted(task_type="CAUSAL_LM"), tmp_path / "new"))
    assert head == {
        "base_model": "someone/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:someone/base", "lora", "transformers"],
    }
    assert body.lstrip().startswith("# Model Card for Model ID")
    assert body.endswith(f"### Framework versions\n\n- PEFT {__version__}\n")


def test_writing_again_changes_nothing(tmp_path):
    model = adapted()
    assert card_of(model, tmp_path) == card_of(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md"]


def test_a_user_s_text_and_fields_are_kept(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nbase_model: old\ntags:\n- mine\n- lora\n- base_model:adapter:old\n---\n"
        "# Mine\n\nHello.\n\n### Framework versions\n\n- PEFT 0.1.0\n- Torch 2\n\n## Later\n\n- PEFT is a word\n"
    )
    head, body = parts(card_of(adapted(), tmp_path))
    assert head["license"] == "mit"
    assert head["base_model"] == "someone/base"
    assert head["tags"] == ["mine", "base_model:adapter:someone/base", "lora", "transformers"]
    assert body == (
        f"# Mine\n\nHello.\n\n### Framework versions\n\n- PEFT {__version__}\n- Torch 2\n\n"
        "## Later\n\n- PEFT is a word\n"
    )


def test_text_without_a_head_gets_one(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nHello.")
    head, body = parts(card_of(adapted(), tmp_path))
    assert head["library_name"] == "peft"
    assert body == f"# Mine\n\nHello.\n\n### Framework versions\n\n- PEFT {__version__}\n"


def test_a_module_without_a_name_has_no_base_model(tmp_path):
    head, _ = parts(card_of(get_peft_model(Mlp(), LoraConfig(target_modules=["lin0"])), tmp_path))
    assert head == {"library_name": "peft", "tags": ["lora"]}


def test_other_methods_and_tasks(tmp_path):
    model = tiny_llama()
    model.name_or_path = "someone/base"
    head, _ = parts(card_of(get_peft_model(model, IA3Config(task_type="FEATURE_EXTRACTION")), tmp_path))
    assert head["tags"] == ["base_model:adapter:someone/base", "ia3", "transformers"]
    assert "pipeline_tag" not in head


def test_how_the_base_model_is_quantised_is_written_once(tmp_path):
    model = adapted()
    model.get_base_model().config.quantization_config = {"quant_method": "some", "bits": 4}
    text = card_of(model, tmp_path)
    assert text.index("- bits: 4") < text.index("### Framework versions")
    assert card_of(model, tmp_path).count("- bits: 4") == 1


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path):
    broken = "---\ntags: [unclosed\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match="cannot be read as a model card"):
        adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_saving_writes_the_card_at_the_root_only(tmp_path):
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_file()
    assert not (tmp_path / "other" / "README.md").exists()
