"""Train a student by distillation, or a teacher: train_deit.py RECIPE [OPTIONS]."""

import sys

from deit.cli import script

if __name__ == "__main__":
    sys.exit(script("train"))
