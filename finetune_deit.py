"""Fine-tune a run or a checkpoint: finetune_deit.py --from RUN [RECIPE] [options]."""

import sys

from deit.cli import script

if __name__ == "__main__":
    sys.exit(script("finetune"))
