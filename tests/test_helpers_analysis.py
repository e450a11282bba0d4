"""Which weights to adapt (KappaTune), what an adapter has put in (intruders), and components of batches of data."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import IncrementalPCA as Sklearn
from torch import nn
from toys import ConvNet, Sequence, tiny_llama

from peft import LoraConfig, get_peft_model
from peft.helpers import KappaTuneSelector, find_kappa_target_modules
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.incremental_pca import IncrementalPCA


# ---- KappaTune ------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.other = nn.Parameter(torch.randn(3, 4, 4))
        self.lin = nn.Linear(4, 4)


def kappa(weight):
    values = torch.linalg.eigvalsh(weight.double().mT @ weight.double() if weight.shape[-1] <= weight.shape[-2]
                                   else weight.double() @ weight.double().mT).sqrt()  # fmt: skip
    return (values[..., -1] / values[..., 0]).mean().item()


def test_condition_numbers_are_those_of_the_definition():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Experts(), "b": Experts(), "s": Sequence()})
    layers, parameters = KappaTuneSelector(model, show_progress=False).condition_numbers()
    expected = {name: m.weight for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert layers == {name: pytest.approx(kappa(w), rel=1e-3) for name, w in expected.items()}
    stacks = {n: p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    assert parameters == {name: pytest.approx(kappa(w), rel=1e-3) for name, w in stacks.items()}


def test_selection_takes_the_lowest():
    torch.manual_seed(0)
    selector = KappaTuneSelector(nn.ModuleDict({k: Experts() for k in "abcde"}), show_progress=False)
    numbers, stacks = selector.condition_numbers()
    order = sorted(numbers, key=numbers.get)
    assert selector.get_best_targets() == order
    assert selector.get_best_targets(top_p=0.5) == order[:2]
    assert selector.get_best_targets(top_p=0.0) == order[:1]
    assert selector.get_best_targets(num_modules=3, top_p=0.1) == order[:3]
    assert selector.get_best_targets(threshold=numbers[order[2]]) == order[:3]
    assert selector.get_best_target_parameters(num_modules=2) == sorted(stacks, key=stacks.get)[:2]


def test_what_is_found_is_a_config_and_adapted_models_are_ranked_as_their_base():
    model = tiny_llama()
    found = find_kappa_target_modules(model, top_p=0.3, show_progress=False)
    assert found["target_parameters"] is None and 0 < len(found["target_modules"]) < 8
    adapted = get_peft_model(model, LoraConfig(r=2, **found))
    assert find_kappa_target_modules(adapted.get_base_model(), top_p=0.3, show_progress=False) == found


def test_sizes_suffixes_and_missing_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Experts(), "big": nn.Linear(4, 9)})
    assert find_kappa_target_modules(model, 1.0, 6, show_progress=False)["target_modules"] == ["a.lin"]
    found = find_kappa_target_modules(model, 1.0, 8, ("other",), show_progress=False)
    assert found["target_parameters"] == ["a.other"]
    with pytest.raises(ValueError, match="'a.gate_up_proj' is on the meta device"):
        find_kappa_target_modules(model.to("meta"), show_progress=False)


# ---- Intruder dimensions --------------------------------------------------------------------------------------------


def with_intruders(model, targets, **fields):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter)
    return model


def weakened(base, delta, r, top_k, epsilon, keep):
    """The definition, direction by direction."""
    known = torch.linalg.svd(base.double(), full_matrices=False)[0]
    u, s, v = torch.linalg.svd((base + delta).double(), full_matrices=False)
    change, count = delta.double().clone(), 0
    for i in range(min(top_k, len(s))):
        if max(abs(float(known[:, j] @ u[:, i])) for j in range(known.shape[1])) < epsilon:
            change += (keep - 1) * s[i] * torch.outer(u[:, i], v[i])
            count += 1
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r], count


@pytest.mark.parametrize("keep", [0.75, 0.0])
def test_intruders_are_weakened_as_defined(keep):
    torch.manual_seed(0)
    model = with_intruders(ConvNet(), ["emb", "lin0", "lin1", "conv1d"], modules_to_save=["norm"])
    lines, total = [], 0
    reduce_intruder_dimension(model, top_k=4, mitigation_lambda=keep, logging_sink=lines.append)
    assert model.active_adapter == "intruder_reduced"
    for name in ("emb", "lin0", "lin1", "conv1d"):
        layer = model.base_model.model.get_submodule(name)
        base = layer.get_base_layer().weight.detach()
        old, new = (layer.get_delta_weight(n).detach() for n in ("default", "intruder_reduced"))
        if name == "emb":
            base, old, new = base.T, old.T, new.T
        expected, count = weakened(base.flatten(1), old.flatten(1), 3, 4, 0.5, keep)
        torch.testing.assert_close(new.flatten(1).double(), expected, rtol=1e-3, atol=1e-4)
        assert f"{name}: Intruders: {count}" in lines
        total += count
    assert total > 2
    norm = model.base_model.model.norm.modules_to_save
    assert torch.equal(norm["default"].weight, norm["intruder_reduced"].weight)
    model.set_adapter("default")


def test_no_intruder_changes_nothing_and_what_is_no_plain_lora_is_refused():
    torch.manual_seed(0)
    model = with_intruders(ConvNet(), ["lin0"])
    reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None)
    layer = model.base_model.model.lin0
    assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("intruder_reduced"))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        reduce_intruder_dimension(model, "other")
    model = with_intruders(ConvNet(), ["lin0"], use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA.*lin0"):
        reduce_intruder_dimension(model)
    assert list(model.peft_config) == ["default"]


def test_intruders_found_are_those_recorded():
    """Deltas of a fixed adapter before and after, as the format's first library gives them."""
    recorded = json.loads((Path(__file__).parent / "data" / "intruders.json").read_text())
    model = get_peft_model(nn.ModuleDict({"a": nn.Linear(6, 5)}), LoraConfig(r=2, lora_alpha=4, target_modules=["a"]))
    layer = model.base_model.model["a"]
    layer.base_layer.weight.data = torch.tensor(recorded["W"])
    layer.lora_A["default"].weight.data = torch.tensor(recorded["A"])
    layer.lora_B["default"].weight.data = torch.tensor(recorded["B"])
    lines = []
    reduce_intruder_dimension(model, top_k=3, mitigation_lambda=0.4, threshold_epsilon=0.7, logging_sink=lines.append)
    assert f"Intruders: {recorded['intruders']}" in lines[0]
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), torch.tensor(recorded["delta"]),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


# ---- Incremental PCA ------------------------------------------------------------------------------------------------


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) @ mixing + 3 for n in (9, 5, 4, 12)]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_it_agrees_with_scikit_learn(k):
    ours, theirs = IncrementalPCA(n_components=k), Sklearn(n_components=k)
    for batch in batches():
        if len(batch) < k:
            continue
        ours.partial_fit(batch)
        theirs.partial_fit(batch.numpy())
    for name in ("singular_values_", "explained_variance_", "explained_variance_ratio_", "mean_", "var_",
                 "noise_variance_"):  # fmt: skip
        expected = torch.as_tensor(getattr(theirs, name))
        torch.testing.assert_close(getattr(ours, name).double(), expected.double(), rtol=1e-8, atol=1e-10)
    signs = (ours.components_ * torch.from_numpy(theirs.components_)).sum(1).sign()
    torch.testing.assert_close(signs[:, None] * ours.components_, torch.from_numpy(theirs.components_))
    data = batches(1)[0]
    torch.testing.assert_close(ours.transform(data) * signs, torch.from_numpy(theirs.transform(data.numpy())))
    assert int(ours.n_samples_seen_) == theirs.n_samples_seen_


def test_fit_is_partial_fit_by_batches_and_leaves_the_data():
    data = torch.cat(batches())
    before = data.clone()
    ours, theirs = IncrementalPCA(4, batch_size=7).fit(data), Sklearn(4, batch_size=7).fit(data.numpy())
    torch.testing.assert_close(ours.singular_values_, torch.from_numpy(theirs.singular_values_))
    assert torch.equal(data, before)
    ours, theirs = IncrementalPCA(3, batch_size=3).fit(data), Sklearn(3, batch_size=3).fit(data.numpy())
    assert float(ours.noise_variance_) == theirs.noise_variance_  # as many rows as components leave nothing over
    assert IncrementalPCA(4).fit(data).batch_size == 30
    assert [s.stop - s.start for s in IncrementalPCA.gen_batches(10, 4, 3)] == [4, 6]


def test_low_rank_is_close_and_repeatable():
    data = torch.cat(batches())
    exact = IncrementalPCA(2).partial_fit(data)
    state = torch.get_rng_state()
    first, second = (IncrementalPCA(2, lowrank=True, lowrank_seed=5).partial_fit(data) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.components_, second.components_)
    torch.testing.assert_close(first.singular_values_, exact.singular_values_, rtol=1e-3, atol=1e-3)


def test_later_batches_may_be_smaller_than_the_number_of_components():
    data = torch.cat(batches())
    steps = IncrementalPCA(6).partial_fit(data[:10])
    for row in data[10:]:
        steps.partial_fit(row[None])
    whole = torch.linalg.svdvals(data - data.mean(0))
    torch.testing.assert_close(steps.singular_values_, whole)


def test_wrong_data_is_refused():
    data = torch.cat(batches())
    for make, message in (
        (lambda: IncrementalPCA(7).partial_fit(data), "between 1 and"),
        (lambda: IncrementalPCA(5).partial_fit(data[:3]), "first batch"),
        (lambda: IncrementalPCA(2).partial_fit(data).partial_fit(data[:, :4]), "this batch has 4 features"),
        (lambda: IncrementalPCA(2).partial_fit(data / 0), "not finite"),
        (lambda: IncrementalPCA(2).partial_fit(data[0]), r"\[samples, features\]"),
        (lambda: IncrementalPCA(2).transform(data), "seen no data"),
        (lambda: IncrementalPCA(lowrank=True), "needs n_components"),
        (lambda: IncrementalPCA(3, lowrank=True, lowrank_q=2), "at least n_components"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
