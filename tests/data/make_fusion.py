"""Records `fusion.*`: what adapters 1.3.0 (transformers 4.57.6) makes of compositions of bottleneck adapters.

Run in an environment of its own, in which that library is installed: `python tests/data/make_fusion.py`. The tensors
of a case are `base.*` (the plain model), `<adapter>.<block>.<role>.*`, `fuse.<block>.<role>.*` (the attention), and
`out`, the last hidden states, all drawn far from their start.
"""

import json
from pathlib import Path

import adapters
import torch
import transformers as tf
from adapters.composition import Fuse, Parallel, Stack
from safetensors.torch import save_file


MODELS = {
    "bert": (
        tf.BertModel,
        tf.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, attention_probs_dropout_prob=0.0,
        ),
    ),
    "gpt2": (
        tf.GPT2Model,
        tf.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    ),
}  # fmt: skip
SETUPS = {"fuse": Fuse("a", "b", "c"), "stack": Stack("c", "a"), "parallel": Parallel("a", "c")}
CASES = {
    f"{model}-{preset}-{setup}-{kind}": {"model": model, "preset": preset, "setup": setup, "kind": kind}
    for model in MODELS
    for preset in ("seq_bn", "double_seq_bn")
    for setup, kind in (("fuse", "dynamic"), ("fuse", "static"), ("stack", None), ("parallel", None))
}
ROLES = {"mh_adapter": "attention", "output_adapter": "feedforward"}


def record(case):
    """The tensors of a case."""
    torch.manual_seed(0)
    cls, config = MODELS[case["model"]]
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    kept = {f"base.{name}": p.detach().clone() for name, p in model.named_parameters()}
    adapters.init(model)
    for name in ("a", "b", "c"):
        model.add_adapter(name, config=adapters.AdapterConfig.load(case["preset"], reduction_factor=4))
    setup = SETUPS[case["setup"]]
    if case["kind"]:
        model.add_adapter_fusion(setup, case["kind"])
    model.active_adapters = setup
    blocks = model.encoder.layer if case["model"] == "bert" else model.h
    for number, block in enumerate(blocks):
        for module in block.modules():
            if not hasattr(module, "adapter_fusion_layer") or module.location_key not in ROLES:
                continue
            role = ROLES[module.location_key]
            for name, adapter in module.adapters.items():
                kept.update(drawn(f"{name}.{number}.{role}.down", adapter.adapter_down[0]))
                kept.update(drawn(f"{name}.{number}.{role}.up", adapter.adapter_up))
            for fusion in module.adapter_fusion_layer.values():
                kept.update(drawn(f"fuse.{number}.{role}", fusion))
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model.eval()(ids).last_hidden_state
    return {**kept, "ids": ids, "out": out}


def drawn(prefix, module):
    """The parameters of a module, drawn anew."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return {f"{prefix}.{name}": p.detach().clone() for name, p in module.named_parameters()}


if __name__ == "__main__":
    here = Path(__file__).parent
    tensors, bases = {}, {}
    for name, case in CASES.items():
        for key, value in record(case).items():
            shared = f"{case['model']}|{key}" if key.startswith("base.") or key == "ids" else None
            if shared is None:
                tensors[f"{name}|{key}"] = value.contiguous()
            elif shared not in bases:
                bases[shared] = value.contiguous()
            else:
                assert torch.equal(bases[shared], value)
    save_file({**tensors, **bases}, here / "fusion.safetensors")
    (here / "fusion.json").write_text(json.dumps(CASES, indent=1) + "\n")
