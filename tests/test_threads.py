"""Threads that serve one model: each gets the answers of its own calls, whatever the others ask for meanwhile."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from toys import tiny_llama

from peft import (
    AdaptionPromptConfig,
    BottleneckConfig,
    LilyConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    ShadowConfig,
    get_peft_model,
)


LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], **LM}
IDS = torch.arange(12).reshape(2, 6)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def rows(*names: str) -> dict[str, Any]:
    return {"input_ids": IDS, "adapter_names": list(names)}


# name -> the config, and calls of which no two may see each other's facts
CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "lora": (
        lambda: LoraConfig(r=2, init_lora_weights=False, **LINEAR),
        [rows("default", "default"), rows("other", "other"), rows("__base__", "other"), {"input_ids": IDS}],
    ),
    "lily": (
        lambda: LilyConfig(r=2, init_weights=False, **LINEAR),
        [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": MASK}],
    ),
    "poly": (
        lambda: PolyConfig(r=2, n_skills=2, n_splits=2, n_tasks=3, **LINEAR),
        [{"input_ids": IDS, "task_ids": torch.tensor([k])} for k in range(3)],
    ),
    "bottleneck": (lambda: BottleneckConfig(reduction_factor=4, **LM), [{"input_ids": IDS}, {"input_ids": IDS + 9}]),
    "adaption prompt": (
        lambda: AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **LM),
        [{"input_ids": IDS}, {"input_ids": IDS[:, :4]}],
    ),
    "shadow": (lambda: ShadowConfig(r=2, **LM), [{"input_ids": IDS}, {"input_ids": IDS[:, :4]}]),
    "reft": (
        lambda: ReftConfig(r=2, **LM),
        [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, {"input_ids": IDS, "attention_mask": MASK}],
    ),
    "prompt": (
        lambda: PromptTuningConfig(num_virtual_tokens=2, **LM),
        [rows("default", "default"), rows("other", "other"), rows("__base__", "other")],
    ),
    "prefix": (
        lambda: PrefixTuningConfig(num_virtual_tokens=2, **LM),
        [rows("default", "default"), rows("other", "other"), rows("__base__", "other")],
    ),
}


def build(case: str) -> PeftModel:
    """A tiny llama with the adapter, and a second one where calls name one, both away from their starts."""
    torch.manual_seed(0)
    config, calls = CASES[case]
    model = get_peft_model(tiny_llama(), config())
    if any("adapter_names" in call for call in calls):
        model.add_adapter("other", config())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or ".other" in name:
                p += 0.3 * torch.randn_like(p)
    return model.eval()


def in_step(modules: Sequence[nn.Module], count: int) -> None:
    """Let as many threads wait for each other before each of these modules, so that their calls surely mix."""
    barrier = threading.Barrier(count, timeout=30)

    def wait(module: nn.Module, args: tuple) -> None:
        barrier.wait()

    for module in modules:
        module.register_forward_pre_hook(wait)


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_see_each_other(case: str) -> None:
    model, calls = build(case), CASES[case][1]
    fresh = copy.deepcopy(model)  # which learns where things are in the first call, by several threads at once
    with torch.no_grad():
        wanted = [model(**call).logits for call in calls]
    assert not all(a.equal(wanted[0]) for a in wanted[1:]), "the calls must differ"
    in_step(model.get_base_model().model.layers, len(calls))
    in_step([fresh.get_base_model().model.embed_tokens], len(calls))
    for serving, times in ((model, 2), (fresh, 1)):
        found: list[Any] = [None] * len(calls)

        def serve(i: int, serving: PeftModel = serving, times: int = times, found: list[Any] = found) -> None:
            with torch.no_grad():
                found[i] = [serving(**calls[i]).logits for _ in range(times)]

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for want, answers in zip(wanted, found):
            assert answers is not None, "the call failed"
            for answer in answers:
                torch.testing.assert_close(answer, want)


def test_a_thread_that_calls_nothing_sees_the_last_call() -> None:
    """As autograd's threads do, which compute layers again in the backward pass of a device."""
    model = build("lora")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x, seen = torch.randn(2, 3, 16), []

    def compute() -> None:
        seen.append(layer(x).detach())

    model(**rows("default", "other"))  # the facts of calls with gradients stay, for the backward pass
    wanted = layer(x).detach()
    for call in (None, None, {"input_ids": IDS}):
        if call:
            model(**call)
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert torch.equal(seen[0], wanted)
    assert torch.equal(seen[1], wanted)
    assert torch.equal(seen[2], layer(x))
    assert not torch.equal(seen[2], wanted)


def test_the_fast_path_of_torch_comes_back() -> None:
    """Two mixed calls that overlap leave torch's switch as it was."""
    from peft.core.layer.rows import without_fast_path

    first, second = without_fast_path(), without_fast_path()
    assert torch.backends.mha.get_fastpath_enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_blocks_can_be_traced_and_exported() -> None:
    """torch.jit asks every module for all of its properties; torch.export exchanges what modules hold meanwhile."""

    class Logits(nn.Module):
        def __init__(self, model: PeftModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    for case in ("bottleneck", "adaption prompt", "shadow", "reft"):
        model = build(case)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what tracing says of branches in transformers
            wanted = model(input_ids=IDS).logits
            traced = torch.jit.trace(Logits(model), IDS, check_trace=False)
            torch.testing.assert_close(traced(IDS), wanted)
            program = torch.export.export(Logits(model), (IDS,), strict=False)
            torch.testing.assert_close(program.module()(IDS), wanted)
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted)


def test_a_model_that_was_called_can_be_copied() -> None:
    """What Shadow keeps of a call, for the loss of its network, is part of a graph; copies have not been called."""
    model = build("shadow")
    model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)
