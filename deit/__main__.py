"""Run `python -m deit`, the same program as the console script `deit`."""

import sys

from deit.cli import program

if __name__ == "__main__":
    sys.exit(program())
