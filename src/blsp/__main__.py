"""`python -m blsp` is `blsp`."""

import sys

from blsp.cli import main

if __name__ == "__main__":
    sys.exit(main())
