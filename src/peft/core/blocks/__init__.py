"""Modules in, beside and after the blocks of a transformer."""
