"""Entry point of `python -m blsp`, which is the command `blsp`."""

import sys

from blsp.cli import main

if __name__ == "__main__":
    sys.exit(main())
