"""Run the flows of the clients in an environment that holds peft 0.21.2, and keep their results.

    PATH/TO/ITS/bin/python tests/clients/record.py [pytest's arguments]

The tests are the same, so what they assert is seen to hold there too, except for tests marked `beyond`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import peft


if __name__ == "__main__":
    folder = Path(__file__).parent
    if peft.__version__ != "0.21.2":
        sys.exit(f"peft {peft.__version__} is installed here, and not 0.21.2")
    target = folder.parent / "data" / "clients.json"
    os.environ["PEFT_CLIENTS_RECORD"] = str(target)
    if not sys.argv[1:]:
        target.unlink(missing_ok=True)
    import pytest

    sys.exit(pytest.main([str(folder), "-q", "-m", "not beyond", "-p", "no:cacheprovider", *sys.argv[1:]]))
