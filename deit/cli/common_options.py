"""The most used options of each command with many options, and examples of it, for its --help."""

from collections.abc import Iterable
from typing import NamedTuple

HELP_OPTIONS = frozenset(("-h", "--help", "--help-all"))
"""The options that print a help text and exit."""


def is_help_requested(arguments: Iterable[str]) -> bool:
    """Return whether a command line requests a help text."""
    return not HELP_OPTIONS.isdisjoint(arguments)


class Common(NamedTuple):
    """The options that `--help` shows; `--help-all` shows all.

    options: ten options, without `--`, the first ones most used.
    examples: arguments of a command, after its name.
    """

    options: tuple[str, ...]
    examples: tuple[str, ...]


COMMON = {
    "train": Common(
        (
            *("out", "resume", "data.root", "teacher.source", "loss", "augmentation"),
            *("optim.epochs", "optim.batch_size", "optim.lr", "run.seed"),
        ),
        (
            "digits --out checkpoints/digits --optim.epochs 20 --run.seed 1",
            "folder --data.root photos --teacher.source regnety_160.deit_in1k",
        ),
    ),
    "finetune": Common(
        (
            *("from", "out", "resume", "resolution", "schedule", "data.root", "teacher.source"),
            *("optim.epochs", "optim.lr", "run.seed"),
        ),
        (
            "--from checkpoints/digits --resolution 12 --optim.epochs 5",
            "folder --from deit_tiny_distilled_patch16_224 --data.root photos",
        ),
    ),
    "profile": Common(
        (
            *("steps", "trace", "json", "optim.batch_size", "student.name", "student.image_size"),
            *("teacher.source", "data.root", "run.device", "run.precision"),
        ),
        ("digits --optim.batch_size 256 --trace trace.json",),
    ),
    "compare": Common(
        (
            *("study", "arms", "seeds", "parallel", "out", "dry-run", "data.root"),
            *("teacher.source", "optim.epochs", "optim.batch_size"),
        ),
        (
            "digits --seeds 0,1,2 --parallel 2",
            "cifar10 --study view-modes --arms same/rc,fix/rs --data.root data",
        ),
    ),
    "sweep": Common(
        (
            *("recipe", "seeds", "parallel", "retries", "top", "out", "dry-run", "data.root"),
            *("teacher.source", "optim.epochs"),
        ),
        ("heat.yaml --out checkpoints/heat --parallel 2", "view-modes --recipe digits --dry-run"),
    ),
    "lottery": Common(
        (
            *("rounds", "prune-rate", "scope", "rewind-epoch", "controls", "seeds", "parallel"),
            *("out", "dry-run", "optim.epochs"),
        ),
        ("digits --rounds 5 --seeds 0,1", "digits --scope 2:4 --out checkpoints/sparse"),
    ),
    "prune": Common(
        (
            *("ratio", "macs", "criterion", "schedule", "controls", "parallel", "out", "dry-run"),
            *("data.root", "optim.epochs"),
        ),
        ("checkpoints/digits --ratio 0.5 --out checkpoints/pruned",),
    ),
    "show-views": Common(
        (
            *("out", "force", "epoch", "num-views", "augmentation", "view-mode", "data.root"),
            *("teacher.source", "student.image_size", "run.seed"),
        ),
        ("digits --augmentation deit3 --out views.png",),
    ),
    "targets write": Common(
        (
            *("out", "epochs", "content", "part", "teacher-index", "teacher.source", "data.root"),
            *("augmentation", "view-mode", "run.seed"),
        ),
        (
            "digits --out checkpoints/targets --epochs 20",
            "digits --out checkpoints/targets --part 0/4",
        ),
    ),
    "evaluate": Common(
        (
            *("split", "data.root", "teacher", "checkpoint", "resolution", "test-set"),
            *("run.device", "run.eval_batch_size", "plot", "json"),
        ),
        (
            "checkpoints/digits --json digits.json",
            "checkpoints/digits --resolution 8,12,16 --plot speed.png",
        ),
    ),
    "quantize": Common(
        (
            *("out", "method", "calibration-images", "quantize-attention", "exclude"),
            *("sensitivity", "max-drop", "data.root", "json", "force"),
        ),
        ("checkpoints/digits --max-drop 0.5",),
    ),
    "loss-landscape": Common(
        (
            *("out", "measure", "images", "checkpoint", "data.root", "split", "points", "grid"),
            *("seed", "rounds"),
        ),
        (
            "checkpoints/digits checkpoints/labels --out checkpoints/landscape",
            "checkpoints/digits --measure lines --images 512",
        ),
    ),
}
"""By the words that select the command: `train`, `targets write`."""
