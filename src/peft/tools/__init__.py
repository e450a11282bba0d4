"""Looking at a model and its training from outside: status, memory, checks."""
