"""`python -m loopmdm` is the command `loopmdm`."""

import sys

from loopmdm.cli import main

if __name__ == "__main__":
    sys.exit(main())
