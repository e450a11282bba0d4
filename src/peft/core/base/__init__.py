"""Base layers: how a kind of layer uses its weight, and how a module keeps it."""
