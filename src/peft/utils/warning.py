"""The warnings of the package, at the path at which others import them."""

from peft.errors import PeftWarning as PeftWarning
from peft.errors import UnusedEntryWarning as UnusedEntryWarning
