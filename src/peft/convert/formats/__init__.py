"""The formats, one file each, in the order in which a source is held against them."""

from peft.convert.formats.adapters import ADAPTERS
from peft.convert.formats.diffusers import DIFFUSERS
from peft.convert.formats.gguf import GGUF
from peft.convert.formats.kohya import KOHYA
from peft.convert.formats.mlx import MLX
from peft.convert.formats.own import PEFT
from peft.convert.formats.torchtune import TORCHTUNE


FORMATS = (GGUF, ADAPTERS, KOHYA, MLX, TORCHTUNE, DIFFUSERS, PEFT)
