"""Adapters as files: their tensors, reading and writing, the model card."""
