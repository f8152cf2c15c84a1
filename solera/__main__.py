"""`python -m solera` is `solera`."""

import sys

from solera.cli import main

if __name__ == "__main__":
    sys.exit(main())
