"""``python -m peft``: the command line."""

import sys

from peft.cli import main


if __name__ == "__main__":
    sys.exit(main())
