"""The laws that the methods of this package keep, for methods of other packages.

from peft.testing import check_method

print(check_method(MyConfig))
"""

from peft.testing.cells import Refusal
from peft.testing.checking import Report, check_method


__all__ = ["Refusal", "Report", "check_method"]
