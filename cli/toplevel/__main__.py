"""`python -m saesteer`: the command line."""

import sys

from saesteer.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
