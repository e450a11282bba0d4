"""Virtual tokens ``[P; E(x)]`` before a text, or keys and values ``[K_p; K(x)]`` in every attention layer.

A method says what it trains (:class:`VirtualTokens`). How a model receives it, is here: embeddings, masks, positions,
labels, caches, generation, rows of a batch with different prompts, files.
"""

from __future__ import annotations

from peft.core.prompts.adapters import NOTHING_TO_MERGE, PromptTuner
from peft.core.prompts.calls import PLAIN, Task, backbone_of, weighted_cross_entropy
from peft.core.prompts.rows import Prompts
from peft.core.prompts.tokens import ENCODER, VirtualTokens, check_shape, define_prompt, put


__all__ = [
    "ENCODER",
    "NOTHING_TO_MERGE",
    "PLAIN",
    "PromptTuner",
    "Prompts",
    "Task",
    "VirtualTokens",
    "backbone_of",
    "check_shape",
    "define_prompt",
    "put",
    "weighted_cross_entropy",
]
