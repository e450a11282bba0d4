"""Merging of task tensors: recorded values of the reference, the papers' definitions, and bad input."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft.utils import merge_utils


RECORDED = load_file(Path(__file__).parent / "data" / "merge_utils.safetensors")
TASKS = [RECORDED[f"task_{i}"] for i in range(3)]
WEIGHTS = RECORDED["weights"]
SIGN_METHODS = ["total", "frequency"]
DENSITIES = [0.25, 0.6]


def same(result, key):
    torch.testing.assert_close(result, RECORDED[key], rtol=1e-6, atol=1e-6)


def test_task_arithmetic_as_recorded():
    same(merge_utils.task_arithmetic(TASKS, WEIGHTS), "task_arithmetic")


@pytest.mark.parametrize("density", DENSITIES)
def test_pruning_as_recorded(density):
    same(merge_utils.magnitude_based_pruning(TASKS[0], density), f"magnitude_based_pruning.{density}")
    same(merge_utils.magnitude_prune(TASKS, WEIGHTS, density), f"magnitude_prune.{density}")
    for rescale in (True, False):
        torch.manual_seed(7)
        same(merge_utils.random_pruning(TASKS[0], density, rescale), f"random_pruning.{density}.{rescale}")
    torch.manual_seed(7)
    same(merge_utils.dare_linear(TASKS, WEIGHTS, density), f"dare_linear.{density}")


@pytest.mark.parametrize("method", SIGN_METHODS)
def test_majority_sign_and_disjoint_merge_as_recorded(method):
    stacked = torch.stack(TASKS)
    mask = merge_utils.calculate_majority_sign_mask(stacked, method)
    assert torch.equal(mask, RECORDED[f"sign_mask.{method}"])
    same(merge_utils.disjoint_merge(stacked, mask), f"disjoint_merge.{method}")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("method", SIGN_METHODS)
def test_ties_as_recorded(method, density):
    same(merge_utils.ties(TASKS, WEIGHTS, density, method), f"ties.{method}.{density}")
    torch.manual_seed(7)
    same(merge_utils.dare_ties(TASKS, WEIGHTS, density, method), f"dare_ties.{method}.{density}")


def test_ties_by_hand():
    # Trimmed to the two largest: [4, 0, -3], [-2, 0, -2.5]; the sums elect +, -; the second task has no + at entry 0.
    tasks = [torch.tensor([4.0, 0.5, -3.0]), torch.tensor([-2.0, 1.0, -2.5])]
    merged = merge_utils.ties(tasks, torch.tensor([1.0, 1.0]), density=0.67)
    torch.testing.assert_close(merged, torch.tensor([4.0, 0.0, -2.75]))


def test_random_pruning_keeps_fraction_and_expectation():
    tensor = torch.full((200, 200), 3.0)
    torch.manual_seed(0)
    pruned = merge_utils.prune(tensor, 0.3, "random", rescale=True)
    # 40,000 draws: five standard deviations of the kept fraction are 0.0115.
    assert abs((pruned != 0).float().mean().item() - 0.3) < 0.0115
    assert abs(pruned.mean().item() - 3.0) < 0.115
    torch.testing.assert_close(pruned[pruned != 0].unique(), torch.tensor([10.0]))


def test_random_pruning_draws_alike_for_every_dtype_and_anew_each_time():
    masks = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(1)
        pruned = merge_utils.random_pruning(torch.ones(1000, dtype=dtype), 0.5, rescale=False)
        assert pruned.dtype == dtype
        masks.append(pruned != 0)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], merge_utils.random_pruning(torch.ones(1000), 0.5, rescale=False) != 0)


@pytest.mark.parametrize("merge", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_keep_dtype_and_arguments(merge, dtype):
    tasks = [task.to(dtype) for task in TASKS]
    before = [task.clone() for task in tasks]
    merged = getattr(merge_utils, merge)(tasks, WEIGHTS.to(dtype), 0.5)
    assert merged.dtype == dtype
    assert merged.shape == tasks[0].shape
    assert all(torch.equal(task, old) for task, old in zip(tasks, before))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_prune_at_the_ends(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(merge_utils.prune(TASKS[0], 1.0, method, rescale=True), TASKS[0])
        assert torch.equal(merge_utils.prune(TASKS[0], 0.0, method, rescale=True), torch.zeros_like(TASKS[0]))
    with pytest.warns(UserWarning, match="1.5"):
        assert torch.equal(merge_utils.prune(TASKS[0], 1.5, method), TASKS[0])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'magnitud'.*'magnitude'"):
        merge_utils.prune(TASKS[0], 0.5, "magnitud")
    for density in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=str(density)):
            merge_utils.prune(TASKS[0], density, "random")
    with pytest.raises(ValueError, match="'median'.*'total'"):
        merge_utils.ties(TASKS, WEIGHTS, 0.5, "median")
    with pytest.raises(ValueError, match="3 task tensors, but 2 weights"):
        merge_utils.task_arithmetic(TASKS, WEIGHTS[:2])
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        merge_utils.task_arithmetic([TASKS[0], torch.zeros(2, 2)], WEIGHTS[:2])
