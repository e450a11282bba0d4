"""LoRA on a small Llama by accelerate, on whatever engine the configuration file says.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py --output adapter

The files are for two processes. accelerate shards, and starts DeepSpeed, on accelerators only: there take out
`use_cpu`, and set mixed_precision to bf16 and num_processes to the number of cards.
"""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, get_peft_model


def by_deepspeed() -> bool:
    """Whether the configuration file asks for DeepSpeed, which accelerate leaves out where it is told `cpu`.

    Without `cpu`, on a machine that has no accelerator, all other engines run as processes that know nothing of each
    other: the launcher does not pass on `use_cpu`.
    """
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def data(steps: int) -> torch.Tensor:
    """Rows of eight tokens, four for each step: two for each of two processes."""
    return torch.randint(1, 32, (4 * steps, 8), generator=torch.Generator().manual_seed(0))


def optimizer_of(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available() and not by_deepspeed())
    net = model()
    loader = torch.utils.data.DataLoader(data(args.steps), batch_size=2)
    net, optimizer, loader = accelerator.prepare(net, optimizer_of(net), loader)
    for ids in loader:
        loss = net(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    engine = accelerator.distributed_type.value
    accelerator.print(f"{accelerator.num_processes} processes ({engine}), loss {loss.item():.3f}")
    state = accelerator.get_state_dict(net)  # gathered, on all processes
    accelerator.unwrap_model(net).save_pretrained(
        args.output, is_main_process=accelerator.is_main_process, state_dict=state
    )
    accelerator.wait_for_everyone()  # no process takes the group down while another still writes
    accelerator.end_training()


if __name__ == "__main__":
    main()
