"""Adapters on every kind of layer, against outputs recorded from the reference library.

`kinds/<case>.json` names a module of `toys.py`, the config's class and arguments, and holds the `adapter_config.json`
that the reference wrote. `kinds/<case>.safetensors` holds `base.*` (the base model), `in.*` (its inputs),
`fresh.*` (the initial tensors after `torch.manual_seed(0)`), `adapter.*` (the file of the perturbed adapter),
`out.base` and `out.adapter`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import TOYS

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict


KINDS = Path(__file__).parent / "kinds"
CASES = sorted(path.stem for path in KINDS.glob("*.json"))
TIGHT = {"rtol": 1e-5, "atol": 1e-5}
# No grouped kernel equals a pair whose down-projection reads all channels, and no weight an update of some tokens.
NOT_MERGEABLE = {"lora_conv2d_groups": "group", "lora_alora": "some tokens"}
# A tensor that two tied layers share: the recorded file repeats it, ours may write it once.
REPEATED = {"tokens_tied": {"base_model.model.lm_head.trainable_tokens_delta"}}


@functools.cache
def read(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the recorded tensors of a case."""
    return json.loads((KINDS / f"{case}.json").read_text()), load_file(KINDS / f"{case}.safetensors")


def part(case: str, prefix: str) -> dict[str, torch.Tensor]:
    """The recorded tensors below a prefix."""
    return {key[len(prefix) :]: value for key, value in read(case)[1].items() if key.startswith(prefix)}


def build_base(case: str) -> nn.Module:
    """The base model of a case, in eval mode."""
    model = TOYS[read(case)[0]["toy"]]()
    found = model.load_state_dict(part(case, "base."), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}  # tied to the embedding, which is there
    return model.eval()


def build_config(case: str) -> peft.PeftConfig:
    """A fresh config from the recorded arguments."""
    record, _ = read(case)
    kwargs = json.loads(json.dumps(record["config_kwargs"]))
    return getattr(peft, record["config_class"])(task_type=record["task_type"], **kwargs)


def write_folder(case: str, folder: Path, **changes: Any) -> str:
    """Write the recorded adapter as a folder, with changes to its config, and return the path."""
    config = read(case)[0]["adapter_config"] | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(part(case, "adapter."), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def run(model: nn.Module, case: str) -> torch.Tensor:
    """The output of a model on the recorded inputs, without gradients."""
    with torch.no_grad():
        output = model(**part(case, "in."))
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("case", CASES)
class TestKinds:
    """One recorded case against our library."""

    def test_output(self, case: str, tmp_path: Path) -> None:
        _, tensors = read(case)
        base = build_base(case)
        torch.testing.assert_close(run(base, case), tensors["out.base"], **TIGHT)
        model = PeftModel.from_pretrained(base, write_folder(case, tmp_path))
        torch.testing.assert_close(run(model, case), tensors["out.adapter"], **TIGHT)
        with model.disable_adapter():
            torch.testing.assert_close(run(model, case), tensors["out.base"], **TIGHT)
        assert (tensors["out.adapter"] - tensors["out.base"]).abs().max() > 1e-3, "the case would show nothing"

    def test_merged_equals_unmerged(self, case: str, tmp_path: Path) -> None:
        _, tensors = read(case)
        folder = write_folder(case, tmp_path)
        model = PeftModel.from_pretrained(build_base(case), folder)
        if case in NOT_MERGEABLE:
            with pytest.raises(NotImplementedError, match=NOT_MERGEABLE[case]):
                model.merge_adapter()
            torch.testing.assert_close(run(model, case), tensors["out.adapter"], **TIGHT)
            return
        model.merge_adapter()
        torch.testing.assert_close(run(model, case), tensors["out.adapter"], **TIGHT)
        model.unmerge_adapter()
        torch.testing.assert_close(run(model, case), tensors["out.adapter"], **TIGHT)
        plain = PeftModel.from_pretrained(build_base(case), folder).merge_and_unload()
        torch.testing.assert_close(run(plain, case), tensors["out.adapter"], **TIGHT)

    def test_same_seed_draws_the_same_tensors(self, case: str) -> None:
        base = build_base(case)
        torch.manual_seed(0)
        model = get_peft_model(base, build_config(case))
        found, wanted = get_peft_model_state_dict(model, save_embedding_layers=False), part(case, "fresh.")
        assert found.keys() | REPEATED.get(case, set()) == wanted.keys()
        for key, value in found.items():
            if not key.endswith("attn.base_layer.out_proj.lora_A.weight"):  # the reference draws this one twice
                torch.testing.assert_close(value, wanted[key], msg=lambda text, key=key: f"{key}: {text}", **TIGHT)

    def test_saved_tensors(self, case: str, tmp_path: Path) -> None:
        model = PeftModel.from_pretrained(build_base(case), write_folder(case, tmp_path))
        model.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
        found, wanted = load_file(tmp_path / "again" / "adapter_model.safetensors"), part(case, "adapter.")
        assert found.keys() | REPEATED.get(case, set()) == wanted.keys()
        for key, value in found.items():
            if key.endswith("out_proj.lora_B.weight"):
                value = value / 2  # files before 1.0 mean this update twice; ours say so in the tensor
            # COFT's projection of a tensor onto its ball is repeated by every forward.
            torch.testing.assert_close(value, wanted[key], msg=lambda text, key=key: f"{key}: {text}", **TIGHT)


def test_attention_of_our_files_adds_the_output_projection_once(tmp_path: Path) -> None:
    """Files of the reference (version below 1) add the update of out_proj twice; ours are y = x (W + dW)^T."""
    case = "lora_attention"
    _, tensors = read(case)
    ours = PeftModel.from_pretrained(build_base(case), write_folder(case, tmp_path, peft_version="1.0.0"))
    adapter = part(case, "adapter.base_model.model.attn.")
    scaling = read(case)[0]["adapter_config"]["lora_alpha"] / read(case)[0]["adapter_config"]["r"]
    plain = build_base(case)
    with torch.no_grad():
        plain.attn.in_proj_weight += scaling * adapter["lora_B.weight"] @ adapter["lora_A.weight"]
        up, down = adapter["base_layer.out_proj.lora_B.weight"], adapter["base_layer.out_proj.lora_A.weight"]
        plain.attn.out_proj.weight += scaling * up @ down
    torch.testing.assert_close(run(ours, case), run(plain, case), **TIGHT)
    assert not torch.allclose(run(ours, case), tensors["out.adapter"], **TIGHT)
    ours.merge_adapter()
    torch.testing.assert_close(run(ours, case), run(plain, case), **TIGHT)
