"""Newer methods and optimizers against their formulas, computed in another way: loops, dense matrices, series."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import tiny_llama

from peft import (
    AbbaConfig,
    ComolConfig,
    DyLoraConfig,
    LoraConfig,
    LoraXsConfig,
    MixLoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.helpers import spectral_surgery
from peft.kernels.decompositions import face_splitting, product_svd
from peft.optimizers import create_loramuon_optimizer, create_lorarite_optimizer
from peft.testing.cells import perturb
from peft.tuners.lora.surgery import gates
from peft.tuners.routing import imbalance, top_weights
from peft.utils.warning import PeftWarning


def adapted(config: Any, seed: int = 3, **fields: Any) -> tuple[PeftModel, Any, torch.Tensor]:
    """A linear layer with an adapter far from its start, that adapter, and inputs ``[2, 5, 8]``."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12)), config(target_modules=["0"], **fields)).eval()
    perturb(model, "default", seed)
    return model, model.base_model.model[0].adapters["default"], torch.randn(2, 5, 8)


def change(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the output."""
    return (model(x) - model.base_model.model[0].base_layer(x)).detach()


# --- methods --------------------------------------------------------------------------------------------------


def test_lora_xs_trains_r_times_r_numbers_between_factors_of_the_weight() -> None:
    model, adapter, x = adapted(LoraXsConfig, r=3, alpha=6)
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [9]
    w = model.base_model.model[0].base_layer.weight.detach()
    # the factors in another way: from the eigenvectors of W^T W; their signs do not matter to A^T A, nor to B A
    values, vectors = torch.linalg.eigh(w.T @ w)
    best = w @ vectors[:, -3:] @ vectors[:, -3:].T
    torch.testing.assert_close(adapter.xs_B @ adapter.xs_A, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.xs_A @ adapter.xs_A.T, torch.eye(3), rtol=1e-4, atol=1e-5)
    wanted = x @ (2 * adapter.xs_B @ adapter.xs_R @ adapter.xs_A).T
    torch.testing.assert_close(change(model, x), wanted.detach(), rtol=1e-4, atol=1e-5)


def test_abba_is_a_product_entry_by_entry_of_a_rank_that_multiplies() -> None:
    model, adapter, x = adapted(AbbaConfig, r1=2, r2=3, alpha=4)
    first, second = adapter.abba_B1 @ adapter.abba_A1, adapter.abba_B2 @ adapter.abba_A2
    dense = 4 / math.sqrt(6) * first * second
    torch.testing.assert_close(change(model, x), (x @ dense.T).detach(), rtol=1e-4, atol=1e-5)
    b, a = face_splitting(adapter.abba_B1, adapter.abba_A1, adapter.abba_B2, adapter.abba_A2)
    assert a.shape == (6, 8) and b.shape == (12, 6)
    torch.testing.assert_close(b @ a, first * second)
    assert torch.linalg.matrix_rank(dense) == 6 > 2 + 3
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (2 + 3) * (8 + 12)


def test_abba_starts_from_the_weight_and_changes_nothing() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(4, 8)
    wanted, (u, s, v) = base(x), torch.linalg.svd(base[0].weight.detach())
    model = get_peft_model(base, AbbaConfig(target_modules=["0"], r1=2, r2=2))
    adapter = model.base_model.model[0].adapters["default"]
    torch.testing.assert_close(adapter.abba_B1 @ adapter.abba_A1, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_first_ranks_of_dylora_are_a_lora(rank: int, tmp_path: Path) -> None:
    model, adapter, x = adapted(DyLoraConfig, r=4, alpha=6)
    model.base_model.use_rank(rank)
    a, b = adapter.dylora_A[:rank], adapter.dylora_B[:, :rank]
    wanted = (x @ a.T @ b.T * 6 / rank).detach()
    torch.testing.assert_close(change(model, x), wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 12)), tmp_path)
    assert loaded.peft_config["default"].rank == rank
    torch.testing.assert_close(change(loaded, x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), model(x))


def test_dylora_draws_ranks_in_training_and_trains_the_last_one_only_if_asked() -> None:
    model, adapter, x = adapted(DyLoraConfig, r=4, min_r=2, alpha=6, last_only=True)
    model.train()
    seen = set()
    for _ in range(40):
        model.zero_grad()
        model(x).square().sum().backward()
        trained = adapter.dylora_B.grad.abs().sum(0).nonzero()[:, 0].tolist()
        assert trained == adapter.dylora_A.grad.abs().sum(1).nonzero()[:, 0].tolist() and len(trained) == 1
        seen.add(trained[0] + 1)
    assert seen == {2, 3, 4}
    assert torch.equal(model.eval()(x), model(x))


def test_ranks_that_dylora_does_not_have_are_refused() -> None:
    model, *_ = adapted(DyLoraConfig, r=4)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="from 1 to 4"):
            model.base_model.use_rank(rank)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.base_model.use_rank(1, "other")
    with pytest.raises(ValueError, match="min_r=5 is more than the largest rank, r=4"):
        DyLoraConfig(r=4, min_r=5)


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_comol_mixes_cores_for_each_token(top_k: int | None) -> None:
    model, adapter, x = adapted(ComolConfig, r=3, alpha=6, num_experts=4, top_k=top_k)
    found = change(model, x)
    for row in range(2):
        for token in range(5):
            h = adapter.comol_A @ x[row, token]
            chances = softmax((adapter.comol_router @ h).tolist())
            kept = sorted(range(4), key=lambda e: -chances[e])[: top_k or 4]
            total = sum(chances[e] for e in kept)
            core = sum(chances[e] / total * adapter.comol_cores[e] for e in kept)
            wanted = 2 * adapter.comol_B @ core @ h
            torch.testing.assert_close(found[row, token], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_a_token_of_mix_lora_uses_the_loras_that_its_router_picks() -> None:
    model, adapter, x = adapted(MixLoraConfig, r=2, alpha=6, num_experts=4, top_k=2)
    found = change(model, x)
    for row in range(2):
        for token in range(5):
            chances = softmax((adapter.mix_router @ x[row, token]).tolist())
            first, second = sorted(range(4), key=lambda e: -chances[e])[:2]
            wanted = torch.zeros(12)
            for e in (first, second):
                a, b = adapter.mix_A[2 * e : 2 * e + 2], adapter.mix_B[:, 2 * e : 2 * e + 2]
                wanted += 3 * chances[e] / (chances[first] + chances[second]) * (b @ a @ x[row, token])
            torch.testing.assert_close(found[row, token], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_imbalance_is_one_where_experts_are_used_alike_and_rises_with_one_that_takes_all() -> None:
    even = torch.eye(4).repeat(3, 1)
    torch.testing.assert_close(imbalance(even * 0.4 + 0.15, top_weights(even, 1)), torch.tensor(1.0))
    alone = torch.tensor([[0.97, 0.01, 0.01, 0.01]]).repeat(6, 1)
    torch.testing.assert_close(imbalance(alone, top_weights(alone, 1)), torch.tensor(4 * 0.97))
    half = torch.cat([even, alone])
    counted = torch.cat([torch.ones(12), torch.zeros(6)])
    torch.testing.assert_close(imbalance(half, top_weights(half, 1), counted), torch.tensor(1.0))


def router_loss(**call: Any) -> tuple[PeftModel, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A llama with MixLoRA, its loss with and without the term for balance, and the call."""
    torch.manual_seed(0)
    fields = {"target_modules": ["q_proj", "down_proj"], "r": 2, "num_experts": 3, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), MixLoraConfig(balance=0.5, **fields))
    perturb(model, "default", 3)
    ids = torch.arange(20).view(2, 10)
    given = {"input_ids": ids, "labels": ids, **call}
    with_term = model.train()(**given).loss
    assert model.base_model.extra_loss() is None, "it is used up"
    model.peft_config["default"].balance = 0.0
    return model, with_term, model(**given).loss, given


def test_the_loss_of_a_training_call_has_the_balance_and_trains_the_router() -> None:
    model, with_term, without, given = router_loss()
    assert 0.45 < (with_term - without).item() < 0.5 * 3
    model.peft_config["default"].balance = 0.5
    layers = [layer for name, layer in model.named_modules() if hasattr(layer, "mix_router")]
    for layer in layers:
        layer.mix_B["default"].data.zero_()  # so that the task says nothing of the routers
    model.zero_grad()
    model(**given).loss.backward()
    assert all(layer.mix_router["default"].grad.any() for layer in layers)
    model.eval()
    torch.testing.assert_close(model(**given).loss, copy.deepcopy(model).unload()(**given).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_balance_under_gradient_checkpointing(reentrant: bool) -> None:
    """The same gradients as without; reentrant checkpoints cannot give them, which is said."""
    model, *_, given = router_loss()
    model.peft_config["default"].balance = 0.5
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with pytest.warns(PeftWarning, match="not balanced") if reentrant and checkpointed else nullcontext():
            model(**given).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if "router" in n})
    same = [torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6) for name in gradients[0]]
    assert all(same) != reentrant


def test_padding_is_no_load() -> None:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 4:] = 0
    model, with_term, without, given = router_loss(attention_mask=mask)
    model.peft_config["default"].balance = 0.5
    given["input_ids"] = given["input_ids"].clone()
    given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    losses = []
    for filler in (0, 7):
        given["input_ids"][1, 4:] = filler
        losses.append(model(**given).loss)
    torch.testing.assert_close(*losses)


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=3 is more than there are experts, num_experts=2"):
        MixLoraConfig(num_experts=2, top_k=3)


# --- optimizers -----------------------------------------------------------------------------------------------


def linear(seed: int = 0, alpha: int = 6, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, torch.Tensor, Any]:
    """A model of one layer with LoRA of rank 2 away from its start, in double precision; A and B."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7)).to(dtype), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    return model, torch.randn(9, 5, dtype=dtype), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def descend(model: PeftModel, x: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """dW after each step."""
    found, layer = [], model.base_model.model[0]
    for step in range(steps):
        optimizer.zero_grad()
        (model(x).tanh() * (1 + step)).square().mean().backward()
        optimizer.step()
        found.append(layer.get_delta_weight("default").detach().clone())
    return found


MAKERS = {
    "muon": lambda m, **kwargs: create_loramuon_optimizer(m, lr=0.05, **kwargs),
    "rite": lambda m, **kwargs: create_lorarite_optimizer(m, lr=0.05, **kwargs),
}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_does_not_depend_on_how_the_change_is_split(name: str, decay: float) -> None:
    """B M and M^-1 A for any M, and another alpha: the same dW after each of several steps; AdamW's are not."""
    trajectories = {}
    for split in ("as it is", "mixed", "alpha"):
        model, x, (a, b) = linear(alpha=60 if split == "alpha" else 6)
        mix = torch.tensor([[3.0, 1.0], [-0.5, 0.2]], dtype=a.dtype)
        with torch.no_grad():
            if split == "mixed":
                a.copy_(torch.linalg.inv(mix) @ a), b.copy_(b @ mix)
            elif split == "alpha":
                a.mul_(0.1)
        trajectories[split] = descend(model, x, MAKERS[name](model, weight_decay=decay), 5)
    for other in ("mixed", "alpha"):
        for found, wanted in zip(trajectories[other], trajectories["as it is"]):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def sign(m: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v


def root(gram: torch.Tensor) -> torch.Tensor:
    """gram^(-1/2), by a series of Newton steps instead of a decomposition."""
    scale = gram.trace()
    y, z = gram / scale, torch.eye(len(gram), dtype=gram.dtype)
    for _ in range(60):
        t = (3 * torch.eye(len(gram), dtype=gram.dtype) - z @ y) / 2
        y, z = y @ t, t @ z
    return z / scale.sqrt()


def test_loramuon_takes_the_steps_of_its_formula() -> None:
    model, x, (a, b) = linear()
    optimizer, s = create_loramuon_optimizer(model, lr=0.1, momentum=0.5, weight_decay=0.2), 3.0
    left, right, means = b.detach().clone(), s * a.detach().clone().T, [0.0, 0.0]
    for step in range(3):
        optimizer.zero_grad()
        (model(x).tanh() * (1 + step)).square().mean().backward()
        gradients = (b.grad.clone(), a.grad.T / s)
        optimizer.step()
        means = [0.5 * mean + 0.5 * g for mean, g in zip(means, gradients)]
        of_left, of_right = root(left.T @ left), root(right.T @ right)
        steps = (-0.05 * sign(means[0] @ of_right) @ of_right, -0.05 * sign(means[1] @ of_left) @ of_left)
        shrink = math.sqrt(1 - 0.1 * 0.2)
        left, right = shrink * left + steps[0] / shrink, shrink * right + steps[1] / shrink
        torch.testing.assert_close(b.detach(), left, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(a.detach(), right.T / s, rtol=1e-7, atol=1e-9)


def test_a_step_of_loramuon_has_the_norm_that_is_asked_for() -> None:
    model, x, (a, b) = linear()
    before = 3.0 * (b @ a).detach()
    kept = b.detach().clone()
    (after,) = descend(model, x, create_loramuon_optimizer(model, lr=0.1), 1)
    assert torch.linalg.matrix_norm((after - before).float(), 2) <= 0.1 * 1.2  # and the product of the two steps
    assert torch.linalg.matrix_norm(3.0 * (b.detach() - kept) @ a.detach(), 2) == pytest.approx(0.05, rel=0.2)


def test_lorarite_takes_the_steps_of_its_algorithm() -> None:
    """In the basis of QR instead of a polar decomposition, which the step must not depend on."""
    model, x, (a, b) = linear()
    optimizer, s = create_lorarite_optimizer(model, lr=0.1, betas=(0.5, 0.8), eps=0.0), 3.0
    left, right = b.detach().clone(), s * a.detach().clone().T
    kept: list[Any] = [None, None]
    for step in range(1, 4):
        optimizer.zero_grad()
        (model(x).tanh() * step).square().mean().backward()
        gradients = (b.grad.clone(), a.grad.T / s)
        optimizer.step()
        moves = []
        for i, (g, other) in enumerate(zip(gradients, (right, left))):
            q, r = torch.linalg.qr(other)
            seen = g @ torch.linalg.inv(r)
            old, v, rho, mean = kept[i] or (q, torch.zeros_like(r), torch.tensor(0.0), torch.zeros_like(g))
            p = q.T @ old
            carried = p @ v @ p.T
            rho = 0.8 * (rho + (torch.linalg.eigvalsh(v) - torch.linalg.eigvalsh(carried)).abs().max())
            v = 0.8 * carried + 0.2 * seen.T @ seen
            scaled = seen @ root((v + rho * torch.eye(2, dtype=v.dtype)) / (1 - 0.8**step))
            mean = 0.5 * mean @ p.T + 0.5 * scaled
            kept[i] = (q, v, rho, mean)
            moves.append(-0.1 / (1 - 0.5**step) * mean @ torch.linalg.inv(r).T)
        left, right = left + moves[0], right + moves[1]
        torch.testing.assert_close(b.detach(), left, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a.detach(), right.T / s, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_a_b_of_zeros_learns_and_what_else_trains_is_adamws(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    x, teacher = torch.randn(40, 5), copy.deepcopy(model).unload()
    teacher[0].weight.data += torch.randn(7, 2) @ torch.randn(2, 5)
    y = teacher(x).detach()
    head = model.base_model.model[2].modules_to_save["default"].weight
    before, losses = head.detach().clone(), []
    optimizer = MAKERS[name](model, others_lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:
            torch.testing.assert_close(head.detach(), before - 1e-2 * head.grad.sign(), rtol=1e-3, atol=1e-5)
    assert losses[-1] < 0.5 * losses[0] and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_goes_on_from_its_saved_state(name: str) -> None:
    model, x, _ = linear()
    optimizer = MAKERS[name](model)
    descend(model, x, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = MAKERS[name](other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found, wanted in zip(descend(other, x, resumed, 2), descend(model, x, optimizer, 2)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", MAKERS)
def test_bad_settings_and_models_without_a_pair_are_refused(name: str) -> None:
    model, *_ = linear()
    with pytest.raises(ValueError, match="weight_decay should be 0 or above, got -1"):
        MAKERS[name](model, weight_decay=-1)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        MAKERS[name](model, **({"momentum": 1.0} if name == "muon" else {"betas": (0.9, 1.0)}))
    with pytest.raises(ValueError, match="no layer in which both factors of an active LoRA adapter train"):
        MAKERS[name](nn.Linear(3, 3))


# --- after training -------------------------------------------------------------------------------------------


def surgery_case() -> tuple[PeftModel, list[torch.Tensor], torch.Tensor]:
    model, x, (a, b) = linear(dtype=torch.float32)
    return model, list(torch.randn(3, 9, 5)), x


def the_loss(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
    return (model(x).tanh() - x[:, :1]).square().mean()


def test_spectral_surgery_reads_the_gradient_of_each_singular_value() -> None:
    """Against finite differences of the loss in the singular values of the merged weight."""
    model, batches, _ = surgery_case()
    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default").detach()
    by = spectral_surgery(model, (the_loss(model, x) for x in batches), mode="gradient")
    (multiplied,) = by.values()
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    slopes = []
    for k in range(2):
        losses = []
        for sign_of in (1, -1):
            shifted = s.clone()
            shifted[k] += sign_of * 1e-4
            weight = layer.base_layer.weight.double() + u[:, :2] * shifted[:2] @ v[:2]
            losses.append(
                sum(
                    ((x.double() @ weight.T + layer.base_layer.bias.double()).tanh() - x[:, :1]).square().mean()
                    for x in batches
                ).item()
                / len(batches)
            )
        slopes.append((losses[0] - losses[1]) / 2e-4)
    step = s[:2] * torch.tensor(slopes)
    wanted = (-0.35 * step / step.abs().max()).exp()
    wanted *= s[:2].sum() / (wanted * s[:2]).sum()
    torch.testing.assert_close(multiplied.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["select", "smooth", "gradient"])
def test_spectral_surgery_keeps_directions_their_sum_and_the_old_adapter(mode: str) -> None:
    model, batches, x = surgery_case()
    layer = model.base_model.model[0]
    before, old = model(x).detach(), layer.get_delta_weight("default").detach()
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    ((_, by),) = spectral_surgery(model, (the_loss(model, b) for b in batches), mode=mode).items()
    assert model.active_adapters == ["refined"]
    new = layer.get_delta_weight("refined").detach()
    u, s, v = torch.linalg.svd(old, full_matrices=False)
    torch.testing.assert_close(new, u[:, :2] * (by * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((by * s[:2]).sum(), s[:2].sum())
    assert not torch.allclose(new, old, rtol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=0)
    assert {name: p.requires_grad for name, p in model.named_parameters() if "refined" not in name} == trains
    assert all(p.grad is None for p in model.parameters())


def test_gates_by_size_of_sensitivity() -> None:
    values, sensitivity = torch.ones(10), torch.tensor([0.1, -9.0, 3, 4, -5, 0.2, 6, 7, 8, 5])
    found = gates(values, sensitivity, "select")
    assert [i for i, by in enumerate(found) if by > 1] == [1, 8] and [i for i, by in enumerate(found) if by < 1] == [
        0,
        5,
    ]
    smooth = gates(values, sensitivity, "smooth")
    assert torch.equal(smooth.argsort(), sensitivity.abs().argsort()) and 0.8 < smooth.min() < smooth.max() < 1.25
    u, s, v = product_svd(torch.randn(3, 8), torch.randn(6, 3))
    torch.testing.assert_close(u.T @ u, torch.eye(3), rtol=0, atol=1e-5)


def test_spectral_surgery_says_what_it_cannot_do() -> None:
    model, *_ = surgery_case()
    for losses in ([], [torch.ones(2, requires_grad=True).sum()]):
        with pytest.raises(
            (ValueError, RuntimeError), match="no gradient in|does not require grad|not have been used"
        ):
            spectral_surgery(model, losses)
        assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="mode should be one of 'select'"):
        spectral_surgery(model, [], mode="random")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        spectral_surgery(model, [], "other")
    dora = get_peft_model(nn.Sequential(nn.Linear(5, 7)), LoraConfig(target_modules=["0"], use_dora=True))
    perturb(dora, "default", 3)
    with pytest.raises(ValueError, match="Spectral Surgery is defined for plain LoRA"):
        spectral_surgery(dora, [])
