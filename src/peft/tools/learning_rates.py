"""Learning rates to begin with, by method: the highest one, for AdamW, with the source of each.

One number cannot suit every model and every data set; each of these is where to start a search. The fewer numbers a
method trains, and the further they stand from the weight, the larger the rate. What papers say is for their models;
"measured" is what examples of this repository found on SmolLM2-135M.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rate(NamedTuple):
    """A learning rate and where it comes from."""

    value: float
    source: str


_LIKE_LORAS = ("comol", "deft", "dylora", "gralora", "lily", "loha", "miss", "mix_lora", "mtl_lora", "peanut")
_VECTORS = "scales and shifts that start at 1 or 0, like IA3's: not searched for here"

LEARNING_RATES = {
    "lora": Rate(2e-4, "QLoRA, arXiv 2305.14314, section 4 (2e-4 up to 13 B parameters, 1e-4 above)"),
    **dict.fromkeys(_LIKE_LORAS, Rate(2e-4, "a low-rank update at LoRA's scale: LoRA's rate, not searched for here")),
    "abba": Rate(1e-3, "a product of two pairs with small factors (arXiv 2505.14238): not searched for here"),
    "adalora": Rate(1e-3, "arXiv 2303.10512, appendix (about 5e-4 to 2e-3 on GLUE)"),
    "adamss": Rate(1e-3, "subspaces of few numbers: between LoRA and VeRA, not searched for here"),
    "adaption_prompt": Rate(9e-3, "arXiv 2303.16199, section 4; 1e-2 measured"),
    "beft": Rate(1e-3, "biases start at the base's own values: not searched for here"),
    "boft": Rate(5e-4, "as OFT, not searched for here"),
    "bottleneck": Rate(1e-3, "measured (examples/tutorial.py); arXiv 2005.00247 uses 1e-4"),
    "c3a": Rate(3e-1, "the docstring of its config: 0.1 to 0.3"),
    "cartridge": Rate(2e-2, "key-value prefixes that start from a text (arXiv 2506.06266): not searched for here"),
    "compacter": Rate(1e-3, "a bottleneck adapter made of few numbers: not searched for here"),
    "cpt": Rate(1e-4, "trained embeddings that start from a text: small steps, not searched for here"),
    "delora": Rate(1e-3, "its norm is bounded, so steps larger than LoRA's do no harm: not searched for here"),
    "fourierft": Rate(5e-2, "coefficients of a spectrum (arXiv 2405.03003): not searched for here"),
    "frod": Rate(1e-2, "few numbers over frozen bases, as VeRA: not searched for here"),
    "glora": Rate(1e-3, "scales and shifts with small factors: not searched for here"),
    "hira": Rate(1e-3, "an update times the weight's entries, which are small: more than LoRA, not searched for here"),
    "hra": Rate(1e-3, "reflections, as rotations: not searched for here"),
    "ia3": Rate(3e-3, "T-Few, arXiv 2205.05638, with Adafactor; 1e-2 measured"),
    "invertible": Rate(1e-4, "arXiv 2005.00052, section 4, for adapters of languages"),
    "ln_tuning": Rate(1e-3, _VECTORS),
    "lokr": Rate(5e-4, "two small factors: a little more than LoRA, not searched for here"),
    "lora_xs": Rate(4e-3, "few numbers between frozen factors (arXiv 2405.17604): not searched for here"),
    "multitask_prompt_tuning": Rate(3e-1, "arXiv 2303.02861, with Adafactor"),
    "oft": Rate(5e-4, "rotations that start at the identity: not searched for here"),
    "osf": Rate(5e-5, "trains the weight's own singular vectors: a rate of full fine-tuning"),
    "p_tuning": Rate(1e-3, "an encoder makes the prompts, so its weights take small steps: not searched for here"),
    "poly": Rate(1e-3, "a router over LoRAs (arXiv 2202.13914): not searched for here"),
    "prefix_tuning": Rate(3e-2, "measured (examples/tutorial.py), without projection"),
    "prompt_tuning": Rate(3e-2, "measured (examples/tutorial.py); arXiv 2104.08691 uses 0.3 with Adafactor"),
    "psoft": Rate(5e-4, "rotations in a subspace: not searched for here"),
    "pvera": Rate(4e-3, "as VeRA"),
    "randlora": Rate(1e-3, "scales of random bases: not searched for here"),
    "reft": Rate(9e-4, "arXiv 2404.03592, appendix (commonsense reasoning): not searched for here"),
    "road": Rate(3e-3, "rotations of pairs of outputs: few numbers, not searched for here"),
    "shadow": Rate(2e-4, "small networks beside the model: not searched for here"),
    "shira": Rate(1e-3, "single entries of the weight, each taking its own step: not searched for here"),
    "supertuning": Rate(1e-3, "single entries of the weight: not searched for here"),
    "tinylora": Rate(1e-2, "a handful of numbers: not searched for here"),
    "trainable_tokens": Rate(1e-3, "rows of the embedding: not searched for here"),
    "union": Rate(5e-4, "one for parts whose own ones differ: a LoRA's or a little more, not searched for here"),
    "unilora": Rate(5e-3, "one vector for all layers: not searched for here"),
    "vblora": Rate(1e-3, "vector bank (arXiv 2405.15179: 1e-3 for the bank, 1e-2 for the logits)"),
    "vera": Rate(4e-3, "arXiv 2310.11454, appendix (instruction tuning)"),
    "waveft": Rate(1e-2, "coefficients of a transform, as FourierFT's: not searched for here"),
    "xlora": Rate(1e-4, "a router over frozen adapters: not searched for here"),
}
"""Method, by its name in small letters -> the rate that `peft train` uses where a recipe says auto."""

_PREFERENCES = 10
"""A rate for preferences is so many times smaller: arXiv 2305.18290 trains all weights at 1e-6."""

_DEFAULT = Rate(1e-3, "no rate is known for this method: a middle one")


def learning_rate_of(config: Any, task: str = "sft") -> Rate:
    """The rate to begin with for an adapter's config.

    Args:
        task: "dpo" takes a tenth, as preferences are learnt in smaller steps.
    """
    rate = LEARNING_RATES.get(config.method_name.lower(), _DEFAULT)
    if task == "dpo":
        return Rate(rate.value / _PREFERENCES, f"a tenth of the rate for supervised fine-tuning, {rate.source}")
    return rate
