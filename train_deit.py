"""Train a student by distillation, or a teacher: train_deit.py RECIPE [options]."""

import sys

from deit.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:], "train_deit.py"))
