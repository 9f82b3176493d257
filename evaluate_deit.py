"""Measure a finished run, head by head: evaluate_deit.py RUN [--json FILE]."""

import sys

from deit.cli import script

if __name__ == "__main__":
    sys.exit(script("evaluate"))
