"""MTL-LoRA: against its formula, rows by task, and the outputs that ``adapters`` gives for the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, inputs
from safetensors.torch import load_file
from torch import nn
from toys import tiny_llama

from peft import MtlLoraConfig, PeftModel, get_peft_model
from peft.core.model.walk import layers_of


pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parent / "golden" / "convert" / "adapters.safetensors"
TYPES = ("singular_values", "linear")
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "bert": ["query"],
    "t5": ["q", "wo"],
    "vit": ["q_proj"],
    "wav2vec2": ["q_proj"],
}


def adapted(name: str, **fields: Any) -> PeftModel:
    """A model with an adapter for three tasks, far from its start."""
    torch.manual_seed(2)
    config = MtlLoraConfig(**{"r": 3, "n_tasks": 3, "n_up_projection": 2, "target_modules": TARGETS[name], **fields})
    model = get_peft_model(build(name), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def logits(model: nn.Module, name: str, rows: Any = slice(None), **kwargs: Any) -> torch.Tensor:
    """The output for some rows of the batch, without gradients."""
    given = {key: value[rows] for key, value in inputs(name).items() if key != "labels"}
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    with torch.no_grad():
        return model(**given, **kwargs).logits


@pytest.mark.parametrize("kind", TYPES)
def test_an_update_is_what_the_formula_says(kind):
    """y' = y + s sum_j exp(w_tj / tau) / sum_i exp(w_ti / tau) B_j D_t A x, sample by sample."""
    torch.manual_seed(0)
    config = MtlLoraConfig(
        r=3, alpha=6, n_tasks=3, n_up_projection=2, task_specific_matrix_type=kind, target_modules=["0"],
        weights_sharpness=0.5,
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)), config)
    layer = model.base_model.model[0]
    a, b, d, w = (getattr(layer, f"mtl_lora_{name}")["default"] for name in ("A", "B", "D", "weights"))
    assert (a.shape, b.shape, d.shape, w.shape) == (
        (3, 5),
        (2, 4, 3),
        (3, 3, 3) if kind == "linear" else (3, 3),
        (3, 2),
    )
    assert b.abs().max() == 0 and w.eq(1).all()
    assert all(torch.equal(task, torch.eye(3) if kind == "linear" else torch.ones(3)) for task in d)
    with torch.no_grad():
        for p in (a, b, d, w):
            p.add_(torch.randn_like(p))
        x, tasks = torch.randn(4, 2, 5), torch.tensor([2, 0, 1, 2])
        wanted = layer.base_layer(x)
        for i, task in enumerate(tasks.tolist()):
            powers = [float(torch.exp(w[task, j] / 0.5)) for j in range(2)]
            matrix = d[task] if kind == "linear" else torch.diag(d[task])
            for j in range(2):
                wanted[i] += 2 * powers[j] / sum(powers) * (x[i] @ a.T @ matrix.T @ b[j].T)
        torch.testing.assert_close(model(x, task_ids=tasks), wanted)


@pytest.mark.parametrize("name", TARGETS)
def test_rows_are_those_of_their_tasks_and_files_hold_them(name, tmp_path):
    """Decoder, encoder, encoder-decoder, vision and audio."""
    model, tasks = adapted(name), torch.tensor([2, 0, 1, 0])
    whole = logits(model, name, task_ids=tasks)
    for row, task in enumerate(tasks):
        alone = logits(model, name, slice(row, row + 1), task_ids=[int(task)])
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
    assert (logits(model, name, task_ids=tasks.roll(1)) - whole).abs().amax(tuple(range(1, whole.dim()))).min() > 1e-3
    model.train()(**inputs(name), task_ids=tasks).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="depends on the task"):
        model.merge_and_unload()
    again = PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
    assert torch.equal(logits(again, name, task_ids=tasks), whole)


def test_a_task_has_a_gradient_of_its_own_and_a_share_in_the_rest():
    model = adapted("llama")
    given = {key: value[:1] for key, value in inputs("llama").items()}
    model.train()(**given, task_ids=[1]).loss.backward()
    layer = next(layer for _, layer in layers_of(model))
    for own in (layer.mtl_lora_D["default"].grad, layer.mtl_lora_weights["default"].grad):
        assert own[1].abs().max() > 0 and own[[0, 2]].abs().max() == 0
    assert layer.mtl_lora_A["default"].grad.abs().max() > 0 and layer.mtl_lora_B["default"].grad.abs().max() > 0


def test_generation_keeps_to_the_tasks_and_unknown_ones_are_named():
    model, ids = adapted("llama"), inputs("llama")["input_ids"][:2]
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    both = model.generate(input_ids=ids, task_ids=[2, 0], **options)
    for row, task in enumerate((2, 0)):
        assert torch.equal(model.generate(input_ids=ids[row : row + 1], task_ids=[task], **options)[0], both[row])
    with pytest.raises(ValueError, match="knows 3 tasks, so a call needs task_ids"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="outside 0..2"):
        model(input_ids=ids, task_ids=[0, 3])
    alone = adapted("llama", n_tasks=1)
    assert torch.equal(alone(input_ids=ids).logits, alone(input_ids=ids, task_ids=[0, 0]).logits)


def test_the_outputs_are_those_of_adapters():
    """Recorded from adapters 1.3.0: two adapters that share A and the B_j, each a task."""
    cases = load_file(GOLDEN)
    base = tiny_llama()
    base.load_state_dict({key.removeprefix("base|"): value for key, value in cases.items() if key.startswith("base|")})
    config = MtlLoraConfig(
        r=2, alpha=3, n_tasks=2, n_up_projection=3, weights_sharpness=0.5, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base, config).eval()
    for key, layer in layers_of(model.base_model.model):
        held = {
            "A": cases[f"mtl|{key}.shared_parameters.a,b.lora_A"],
            "B": cases[f"mtl|{key}.shared_parameters.a,b.lora_B"],
            "D": torch.stack([cases[f"mtl|{key}.loras.{task}.task_specific.values"] for task in "ab"]),
            "weights": torch.stack([cases[f"mtl|{key}.loras.{task}.weights"] for task in "ab"]),
        }
        for name, value in held.items():
            getattr(layer, f"mtl_lora_{name}")["default"].data.copy_(value)
    ids = torch.tensor([[1, 5, 2, 9, 3, 7], [4, 4, 8, 2, 6, 1], [9, 3, 7, 1, 5, 2]])
    with torch.no_grad():
        found = model(input_ids=ids, task_ids=[0, 1, 0]).logits
        assert (model(input_ids=ids, task_ids=[1, 0, 1]).logits - found).abs().max() > 1e-3
    torch.testing.assert_close(found, cases["mtl|output"], atol=2e-6, rtol=1e-5)
