"""Configurations of small runs to fine-tune, and their weights."""

from safetensors.torch import load_file

from deit.config.finetune_schedules import at_resolution, with_init
from deit.config.validation import load_config
from deit.core import run_folder

SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
FEW = {"train_fraction": 0.2}
BRIEF = {"epochs": 2, "batch_size": 64, "warmup_epochs": 1}


def finer(runs, **sections):
    """Return the configuration of fine-tuning the student at 16 px with a teacher at 16 px."""
    config = load_config(runs / "student" / "config.json")
    config = with_init(config, str(runs / "student"), None)
    config = at_resolution(config, 16)
    config = config.replace(teacher={"source": (str(runs / "teacher16"),)}, optim=BRIEF)
    return config.replace(**sections)


def weights(run, name="last"):
    """Return the weights of a checkpoint of a run."""
    return load_file(run_folder.find_checkpoint(run, name) / "model.safetensors")
