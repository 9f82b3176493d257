"""Fine-tune a finished run at higher resolution (not in this version yet)."""

import sys

from deit.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("finetune", sys.argv[1:], "finetune_deit.py"))
