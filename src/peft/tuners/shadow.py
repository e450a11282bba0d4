"""Shadow: a small network beside the model, h <- h + alpha W_up W_down (h - s), s <- (1 - g) s + g T(h).

The state s starts as what the network makes of the same input; g = sigmoid(G(h)) (ShadowPEFT, arXiv 2604.20313).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting, shared
from peft.core.blocks.blocks import BlockAdapter, BlockTarget, BlockTuner, find_blocks, width_of
from peft.core.model import operations
from peft.core.model.registry import define_tuner
from peft.core.model.targeting import selected
from peft.core.model.walk import embeddings_of, layers_of, locate
from peft.default_targets import SEQ_CLS_HEAD_NAMES
from peft.errors import NoMatchingPeftModuleError
from peft.peft_types import PeftType
from peft.tuners.shadow_layer import ShadowLayer, States, shadow_state, shadow_update
from peft.tuners.shadow_utils import Network, loss_of, network_for, stack_of


if TYPE_CHECKING:
    from peft.compat.shadow import DetachedShadowModel


@dataclass
class ShadowConfig(TargetModules, ExcludeModules, LayerSelection, ModulesToSave, Network):
    """Config of Shadow. Left out, ``target_modules`` are all blocks of the decoder.

    For serving on two sides: the small network, trained beside a large decoder, also runs alone on a small device.
    """

    METHOD: ClassVar[PeftType] = PeftType.SHADOW

    r: int = option(8, "Width of the bottleneck from the difference of the states to the update.", minimum=1)
    shadow_alpha: float = option(0.1, "Factor of the update.")
    shadow_dropout: float = option(0.2, "Dropout on the difference of the states.", minimum=0, below=1)
    init_weights: bool = option(True, "Start with W_up = 0, so that nothing changes; otherwise at random numbers.")
    update_hidden_size: int = option(None, "Width inside T and G; `r` if left out.", minimum=1)
    auxiliary_loss_weight: float = option(
        0.05, "Weight of the loss of the shadow network alone, which is added where labels are given.", minimum=0
    )


class Shadow(BlockAdapter):
    """The bottleneck, and T and G, of one block. The shadow network is shared by all; the first layer runs it."""

    shadow_down, shadow_up = part(nn.ModuleDict), part(nn.ModuleDict)
    shadow_update_transform, shadow_update_gate = part(nn.ModuleDict), part(nn.ModuleDict)
    shadow_backbone, shadow_projection, shadow_head = shared(), shared(), shared()
    shadow_dropout = setting(nn.ModuleDict)
    alpha = setting()
    labelled = True

    def create(self, config: ShadowConfig, key: str) -> None:
        width, inner = width_of(self.base), config.update_hidden_size or config.r
        self.shadow_down = nn.Linear(width, config.r, bias=False)
        self.shadow_up = nn.Linear(config.r, width, bias=False)
        if config.init_weights:
            nn.init.zeros_(self.shadow_up.weight)
        self.shadow_update_transform, self.shadow_update_gate = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for _ in range(2)
        )
        self.shadow_dropout, self.alpha = nn.Dropout(config.shadow_dropout), config.shadow_alpha

    @classmethod
    def share(cls, config: ShadowConfig, layers: Any) -> dict[str, Any]:
        stack, width = layers[0].stack, width_of(layers[0].base_layer)
        backbone = network_for(config, stack, width)
        backbone.loss_weight = config.auxiliary_loss_weight
        inner = backbone.config.hidden_size
        projection = nn.Identity() if inner == width else nn.Linear(inner, width, bias=False)
        head = nn.Identity() if layers[0].head is None else deepcopy(layers[0].head)
        for module in (backbone, head):
            module.requires_grad_(True)  # the copied head is as frozen as the base
        return {"shadow_backbone": backbone, "shadow_projection": projection, "shadow_head": head}

    def change(self, h: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What is added to the block's input."""
        apart = self.shadow_dropout(h - state)
        return shadow_update(apart, self.shadow_down.weight, self.shadow_up.weight, self.alpha)

    def next_state(self, state: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """The state after the block, by its output."""
        return shadow_state(state, self.shadow_update_gate(h), self.shadow_update_transform(h))


class ShadowTuner(BlockTuner):
    """Applies Shadow to the blocks of a decoder."""

    def find(self, config: ShadowConfig, model: nn.Module) -> list[BlockTarget]:  # type: ignore[override]
        blocks = find_blocks(model)
        stacks = {block.key.rpartition(".")[0] for block in blocks}
        if len(stacks) != 1:
            raise NoMatchingPeftModuleError(
                f"Shadow adapts models with one stack of transformer blocks; {type(model).__name__} has {len(stacks)}."
            )
        if config.target_modules is None:
            config.target_modules = {block.key for block in blocks}  # type: ignore[assignment]
        chosen = [block for block in blocks if selected(config, block.key)]
        if not chosen:
            raise NoMatchingPeftModuleError(
                f"target_modules {config.target_modules} name no transformer block; these are "
                f"{', '.join(block.key for block in blocks)}."
            )
        return [BlockTarget(block.key, locate(model, block.key).module, block=block) for block in chosen]

    def _share(self, name: str, config: Any, layers: list[Any]) -> None:
        stack, root = locate(self.model, stack_of(self.model)).module, self.model
        head = next((m for key in SEQ_CLS_HEAD_NAMES if (m := getattr(root, key, None)) is not None), None)
        # A head in modules_to_save is wrapped by then; the copy starts from the base's own.
        head = getattr(head, "original_module", head) if config.task_type == "SEQ_CLS" else None
        there = [layer for _, layer in layers_of(root) if isinstance(layer, ShadowLayer)]
        states = next((layer.states for layer in there if "states" in layer.__dict__), States())
        for layer in layers:
            # As submodules they would hold the layer itself.
            layer.__dict__.update(states=states, stack=stack, head=head)
        super()._share(name, config, layers)
        self._watch(there)

    def _watch(self, layers: list[ShadowLayer]) -> None:
        """Hook the model, through one of the layers, unless that is done."""
        if layers and not any("handles" in layer.__dict__ for layer in layers):
            start = layers[0].stack.register_forward_pre_hook(layers[0].start, with_kwargs=True)
            finish = self.model.register_forward_hook(layers[0].finish, with_kwargs=True)
            layers[0].__dict__["handles"] = [start, finish]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # The layer that had the hooks may be gone.
        self._watch([layer for _, layer in layers_of(self.model) if isinstance(layer, ShadowLayer)])

    def _layer(self) -> ShadowLayer:
        return next(x for _, x in layers_of(self.model) if isinstance(x, ShadowLayer) and "handles" in x.__dict__)

    @property
    def last_shadow_loss(self) -> torch.Tensor | None:
        """The loss of the shadow network in the last call with labels, without its weight; detached."""
        return getattr(self._layer(), "loss", None)

    def shadow_auxiliary_loss(
        self, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The loss of the shadow network alone in the last call, None where it did not run; see :func:`loss_of`."""
        name, layer = self.active_adapters[0], self._layer()
        return loss_of(layer.logits(name, self.model), labels, attention_mask) if name in layer.states.of else None

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
        """An adapter's shadow network (default: the active one's) as a small model that stands alone.

        Args:
            copy: give copies of its modules; otherwise it shares them with this model.
        """
        from peft.compat.shadow import DetachedShadowModel  # which needs transformers

        name = adapter_name or self.active_adapters[0]
        operations.require_adapters(self.model, [name])
        parts = self.shadow_backbone[name], self.shadow_projection[name], self._layer().head_of(name, self.model)
        table = embeddings_of(self.model)[0] if embeddings_of(parts[0])[0] is None else None
        alone = DetachedShadowModel(*parts, self.peft_config[name].task_type == "SEQ_CLS", table).eval()
        return deepcopy(alone) if copy else alone


ShadowModel = define_tuner(Shadow, ShadowConfig, base=ShadowTuner, layer=ShadowLayer, mixed=False)
