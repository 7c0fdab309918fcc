"""``python -m depthprune``: the command line."""

import sys

from depthprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
