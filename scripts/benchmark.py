"""Measure our speed beside a peer's, on this machine, in turns: `benchmark.py data`, `targets`."""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deit.config import Config, OptimConfig, StudentConfig, ViewsConfig, derive
from deit.console import say, table
from deit.datasets.images import Encoded, Images
from deit.datasets.loader import Sizes, TrainLoader
from deit.datasets.splits import load_splits
from deit.datasets.stores import FolderStore
from deit.datasets.views import Colours
from deit.engine import Job, Tally, train_epoch
from deit.environment import create_accelerator, describe, keep_freed_memory
from deit.models.networks import create_network
from deit.models.saved import Facts, build_student
from deit.optim import build_optimizer
from deit.preparation import chorus, facts_of, loader_of, teachers_of
from deit.presets import OBJECTIVES
from deit.recipes import cifar10_micro
from deit.stored import answer_to
from deit.target_writer import recorded, write_targets
from deit.targets import Layout
from deit.teaching import Faculty

COLOURS = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = ViewsConfig(crop="random_resized", flip=0.5)
RANDAUGMENT = ViewsConfig(crop="random_resized", flip=0.5, policy="randaugment")
DEIT = ViewsConfig(crop="random_resized", flip=0.5, policy="randaugment", erasing=0.25)
_BATCH = 128
_FILES_BATCH = 32
_PREFETCH = 2  # batches a worker is ahead, on both sides
_NUMBER = 2048  # images in memory


class Case(NamedTuple):
    """One row: what is compared, and for each side a function that makes batches without end."""

    name: str
    ours: Callable[[], Iterator[int]]
    theirs: Callable[[], Iterator[int]]
    peer: str
    ahead: int = 0  # batches that lie ready when a turn begins: not counted


def photographs(number: int, side: int) -> np.ndarray:
    """Real image content without a download: parts of scikit-learn's two photographs, uint8
    [number, side, side, 3]."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    parts = []
    for index in range(number):
        picture = pictures[index % len(pictures)]
        extent = int(generator.integers(min(side, 200), min(picture.size)))
        left = int(generator.integers(picture.width - extent + 1))
        top = int(generator.integers(picture.height - extent + 1))
        part = picture.crop((left, top, left + extent, top + extent))
        parts.append(np.array(part.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(parts)


def our_loader(images: Images | Encoded, views: ViewsConfig, side: int, workers: int) -> Any:
    """Our loader as a run would build it."""
    return TrainLoader(
        images,
        10,
        views=views,
        optim=OptimConfig(batch_size=_FILES_BATCH if workers else _BATCH),
        sizes=Sizes(side, side, side),
        colours=COLOURS,
        seed=0,
        workers=workers,
    )


def ours(
    images: Images | Encoded, views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """Our loader and the normalisation a network of ours does, batch after batch."""
    loader = our_loader(images, views, side, workers)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in COLOURS)
    for epoch in range(10**9):
        for batch in loader.epoch(epoch):
            yield len((batch.images - mean) / std)


class _Pictures(torch.utils.data.Dataset):
    """What timm's loader reads: Pillow images from memory, or from files."""

    def __init__(self, source: np.ndarray | list[Path]) -> None:
        self.source = source
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.source[index]
        picture = Image.open(entry).convert("RGB") if isinstance(entry, Path) else None
        picture = picture or Image.fromarray(entry)
        return self.transform(picture), index % 10


def timms(
    source: np.ndarray | list[Path], views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """timm's create_loader with the same augmentation and its fast collation, batch after batch."""
    from timm.data import auto_augment, create_loader

    # Pillow 13 refuses to keep 0 bits, which timm asks for at magnitude 10: at least 1, as ours.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **settings: (
        auto_augment.posterize(image, max(bits, 1), **settings)
    )
    loader = create_loader(
        _Pictures(source),
        input_size=(3, side, side),
        batch_size=_FILES_BATCH if workers else _BATCH,
        is_training=True,
        use_prefetcher=True,
        re_prob=views.erasing,
        re_mode="pixel",
        scale=views.crop_scale,
        ratio=views.crop_ratio,
        hflip=views.flip,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1" if views.policy == "randaugment" else None,
        interpolation=views.interpolation,
        mean=COLOURS.mean,
        std=COLOURS.std,
        num_workers=workers,
        pin_memory=False,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over so many seconds."""
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += next(batches)
    return number / (time.perf_counter() - started)


def measured(case: Case, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Both sides in turns; the ratio of each turn, so that a busy moment meets both."""
    sides = case.ours(), case.theirs()
    for side in sides:
        next(side)  # warm up: workers, caches
    pairs = []
    for _ in range(rounds):
        turns = []
        for side in sides:
            for _ in range(case.ahead):  # what a worker made while the other side was measured
                next(side)
            turns.append(rate(side, seconds))
        pairs.append(turns)
    ratios = [one / other for one, other in pairs]
    mine, other = (statistics.mean(values) for values in zip(*pairs))
    return {
        "name": case.name,
        "peer": case.peer,
        "ours_images_per_s": mine,
        "peer_images_per_s": other,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "n": rounds,
    }


def memory_case(name: str, views: ViewsConfig, side: int, source: int) -> Case:
    """Images in memory, one thread each."""
    arrays = photographs(_NUMBER, source)
    labels = torch.arange(_NUMBER) % 10
    images = Images(torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(), labels)
    return Case(
        name,
        lambda: ours(images, views, side),
        lambda: timms(arrays, views, side),
        "timm create_loader",
    )


def file_case(name: str, views: ViewsConfig, side: int, folder: Path) -> Case:
    """JPEG files of 400 px, one worker process each."""
    paths = []
    for index, array in enumerate(photographs(3 * _BATCH, 400)):
        paths.append(folder / f"{index}.jpg")
        Image.fromarray(array).save(paths[-1], quality=90)
    store = FolderStore(folder, tuple(path.name for path in paths))
    images = Encoded(torch.arange(len(paths)) % 10, store, torch.arange(len(paths)))
    return Case(
        name,
        lambda: ours(images, views, side, workers=1),
        lambda: timms(paths, views, side, workers=1),
        "timm create_loader",
        ahead=_PREFETCH + 1,
    )


def step_case(name: str, network: str, patch: int, side: int) -> Case:
    """A training step fed by our loader, beside the same step on a batch that is there already."""
    array = photographs(_NUMBER, side)
    images = Images(
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), torch.arange(_NUMBER) % 10
    )
    classes = tuple(str(label) for label in range(10))
    config = StudentConfig(name=network, image_size=side, patch_size=patch)
    student = build_student(Facts(config, classes, *COLOURS, 1.0))
    optimizer = torch.optim.AdamW(student.parameters())

    def step(pictures: Tensor, targets: Tensor) -> int:
        outputs = student(pictures)
        loss = torch.nn.functional.cross_entropy(outputs.class_logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(pictures)

    def fed() -> Iterator[int]:
        loader = our_loader(images, DEIT, side, 0)
        for epoch in range(10**9):
            for batch in loader.epoch(epoch):
                yield step(batch.images, batch.targets)

    def ready() -> Iterator[int]:
        batch = next(our_loader(images, DEIT, side, 0).epoch(0))
        while True:
            yield step(batch.images, batch.targets)

    return Case(name, fed, ready, "no loader at all")


def target_config(folder: Path, student: str) -> Config:
    """CIFAR-10's shape and recipe on scikit-learn's photographs, in class folders."""
    root = folder / "pictures"
    if not root.exists():
        for index, array in enumerate(photographs(_NUMBER, 32)):
            place = root / f"class {index % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{index:05d}.png")
    return derive(
        cifar10_micro(),
        data={"source": "folder", "root": str(root), "test_fraction": 0.05},
        student={"name": student},
        teacher={"source": (f"{Path(__file__)}:regnet",), "allow_weak": True},
        optim={"epochs": 4},
        run={"device": "cpu"},
    )


def regnet() -> torch.nn.Module:
    """A teacher of CIFAR's size with random weights: its answers do not matter here."""
    torch.manual_seed(0)
    return create_network(StudentConfig(name="regnety_002_small_stem", image_size=32), 10)


def stored_case(name: str, student: str, folder: Path) -> Case:
    """Training with stored hard targets beside training without any teacher."""
    config = target_config(folder, student)
    store = folder / f"store-{student}"
    write_targets(config, store)
    taught = derive(config, teacher={"source": (), "targets": (str(store),)})
    alone = dataclasses.replace(config, loss=OBJECTIVES["none"])
    return Case(name, lambda: trained(taught), lambda: trained(alone), "no teacher at all")


def trained(config: Config) -> Iterator[int]:
    """Training steps as a run takes them, one after the other."""
    faculty = Faculty(config)
    accelerator = create_accelerator(config.run)
    splits = load_splits(config.data)
    loader, panel = faculty.load(splits, accelerator)
    faculty.check(splits, accelerator, loader)
    student = build_student(facts_of(config, splits))
    optimizer = build_optimizer(student, config.optim)
    student, optimizer = accelerator.prepare(student, optimizer)
    job = Job(accelerator, student, panel, optimizer, None, config.loss, config.optim, 0)
    for epoch in range(10**9):
        batches = loader.epoch(epoch % config.optim.epochs)
        for _ in train_epoch(job, batches, Tally(accelerator, {}), step=0, steps=10**6):
            yield config.optim.batch_size


def writing_case(name: str, folder: Path) -> Case:
    """Writing targets beside the teacher's bare forward pass on a batch that is there already."""
    config = target_config(folder, "deit_micro")
    splits = load_splits(config.data)
    accelerator = create_accelerator(config.run)
    (teacher,) = teachers_of(config, splits, accelerator)
    loader = loader_of(config, splits, accelerator, teacher_size=None, alone=True)

    def written() -> Iterator[int]:
        answer = answer_to(config, loader, chorus(config, splits, [teacher], accelerator))
        layout = Layout("hard", 10, config.optim.epochs, loader.places, False)
        for unit in range(10**9):
            for epoch, first, last in layout.stretches(unit % layout.units):
                places = torch.arange(first, last)
                for shown in loader.shown(epoch, places, block=config.run.evaluation_batch):
                    recorded(layout, shown, answer(shown))
                    yield len(shown.places)

    def bare() -> Iterator[int]:
        block = config.run.evaluation_batch
        shown = next(loader.shown(0, torch.arange(block), block=block))
        while True:
            teacher(shown.images)
            yield block

    return Case(name, written, bare, "the teacher's forward pass")


def targets(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py targets` whose name holds the wanted text."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cases: dict[str, Callable[[str], Case]] = {
            "training deit_micro with stored hard targets": lambda name: stored_case(
                name, "deit_micro", place
            ),
            "training deit_tiny with stored hard targets": lambda name: stored_case(
                name, "deit_tiny", place
            ),
            "writing targets of RegNetY-200MF": lambda name: writing_case(name, place),
        }
        return run_cases(cases, rounds, seconds, wanted)


def run_cases(
    cases: dict[str, Callable[[str], Case]], rounds: int, seconds: float, wanted: str
) -> list[dict[str, Any]]:
    """Measure those cases whose name holds the wanted text, one after the other."""
    rows = []
    cases = {name: case for name, case in cases.items() if wanted in name}
    for number, (name, case) in enumerate(cases.items(), start=1):
        row = measured(case(name), rounds=rounds, seconds=seconds)
        rows.append(row)
        say(
            f"{number}/{len(cases)} {row['name']}: {row['ours_images_per_s']:.0f} images/s, "
            f"{row['peer']} {row['peer_images_per_s']:.0f}, ratio {row['ratio']:.2f}"
        )
    return rows


def data(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py data` whose name holds the wanted text."""
    with tempfile.TemporaryDirectory() as folder:
        full, micro, tiny = "crop, flip, RandAugment, erasing", "deit_micro", "deit_tiny"
        jpeg = "224 px from JPEG files of 400 px, 1 worker"
        step = "32 px: training step of"
        cases: dict[str, Callable[[str], Case]] = {
            "32 px in memory: crop, flip": lambda name: memory_case(name, CROP_AND_FLIP, 32, 32),
            "32 px in memory: crop, flip, RandAugment": lambda name: memory_case(
                name, RANDAUGMENT, 32, 32
            ),
            f"32 px in memory: {full}": lambda name: memory_case(name, DEIT, 32, 32),
            f"64 px in memory: {full}": lambda name: memory_case(name, DEIT, 64, 64),
            f"{jpeg}: {full}": lambda name: file_case(name, DEIT, 224, Path(folder)),
            f"{step} {micro}, full views": lambda name: step_case(name, micro, 4, 32),
            f"{step} {tiny}, full views": lambda name: step_case(name, tiny, 4, 32),
        }
        return run_cases(cases, rounds, seconds, wanted)


WHAT = {"data": data, "targets": targets}


def main() -> None:
    """Print a table; with --json also write it, with command, machine and commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        choices=tuple(WHAT),
        help="one thread a side. data: loaders; targets: writing and reading a teacher's answers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (3)")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only those whose name holds it")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds should be positive")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: no folder {options.json.absolute().parent}")
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides
    rows = WHAT[options.what](options.rounds, options.seconds, options.rows)
    if not rows:
        parser.error(f"--rows {options.rows!r}: no row's name holds it")
    table(
        "images/s of one thread, median ratio of the turns (least to greatest)",
        ("what", "ours", "peer", "ratio", "range", "beside"),
        [
            (
                row["name"],
                f"{row['ours_images_per_s']:.0f}",
                f"{row['peer_images_per_s']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
                row["peer"],
            )
            for row in rows
        ],
    )
    if options.json is not None:
        from deit.config import RunConfig

        facts = {
            "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
            "rounds": options.rounds,
            "seconds": options.seconds,
            "batch_size": _BATCH,
            "rows": rows,
            "environment": describe(create_accelerator(RunConfig(device="cpu")), []),
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
        say(f"wrote {options.json}")


if __name__ == "__main__":
    main()
