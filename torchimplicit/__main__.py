"""``python -m torchimplicit`` is the command ``torchimplicit``."""

import sys

from torchimplicit.cli import main

if __name__ == "__main__":
    sys.exit(main())
