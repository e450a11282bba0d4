"""Processes on the CPU that accelerate takes for those of accelerators.

    accelerate launch --config_file FILE tests/as_accelerators.py SCRIPT ...

accelerate offers FSDP and DeepSpeed to processes that have an accelerator. Here they have gloo and the CPU instead.
What accelerate, torch, DeepSpeed and the script do then is what they do on accelerators.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import dataclasses
from torch.distributed.fsdp import _init_utils, _optim_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle


@contextmanager
def as_accelerators() -> Iterator[None]:
    """Within this, accelerate finds several accelerators. Its state is new, within and after."""
    unflatten = _optim_utils._unflatten_orig_param_states  # (..., cpu_offload)
    replaced = (
        (PartialState, "_prepare_backend", lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)),
        # FSDP with sync_module_states asks for the device by itself
        (dataclasses, "is_cuda_available", lambda: True),
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        # torch's FSDP 1 sends no tensors that lie on the CPU, which gloo can
        (_init_utils, "_check_module_states_for_sync_module_states", lambda states: None),
        # it moves what it has gathered to the CPU, and takes it for copied there: it lets go of the weights (a
        # segmentation fault), and gathers the next state of the optimizer into the same memory
        (FlatParamHandle, "to_cpu", lambda self: nullcontext()),
        (_optim_utils, "_unflatten_orig_param_states", lambda *args: unflatten(*args[:-1], False)),
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"):
        patches = [mock.patch.object(*each) for each in replaced]
        try:
            for patch in patches:
                patch.start()
            yield
        finally:
            for patch in patches:
                patch.stop()
            AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # DeepSpeed makes the group itself
        torch.distributed.init_process_group("gloo")
    sys.argv.pop(0)
    with as_accelerators():
        runpy.run_path(sys.argv[0], run_name="__main__")
