"""The path by which the ecosystem imports :class:`BufferDict`."""

from peft.core.layer.buffers import BufferDict


__all__ = ["BufferDict"]
