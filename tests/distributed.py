"""Processes that train a small model on an engine of torch's or DeepSpeed's, and what one process makes of it."""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from as_accelerators import as_accelerators
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.layer import together as reading
from peft.core.model.walk import bare
from peft.kernels import few


STEPS = 3
WEIGHTS: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def together() -> peft.LoraConfig:
    """A LoRA whose layers read their inputs together, on however few rows."""
    reading.ROWS = 1
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.LoraConfig(r=3, init_lora_weights=False, **WEIGHTS | {"target_modules": targets})


METHODS: dict[str, Callable[[], Any]] = {
    "together": together,
    "lora": lambda: peft.LoraConfig(r=3, init_lora_weights=False, **WEIGHTS),
    "dora": lambda: peft.LoraConfig(r=3, use_dora=True, init_lora_weights=False, **WEIGHTS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **WEIGHTS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **WEIGHTS),
    "vera": lambda: peft.VeraConfig(r=3, **(WEIGHTS | {"target_modules": ["q_proj", "o_proj"]})),
    "hira": lambda: peft.HiraConfig(r=3, **WEIGHTS),
    "bottleneck": lambda: peft.BottleneckConfig(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "modules_to_save": lambda: peft.LoraConfig(r=3, modules_to_save=["lm_head", "norm"], **WEIGHTS),
}


def save_base(folder: str) -> None:
    """A small Llama; its sizes are such that two or four processes get equal parts of each matrix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batch(step: int) -> dict[str, torch.Tensor]:
    """Four rows of six tokens."""
    ids = torch.randint(1, 32, (4, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def adapted(folder: str, method: str, load: Callable[[str], nn.Module] | None = None) -> PeftModel:
    base = load(folder) if load else AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method]())


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with an epsilon that does not blow up what is not quite zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0, foreach=False)


def train(model: Any, optimizer: Any, steps: range, rows: slice = slice(None), **given: Any) -> list[float]:
    """The losses of these steps."""
    losses = []
    for step in steps:
        loss = model(**{name: value[rows] for name, value in batch(step).items()}, **given).loss
        if isinstance(optimizer, torch.optim.Optimizer):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:  # DeepSpeed's engine
            optimizer.backward(loss)
            optimizer.step()
        losses.append(loss.item())
    return losses


# --- engines ---------------------------------------------------------------------------------------------------


class Engine:
    """One way to put a model on several processes. ``splits_batch``: each process has rows of its own."""

    splits_batch = True
    load: Callable[[str], nn.Module] | None = None

    @property
    def load_alone(self) -> Callable[[str], nn.Module] | None:
        """How one process loads the same base."""
        return self.load

    def wrap(self, model: PeftModel) -> Any:
        raise NotImplementedError

    def optimizer(self, wrapped: Any) -> Any:
        return optimizer_for(wrapped)

    def loss_of_all(self, losses: list[float]) -> torch.Tensor:
        found = torch.tensor(losses)
        if self.splits_batch:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.SUM)
            found /= torch.distributed.get_world_size()
        return found

    def rows(self) -> slice:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return slice(rank * 4 // size, (rank + 1) * 4 // size) if self.splits_batch else slice(None)

    def tensors(self, wrapped: Any) -> dict[str, torch.Tensor]:
        """The adapter, whole, on each process."""
        return get_peft_model_state_dict(wrapped)

    def save(self, wrapped: Any, optimizer: Any, where: str) -> None:
        """Adapter and optimizer, by ``torch.distributed.checkpoint``."""
        checkpoint.save(self._state(wrapped, optimizer), checkpoint_id=where)

    def restore(self, wrapped: Any, optimizer: Any, where: str, **options: Any) -> None:
        state = self._state(wrapped, optimizer)
        # by default the planner takes a checkpoint for one of an old format if a tensor of FSDP 1 has less rows than
        # there are processes
        planner = checkpoint.DefaultLoadPlanner(flatten_sharded_tensors=False)
        checkpoint.load(state, checkpoint_id=where, planner=planner, **options)
        set_state_dict(
            wrapped,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )

    def _state(self, wrapped: Any, optimizer: Any) -> dict[str, Any]:
        trained = StateDictOptions(ignore_frozen_params=True)
        model, states = get_state_dict(wrapped, optimizer, options=trained)
        # bitsandbytes adds to a 4-bit weight what is no parameter, so torch does not take it for frozen
        return {"model": {k: v for k, v in model.items() if ".weight." not in k}, "optimizer": states}


class DDP(Engine):
    def wrap(self, model: PeftModel) -> Any:
        return nn.parallel.DistributedDataParallel(model)

    def tensors(self, wrapped: Any) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(wrapped.module)


class FSDP1(Engine):
    """As accelerate still offers it: frozen and trained parameters in one unit, or by ``fsdp_auto_wrap_policy``."""

    def __init__(self, one_unit: bool) -> None:
        self.one_unit = one_unit

    def wrap(self, model: PeftModel) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        def layers(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return recurse or type(module).__name__ == "LlamaDecoderLayer"

        policy = layers if self.one_unit else peft.utils.other.fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=self.one_unit, device_id=torch.device("cpu")
        )

    def units(self, wrapped: Any) -> list[Any]:
        """The flat parameters, the outermost first."""
        handles = [unit._handle for unit in wrapped.fsdp_modules(wrapped)]
        return [handle.flat_param for handle in handles if handle is not None]

    def tensors(self, wrapped: Any) -> dict[str, torch.Tensor]:
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

        if not self.one_unit:  # what torch gives as a state dict on the CPU is memory that it has let go
            with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
                return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, whole):
            return get_peft_model_state_dict(wrapped, wrapped.state_dict())


class FSDP2(Engine):
    def wrap(self, model: PeftModel) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)


class QFSDP2(FSDP2):
    @staticmethod
    def load(folder: str) -> nn.Module:  # type: ignore[override]
        from transformers import BitsAndBytesConfig

        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"})
        return model.train()  # else bitsandbytes packs weights anew on some CPUs, and refuses such small ones


class TP(Engine):
    splits_batch = False
    load_alone = None

    @staticmethod
    def load(folder: str) -> nn.Module:  # type: ignore[override]
        from transformers.distributed import DistributedConfig

        size = torch.distributed.get_world_size()
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size))

    def wrap(self, model: PeftModel) -> Any:
        return model


def zero(stage: int, rows: int | str = "auto") -> dict[str, Any]:
    """A configuration of DeepSpeed that keeps no gathered weight longer than a layer needs it."""
    return {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,  # by default it keeps what it may need again soon
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default it clips
        "zero_force_ds_cpu_optimizer": False,
    }


def compile_nothing() -> None:
    """Have DeepSpeed do without its extension for processes on one machine, which takes minutes to compile."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeRO(Engine):
    """DeepSpeed's own partitioning of optimizer states and gradients (2), and of parameters (3).

    Args:
        universal: it goes on from a checkpoint of any number of processes, which ``universal`` has converted.
    """

    def __init__(self, stage: int, universal: bool = False) -> None:
        self.stage, self.universal = stage, universal

    def wrap(self, model: PeftModel) -> Any:
        import deepspeed

        compile_nothing()
        config = zero(self.stage, 4 // torch.distributed.get_world_size())
        config["checkpoint"] = {"load_universal": self.universal}
        return deepspeed.initialize(model=model, optimizer=optimizer_for(model), config=config)[0]

    def optimizer(self, wrapped: Any) -> Any:
        return wrapped

    def save(self, wrapped: Any, optimizer: Any, where: str) -> None:
        wrapped.save_checkpoint(where, exclude_frozen_parameters=True)

    def restore(self, wrapped: Any, optimizer: Any, where: str, **options: Any) -> None:
        wrapped.load_checkpoint(where, load_module_strict=False)

    def tensors(self, wrapped: Any) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(wrapped.module)


ENGINES: dict[str, Engine] = {
    "zero2": ZeRO(2),
    "zero3": ZeRO(3),
    "ddp": DDP(),
    "fsdp1": FSDP1(one_unit=False),
    "fsdp1_one_unit": FSDP1(one_unit=True),
    "fsdp2": FSDP2(),
    "fsdp2_nf4": QFSDP2(),
    "tp": TP(),
}
UNIVERSAL: dict[str, Engine] = {"zero2": ZeRO(2, universal=True), "zero3": ZeRO(3, universal=True)}


@lru_cache(None)
def alone(
    folder: str, method: str, load: Callable[[str], nn.Module] | None, **given: Any
) -> tuple[list[float], dict[str, Any]]:
    """The losses of three steps in one process, and the adapter after them; ``given`` goes to the model's call."""
    model = adapted(folder, method, load)
    losses = train(model, optimizer_for(model), range(STEPS), **given)
    return losses, get_peft_model_state_dict(model)


def cell(folder: str, engine: str, method: str) -> None:
    """Three steps on an engine are three steps in one process: losses, and the adapter that is saved."""
    on = ENGINES[engine]
    wanted, adapter = alone(folder, method, on.load_alone)
    wrapped = on.wrap(adapted(folder, method, on.load))
    losses = train(wrapped, on.optimizer(wrapped), range(STEPS), on.rows())
    torch.testing.assert_close(on.loss_of_all(losses), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    if tensors := on.tensors(wrapped):  # some engines give them to the first process alone
        same(tensors, adapter)


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Plain tensors of the same names and values."""
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert type(found[name]) is torch.Tensor, f"{name} is a {type(found[name]).__name__}"
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def break_off(folder: str, engine: str, method: str, where: str) -> None:
    """All steps but the last, and a checkpoint."""
    on = ENGINES[engine]
    model = on.wrap(adapted(folder, method, on.load))
    optimizer = on.optimizer(model)
    train(model, optimizer, range(STEPS - 1), on.rows())
    on.save(model, optimizer, where)


def universal(where: str) -> None:
    """Convert DeepSpeed's checkpoint to one for any number of processes, as its script does."""
    from deepspeed.checkpoint import ds_to_universal

    if torch.distributed.get_rank() == 0:
        step = f"{where}/global_step{STEPS - 1}"
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=step,
                output_folder=f"{step}_universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    torch.distributed.barrier()


def go_on(
    folder: str, engine: str, method: str, where: str, by_oneself: bool = False, converted: bool = False
) -> None:
    """The last step from a checkpoint: the loss and the adapter are those of a training without a break.

    Args:
        by_oneself: on the first process alone, whatever number has written the checkpoint.
        converted: the checkpoint is DeepSpeed's universal one.
    """
    on = (UNIVERSAL if converted else ENGINES)[engine]
    losses, adapter = alone(folder, method, on.load_alone)
    if by_oneself:
        if torch.distributed.get_rank() != 0:
            return
        model = adapted(folder, method, on.load_alone)
        optimizer = optimizer_for(model)
        Engine().restore(model, optimizer, where, no_dist=True)
        loss = torch.tensor(train(model, optimizer, range(STEPS - 1, STEPS)))
        tensors = get_peft_model_state_dict(model)
    else:
        model = on.wrap(adapted(folder, method, on.load))
        optimizer = on.optimizer(model)
        on.restore(model, optimizer, where)
        loss = on.loss_of_all(train(model, optimizer, range(STEPS - 1, STEPS), on.rows()))
        tensors = on.tensors(model)
    torch.testing.assert_close(loss, torch.tensor(losses[-1:]), rtol=1e-5, atol=1e-5)
    if tensors:
        same(tensors, adapter)


class Allocated(TorchDispatchMode):
    """Notes the memory of all results, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if type(tensor) is torch.Tensor:
                self.made.append(StorageWeakRef(tensor.untyped_storage()))
        return result

    def alive(self) -> list[int]:
        """Bytes of each memory that is still there."""
        found = {ref.cdata: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.made}
        return [storage.nbytes() for storage in found.values() if storage is not None]


def gathers(folder: str, engine: str, method: str) -> None:
    """No base weight that was gathered, or made dense, for a layer outlives it: none is there after the forward."""
    on = ENGINES[engine]
    model = on.wrap(adapted(folder, method, on.load))
    rows = {name: value[:3] for name, value in batch(0).items()}  # activations have other sizes than weights then
    sizes = {16 * 24 * 4, 16 * 16 * 4} | ({16 * 24 // 2, 16 * 16 // 2} if isinstance(on, QFSDP2) else set())
    small = 0 if method == "hira" else few.ENTRIES  # small weights that it makes are kept, as those of few entries
    with patch.object(few, "ENTRIES", small), Allocated() as memory:
        loss = model(**rows).loss
        if isinstance(on, FSDP1):  # it keeps, empty, the memory into which it gathers
            inner = on.units(model)[1:]  # the outermost is needed again at once
            assert not any(unit._full_param_padded.untyped_storage().size() for unit in inner)
            sizes -= {unit._full_param_padded.nbytes for unit in on.units(model)}
        assert not (left := sizes & {*memory.alive()}), f"{left} bytes"
    model.backward(loss) if isinstance(on, ZeRO) else loss.backward()
    if isinstance(on, FSDP1):
        assert not any(unit._full_param_padded.untyped_storage().size() for unit in on.units(model))
    if not isinstance(on, ZeRO):  # which has its gradients elsewhere
        assert any(p.grad is not None for p in model.parameters())


def savings(folder: str, engine: str, method: str) -> None:
    """With all that spares memory switched on, losses and steps are those of one process without it."""
    on = ENGINES[engine]
    wanted, adapter = alone(folder, method, on.load_alone)
    model = adapted(folder, method, on.load)
    peft.enable_memory_savings(model, chunked_loss=True)
    wrapped = on.wrap(model)
    losses = train(wrapped, on.optimizer(wrapped), range(STEPS), on.rows())
    torch.testing.assert_close(on.loss_of_all(losses), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    if tensors := on.tensors(wrapped):
        same(tensors, adapter)


def empty(folder: str) -> nn.Module:
    """The base with parameters on the meta device, for processes that get their values from another one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    make_buffers(model)
    return model


def make_buffers(model: nn.Module) -> None:
    """Those outside of the state dict, which each process has to make."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.__init__(module.config)


def loaded_by_the_first(folder: str, method: str, emptied: bool) -> None:
    """Only the first process has the values of base and adapter; by torch's broadcast all train as one process does.

    Args:
        emptied: all put the model on the meta device before it is sharded, as accelerate does.
    """
    on = ENGINES["fsdp2"]
    losses, adapter = alone(folder, method, None)
    first = torch.distributed.get_rank() == 0

    model = adapted(folder, method, None if first else empty)
    values = copy.deepcopy(model.state_dict()) if first else {}
    wrapped = on.wrap(model.to("meta") if emptied else model)
    make_buffers(model)
    set_model_state_dict(wrapped, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    found = train(wrapped, on.optimizer(wrapped), range(STEPS), on.rows())
    torch.testing.assert_close(on.loss_of_all(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    same(on.tensors(wrapped), adapter)


def rows_of_each(folder: str, engine: str) -> None:
    """Each process has rows of another adapter: it waits for no gradient, and gets that of all rows."""
    on = ENGINES[engine]

    def model() -> PeftModel:
        made = adapted(folder, "lora")
        torch.manual_seed(2)
        made.add_adapter("other", METHODS["lora"]())
        made.set_requires_grad(["default", "other"], True)
        return made

    names = ["default", "default", "other", "other"]
    alone = model()
    optimizer = optimizer_for(alone)
    wrapped = on.wrap(model())
    own = optimizer_for(wrapped)
    for step in range(STEPS):
        for each, opt, rows in ((alone, optimizer, slice(None)), (wrapped, own, on.rows())):
            given = {name: value[rows] for name, value in batch(step).items()}
            each(**given, adapter_names=names[rows]).loss.backward()
            opt.step()
            opt.zero_grad()
    for name in ("default", "other"):
        found = get_peft_model_state_dict(bare(getattr(wrapped, "module", wrapped)), adapter_name=name)
        same(found, get_peft_model_state_dict(alone, adapter_name=name))


def starts_alike(folder: str) -> None:
    """Factors of a layer that processes compute together are those of the first, whatever each has drawn."""
    base = ENGINES["tp"].load(folder)
    torch.manual_seed(torch.distributed.get_rank())
    model = get_peft_model(base, METHODS["lora"]())
    for name, tensor in get_peft_model_state_dict(model).items():
        first = tensor.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def files(folder: str, engine: str, where: str) -> None:
    """What is saved from several processes loads in one, and the other way round."""
    on = ENGINES[engine]
    alone = adapted(folder, "modules_to_save")
    with torch.no_grad():
        for p in alone.parameters():
            p.add_(0.01 if p.requires_grad else 0.0)
    wrapped = on.wrap(adapted(folder, "modules_to_save", on.load))
    set_peft_model_state_dict(bare(wrapped), get_peft_model_state_dict(alone))
    same(on.tensors(wrapped), get_peft_model_state_dict(alone))
    bare(wrapped).save_pretrained(where, is_main_process=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), where)
    same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(alone))


def bytes_of_each(folder: str) -> None:
    """What a process holds under FSDP is what the estimate says, spread."""
    model = adapted(folder, "lora")
    estimate = peft.estimate_memory(model, batch_size=2, sequence_length=6).spread(torch.distributed.get_world_size())
    wrapped = ENGINES["fsdp2"].wrap(model)
    optimizer = optimizer_for(wrapped)
    loss = wrapped(**{name: value[:2] for name, value in batch(0).items()}).loss
    loss.backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    gradients = sum(p.grad.to_local().nbytes for p in trained)
    optimizer.step()
    states = [t.to_local() for state in optimizer.state.values() for t in state.values() if t.dim()]
    for module in wrapped.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    weights = sum(p.to_local().nbytes for p in wrapped.parameters()) + sum(b.nbytes for b in wrapped.buffers())
    # rows of a tensor are not split: ranks of three make unequal parts
    for found, said in (
        (weights, estimate.weights),
        (gradients, estimate.gradients),
        (sum(t.nbytes for t in states), estimate.optimizer),
    ):
        assert abs(found - said) <= 0.34 * min(estimate.gradients, said) + 0.02 * said, (found, said)


# --- transformers' Trainer ---------------------------------------------------------------------------------------


def fsdp(version: int, **options: Any) -> dict[str, Any]:
    layers = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    return {"fsdp": True, "fsdp_config": {"version": version, **layers, **options}}


TRAINERS: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
    "fsdp1": fsdp(1, use_orig_params=False),  # the Trainer gives it our fsdp_auto_wrap_policy
    "fsdp1_one_unit": fsdp(1, use_orig_params=True),
    "fsdp2": fsdp(2),
    "fsdp2_parts": fsdp(2, state_dict_type="SHARDED_STATE_DICT"),
    "fsdp1_first": fsdp(1, use_orig_params=True, cpu_ram_efficient_loading=True, sync_module_states=True),
    "fsdp2_first": fsdp(2, cpu_ram_efficient_loading=True),
}
"""What a user gives to TrainingArguments. "first": the other processes have no values of base and adapter."""


def trainer(folder: str, engine: str, method: str, where: str) -> None:
    """`Trainer` by its arguments: three steps, what it saves, and the third step from its checkpoint of two."""
    # The Trainer divides by five of a row's six tokens, as no token predicts the first; the last virtual token does.
    losses, adapter = alone(folder, method, None, num_items_in_batch=20)
    rows = [dict(zip(data, row)) for data in map(batch, range(STEPS)) for row in zip(*data.values())]
    for resumed in (False, True):
        given = copy.deepcopy(TRAINERS[engine])
        if "deepspeed" in given:
            compile_nothing()
        with as_accelerators():
            arguments = TrainingArguments(
                where,
                per_device_train_batch_size=4 // torch.distributed.get_world_size(),
                train_sampling_strategy="sequential",
                max_steps=STEPS,
                logging_steps=1,
                save_steps=STEPS - 1,
                learning_rate=1e-2,
                adam_epsilon=1e-3,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to=[],
                disable_tqdm=True,
                **given,
            )
            load = empty if engine.endswith("_first") and torch.distributed.get_rank() != 0 else None
            model = adapted(folder, method, load)
            for module in model.modules():  # accelerate knows the optimizer's by their memory, which copies lack here
                if any(p.is_meta and p.requires_grad for p in module.parameters(recurse=False)):
                    module.to_empty(device="cpu", recurse=False)
            run = Trainer(model, arguments, train_dataset=rows)
            run.train(resume_from_checkpoint=f"{where}/checkpoint-{STEPS - 1}" if resumed else None)
            if engine == "fsdp2_parts":  # of which transformers saves checkpoints only
                run.model.save_pretrained(f"{where}/adapter", is_main_process=run.is_world_process_zero())
            else:
                run.save_model(f"{where}/adapter")
            unset_hf_deepspeed_config()
        found = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=1e-4)
        torch.distributed.barrier()
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), f"{where}/adapter")
        same(get_peft_model_state_dict(loaded), adapter)
        torch.distributed.barrier()  # the next run writes over it


# --- processes -------------------------------------------------------------------------------------------------


def serve(rank: int, size: int, store: str, pipe: Any) -> None:
    """Run what comes through the pipe, ``(function name, arguments)``, and answer None or what went wrong."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        try:
            globals()[job[0]](*job[1:])
            pipe.send(None)
        except BaseException:
            pipe.send(f"process {rank}:\n{traceback.format_exc()}")
    torch.distributed.destroy_process_group()


class Crew:
    """Processes that wait for work; started once, since importing torch is most of what a test costs."""

    def __init__(self, size: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = tempfile.mktemp()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, *job: Any, seconds: float = 300) -> None:
        """Let all of them do it; AssertionError with what went wrong in each, or if one does not answer."""
        for pipe in self.pipes:
            pipe.send(job)
        answers, until = [], time.monotonic() + seconds
        for rank, pipe in enumerate(self.pipes):
            late = not pipe.poll(max(0.0, until - time.monotonic()))
            answers.append(f"process {rank} hangs in {job}" if late else pipe.recv())
            if answers[-1]:  # the others may wait for this one, or have a word on why it hangs
                until = min(until, time.monotonic() + 5)
        if any(str(answer).endswith(f"hangs in {job}") for answer in answers):
            self.stop()
        assert not any(answers), "\n".join(filter(None, answers))

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def crew(size: int) -> Iterator[Crew]:
    made = Crew(size)
    try:
        yield made
    finally:
        made.stop()
