"""Evaluate a finished run: evaluate_deit.py RUN [OPTIONS]."""

import sys

from deit.cli import script

if __name__ == "__main__":
    sys.exit(script("evaluate"))
