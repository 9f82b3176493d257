"""Fine-tune a run or pretrained weights: finetune_deit.py [RECIPE] --from SOURCE [OPTIONS]."""

import sys

from deit.cli import script

if __name__ == "__main__":
    sys.exit(script("finetune"))
