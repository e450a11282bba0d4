"""What adapters need to know about other libraries, at the path at which others import it."""

from peft._lazy import also_known
from peft.compat.integrations import *  # noqa: F403


also_known(__name__)
