"""One adapted layer: its adapters, how its output is computed, its weight with and without them."""
