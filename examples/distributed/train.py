"""LoRA on a small Llama by accelerate, on whatever engine the configuration file says.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py --output adapter

The files are for two processes on CPUs. On GPUs take out `use_cpu`, put MULTI_GPU in the place of MULTI_CPU, bf16 in
that of mixed_precision, and the number of cards in that of num_processes.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, get_peft_model


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    accelerator = Accelerator()
    net = model()
    data = torch.randint(1, 32, (4 * args.steps, 8), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, foreach=False)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    for ids in loader:
        loss = net(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
    state = accelerator.get_state_dict(net)  # gathered, on all processes
    accelerator.unwrap_model(net).save_pretrained(
        args.output, is_main_process=accelerator.is_main_process, state_dict=state
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
