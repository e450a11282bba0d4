"""The families of methods: what a method gives, and what follows from it for every operation."""
