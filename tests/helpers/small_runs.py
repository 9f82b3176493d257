"""Small runs that take seconds, and checks that two of them are equal."""

from pathlib import Path

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes import RECIPES
from deit.config.recipes.handwriting import digits
from deit.core import run_log
from tests.helpers.command_server import CommandServer
from tests.helpers.processes import Completed

STEPS = 5


SMALL = (
    *(
        "digits",
        "--loss",
        "none",
        "--teacher.source",
        "none",
        "--views.auto_augment",
        "randaugment",
    ),
    *("--views.mixup_alpha", "0.8", "--views.cutmix_alpha", "1"),
    *("--student.depth", "2", "--student.embed_dim", "24", "--student.num_heads", "2"),
    # A quarter of the images: 324, which are five batches.
    *("--data.train_fraction", "0.25", "--optim.batch_size", "64", "--optim.epochs", "2"),
    *("--student.drop_path", "0.2"),
    *("--optim.warmup_epochs", "1", "--optim.ema_epochs", "1", "--run.eval_every_epochs", "1"),
    *("--run.linear_backend", "torch"),  # the same on every processor
)


def assert_same_run(out: Path, uninterrupted_run: Path) -> None:
    """Assert that two runs have the same state hashes and best weights, and no temporary files."""
    for name in (run_log.HASH_CHAIN, "best/model.safetensors"):
        assert (out / name).read_bytes() == (uninterrupted_run / name).read_bytes()
    steps = [row["step"] for row in run_log.read(out / run_log.METRICS)]
    assert steps == [STEPS, 2 * STEPS]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def run(command_server: CommandServer, out: Path, fault: str = "", *more: object) -> Completed:
    """Run or resume the small training, with a fault of deit.core.fault_injection."""
    return command_server.run("train", *SMALL, "--out", out, "--resume", *more, DEIT_FAULT=fault)


THREE_EPOCHS = (
    *("--student.embed_dim", "24", "--student.depth", "2", "--student.num_heads", "3"),
    *("--optim.epochs", "3", "--optim.warmup_epochs", "1", "--optim.batch_size", "64"),
    *("--run.eval_every_epochs", "3", "--data.train_fraction", "0.3"),
)


QUICK_PRUNING = ("--optim.epochs", "2", "--optim.warmup_epochs", "0.5", "--images", "128")


WITH_AVERAGE = (
    *("--student.embed_dim", "16", "--student.depth", "1", "--student.num_heads", "2"),
    *("--optim.epochs", "3", "--optim.warmup_epochs", "1", "--optim.batch_size", "64"),
    *("--run.eval_every_epochs", "2", "--data.train_fraction", "0.2", "--optim.ema_epochs", "1"),
)


ON_IMAGES = (
    *("--loss", "none", "--teacher.source", "none"),
    *("--student.name", "vit_micro", "--student.depth", "1", "--student.embed_dim", "16"),
    *("--student.num_heads", "2", "--student.image_size", "16", "--student.patch_size", "4"),
    *("--data.image_size", "18", "--optim.batch_size", "8", "--optim.epochs", "3"),
    *("--optim.warmup_epochs", "0", "--data.storage", "files"),
)


def two_epochs(**sections):
    """Return the configuration of a small run of two epochs without a teacher."""
    small = digits().replace(
        data={"train_fraction": 0.2},
        student={"depth": 1, "embed_dim": 16, "num_heads": 2},
        teacher={"source": ()},
        loss=LOSS_PRESETS["none"],
        optim={"epochs": 2, "warmup_epochs": 1},
    )
    return small.replace(**sections)


def image_run_arguments(image_folder: Path, out: Path, workers: int) -> tuple[str, ...]:
    """Return the command line of a short training on images that worker processes read."""
    return (
        *("train", "folder", "--data.root", str(image_folder), "--data.num_workers", str(workers)),
        *ON_IMAGES,
        *("--out", str(out), "--resume"),
    )


def image_run_config(image_folder: Path, workers: int):
    """Return the configuration of a short training on images that worker processes read."""
    data = {"root": str(image_folder), "storage": "files", "num_workers": workers, "image_size": 18}
    student = {"name": "vit_micro", "depth": 1, "embed_dim": 16, "num_heads": 2, "image_size": 16}
    return RECIPES["folder"]().replace(
        data=data,
        student={**student, "patch_size": 4},
        teacher={"source": ()},
        loss={"kind": "none"},
        optim={"batch_size": 8, "epochs": 1, "warmup_epochs": 0},
    )
