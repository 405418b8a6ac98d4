"""`python -m bcoskit`, which is `bcoskit`."""

import sys

from bcoskit.cli import main

if __name__ == "__main__":
    sys.exit(main())
