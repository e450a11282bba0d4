"""Adapters made of adapters: expressions such as ``Stack("language", Fuse("a", "b"))``, and how models hold them."""
