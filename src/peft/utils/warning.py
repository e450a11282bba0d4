"""The warnings of the package."""


class PeftWarning(UserWarning):
    """Something was accepted, but the outcome may not be what was meant."""
