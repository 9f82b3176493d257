"""Measure a finished run, head by head: evaluate_deit.py RUN [--json FILE]."""

import sys

from deit.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:], "evaluate_deit.py"))
