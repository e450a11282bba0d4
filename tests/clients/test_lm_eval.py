"""lm_eval measures a model with an adapter from a folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fill, llama, lora, tokenizer

from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model


lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
instance = pytest.importorskip("lm_eval.api.instance")

TEXTS = [("a b c", " d e f"), ("u v", " w x y"), ("k l m n", " o p")]


def measured(folder: Any, name: str | None = None) -> list[float]:
    """Log-likelihoods of the texts, of the base in `folder` with the adapter `name` in it."""
    extra = {} if name is None else {"peft": str(folder / name)}
    model = huggingface.HFLM(
        pretrained=str(folder / "base"), device="cpu", dtype="float32", batch_size=2, max_length=32, **extra
    )
    assert isinstance(model.model, PeftModel) == (name is not None)
    requests = [instance.Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
    return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]


CONFIGS = {
    "lora": lora(task_type="CAUSAL_LM"),
    "dora": lora(task_type="CAUSAL_LM", use_dora=True),
    "head": lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_from_a_folder(tmp_path, name, as_reference):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(llama(), CONFIGS[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(tmp_path / name)
    if name in ("lora", "dora"):
        fill(model, 5, only="lora_").save_pretrained(tmp_path / name)
    scores = measured(tmp_path, name)
    assert scores != measured(tmp_path)
    if name in ("lora", "ia3", "dora"):
        as_reference(scores=scores, tolerance=1e-4)
