"""Fine-tune a run or a checkpoint: finetune_deit.py --from RUN [RECIPE] [options]."""

import sys

from deit.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("finetune", sys.argv[1:], "finetune_deit.py"))
