"""`python -m rankgate.cli`, the same as `rankgate`."""

import sys

from rankgate.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
