"""K adapters trained together, by `peft.MultiAdapterTrainer`, against one after another, by transformers' `Trainer`.

    python benchmarks/many.py [--adapters 8] [--steps 20]

Prints the seconds of both and their ratio. One thread, float32, a Llama of four layers and width 256.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, MultiAdapterTrainer, get_peft_model


def model(names: list[str]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=4, **sizes))
    config = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    made = get_peft_model(base, LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, LoraConfig(**config))
    return made


def rows(seed: int, count: int, length: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(1, 512, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="rows of each adapter in a step")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"adapter_{i}" for i in range(args.adapters)]
    data = {name: rows(i, args.steps * args.batch, args.length) for i, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            num_train_epochs=1,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        seconds = []
        trainers = [
            [Trainer(model([name]), options, train_dataset=data[name]) for name in names],
            [MultiAdapterTrainer(model(names), options, data)],
        ]
        for group in trainers:
            start = time.process_time()
            for trainer in group:
                trainer.train()
            seconds.append(time.process_time() - start)
    after, together = seconds
    print(f"one after another {after:.2f} s, together {together:.2f} s: {together / after:.2f} of the time")


if __name__ == "__main__":
    main()
