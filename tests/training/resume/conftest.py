"""Runs that the tests of resuming share."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.core import fault_injection
from deit.distill.write_targets import write_targets
from deit.training.train import train
from tests.helpers.resume_helpers import EPOCHS, LAST, stop_at


@pytest.fixture(scope="package")
def config(tmp_path_factory) -> Config:
    """Return a configuration with all random operations, EMA, stored targets and image files."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume")
    generator = torch.Generator().manual_seed(0)
    for split, images_per_class in (("train", 14), ("val", 3)):
        for label in range(3):
            class_folder = folder / "pictures" / split / f"class{label}"
            class_folder.mkdir(parents=True)
            for index in range(images_per_class):
                noise = torch.randint(0, 120, (12, 12, 3), generator=generator)
                noise[..., label] += 100
                Image.fromarray(noise.to(torch.uint8).numpy()).save(class_folder / f"{index}.png")
    data = {
        "source": "folder",
        "root": str(folder / "pictures"),
        "image_size": 12,
        "num_workers": 0,
    }
    data |= {"storage": "files", "validation_fraction": 0.2}
    teacher = digits_teacher().replace(data=data, student={"image_size": 12}, optim={"epochs": 3})
    train(teacher.replace(optim={"batch_size": 8}), folder / "teacher")
    config = digits().replace(
        data=data,
        views={
            "auto_augment": "randaugment",
            "erasing_prob": 0.25,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
        },
        student={"image_size": 12, "depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path": 0.3}
        | {"dropout": 0.1},
        teacher={"source": (str(folder / "teacher"),)},
        optim={"epochs": EPOCHS, "batch_size": 8, "warmup_epochs": 1, "ema_epochs": 1.0},
        run={"eval_every_epochs": 1, "linear_backend": "torch"},  # the same on every processor
    )
    write_targets(config, folder / "targets")
    return config.replace(teacher={"target_stores": (str(folder / "targets"),)})


@pytest.fixture(scope="package")
def live_config(config) -> Config:
    """Return `config` without stored targets, whose check takes as long as the training."""
    return config.replace(teacher={"target_stores": ()})


@pytest.fixture(scope="package")
def uninterrupted_run(config, tmp_path_factory) -> Path:
    """Return a finished run without a stop."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(config, out)["step"] == LAST
    return out


@pytest.fixture(autouse=True)
def _one_thread(_deterministic_and_offline):
    torch.set_num_threads(1)  # results differ with two threads
    yield
    fault_injection.install_faults(None)


@pytest.fixture(scope="package")
def stopped_run(live_config, tmp_path_factory) -> tuple[Config, Path]:
    """Return the configuration and the folder of a run stopped after its first step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stop_at(live_config, out, "step:1:term")
    return live_config, out
