"""Entry point of ``python -m optimkit``."""

import sys

from optimkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
