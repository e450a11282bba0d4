"""Configs: fields and defaults, validation, and the way to `adapter_config.json` and back."""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import peft.config
from peft._version import __version__
from peft.config import (
    CONFIG_NAME,
    PeftConfig,
    PeftConfigMixin,
    PromptLearningConfig,
    TargetModules,
    match_pattern,
    option,
    resolve_pattern,
)
from peft.tuners.lora import config as lora_config
from peft.tuners.lora.config import LoftQConfig, LoraConfig, LoraRuntimeConfig
from peft.utils import peft_types
from peft.utils.error import ConfigError, ConfigFileError, NotSupportedYetError, PeftError
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType, register_peft_method
from peft.utils.warning import PeftWarning


REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_configs.json").read_text())
REQUIRED = {"cpt_token_ids": [1, 2], "total_step": 10}
"""Fields that have to be given, in some configs."""
OUR_OWN = {"LilyConfig": {"routing"}}
"""Fields that the file format of others does not have, and that files have all the same, by class."""
BASES = {cls.__name__: cls for cls in (PeftConfigMixin, PeftConfig, PromptLearningConfig)}


def _config_classes() -> dict[str, type]:
    peft.config._load_methods()
    return {LoraConfig.__name__: LoraConfig, **{c.__name__: c for c in PEFT_TYPE_TO_CONFIG_MAPPING.values()}}


CONFIGS = _config_classes()


def _minimal(cls: type) -> PeftConfig:
    names = {f.name for f in dataclasses.fields(cls)}
    kwargs = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "target_modules": ["v_proj", "q_proj"]}
    if cls.__name__ == "AdaptionPromptConfig":
        kwargs["target_modules"] = "self_attn"  # one name
    if "feedforward_modules" in names:
        kwargs["feedforward_modules"] = ["q_proj"]
    kwargs |= REQUIRED
    return cls(**{k: v for k, v in kwargs.items() if k in names})


def _edit(folder: Path, **changes) -> Path:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def registry():
    mappings = [getattr(peft_types, n) for n in dir(peft_types) if n.startswith("PEFT_TYPE_TO_")]
    before = [dict(m) for m in mappings]
    yield
    for mapping, content in zip(mappings, before):
        mapping.clear()
        mapping.update(content)


# ------------------------------------------------------------------------------------------------ fields and defaults


def _default(field: dataclasses.Field):
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value):
        return {"__class__": type(value).__name__, **dataclasses.asdict(value)}
    return value.value if isinstance(value, enum.Enum) else value


def _assert_fields(cls: type, expected: dict) -> None:
    known = (f for f in dataclasses.fields(cls) if not f.metadata.get("own"))
    found = {f.name: _default(f) for f in known if f.name not in OUR_OWN.get(cls.__name__, ())}
    assert found == expected
    assert {n: type(v) for n, v in found.items()} == {n: type(v) for n, v in expected.items()}  # True is not 1


@pytest.mark.parametrize("method", sorted(REFERENCE["methods"]))
def test_fields_and_defaults_of_methods(method):
    entry = REFERENCE["methods"][method]
    cls = CONFIGS[entry["config_class"]]
    _assert_fields(cls, entry["fields"])
    given = {name: value for name, value in REQUIRED.items() if name in entry["fields"]}
    assert cls(**given).peft_type is PeftType[method]


@pytest.mark.parametrize("name", sorted(REFERENCE["helpers"]))
def test_fields_and_defaults_of_helpers(name):
    _assert_fields(BASES.get(name) or getattr(lora_config, name), REFERENCE["helpers"][name]["fields"])


def test_enums_have_all_names():
    assert [e.name for e in PeftType] == [e.value for e in PeftType] == REFERENCE["peft_types"]
    assert [e.name for e in TaskType] == [e.value for e in TaskType] == REFERENCE["task_types"]
    assert PeftType.LORA == "LORA" and {PeftType.LORA: 1}["LORA"] == 1


UNREAD = {
    "target_svd_config": "never did anything; a value given for it is told",
    "poly_type": "one choice",
    "runtime_config": "its one option says that it has no effect",
    "use_qalora": "read by the name that the variant gives",
    "shadow_hidden_size": "read with others as shadow_...",
    "shadow_intermediate_size": "read with others as shadow_...",
    "shadow_num_attention_heads": "read with others as shadow_...",
}
"""Fields that no code reads by name, and why."""


def test_every_field_is_read():
    read: set[str] = set()
    for path in Path(peft.config.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                read.update(a.value for a in node.args if isinstance(a, ast.Constant))
            elif isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "loss_weight":
                read.add(node.value.value)
    fields = {f.name for cls in CONFIGS.values() for f in dataclasses.fields(cls)}
    assert fields - read == set(UNREAD)


@pytest.mark.parametrize("cls", [*CONFIGS.values(), *BASES.values()], ids=lambda c: c.__name__)
def test_every_field_has_help(cls):
    for field in dataclasses.fields(cls):
        assert len(field.metadata.get("help", "")) > 10, f"{cls.__name__}.{field.name}"
        nested = field.metadata.get("nested")
        for inner in dataclasses.fields(nested) if nested else ():
            assert len(inner.metadata.get("help", "")) > 10, f"{nested.__name__}.{inner.name}"


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("cls", CONFIGS.values(), ids=lambda c: c.__name__)
def test_round_trip(cls, tmp_path):
    config = _minimal(cls)
    config.save_pretrained(tmp_path / "new" / "folder")
    for reader in (PeftConfig, cls):
        loaded = reader.from_pretrained(tmp_path / "new" / "folder")
        assert type(loaded) is cls and loaded == config
    assert os.listdir(tmp_path / "new" / "folder") == [CONFIG_NAME]
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_file_looks_as_the_ecosystem_expects(saved):
    text = (saved / CONFIG_NAME).read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True)
    assert content["target_modules"] == ["q_proj", "v_proj"]
    assert (content["peft_type"], content["task_type"]) == ("LORA", "CAUSAL_LM")
    assert content["peft_version"] == __version__
    assert set(content) == set(REFERENCE["methods"]["LORA"]["fields"]) - {"runtime_config"}


def test_enum_task_type_is_written_as_text(tmp_path):
    LoraConfig(task_type=TaskType.SEQ_CLS).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["task_type"] == "SEQ_CLS"


def test_auto_mapping_is_written(tmp_path):
    LoraConfig().save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Net"})
    assert LoraConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "Net"}


def test_values_survive_a_round_trip(tmp_path):
    config = LoraConfig(
        target_modules=["b", "a"],
        exclude_modules=("x",),
        rank_pattern={"^a": 2, "b": 3},
        alpha_pattern={"b": 0.5},
        layers_to_transform=range(2),
        layers_pattern="h",
        layer_replication=[[0, 2], (1, 3)],
        trainable_token_indices={"embed": [1, 2]},
        modules_to_save={"z", "y"},
        use_dora=True,
        inference_mode=True,
    )
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"x"}
    assert config.layers_to_transform == [0, 1] and config.modules_to_save == ["y", "z"]
    assert config.layer_replication == [(0, 2), (1, 3)]
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_runtime_config_is_not_saved(tmp_path):
    config = LoraConfig(runtime_config={"ephemeral_gpu_offload": True})
    assert config.runtime_config == LoraRuntimeConfig(ephemeral_gpu_offload=True)
    assert "runtime_config" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).runtime_config == LoraRuntimeConfig()


@pytest.mark.parametrize("method", sorted(set(REFERENCE["methods"]) - {"LILY"}))  # whose `routing` says who wrote it
def test_a_dict_has_fields_of_our_own_only_where_they_are_set(method):
    # diffusers writes the dict into its files, where 0.21.2 makes a config of it
    entry = REFERENCE["methods"][method]
    needed = {"ADALORA": {"total_step": 9}}.get(method, {})
    said = PEFT_TYPE_TO_CONFIG_MAPPING[method](**needed).to_dict()
    assert set(said) <= {*entry["fields"], "peft_type", "task_type", "peft_version"}
    assert LoraConfig(use_gating=True).to_dict()["use_gating"] is True


def test_the_method_of_a_saved_config(saved):
    assert PeftConfig._get_peft_type(str(saved)) == "LORA"


def test_the_file_wins_over_keywords_and_keywords_over_defaults(saved):
    content = json.loads((saved / CONFIG_NAME).read_text())
    del content["use_rslora"]
    (saved / CONFIG_NAME).write_text(json.dumps(content))
    config = PeftConfig.from_pretrained(saved, r=64, use_rslora=True, token="t", device_map="auto")
    assert config.r == 4 and config.use_rslora is True


def test_from_peft_type():
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == LoraConfig(r=3)
    assert LoraConfig.from_peft_type(r=3) == LoraConfig(r=3)


# ---------------------------------------------------------------------------------- files of other versions, bad files


def test_unknown_fields_are_named_in_one_warning(saved):
    _edit(saved, peft_version="9.1", new_field=1, other=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(saved)
    assert [w.category for w in caught] == [PeftWarning]
    for text in ("new_field", "other", "9.1", __version__):
        assert text in str(caught[0].message)
    assert config.r == 4 and not hasattr(config, "new_field")


def test_unknown_nested_field_is_named_and_left_out(saved):
    _edit(saved, loftq_config={"loftq_bits": 3, "new": 1})
    with pytest.warns(PeftWarning, match=r"loftq_config\.new"):
        config = PeftConfig.from_pretrained(saved)
    assert config.loftq_config == LoftQConfig(loftq_bits=3)


def test_version_of_the_file_is_kept_until_saved(saved, tmp_path):
    _edit(saved, peft_version="0.9.0")
    config = PeftConfig.from_pretrained(saved)
    assert config.peft_version == "0.9.0"
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_NAME).read_text())["peft_version"] == __version__
    path = saved / CONFIG_NAME
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "peft_version"}))
    assert PeftConfig.from_pretrained(saved).peft_version is None  # written before the field existed
    assert LoraConfig().peft_version == __version__


def test_unknown_method_names_nearest_and_version(saved):
    path = _edit(saved, peft_type="LROA", peft_version="9.1")
    with pytest.raises(ConfigError, match=r"LROA.*Did you mean 'LORA'.*9\.1") as caught:
        PeftConfig.from_pretrained(saved)
    assert str(path) in str(caught.value)


def test_known_method_that_is_not_there_is_refused_by_name(saved, registry):
    PEFT_TYPE_TO_CONFIG_MAPPING.pop("CPT", None)
    _edit(saved, peft_type="CPT")
    with pytest.raises(NotSupportedYetError, match="CPT"):
        PeftConfig.from_pretrained(saved)


@pytest.mark.parametrize("content", ['{"peft_type": "LO', "", "[1]", "\x00"])
def test_damaged_file_is_named(saved, content):
    (saved / CONFIG_NAME).write_text(content)
    with pytest.raises(ConfigFileError) as caught:
        PeftConfig.from_pretrained(saved)
    assert str(saved / CONFIG_NAME) in str(caught.value)


def test_file_that_is_no_text_is_named(saved):
    (saved / CONFIG_NAME).write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigFileError, match="damaged"):
        PeftConfig.from_pretrained(saved)


def test_missing_file_names_folder_and_sub_folders(saved):
    LoraConfig().save_pretrained(saved / "second")
    (saved / CONFIG_NAME).unlink()
    with pytest.raises(ConfigFileError, match="second") as caught:
        PeftConfig.from_pretrained(saved)
    assert str(saved) in str(caught.value) and CONFIG_NAME in str(caught.value)
    with pytest.raises(ConfigFileError, match="third"):
        PeftConfig.from_pretrained(saved, subfolder="third")
    assert PeftConfig.from_pretrained(saved, subfolder="second") == LoraConfig()


def test_neither_folder_nor_repository(tmp_path):
    with pytest.raises(ConfigFileError, match="no local folder"):
        PeftConfig.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigFileError, match="someone/nothing"):
        PeftConfig.from_pretrained("someone/nothing", local_files_only=True, cache_dir=str(tmp_path))


def test_config_comes_from_the_hub_with_its_options(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repo_id, filename, *, subfolder=None, revision=None, token=None):
        asked.update(repo_id=repo_id, filename=filename, subfolder=subfolder, revision=revision, token=token)
        return str(saved / CONFIG_NAME)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = PeftConfig.from_pretrained("user/name", "sub", revision="v1", token="t", is_trainable=True)
    assert config.r == 4 and config.revision is None
    expected = {"repo_id": "user/name", "filename": CONFIG_NAME, "subfolder": "sub", "revision": "v1", "token": "t"}
    assert asked == expected


# ------------------------------------------------------------------------------------------------------ atomic writing


def _crash(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_interrupted_save_keeps_the_old_file(saved, monkeypatch, moment):
    before = (saved / CONFIG_NAME).read_bytes()
    monkeypatch.setattr(os, moment, _crash)
    with pytest.raises(OSError, match="disk full"):
        LoraConfig(r=64).save_pretrained(saved)
    assert (saved / CONFIG_NAME).read_bytes() == before
    assert os.listdir(saved) == [CONFIG_NAME]


def test_value_that_json_cannot_hold_is_named(saved):
    before = (saved / CONFIG_NAME).read_bytes()
    config = LoraConfig(auto_mapping={"a": object()})
    with pytest.raises(ConfigError, match="auto_mapping"):
        config.save_pretrained(saved)
    assert (saved / CONFIG_NAME).read_bytes() == before


def test_saving_into_a_file_is_refused(saved):
    with pytest.raises(ConfigFileError, match="it is a file"):
        LoraConfig().save_pretrained(saved / CONFIG_NAME)


def test_push_to_hub_uploads_the_saved_file_and_its_tags_in_one_commit_to_a_branch_that_is_made(monkeypatch):
    import huggingface_hub
    from transformers.utils import hub

    calls = {}

    def create_repo(repo_id, **kwargs):
        calls["repo"] = repo_id, kwargs
        return huggingface_hub.RepoUrl(f"https://huggingface.co/user/{repo_id}")

    def create_branch(**kwargs):
        calls["branch"] = kwargs["repo_id"], kwargs["branch"]

    def create_commit(repo_id, operations, **kwargs):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_text() for operation in operations}
        calls["commit"] = repo_id, files, kwargs
        return "commit"

    api = SimpleNamespace(create_repo=create_repo, create_branch=create_branch, create_commit=create_commit)
    monkeypatch.setattr(hub, "hf_api", lambda: api, raising=False)
    for name, call in vars(api).items():  # transformers has imported them by name
        monkeypatch.setattr(hub, name, call, raising=False)
    options = {"token": "t", "private": True, "revision": "second", "tags": ["poems"]}
    assert LoraConfig(r=5).push_to_hub("name", **options) == "commit"
    assert calls["repo"] == ("name", {"private": True, "token": "t", "exist_ok": True})
    assert calls["branch"] == ("user/name", "second")
    repo_id, files, given = calls["commit"]
    assert (repo_id, given["revision"], given["commit_message"]) == ("user/name", "second", "Upload config")
    assert json.loads(files.pop(CONFIG_NAME))["r"] == 5 and "- poems" in files.pop("README.md") and files == {}


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"r": 0}, "r=0 .* at least 1"),
        ({"r": "8"}, "r='8' .* whole number"),
        ({"r": 2.5}, "r=2.5 .* whole number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 .* below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1 .* at least 0"),
        ({"bias": "lora_onyl"}, "bias='lora_onyl'.*Did you mean 'lora_only'.*'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "gausian"}, "Did you mean 'gaussian'"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 "),
        ({"task_type": "CAUSALLM"}, "invalid task type 'CAUSALLM'.*Did you mean 'CAUSAL_LM'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]='x'"),
        ({"alpha_pattern": 3}, "alpha_pattern must be a dict"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"exclude_modules": [1]}, "exclude_modules must be a list"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": "all-linear", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"target_modules": ["q"], "layers_to_transform": [-1]}, "layer numbers"),
        ({"init_lora_weights": "orthogonal", "r": 7}, "even, got 7"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "even, got 3"),
        ({"layer_replication": [(3, 1)]}, r"layer_replication .* \(3, 1\)"),
        ({"layer_replication": [(0, 1, 2)]}, "layer_replication"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed": "12"}}, "trainable_token_indices"),
        ({"target_parameters": ["w"], "lora_dropout": 0.1}, "target_parameters does not work with lora_dropout"),
        ({"target_parameters": ["w"], "use_dora": True}, "target_parameters does not work with use_dora"),
        ({"target_parameters": ["w"], "lora_bias": True}, "target_parameters does not work with lora_bias"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoraConfig(**kwargs)
    assert isinstance(caught.value, (PeftError, ValueError)) and "LoraConfig" in str(caught.value)


def test_unknown_keyword_names_the_nearest_field():
    with pytest.raises(TypeError, match="'target_module'.*Did you mean 'target_modules'"):
        LoraConfig(target_module=["q"])
    with pytest.raises(TypeError, match="EvaConfig has no field 'rhoo'.*'rho'"):
        LoraConfig(eva_config={"rhoo": 1.0})


def test_subclass_with_a_constructor_of_its_own():
    class Mine(LoraConfig):
        def __init__(self, rank, **kwargs):
            super().__init__(r=rank, **kwargs)

    assert Mine(rank=3, lora_alpha=1).r == 3


def test_bad_value_in_a_file_names_the_file(saved):
    path = _edit(saved, r=0)
    with pytest.raises(ConfigError, match="r=0") as caught:
        PeftConfig.from_pretrained(saved)
    assert str(path) in str(caught.value)


def test_prompt_learning_base():
    assert PromptLearningConfig(num_virtual_tokens=3).is_prompt_learning is True
    assert LoraConfig().is_prompt_learning is False and LoraConfig().is_adaption_prompt is False
    assert PeftConfig(peft_type="ADAPTION_PROMPT").is_adaption_prompt is True
    with pytest.raises(ConfigError, match="num_virtual_tokens=0"):
        PromptLearningConfig(num_virtual_tokens=0)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations_of_today_are_accepted(init):
    assert LoraConfig(init_lora_weights=init, use_dora=True, use_rslora=True).init_lora_weights == init


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    "keys, name, expected",
    [
        (["q_proj"], "model.layers.0.q_proj", "q_proj"),
        (["a", "layers.0.q_proj"], "model.layers.0.q_proj", "layers.0.q_proj"),
        (["^q_proj"], "model.q_proj", None),
        (["^q_proj"], "q_proj", "^q_proj"),
        (["^model.q_proj"], "model.q_proj", "^model.q_proj"),
        (["^a.*proj"], "x.a.b.proj", None),
        (["proj"], "q_proj", None),
        (["l.*"], "model.layers.0.q_proj", "l.*"),
        (["a|b"], "m.b", "a|b"),
        (["a|b"], "xb", None),
        (["q.*", "q2"], "q2", "q.*"),
        (["q"], "model.q.inner", None),
        (["q"], "model.q\n", None),
    ],
)
def test_match_pattern(keys, name, expected):
    assert match_pattern(keys, name) == expected
    assert resolve_pattern({k: i for i, k in enumerate(keys)}, name, -1) == (
        -1 if expected is None else keys.index(expected)
    )


def test_resolve_pattern_without_patterns():
    assert resolve_pattern(None, "a", 8) == resolve_pattern({}, "a", 8) == 8
    assert LoraConfig(rank_pattern=None).rank_pattern == {}


# ------------------------------------------------------------------------------------------------------------ registry


@dataclasses.dataclass
class _ThirdPartyConfig(TargetModules):
    METHOD: ClassVar = "THIRD_PARTY"
    size: int = option(2, "A size that has to be positive.", minimum=1)


def test_third_parties_register_methods_of_their_own(registry, tmp_path):
    register_peft_method(name="third_party", config_cls=_ThirdPartyConfig, model_cls=object, is_mixed_compatible=True)
    register_peft_method(name="third_party", config_cls=_ThirdPartyConfig, model_cls=object, is_mixed_compatible=True)
    assert peft_types.PEFT_TYPE_TO_PREFIX_MAPPING["THIRD_PARTY"] == "third_party_"
    assert peft_types.PEFT_TYPE_TO_MIXED_MODEL_MAPPING["THIRD_PARTY"] is object
    config = _ThirdPartyConfig(size=3, target_modules=["a"])
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "Third"}, "lower case"),
        ({"name": "third party"}, "identifier"),
        ({"prefix": ""}, "prefix"),
        ({"name": "taken"}, "already registered with _ThirdPartyConfig"),
    ],
)
def test_bad_registrations_change_nothing(registry, changes, message):
    register_peft_method(name="taken", config_cls=_ThirdPartyConfig, model_cls=int)
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    with pytest.raises(ValueError, match=message):
        register_peft_method(**{"name": "fresh", "config_cls": LoraConfig, "model_cls": object, **changes})
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING


def test_registration_needs_classes(registry):
    with pytest.raises(TypeError, match="config_cls"):
        register_peft_method(name="fresh", config_cls=LoraConfig(), model_cls=object)


# ------------------------------------------------------------------------------------------------------------- imports


def test_importing_the_config_is_light():
    code = (
        "import sys, peft.config; "
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'huggingface_hub', 'accelerate')])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(peft.config.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_a_config_resolves_can_be_read_from_it() -> None:
    assert peft.SupertuningConfig(r=3).lora_alpha == 6 and peft.SupertuningConfig().lora_alpha is None


def test_a_config_without_a_method_raises_what_0_21_raises(tmp_path: Path) -> None:
    """TypeError where a config is read, KeyError where a model is loaded; both are ValueErrors here as well."""
    file = tmp_path / CONFIG_NAME
    for values in ({"r": 3, "hidden_size": 8}, {"r": 3, "peft_type": "NONE_OF_OURS"}):
        file.write_text(json.dumps(values))
        for error in (TypeError, KeyError, ValueError):
            with pytest.raises(error, match=f"{CONFIG_NAME}: .*peft_type"):
                PeftConfig.from_pretrained(tmp_path)
            with pytest.raises(error, match="peft_type"):
                peft.get_peft_config({name: value for name, value in values.items() if name != "hidden_size"})
    file.write_text(json.dumps({"r": 3, "target_modules": ["a"]}))
    assert LoraConfig.from_pretrained(tmp_path).r == 3, "the class says what the file leaves out"
    with pytest.raises(TypeError, match="names no peft_type"):
        peft.IA3Config.from_pretrained(tmp_path)


def test_what_a_file_says_of_a_process_is_left_out_and_named(tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    for cls in (PeftConfig, LoraConfig):
        with pytest.warns(PeftWarning, match="runtime_config of a file does nothing"):
            assert not cls.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload
    values["runtime_config"]["ephemeral_gpu_offload"] = False
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraConfig.from_pretrained(tmp_path)
