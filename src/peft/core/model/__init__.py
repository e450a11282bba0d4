"""Adapters in a whole model: where they go, what they share, their life."""
