"""Damaged and altered adapter files: each loads, or is refused by an error that names it; the base stays as it was.

``PEFT_FUZZ_FILES=10000 pytest tests/test_files_fuzz.py`` tries that many; by default 500 are tried.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import tiny_llama

from peft import (
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.error import PeftError


COUNT = int(os.environ.get("PEFT_FUZZ_FILES", "500"))
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS = (
    LoraConfig(
        **TARGETS,
        r=2,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 4},
        modules_to_save=["lm_head"],
        bias="all",
        exclude_modules=["k_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
    ),
    LoraConfig(**TARGETS, r=2, use_dora=True, trainable_token_indices={"embed_tokens": [1, 2]}),
    LoraConfig(target_modules=r".*\.(q|v)_proj", r=2, target_parameters=["o_proj.weight"]),
    IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    LoHaConfig(**TARGETS, r=2, rank_pattern={"v_proj": 1}),
    VeraConfig(target_modules=["q_proj"], r=2, save_projection=True),
    OFTConfig(**TARGETS, oft_block_size=4),
    BOFTConfig(**TARGETS, boft_block_size=4),
    FourierFTConfig(**TARGETS, n_frequency=4, n_frequency_pattern={"q_proj": 5}),
    MissConfig(**TARGETS, r=2),
    VBLoRAConfig(target_modules=["q_proj"], r=2, num_vectors=4, vector_length=4, save_only_topk_weights=True),
    LNTuningConfig(target_modules=["input_layernorm"]),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
)
JUNK = (None, True, False, 0, 1, -1, 3, 2**40, 0.5, -2.0, 1e300, "", "(", "q_proj", "*", "[a", "none", [], [None], [1],
        [""], ["("], ["q_proj"], [["q_proj"]], [{}], {}, {"(": 1}, {"q_proj": None}, {"q_proj": "2"}, {"q_proj": 0},
        {"q_proj": [1]}, {"": 2}, {"*": 3}, [[0, 1]], [-1], [2**40])  # fmt: skip


def is_refusal(error):
    return isinstance(error, ValueError | OSError | PeftError)


def alter_config(draw, values):
    """Change one entry of a config, or one inside a list or dict; gives its name."""
    name = draw.choice(sorted(values))
    value, junk = values[name], copy.deepcopy(draw.choice(JUNK))
    how = draw.random()
    if how < 0.1:
        del values[name]
    elif how < 0.2:
        values[name + draw.choice(("_", "s", ""))] = values.pop(name)
    elif how < 0.5 and isinstance(value, list) and value:
        value[draw.randrange(len(value))] = junk
    elif how < 0.5 and isinstance(value, dict) and value:
        value[draw.choice(sorted(value))] = junk
    elif how < 0.6 and isinstance(value, dict):
        value[draw.choice(("(", "", "*", "q_proj", "no_such"))] = junk
    elif how < 0.65:
        values[draw.choice(("no_such_field", "METHOD", "__class__", "self"))] = junk
    else:
        values[name] = junk
    return name


def alter_tensors(draw, tensors):
    """Change one tensor of a file, or its name."""
    name = draw.choice(sorted(tensors))
    tensor = tensors[name] if tensors[name].dim() else tensors[name][None]
    changed = draw.choice((
        None,
        tensor.new_zeros(0),
        tensor[:1].clone(),
        torch.cat((tensor, tensor)),
        tensor[None].clone(),
        tensor.flatten().clone(),
        tensor.new_full(tensor.shape, float("nan")) if tensor.is_floating_point() else tensor,
        tensor.to(torch.float16) if tensor.is_floating_point() else tensor.to(torch.int64),
        tensor.to(torch.int64),
        tensor.to(torch.bool),
        torch.tensor(1.0),
    ))  # fmt: skip
    del tensors[name]
    if changed is not None:
        tensors[draw.choice((name, name, name, name + ".x", name[1:], name.replace("model.", "", 1), "weight"))] = (
            changed
        )


def damage(draw, path):
    """Cut a file, or change a few of its bytes."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.4:
        data = data[: draw.randrange(len(data))]
    for _ in range(draw.randrange(4) if data else 0):
        data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
    path.write_bytes(data)


def alter(draw, folder, config, tensors):
    """Write altered files into a folder."""
    values, tensors = copy.deepcopy(config), dict(tensors)
    how = draw.random()
    for _ in range(draw.randint(1, 3)):
        if how < 0.7:
            alter_config(draw, values)
        if how > 0.6 and tensors:
            alter_tensors(draw, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    if how > 0.95:
        damage(draw, folder / draw.choice(("adapter_config.json", "adapter_model.safetensors")))


def picture(model):
    """All that could change in a base model."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return state, modules, {name: p.requires_grad for name, p in model.named_parameters()}, sorted(vars(model))


def same(one, other):
    return one[1:] == other[1:] and all(torch.equal(t, other[0][name]) for name, t in one[0].items())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Config and tensors of an adapter of each method."""
    found = []
    for number, config in enumerate(CONFIGS):
        folder = tmp_path_factory.mktemp(f"a{number}")
        get_peft_model(tiny_llama(), copy.deepcopy(config)).save_pretrained(folder)
        found.append(
            (json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors"))
        )
    return found


def names_entry(message, folder, config, tensors):
    """Whether an error says which entry of the config, or which tensor, it is about, or that a file is damaged."""
    if "damaged" in message and "cannot be made an adapter" not in message:
        return True
    written = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    names = {name for name in (*config, *written, *tensors, *held) if len(name) > 2}
    words = re.findall(r"[\w.]+", message)  # a short name such as "r" is said with its value
    return any(name.startswith(word.strip(".")) for word in words if len(word) > 3 for name in names) or bool(
        re.search(r"\b\w{1,3}=", message)
    )


def attempt(draw, folder, base, config, tensors, before):
    """Load altered files; gives what is wrong with what happened, or None, and the error."""
    alter(draw, folder, config, tensors)
    try:
        loaded = PeftModel.from_pretrained(base, folder)
    except Exception as error:
        if not is_refusal(error):
            return f"{type(error).__name__}: {error}", error
        if str(folder) not in str(error):
            return f"names no file: {type(error).__name__}: {error}", error
        if not names_entry(str(error).replace(str(folder), ""), folder, config, tensors):
            return f"names no entry: {type(error).__name__}: {error}", error
        return (None if same(before, picture(base)) else f"changed the base: {error}"), error
    back = loaded.unload() if hasattr(loaded, "unload") else loaded.get_base_model()
    assert isinstance(back, nn.Module)
    return None, None


def header(names, data=bytes(4)):
    """A file of safetensors with this header."""
    text = names if isinstance(names, bytes) else json.dumps(names).encode()
    return struct.pack("<Q", len(text)) + text + data


def loop(path):
    """A link to itself in a file's place."""
    path.unlink()
    path.symlink_to(path)


DEEP = b"[" * 100_000 + b"]" * 100_000
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BROKEN_CONFIGS = {
    "list": b"[]", "null": b"null", "empty": b"", "deep": DEEP, "deep inside": b'{"r":' + DEEP + b"}",
    "other bytes": b'{"peft_type":"LORA","revision":"\xe9"}', "utf-16": '{"peft_type":"LORA"}'.encode("utf-16"),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
}  # fmt: skip
BROKEN_WEIGHTS = {
    "empty": b"", "no header": struct.pack("<Q", 2**60) + b"{}", "list": header([]), "deep": header(DEEP),
    "no json": header(b"{]"), "other bytes": header(b"\xff\xfe"), "dtype": header({"a": {**ONE, "dtype": "F99"}}),
    "huge": header({"a": {**ONE, "shape": [2**40, 2**40]}}), "negative": header({"a": {**ONE, "shape": [-1]}}),
    "beyond": header({"a": {**ONE, "data_offsets": [0, 400]}}), "overlap": header({"a": ONE, "b": ONE}),
    "page": b"<!DOCTYPE html><html></html>",
}  # fmt: skip
ENTRIES = (
    {"r": 10**400}, {"r": -4}, {"r": 2**62}, {"r": "8"}, {"r": float("nan")}, {"lora_alpha": float("inf")},
    {"peft_type": ["LORA"]}, {"peft_type": ""}, {"task_type": 3}, {"peft_version": [1]}, {"target_modules": []},
    {"target_modules": [["q_proj"]]}, {"target_modules": ["\ud800"]}, {"layers_to_transform": [-1]},
    {"rank_pattern": {"q_proj": "2"}}, {"layer_replication": [[0, 99]]}, {"layer_replication": [0, 1]},
    {"trainable_token_indices": [2**70]}, {"eva_config": {"rho": "x"}},
    {"megatron_config": {"a": 1}, "megatron_core": "os"},
)  # fmt: skip
ACCEPTED = ({"use_dora": None, "use_rslora": 1}, {"cls": 1, "self": 2, "kwargs": 3}, {"__class__": "x", "to_dict": 1})


def refusal(base, folder):
    """The error that a folder is refused by, which names it and leaves the base as it was."""
    before = picture(base)
    with warnings.catch_warnings(), pytest.raises((ValueError, OSError, PeftError)) as caught:
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(base, folder)
    assert str(folder) in str(caught.value) and same(before, picture(base))
    return str(caught.value)


def test_broken_files_are_refused_by_name(files, tmp_path):
    base, (config, tensors) = tiny_llama(), files[0]
    weights, said = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(tensors, weights)
    for content in BROKEN_CONFIGS.values():
        said.write_bytes(content)
        assert said.name in refusal(base, tmp_path)
    for entry in ENTRIES:
        said.write_text(json.dumps(config | entry))
        message = refusal(base, tmp_path)
        assert said.name in message and any(name in message for name in ("targets", *entry))
    for entry in ACCEPTED:
        said.write_text(json.dumps(config | entry))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(base, tmp_path).unload()
    for content in BROKEN_WEIGHTS.values():
        weights.write_bytes(content)
        assert "adapter_model" in refusal(base, tmp_path)
    for path in (weights, said):
        loop(path)
        assert path.name in refusal(base, tmp_path)


def test_altered_files_load_or_are_refused(files, tmp_path):
    wrong, loaded, refused = [], 0, 0
    for seed in range(COUNT):
        draw = random.Random(seed)
        base = tiny_llama()
        before = picture(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem, error = attempt(draw, tmp_path, base, *draw.choice(files), before)
        loaded, refused = loaded + (error is None), refused + (error is not None)
        if problem:
            wrong.append(f"{seed}: {problem[:300]}")
    print(f"{COUNT} files: {loaded} loaded, {refused} refused")
    assert wrong == []
    assert loaded > COUNT // 20 and refused > COUNT // 20
