"""`enable_memory_savings`: losses and gradients stay, what is kept shrinks, and all of it is undone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from toys import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import peft
from peft import LoraConfig, get_peft_model
from peft.kernels import loss
from peft.tools import heap, savings


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 300)


def lora(**options) -> LoraConfig:
    targets = options.pop("target_modules", ["q_proj", "v_proj", "gate_proj", "down_proj"])
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, **options)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_implementation="eager")
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def adapted(base: nn.Module, **options) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(base, lora(**options))


def peft_model(**options) -> nn.Module:
    return adapted(llama(), **options)


def own_adapter() -> nn.Module:
    """A model of transformers, which adds the adapter itself."""
    model = llama()
    torch.manual_seed(1)
    model.add_adapter(lora())
    return model


MODELS = {
    "PeftModel": peft_model,
    "dropout": partial(peft_model, lora_dropout=0.3),
    "add_adapter": own_adapter,
    "GPT-2": lambda: adapted(gpt2(), target_modules=["c_attn", "c_proj"]),
    "not adapted": llama,
}
PARTS = {
    "recompute": {"checkpointing": False},
    "checkpointing": {"recompute": False},
    "chunked_loss": {"recompute": False, "checkpointing": False, "chunked_loss": True},
    "all": {"chunked_loss": True},
}


def step(model: nn.Module, rows: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step, with the same draws each time."""
    model.train().zero_grad()
    ids = torch.randint(3, 30, (rows, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    torch.manual_seed(5)
    value = model(input_ids=ids, labels=labels).loss
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model: nn.Module) -> int:
    """Bytes that autograd keeps for a step, each storage once, without the model's own."""
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    total, alive = 0, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal total
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            alive.append(t.detach())
            total += t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        step(model)
    return total


def state(model: nn.Module) -> list:
    """What of a model a switch could leave changed."""
    names = ("gradient_checkpointing", "chunked_loss")
    own = [[getattr(m, "loss_function", "-"), *(vars(m).get(name, "-") for name in names)] for m in model.modules()]
    return [
        own,
        [_function(m) for m in model.modules()],
        [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
    ]


def _function(module: nn.Module):
    """What recomputes a block, without what adapters put around it."""
    found = vars(module).get("_gradient_checkpointing_func")
    return getattr(found, "function", found)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MODELS)
def test_same_step_fewer_bytes_and_undone(name, part):
    model = MODELS[name]()
    wanted, theirs = step(model)
    before, bytes_before = state(model), kept(model)
    peft.enable_memory_savings(model, **PARTS[part])
    got, ours = step(model)
    torch.testing.assert_close(got, wanted)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=key)
    if (name, part) != (
        "GPT-2",
        "recompute",
    ):  # whose activation is written out in sums, of which no part is kept twice
        assert kept(model) < bytes_before
    peft.disable_memory_savings(model)
    assert state(model) == before and kept(model) == bytes_before
    peft.disable_memory_savings(model)


def test_parts_add_up():
    model, sizes = peft_model(), []
    for options in (None, PARTS["recompute"], {**PARTS["recompute"], "chunked_loss": True}, PARTS["all"]):
        if options is not None:
            on = peft.enable_memory_savings(model, **options)  # takes the place of the one before
            assert on.chunked_loss == options.get("chunked_loss", False)
        sizes.append(kept(model))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_outputs_look_the_same_unless_asked():
    model, ids = peft_model(), torch.randint(3, 30, (2, 7))
    before = model.train()(input_ids=ids, labels=ids).logits
    assert peft.enable_memory_savings(model) == peft.MemorySavings(True, True, False, False, trim=heap.can_trim())
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, before)
    peft.enable_memory_savings(model, chunked_loss=True)
    assert model(input_ids=ids, labels=ids).logits.shape[1] == 1
    assert model(input_ids=ids, labels=ids, chunked_loss=False).logits.shape[1] == 7
    assert model.eval()(input_ids=ids, labels=ids).logits.shape[1] == 7


def test_on_the_base_before_it_is_adapted():
    base = llama()
    peft.enable_memory_savings(base, chunked_loss=True)
    model = adapted(base)
    wanted, got = step(peft_model()), step(model)
    torch.testing.assert_close(got, wanted)
    model.chunked_loss = True  # twice the same
    torch.testing.assert_close(step(model), wanted)
    duplicate = copy.deepcopy(model)
    peft.disable_memory_savings(duplicate)
    assert kept(duplicate) > kept(model)
    torch.testing.assert_close(step(model), wanted)


def test_estimate_knows_of_it():
    model, sizes = peft_model(), []
    for options in (None, {"checkpointing": False}, {"checkpointing": False, "chunked_loss": True}, {}):
        if options is not None:
            peft.enable_memory_savings(model, **options)
        sizes.append(peft.estimate_memory(model.train(), batch_size=3, sequence_length=12).activations)
    assert sizes[0] > sizes[1] > sizes[2] > 0 and sizes[1] > sizes[3]


def test_a_failed_call_leaves_nothing_open():
    model = peft_model().train()
    peft.enable_memory_savings(model, chunked_loss=True)
    with pytest.raises(RuntimeError, match="own"):
        handle = model.get_base_model().model.norm.register_forward_pre_hook(_raise)
        step(model)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    handle.remove()
    torch.testing.assert_close(step(model), step(peft_model()))


def _raise(*_):
    raise RuntimeError("its own")


def test_user_checkpointing_stays(tmp_path):
    model = peft_model()
    function = partial(checkpoint, use_reentrant=True)
    model.get_base_model()._set_gradient_checkpointing(True, function)
    wanted, before = step(model), state(model)
    peft.enable_memory_savings(model)
    torch.testing.assert_close(step(model), wanted)
    assert {_function(m) for m in model.modules()} == {function, None}
    peft.disable_memory_savings(model)
    assert state(model) == before
    model.save_pretrained(tmp_path / "a")
    peft.enable_memory_savings(model)
    model.save_pretrained(tmp_path / "b")
    assert len({(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"}) == 1
    torch.save(model, tmp_path / "whole")
    torch.testing.assert_close(step(torch.load(tmp_path / "whole", weights_only=False)), wanted)


def test_offloading(monkeypatch):
    """What waits in CPU memory comes back; on a CPU, where there is nothing to move, asking for it is an error."""
    model = peft_model()
    with pytest.raises(ValueError, match="CPU memory already"):
        peft.enable_memory_savings(model, offload=True)
    wanted, moved = step(model), []
    outer = savings.save_on_cpu

    def counting(**options):
        moved.append(options)
        return outer(pin_memory=False)

    monkeypatch.setattr(savings, "save_on_cpu", counting)
    on = peft.MemorySavings(True, True, True, False)
    base = model.get_base_model()
    switched = savings._Switched(on, model, base, list(savings.with_switch(base)), "cuda")
    torch.testing.assert_close(step(model), wanted)
    assert moved == [{"pin_memory": True, "device_type": "cuda"}] * 2  # each block once
    switched.undo()


def test_what_cannot_be_is_refused():
    plain = nn.Sequential(nn.Linear(3, 3))
    assert peft.enable_memory_savings(plain) == peft.MemorySavings(True, False, False, False, heap.can_trim())
    assert peft.enable_memory_savings(nn.DataParallel(plain)).recompute
    with pytest.raises(ValueError, match="no blocks"):
        peft.enable_memory_savings(plain, checkpointing=True)
    with pytest.raises(ValueError, match="checkpointing is off"):
        peft.enable_memory_savings(plain, offload=True)
    with pytest.raises(ValueError, match="recompute is off"):
        peft.enable_memory_savings(plain, trim=True, recompute=False)
    with pytest.raises(ValueError, match="not on a CPU"):
        peft.enable_memory_savings(nn.Linear(3, 3, device="meta"), trim=True)
    before = state(plain)
    with pytest.raises(ValueError, match="no head"):
        peft.enable_memory_savings(plain, chunked_loss=True)
    assert state(plain) == before
    peft.disable_memory_savings(plain)
    assert not vars(plain).get("_peft_record")


@pytest.fixture
def trims(monkeypatch) -> list[int]:
    """What the process takes whenever its heap is trimmed; it grows by a MiB each time that it is looked at."""
    held, found = [400 * heap.LARGE], []

    def grown() -> int:
        held[0] += heap.LARGE
        return held[0]

    def trim(pad: int) -> int:
        found.append(held[0])
        held[0] -= 50 * heap.LARGE
        return 1

    monkeypatch.setattr(heap, "resident", grown)
    monkeypatch.setattr(heap, "_trim", lambda: trim)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_heap_is_trimmed_as_the_process_grows(trims, monkeypatch, checkpointing):
    """Seen where tensors are kept and used, those of checkpointed blocks too; small ones are not looked at."""
    model = peft_model()
    wanted = step(model)
    peft.enable_memory_savings(model, checkpointing=checkpointing)
    torch.testing.assert_close(step(model), wanted)
    assert not trims
    monkeypatch.setattr(heap, "LARGE", 1)
    monkeypatch.setattr(heap, "LEAST", 1)
    monkeypatch.setattr(heap, "SHARE", 100 * 2**20)
    torch.testing.assert_close(step(model), wanted)
    assert trims
    found = len(trims)
    peft.enable_memory_savings(model, checkpointing=checkpointing, trim=False)
    torch.testing.assert_close(step(model), wanted)
    assert len(trims) == found


def test_when_the_heap_is_trimmed(trims, monkeypatch):
    """When half has been added to the least that the process has had since the last time, and 64 MiB."""
    sizes = iter([400, 599, 380, 569, 570, 300, 449, 450, 100, 163, 164, 90])  # after 570, 450 and 164 it is trimmed
    monkeypatch.setattr(heap, "resident", lambda: next(sizes) * 2**20)
    watch, at = heap.Trimmed(), []
    for look in range(9):
        before = len(trims)
        watch(heap.LARGE)
        watch(heap.LARGE - 1)
        at += [look] * (len(trims) - before)
    assert at == [4, 6, 8] and not list(sizes)


@pytest.mark.skipif(not heap.can_trim(), reason="another C library than glibc")
def test_holes_go_back_to_the_system():
    """Every second tensor of 1 MiB is freed: their pages leave the process, the others keep their values."""
    torch.ones(31 << 18)  # once freed, tensors of 1 MiB come from the heap
    tensors = [torch.full((1 << 18,), float(i)) for i in range(200)]
    watch, full = heap.Trimmed(), heap.resident()
    watch.least = 1  # as if the process had grown
    del tensors[::2]
    watch(heap.LARGE)
    assert heap.resident() < full - 80 * 2**20 and watch.least == pytest.approx(heap.resident(), rel=0.05)
    assert all(t.eq(2 * i + 1).all() for i, t in enumerate(tensors))


def test_changes_in_place_are_still_seen():
    class Spoiled(nn.Module):
        def forward(self, x):
            y = torch.sigmoid(self.lin(x))
            z = y * y
            y.mul_(2)
            return z

    model = Spoiled()
    model.lin = nn.Linear(3, 3)
    peft.enable_memory_savings(model)
    with pytest.raises(RuntimeError, match="in-place"):
        model(torch.randn(2, 3)).sum().backward()


def test_trainer(tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 30, (8, 10)).tolist()]
    losses = []
    for on in (False, True):
        model = peft_model(lora_dropout=0.1)
        if on:
            peft.enable_memory_savings(model, chunked_loss=True)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, seed=0, save_strategy="no", learning_rate=0.1, optim="sgd",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and len(losses[0]) == 3


def test_adapters_keep_no_input_that_its_graph_gives_back():
    """Without any switch: what a method reads of a layer's input is made again, also a view or a spectrum of it."""
    for config in (
        peft.LilyConfig(r=2, stride_A=1, num_B=2),
        peft.C3AConfig(block_size=8),
        peft.OFTConfig(oft_block_size=2),
    ):
        config.target_modules = ["q_proj", "k_proj", "down_proj"]
        torch.manual_seed(1)
        model = get_peft_model(llama(), config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        got, ours = step(model)
        few = kept(model)
        with peft.kernels.plain():
            wanted, theirs = step(model)
            many = kept(model)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(ours, theirs)
        assert few < many
