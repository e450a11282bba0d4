"""The warnings of the package."""


class PeftWarning(UserWarning):
    """Something was accepted, but the outcome may not be what was meant."""


class UnusedEntryWarning(PeftWarning, RuntimeWarning):
    """A config asks for something that does not happen; the message names it, and the nearest that there is."""
