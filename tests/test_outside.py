"""Methods of other packages: found by their entry points when they are needed, held to the laws by `check_method`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft
from peft.testing import Refusal, check_method
from peft.tuners.ia3 import IA3


OUTSIDE = Path(__file__).parent / "data" / "outside"


def in_a_process(code: str, *arguments: str) -> str:
    """What code prints in a process of its own in which the example package is installed."""
    path = os.pathsep.join([str(OUTSIDE), str(Path(peft.__file__).parents[1])])
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FILES = """
import sys, torch, warnings
from torch import nn
import peft, peft.tuners
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model

assert "rank_one" not in sys.modules
config = get_peft_config({"peft_type": "RANK_ONE", "target_modules": ["0"], "scale": 2.0})
assert "no_method" not in sys.modules, "it was not asked for"
base = nn.Sequential(nn.Linear(4, 6))
model = get_peft_model(base, config)
nn.init.normal_(model.base_model.model[0].one_u["default"])
x = torch.randn(3, 4)
wanted = model(x)
model.save_pretrained(sys.argv[1])
print(type(config).__name__, model.peft_config["default"].peft_type.value)
torch.save((model.unload().state_dict(), x, wanted), sys.argv[1] + "/seen.pt")
"""

AGAIN = """
import sys, torch
from torch import nn
from peft import AutoPeftModel, PeftConfig, PeftModel

assert PeftConfig.from_pretrained(sys.argv[1]).scale == 2.0
state, x, wanted = torch.load(sys.argv[1] + "/seen.pt")
base = nn.Sequential(nn.Linear(4, 6))
base.load_state_dict(state)
torch.testing.assert_close(PeftModel.from_pretrained(base, sys.argv[1])(x), wanted)
"""


def test_a_method_with_an_entry_point_is_found_when_it_is_named(tmp_path: Path) -> None:
    assert in_a_process(FILES, str(tmp_path)).split() == ["RankOneConfig", "RANK_ONE"]
    in_a_process(AGAIN, str(tmp_path))


PAGES = """
import sys, warnings
from peft.tools import catalogue

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = {method.key: method for method in catalogue.methods()}
    catalogue.methods()
for warning in caught:
    print(warning.message)
assert "lora" in found and not {"gone", "nothing"} & set(found)
print("\\n".join(catalogue.page(found["rank_one"], shared=", see there")))
assert "pytest" not in sys.modules
"""


def test_all_methods_are_listed_and_broken_ones_are_named_once() -> None:
    out = in_a_process(PAGES)
    assert out.count("the method 'gone' of the package 'rank-one' is left out") == 1
    assert "ModuleNotFoundError: No module named 'module_that_is_gone'" in out
    assert out.count("'nothing' of the package 'rank-one'") == 1 and "it registers no method of that name" in out
    assert "# Rank one" in out and "dW = s u v^T" in out and "For seeing how a package brings a method." in out
    assert "| `scale` | `1.0` | The update is multiplied by it. |" in out


UNKNOWN = """
import warnings
from peft import get_peft_config

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("gone", "rank_on"):
        try:
            get_peft_config({"peft_type": name})
        except ValueError as error:
            print(error)
print(*[warning.message for warning in caught])
"""


def test_a_method_that_cannot_be_loaded_is_unknown_and_others_are_not_touched() -> None:
    out = in_a_process(UNKNOWN)
    assert "Unknown peft_type 'GONE'" in out and "Unknown peft_type 'RANK_ON'. Did you mean 'RANK_ONE'?" in out
    assert "'gone' of the package" in out and "'nothing'" not in out


LAWS = """
import sys
sys.modules["pytest"] = None
from peft.testing import check_method
from rank_one import RankOne, RankOneConfig

print(check_method(RankOneConfig, only="-Conv2d[groups]-float32"))
print(check_method(RankOne, only="rank_one-Linear"))
"""


def test_the_method_of_the_package_keeps_the_laws() -> None:
    first, second = in_a_process(LAWS).splitlines()
    assert first.startswith("rank_one: ") and "laws hold" in first
    assert int(second.split(" checks")[0].split()[-1]) > 60


def test_a_law_that_is_broken_is_named_with_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = IA3.fold
    monkeypatch.setattr(IA3, "fold", lambda self, weight, base: fold(self, weight, base) * 1.1)
    with pytest.raises(AssertionError) as caught:
        check_method("ia3", only="ia3-Linear[no-bias]-float32")
    message = str(caught.value)
    assert message.startswith("ia3 breaks ") and "merged_equals_unmerged_and_comes_out_again: 1: forward = " in message
    assert "on ia3-Linear[no-bias]-float32" in message and "AssertionError: merged with {}" in message
    assert "at:   cell.near(cell.run(model), before, " in message and "laws.py:" in message


def test_where_a_method_has_no_meaning_is_said_and_checked() -> None:
    which = "beft-Embedding[padding_idx]-float32"
    with pytest.raises(AssertionError, match=r"(?s)breaks .* has no bias that BEFT could train"):
        check_method("beft", only=which, shifts=True)
    hole = Refusal("adapt", "has no bias", "a table has no bias", lambda m, p: p.kind == "Embedding")
    report = check_method("beft", only=which, shifts=True, holes=[hole])
    assert report.held == {"a_layer_that_cannot_be_adapted_is_refused": [which]}
    wrong = Refusal("adapt", "is too small", "tables are small", lambda m, p: p.kind == "Embedding")
    with pytest.raises(AssertionError, match="which says nothing of 'is too small'"):
        check_method("beft", only=which, shifts=True, holes=[wrong])


@pytest.mark.parametrize("method", ["prompt_tuning", "bottleneck", Path])
def test_what_adapts_no_single_layers_is_refused(method: object) -> None:
    with pytest.raises(TypeError, match="adapts single layers"):
        check_method(method)


def test_a_filter_that_meets_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="no law on any layer of ia3 has the text 'Cnv2d'"):
        check_method(peft.IA3Config, only="Cnv2d")
