"""``python -m apl`` is the command ``apl``."""

import sys

from apl.cli import main

if __name__ == "__main__":
    sys.exit(main())
