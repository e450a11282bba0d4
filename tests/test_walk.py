"""One operation walks through a model once, sees each change that it makes itself, and keeps nothing of it."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.core.model import walk as walks
from peft.core.model.auxiliary import TrainableTokensWrapper
from peft.core.model.walk import holders_of, surveyed, walk


def base() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    return nn.ModuleDict({"table": nn.Embedding(5, 4), "blocks": nn.ModuleList([block]), "end": nn.Linear(4, 4)})


def places(model: nn.Module) -> list[tuple]:
    return [(s.path, s.key, id(s.module), [(p, id(w)) for p, w in s.wrappers], len(s.above)) for s in walk(model)]


CHANGES: dict[str, Callable[[nn.ModuleDict], object]] = {
    "replaced": lambda m: m["blocks"][0].__setitem__("q", nn.Linear(4, 4)),
    "added": lambda m: m["blocks"].append(nn.Linear(4, 4)),
    "removed": lambda m: m["blocks"][0].__delitem__("k"),
    "held twice": lambda m: m.__setitem__("again", m["end"]),
    "inside a wrapper": lambda m: setattr(m["table"].token_adapter, "base_layer", nn.Embedding(5, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_within_an_operation(change: str) -> None:
    model = base()
    model["table"] = TrainableTokensWrapper(model["table"])
    with surveyed():
        before, held = places(model), holders_of(model)
        again = list(walk(model))
        assert all(a is b for a, b in zip(again, walk(model)))  # nothing has changed: no second walk
        CHANGES[change](model)
        after, held_after = places(model), holders_of(model)
    assert after != before or held_after != held
    assert (after, held_after) == (places(model), holders_of(model))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules through which walks have gone since."""
    found: list[nn.Module] = []
    walked = walks._walk

    def counting(model: nn.Module, *rest: object) -> object:
        found.append(model)
        return walked(model, *rest)

    monkeypatch.setattr(walks, "_walk", counting)
    return found


def test_a_further_adapter_takes_one_walk(tmp_path: Path, walked: list[nn.Module]) -> None:
    config = LoraConfig(r=2, target_modules=["q", "k"])
    get_peft_model(base(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    walked.clear()
    model.load_adapter(tmp_path, "other")
    assert [type(m).__name__ for m in walked] == ["ModuleDict"]
    walked.clear()
    model.delete_adapter("other")
    assert len(walked) == 1


def test_nothing_is_kept_of_what_leaves_the_model(tmp_path: Path) -> None:
    get_peft_model(base(), LoraConfig(r=2, target_modules=["q"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    model.load_adapter(tmp_path, "other")
    left = weakref.ref(model.get_base_model()["end"])
    model.get_base_model()["end"] = nn.Identity()
    gc.collect()
    assert left() is None
