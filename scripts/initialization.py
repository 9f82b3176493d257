"""Compare weight initializations of narrow students: accuracy on whole and shuffled images."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.metrics import topk_accuracy
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits
from deit.models.saved_student import load_student
from deit.models.student import Student
from deit.training.train import train


def shuffled_patches(images: Tensor, patch: int) -> Tensor:
    """Return images [B, 3, S, S] with the patches of each in a random order."""
    grid = images.shape[-1] // patch
    split = "b c (h p) (w q) -> b (h w) c p q"
    patches = rearrange(images, split, p=patch, q=patch)
    order = torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    mixed = patches[torch.arange(len(images))[:, None], order]
    return rearrange(mixed, "b (h w) c p q -> b c (h p) (w q)", h=grid)


def measure(config: Config, student: Student) -> str:
    """Return the accuracy on training images, whole and shuffled, and the standard deviations of
    position and patch embeddings."""
    images, labels = load_splits(config.data).train
    whole = images.float() / 255
    accuracies = []
    with torch.no_grad():
        for view in (whole, shuffled_patches(whole, config.student.patch_size)):
            accuracies.append(topk_accuracy(logits_by_head(student.eval()(view))["fused"], labels))
        patches = student.network.patch_embed((whole - student.mean) / student.std).std()
        positions = student.network.pos_embed.std()
    return (
        f"whole {100 * accuracies[0]:5.1f} %, shuffled {100 * accuracies[1]:5.1f} %, standard "
        f"deviation of positions {positions:.3f} and of patch embeddings {patches:.2f}"
    )


def main() -> None:
    """Train digits without a teacher for a few epochs with each initialization."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for weight_init in ("timm", "scaled"):
        for seed in options.seeds:
            for epochs in options.epochs:
                config = digits().replace(
                    student={"weight_init": weight_init},
                    views={"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
                    loss=LOSS_PRESETS["none"],
                    optim={"epochs": epochs, "warmup_epochs": 2},
                    run={"seed": seed, "eval_every_epochs": epochs},
                )
                with tempfile.TemporaryDirectory() as folder:
                    train(config, Path(folder))
                    student, _ = load_student(run_folder.latest_checkpoint(Path(folder)))
                print(f"{weight_init}, seed {seed}, {epochs} epochs: {measure(config, student)}")


if __name__ == "__main__":
    main()
