"""The format of stored targets: records, checks and sizes, compared with arithmetic by hand."""

import numpy as np
import pytest
import torch

from deit.datasets.mixing import Mix
from deit.datasets.view_batches import UnmixedViews
from deit.distill.target_fingerprint import differences
from deit.distill.target_format import RecordFormat, decode, encode, view_checksum

HARD = RecordFormat("hard", 10, 300, 50_000, False)


def size(layout):
    """Return the bytes of targets.bin and checks.bin."""
    checksums = layout.epochs * len(layout.checked_rows)
    return layout.rows * layout.dtype.itemsize, 4 * (3 * layout.num_shards + checksums)


@pytest.mark.parametrize("paired", [False, True])
def test_hard_targets_of_cifar10_for_300_epochs_are_15_mb(paired):
    targets, checks = size(HARD._replace(mixed_pairs=paired))
    assert targets == 15_000_000
    manifest = 6_000
    assert checks + manifest < 0.01 * targets


@pytest.mark.fault("D8")
@pytest.mark.parametrize(
    ("records", "num_classes", "expected"),
    [
        ("hard", 10, 1),
        ("hard", 256, 1),
        ("hard", 257, 2),
        ("hard", 1000, 2),
        ("full", 10, 21),
        ("full", 100, 201),
        ("full", 1000, 2002),
        ("top-5", 1000, 20),
        ("top-10", 100, 30),
    ],
)
def test_record_format_bytes_per_record(records, num_classes, expected):
    assert RecordFormat(records, num_classes, 1, 1, False).dtype.itemsize == expected


@pytest.mark.parametrize(
    "layout", [HARD, RecordFormat("full", 10, 7, 1294, True), RecordFormat("hard", 3, 1, 5, False)]
)
def test_shards_cover_every_row_once(layout):
    assert layout.rows_per_shard % 2 == 0
    seen = np.zeros(layout.rows if layout.rows < 10**6 else 0, dtype=int)
    last = 0
    for shard in range(layout.num_shards):
        for epoch, first, stop in layout.epoch_ranges(shard):
            start = epoch * layout.rows_per_epoch + first
            assert start == last
            last = epoch * layout.rows_per_epoch + stop
            assert 0 <= first < stop <= layout.rows_per_epoch
            seen[start:last] += 1
    assert last == layout.rows
    assert (seen == 1).all()
    assert layout.num_shards <= 2048


@pytest.mark.parametrize(
    ("num_rows", "paired", "step", "num_checked"),
    [
        (50_000, False, 1024, 49),
        (1294, True, 160, 9),
        (16, True, 2, 8),
        (5, False, 2, 3),
        (1, False, 2, 1),
    ],
)
def test_check_interval_grows_with_the_epoch(num_rows, paired, step, num_checked):
    layout = RecordFormat("hard", 10, 2, num_rows, paired)
    assert layout.check_interval == step
    assert len(layout.checked_rows) == num_checked
    assert all(row + paired < num_rows for row in layout.checked_rows)


LOGITS = 3 * torch.randn(500, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.fault("D8")
@pytest.mark.parametrize("records", ["hard", "full", "top-3", "top-9"])
def test_decoded_labels_are_exact_in_every_record_format(records):
    layout = RecordFormat(records, 10, 1, 500, False)
    labels, _ = decode(layout, encode(layout, LOGITS))
    assert torch.equal(labels, LOGITS.argmax(dim=1))
    near_tie = torch.tensor([[1.0, 1.0 + 1e-6, 0.5] + [0.0] * 7])  # equal once rounded to fp16
    assert decode(layout, encode(layout, near_tie))[0].tolist() == [1]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_full_records_are_accurate_at_any_temperature(temperature):
    layout = RecordFormat("full", 10, 1, 500, False)
    _, scores = decode(layout, encode(layout, LOGITS))
    assert scores.dtype == torch.float32
    actual, expected = ((z / temperature).softmax(dim=1) for z in (scores, LOGITS))
    variation = (actual - expected).abs().sum(dim=1) / 2
    assert variation.mean() < 1e-3
    assert variation.max() < 2e-3


def test_top_k_records_spread_the_rest_evenly():
    layout = RecordFormat("top-3", 10, 1, 500, False)
    _, scores = decode(layout, encode(layout, LOGITS))
    actual, exact = scores.softmax(dim=1), LOGITS.softmax(dim=1)
    top, indices = exact.topk(3, dim=1)
    assert torch.allclose(actual.gather(1, indices), top, atol=2e-3)
    expected_rest = (1 - top.sum(dim=1, keepdim=True)) / 7
    rest = actual.scatter(1, indices, 0.0).sum(dim=1, keepdim=True) / 7
    assert torch.allclose(rest, expected_rest, atol=1e-3)


@pytest.mark.fault("D8")
def test_decoded_extreme_logits_are_finite():
    layout = RecordFormat("full", 3, 1, 1, False)
    records = encode(layout, torch.tensor([[1e6, 0.0, -1e6]]))
    labels, scores = decode(layout, records)
    assert labels.tolist() == [0]
    assert scores.isfinite().all()
    top_two = RecordFormat("top-2", 3, 1, 1, False)
    assert decode(top_two, encode(top_two, torch.tensor([[1e6, 0.0, -1e6]])))[1].isfinite().all()


def unmixed_views(**changes):
    pixels = torch.randint(
        256, (4, 3, 6, 6), generator=torch.Generator().manual_seed(4), dtype=torch.uint8
    )
    mix = Mix(
        torch.tensor([0.3, 0.6], dtype=torch.float64),
        torch.tensor([False, True]),
        torch.tensor([[0, 0, 0, 0], [1, 2, 4, 5]]),
        6,
    )
    base = UnmixedViews(pixels, mix, torch.arange(4), 0, torch.arange(4))
    return base._replace(**changes)


def with_change(value, row, amount):
    value = value.clone()
    value[row] += amount
    return value


def test_view_checksum_changes_with_every_pixel_and_mixing_parameter():
    base = unmixed_views()
    expected = view_checksum(base, 2)
    mix = base.mix
    changed = {
        "pixel": unmixed_views(pixels=with_change(base.pixels, (2, 1, 3, 3), 1)),
        "pixel of the partner": unmixed_views(pixels=with_change(base.pixels, (3, 0, 0, 5), 1)),
        "weight": unmixed_views(mix=mix._replace(lam=with_change(mix.lam, 1, 1e-4))),
        "kind": unmixed_views(mix=mix._replace(is_cutmix=torch.tensor([False, False]))),
        "box": unmixed_views(mix=mix._replace(boxes=with_change(mix.boxes, (1, 3), 1))),
        "unmixed": unmixed_views(mix=None),
    }
    for name, views in changed.items():
        assert view_checksum(views, 2) != expected, name
    # The other pair, and the last bits of the weight, do not matter.
    other_pair = unmixed_views(pixels=with_change(base.pixels, (1, 0, 0, 0), 1))
    assert view_checksum(other_pair, 2) == expected
    close = mix._replace(lam=with_change(mix.lam, 1, 1e-12))
    assert view_checksum(unmixed_views(mix=close), 2) == expected


def test_differences_name_the_path_of_each_value():
    before = {"views": {"crop": "padded", "flip": 0.5}, "seed": 0, "dataset": "a" * 64}
    after = {"views": {"crop": "none", "flip": 0.5}, "seed": 1, "dataset": "b" * 64, "new": 3}
    assert differences(before, after) == [
        "views.crop: 'padded' in the store, 'none' in this run",
        "seed: 0 in the store, 1 in this run",
        "dataset: aaaaaaaaaaaa... in the store, bbbbbbbbbbbb... in this run",
        "new: None in the store, 3 in this run",
    ]
    assert differences(before, before) == []


GROWTH = """
import sys
from pathlib import Path
import psutil
import torch
from deit.core.types import Batch
from deit.distill.target_format import RecordFormat
from deit.distill.target_store import TargetStore
import numpy as np

folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
layout = RecordFormat("full", 10, epochs, 10_000, False)
with (folder / "targets.bin").open("wb") as file:
    for _ in range(epochs):
        file.write(bytes(layout.rows_per_epoch * layout.dtype.itemsize))
checks = 3 * layout.num_shards + layout.epochs * len(layout.checked_rows)
np.zeros(checks, "<u4").tofile(folder / "checks.bin")
manifest = dict.fromkeys(("fingerprint", "provenance", "inference", "teacher_top1"), {})
manifest["record_format"] = layout._asdict()
manifest["fingerprint"] = {"views": {"teacher_view": "same"}}
store = TargetStore(folder, manifest)
images = torch.zeros(10_000, 0)

def resident():
    return psutil.Process().memory_info().rss // 1024

def read(epoch):
    store(Batch(images, None, images, images, epoch, torch.arange(10_000)))

read(0)
before = resident()
for epoch in range(epochs):
    read(epoch)
print(resident() - before)
"""


def test_target_store_memory_does_not_grow_with_epochs_read(command_server, tmp_path):
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    done = command_server.run(tmp_path, "150", script=str(script))  # 150 epochs: 31 MB
    assert done.code == 0, done.err
    assert int(done.out) < 4_000  # KiB
