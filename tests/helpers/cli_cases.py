"""Options of short runs, and the options of each command, for the tests of deit/cli."""

# A run of seconds: two updates on a fifth of the training digits.
QUICK = (
    *("--optim.epochs=1", "--optim.warmup_epochs=0", "--optim.batch_size=128"),
    "--data.train_fraction=0.2",
)
SMALL = ("--student.embed_dim=16", "--student.depth=1", "--student.num_heads=2")

COMMANDS_WITH_CONFIG = {
    "train": ("", ""),
    "finetune": ("from resolution schedule", ""),
    "compare": ("study arms seeds parallel retries", "resume"),
    "sweep": ("recipe seeds parallel retries top", "resume"),
    "prune": (
        "ratio heads hidden macs scope criterion images checkpoint schedule controls parallel",
        "resume",
    ),
    "lottery": (
        "rounds prune-rate scope rewind-epoch controls control-rounds tolerance seeds parallel "
        "retries",
        "resume",
    ),
    "show-views": ("out force epoch num-views", "resume dry-run print-config"),
    "targets write": ("out epochs content part teacher-index", "resume dry-run"),
    "profile": ("updates trace json force", "out resume dry-run print-config"),
}
"""Each command that takes a configuration: its own options, and shared options it does not take."""
