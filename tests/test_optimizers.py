"""Optimizers for LoRA: against the formulas, against recorded steps, through Trainer, and resumed."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import ConvNet, tiny_llama

from peft import LoraConfig, get_peft_model
from peft.optimizers import (
    create_8bit_optimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from peft.optimizers.lorafa import LoraFAOptimizer


RECORDED = Path(__file__).parent / "data" / "optimizer_steps.json"
MAKERS = {
    "loraplus": lambda m: create_loraplus_optimizer(
        m, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, eps=1e-6
    ),
    "loraplus_sgd": lambda m: create_loraplus_optimizer(
        m, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=4.0, momentum=0.9
    ),
    "lorafa": lambda m: create_lorafa_optimizer(m, r=2, lora_alpha=6, lr=0.01, weight_decay=0.1),
    "riemannian": lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "riemannian_sgd": lambda m: create_riemannian_optimizer(m, torch.optim.SGD, lr=0.01, reg=0.1),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False), nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.head(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))


def waves(shape, number):
    """A tensor without chance in it: the same on every machine."""
    return torch.sin(torch.arange(1.0, math.prod(shape) + 1) ** 2 * (0.7 + 0.1 * number)).view(shape) * 0.4


def adapted(**fields):
    """Net with LoRA (of rank 3 at one layer, 2 at the other), a trained head and a trained bias."""
    model = Net()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = waves(parameter.shape, number)
    fields = {"r": 2, "lora_alpha": 6, "rank_pattern": {"second": 3}, "modules_to_save": ["head"]} | fields
    model = get_peft_model(model, LoraConfig(target_modules=["first", "second"], **fields))
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_" in name:
            parameter.data = waves(parameter.shape, number)
    return model


def steps(model, optimizer, count=3, start=0):
    for number in range(start, start + count):
        optimizer.zero_grad()
        (model(waves((4, 6), number)) - waves((4, 3), number + 5)).pow(2).mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "to_save" in name}


@pytest.mark.parametrize("maker", MAKERS)
def test_three_steps_are_those_recorded(maker):
    recorded = json.loads(RECORDED.read_text())[maker]
    model = adapted()
    found = steps(model, MAKERS[maker](model))
    assert set(found) == set(recorded)
    exact = {"rtol": 2e-5, "atol": 2e-6} if maker != "lorafa" else {"rtol": 4e-3, "atol": 4e-4}  # it was in 16 bits
    for name, values in recorded.items():
        torch.testing.assert_close(found[name], torch.tensor(values), **exact, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_resumed_optimizer_makes_the_same_steps(maker, tmp_path):
    model = adapted()
    optimizer = MAKERS[maker](model)
    steps(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = steps(model, optimizer, start=3)
    resumed = adapted()
    optimizer = MAKERS[maker](resumed)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    found = steps(resumed, optimizer, start=3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("maker", ["loraplus", "lorafa", "riemannian"])
def test_trainer_runs_with_them(maker, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM"))
    data = [{"input_ids": torch.arange(5) + n, "labels": torch.arange(5) + n} for n in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    Trainer(model, arguments, train_dataset=data, optimizers=(MAKERS[maker](model), None)).train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("maker", ["loraplus", "riemannian"])
def test_eight_bit_optimizers_fit(maker):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cls = bitsandbytes.optim.AdamW8bit
    model = adapted()
    if maker == "loraplus":
        optimizer = create_loraplus_optimizer(model, cls, lr=0.01, loraplus_lr_ratio=4.0)
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1e-6, 0.04, 0.04]
    else:
        optimizer = create_riemannian_optimizer(model, cls, lr=0.01)
    assert isinstance(optimizer, cls)
    before = model.base_model.model.first.lora_B["default"].weight.detach().clone()
    steps(model, optimizer, 1)  # its states are in 32 bits below 4,096 entries, so the step is AdamW's
    step = (model.base_model.model.first.lora_B["default"].weight - before).abs()
    assert torch.allclose(step, torch.full_like(step, 0.04 if maker == "loraplus" else 0.01), rtol=0.1)


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------


def test_loraplus_groups():
    model = get_peft_model(
        ConvNet(),
        LoraConfig(r=2, target_modules=["emb", "lin0", "conv2d"], use_dora=True, lora_bias=False,
                   modules_to_save=["lin1", "norm"]),
    )  # fmt: skip
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-5, weight_decay=0.3
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)].removeprefix("base_model.model.") for p in g["params"]} for g in optimizer.param_groups]
    assert groups[0] == {
        "lin0.lora_A.default.weight", "conv2d.lora_A.default.weight", "lin1.modules_to_save.default.weight",
        "conv2d.lora_magnitude_vector.default.weight",
    }  # fmt: skip
    assert groups[1] == {"emb.lora_embedding_A.default", "emb.lora_embedding_B.default"}
    assert groups[2] == {"lin0.lora_B.default.weight", "conv2d.lora_B.default.weight"}
    trained = {names[id(p)].removeprefix("base_model.model.") for p in model.parameters() if p.requires_grad}
    assert groups[3] == trained - groups[0] - groups[1] - groups[2] and groups[3]
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-5, 16e-3, 16e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.3, 0.3, 0.0]


# ---- LoRA-FA --------------------------------------------------------------------------------------------------------


def test_lorafa_step_is_that_of_the_formula():
    model = adapted(modules_to_save=None)
    layer = model.base_model.model.second  # of rank 3, hence of scaling 2
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=0.01)
    assert not a.requires_grad and b.requires_grad
    before = b.detach().clone()
    steps(model, optimizer, 1)
    gradient = b.grad @ torch.linalg.inv(a @ a.T) / 2.0**2
    expected = before - 0.01 * gradient / (gradient.abs() + 1e-6 / math.sqrt(1e-3))  # Adam's first step
    torch.testing.assert_close(b, expected, rtol=1e-4, atol=1e-6)


def test_lorafa_freezes_the_drawn_factor_of_every_kind_and_trains():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["emb", "conv1d", "grouped", "lin1"])
    base = ConvNet()
    base.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
    base.lin1 = nn.Linear(24, 5)
    base.forward = lambda ids: base.lin1(base.conv1d(base.grouped(base.emb(ids).transpose(1, 2))).mean(2))
    model = get_peft_model(base, config)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    inner = model.base_model.model
    assert inner.emb.lora_embedding_A["default"].requires_grad
    assert not inner.emb.lora_embedding_B["default"].requires_grad
    ids, losses = torch.arange(24).view(4, 6), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model(ids).pow(2).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert inner.emb.lora_embedding_A["default"].abs().sum() > 0

    # The step of the full weight, projected on what A spans, is the step of B: for each group of a convolution.
    layer = inner.grouped
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer.zero_grad()
    model(ids).pow(2).mean().backward()
    found = optimizer._projected()[b]
    for group in range(2):
        rows = a.detach()[2 * group : 2 * group + 2].flatten(1)
        expected = b.grad[8 * group : 8 * group + 8, :, 0] @ torch.linalg.inv(rows @ rows.T) / 4
        torch.testing.assert_close(found[8 * group : 8 * group + 8, :, 0], expected, rtol=1e-3, atol=1e-6)


def test_lorafa_says_what_it_was_told_wrongly():
    with pytest.raises(ValueError, match="no LoRA adapter"):
        create_lorafa_optimizer(Net(), r=2, lora_alpha=6, lr=0.1)
    with pytest.raises(ValueError, match="use_rslora=True contradicts adapter 'default'"):
        create_lorafa_optimizer(adapted(), r=2, lora_alpha=6, lr=0.1, use_rslora=True)
    with pytest.warns(UserWarning, match="no layer has r=16"):
        create_lorafa_optimizer(adapted(), r=16, lora_alpha=16, lr=0.1)
    for wrong in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraFAOptimizer(Net().parameters(), **wrong)


def test_lorafa_without_lora_is_adamw():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    fields = {"lr": 0.01, "eps": 0.0}
    for model, cls in ((ours, LoraFAOptimizer), (theirs, torch.optim.Adam)):
        optimizer = cls(model.parameters(), **fields)
        for number in range(3):
            optimizer.zero_grad()
            model(waves((4, 6), number)).pow(2).mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


# ---- Riemannian preconditioning -------------------------------------------------------------------------------------


def test_riemannian_step_is_that_of_the_formula_with_and_without_a_closure():
    for closure in (False, True):
        model = adapted(modules_to_save=None)
        layer = model.base_model.model.first
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        old_a, old_b = a.detach().clone(), b.detach().clone()
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.5, reg=0.1)

        def loss(model=model):
            return (model(waves((4, 6), 0)) - waves((4, 3), 5)).pow(2).mean()

        def evaluate(model=model, optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        gradient_a, gradient_b = torch.autograd.grad(loss(), [a, b])
        if closure:
            before = loss()
            assert optimizer.step(evaluate) == before
        else:
            evaluate()
            optimizer.step()
        eye = 0.1 * torch.eye(2)
        torch.testing.assert_close(a, old_a - 0.5 * torch.linalg.inv(old_b.T @ old_b + eye) @ gradient_a)
        torch.testing.assert_close(b, old_b - 0.5 * gradient_b @ torch.linalg.inv(old_a @ old_a.T + eye))


def test_riemannian_names_what_is_missing():
    with pytest.raises(ValueError, match="no linear layer"):
        create_riemannian_optimizer(Net(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="reg should be"):
        create_riemannian_optimizer(adapted(), torch.optim.SGD, lr=0.1, reg=-1)


@pytest.mark.parametrize("maker", ["lorafa", "riemannian"])
def test_a_sharded_factor_is_refused(maker):
    model = adapted()
    optimizer = MAKERS[maker](model)
    steps(model, optimizer, 1)
    model.base_model.model.first.lora_A["default"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="needs whole factors"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_states_of_8_bits(name):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(600, 8), nn.Linear(8, 600))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["1"], modules_to_save=["0"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = create_8bit_optimizer(model, lr=0.01, optimizer=name, weight_decay=0.1)
    for _ in range(2):
        model(torch.arange(9)).square().mean().backward()
        optimizer.step()
    dtypes = {n: optimizer.state[p]["state1"].dtype for n, p in model.named_parameters() if p.requires_grad}
    assert set(dtypes) == set(before) and all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )
    eight = {n for n, dtype in dtypes.items() if dtype == torch.uint8}
    assert eight == {n for n in before if "lora_B" in n}  # A is small, and embeddings stay exact


def test_8_bits_refused(monkeypatch):
    model = get_peft_model(Net(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="'adamw'"):
        create_8bit_optimizer(model, lr=0.1, optimizer="adanw")
    monkeypatch.setattr("peft.optimizers.eight_bits.is_bnb_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        create_8bit_optimizer(model, lr=0.1)
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="nothing of this"):
        create_8bit_optimizer(model.requires_grad_(False), lr=0.1)
