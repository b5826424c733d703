"""`python -m kdjax`: the command line."""

import sys

from kdjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
