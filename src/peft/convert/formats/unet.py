"""UNets of Stable Diffusion: the names of their authors, which kohya-ss has for SDXL, and those of diffusers.

The authors number all blocks through, an input block for each residual block and each step down; diffusers counts
levels, of two residual blocks in the input and three in the output. The matrices are the same one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.convert.held import (
    Held,
    Pairs,
    alpha_and_rank,
    held_of,
    is_lora,
    modules_of,
    on_modules,
    pairs_of,
    renames_no,
    without_whole_modules,
)
from peft.convert.names import UNET_OF_AUTHORS, UNET_OF_DIFFUSERS
from peft.convert.source import Base
from peft.errors import ConfigError


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_LEVEL = 3  # input blocks of a level: two residual blocks and the step down; output blocks: three residual blocks


def is_authors(names: Iterable[str]) -> bool:
    """Whether modules have the names of Stable Diffusion's authors."""
    return any(name.partition(".")[0] in UNET_OF_AUTHORS for name in names)


def has_unet(names: Iterable[str]) -> bool:
    """Whether modules are those of a UNet of diffusers."""
    return any(name.partition(".")[0] in UNET_OF_DIFFUSERS for name in names)


def diffusers_name(module: str) -> str:
    """What diffusers calls a module of the authors': ``input_blocks.4.1.norm`` is ``down_blocks.1.attentions.0.norm``.

    Raises:
        ConfigError: the UNets of Stable Diffusion have no such module.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    place = _place(module)
    if place is not None:
        part, inner = place
        if ".resnets." not in part:
            return f"{part}.{inner}"
        if inner in _RESNET:
            return f"{part}.{_RESNET[inner]}"
    raise ConfigError(f"{module} is no module of a UNet of Stable Diffusion with a counterpart in diffusers.")


def _place(module: str) -> tuple[str, str] | None:
    """The part of diffusers' UNet that a module is in, and its name there."""
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", module):
        return f"mid_block.{_MIDDLE[found[1]]}", found[2]
    if found := re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", module):
        level, place = divmod(int(found[1]) - 1, _LEVEL)
        if place == _LEVEL - 1:
            return (f"down_blocks.{level}.downsamplers.0", "conv") if found[3] == "op" else None
        return f"down_blocks.{level}.{('resnets', 'attentions')[int(found[2])]}.{place}", found[3]
    if found := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", module):
        level, place = divmod(int(found[1]), _LEVEL)
        if found[2] != "0" and found[3] == "conv":
            return f"up_blocks.{level}.upsamplers.0", "conv"
        if found[2] != "2":
            return f"up_blocks.{level}.{('resnets', 'attentions')[int(found[2])]}.{place}", found[3]
    return None


def unet_to_diffusers(held: Held) -> Held:
    """An adapter on the authors' modules as the same on diffusers'.

    Raises:
        ConfigError: a module has no counterpart, or the method has no ranks by module.
    """
    if is_lora(held):
        pairs = pairs_of(held)
        return held_of(Pairs({diffusers_name(m): pair for m, pair in pairs.pairs.items()}, pairs.others, pairs.rslora))
    if held.method not in ("LOHA", "LOKR"):
        raise renames_no(held, "a UNet")
    found = without_whole_modules(held, "a UNet").by_module
    names = {module: diffusers_name(module) for module in found}
    modules = {names[module]: parts for module, parts in found.items()}
    return on_modules(held, modules, {name: alpha_and_rank(held, module) for module, name in names.items()})


def unet_as_in(held: Held, base: Base) -> Held:
    """The adapter on the modules of a base that is a UNet of diffusers; any other as it is."""
    if has_unet(base.names) and is_authors(modules_of(held)):
        return unet_to_diffusers(without_whole_modules(held, "a UNet"))
    return held
