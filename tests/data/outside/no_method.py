"""An entry point's module that registers nothing."""
