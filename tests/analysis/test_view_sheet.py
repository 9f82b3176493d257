"""The sheet of `deit show-views`: its cells, its texts, what it refuses."""

import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFont

from deit.analysis import view_sheet
from deit.analysis.view_sheet import draw_view_sheet
from deit.config.data_section import DataConfig, ViewsConfig
from deit.config.schema import Config, LossConfig, OptimConfig, RunConfig
from deit.config.student_section import StudentConfig
from deit.datasets.splits import load_splits
from deit.distill.build import build_train_loader
from tests.helpers.commands import TEN, assert_refused, fake_teacher, run_in, tree
from tests.helpers.images import write_image_folder

TILE, GAP, LINE = view_sheet._TILE, view_sheet._GAP, view_sheet._LINE
HEADER = LINE + 2 * GAP


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", number=8)


def configuration(root, storage="memory", **views):
    """15 training images of 3 classes in batches of 4."""
    return Config(
        data=DataConfig(source="folder", root=str(root), storage=storage, image_size=16),
        views=ViewsConfig(**{"crop": "random_resized", "mixup_alpha": 0.8, **views}),
        student=StudentConfig(name="deit_micro", image_size=16),
        loss=LossConfig(kind="none"),
        optim=OptimConfig(batch_size=4, epochs=3, warmup_epochs=0, lr_base_batch_size=None),
        run=RunConfig(device="cpu", seed=11),
    )


def tile(sheet, number, across, num_images=2, lines=2):
    """A picture of the sheet: of cell `number`, `across` from the left; int64 [side, side, 3]."""
    width = num_images * (TILE + 2) + GAP
    height = TILE + lines * LINE + 2 * GAP
    columns = (sheet.width - GAP) // width
    left = GAP + number % columns * width + across * (TILE + 2)
    top = HEADER + number // columns * height
    return np.asarray(sheet)[top : top + TILE, left : left + TILE].astype(int)


def test_a_sheet_without_paper_has_the_same_tiles_and_letters_for_light_and_dark(root, tmp_path):
    for clear in (False, True):
        draw_view_sheet(
            configuration(root), tmp_path / f"{clear}.png", num_views=3, transparent=clear
        )
    white, clear = (Image.open(tmp_path / f"{one}.png") for one in (False, True))
    assert (white.mode, clear.mode) == ("RGB", "RGBA")
    assert np.array_equal(tile(clear, 2, 1)[..., :3], tile(white, 2, 1))
    assert tile(clear, 2, 1)[..., 3].min() == 255
    assert clear.getpixel((0, 0))[3] == 0
    letters = np.asarray(clear)[:HEADER].reshape(-1, 4)
    (ink,) = {tuple(int(level) for level in one[:3]) for one in letters if one[3]}
    assert contrast(ink, (255, 255, 255)) > 3
    assert contrast(ink, (0x12, 0x16, 0x1C)) > 3  # the page's paper in the dark


def contrast(one, other):
    """Of two colours, from 1 to 21 (WCAG 2.2, relative luminance)."""
    parts = [
        [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in c]
        for c in ([level / 255 for level in colour] for colour in (one, other))
    ]
    light = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in parts]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_tiles_are_the_image_and_the_view_of_the_batch(storage, root, tmp_path, capsys):
    config = configuration(root, storage)
    draw_view_sheet(config, tmp_path / "sheet.png", epoch=2, num_views=7)
    told = rf"\w+ {re.escape(str(tmp_path / 'sheet.png'))}\b\D*\b7\b\D*\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    sheet = Image.open(tmp_path / "sheet.png")
    splits = load_splits(config.data)
    batches = build_train_loader(config, splits, Accelerator(cpu=True), teacher_size=None).epoch(2)
    pair = next(batches), next(batches)
    images, samples = (
        torch.cat([getattr(batch, field) for batch in pair])[:7]
        for field in ("images", "sample_ids")
    )
    enlarged = np.ones((TILE // 16, TILE // 16), dtype=int)
    for number, (image, sample) in enumerate(zip(images, samples.tolist())):
        levels = (image * 255).round().long()
        view = np.stack([np.kron(channel, enlarged) for channel in levels.numpy()], axis=-1)
        assert np.array_equal(tile(sheet, number, 1), view)
        found = tile(sheet, number, 0)
        if storage == "memory":
            stored = splits.train.pixels[sample].numpy()
            whole = np.stack([np.kron(channel, enlarged) for channel in stored], axis=-1)
            assert np.array_equal(found, whole)
        else:
            # The whole picture at the tile's size, not a square made small before.
            with Image.open(splits.train.name(sample)) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                square = picture.convert("RGB").crop((left, top, left + side, top + side))
            close = np.asarray(square.resize((TILE, TILE), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(found - close).mean() < 7


@pytest.mark.parametrize("wanted", [1, 4, 6, 99])
def test_as_many_cells_as_wanted_and_no_more_than_an_epoch_has(wanted, root, tmp_path, capsys):
    draw_view_sheet(configuration(root), tmp_path / "sheet.png", num_views=wanted)
    views = min(wanted, 12)  # three batches of 4 of 15 images
    assert re.search(rf"sheet\.png\b\D*\b{views}\b", capsys.readouterr().out)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    # Below each cell lies text; right of its two pictures and below the last cell, paper.
    width, height = 2 * (TILE + 2) + GAP, TILE + 2 * LINE + 2 * GAP
    columns, rows = (sheet.shape[1] - GAP) // width, (sheet.shape[0] - HEADER) // height
    assert columns * rows >= views > columns * (rows - 1)
    for number in range(columns * rows):
        left, top = GAP + number % columns * width, HEADER + number // columns * height
        cell = sheet[top : top + height, left : left + width]
        assert (cell[:TILE, :TILE].std() > 5) == (number < views)
        assert (cell[TILE + 2 : TILE + 2 + 2 * LINE].min() < 130) == (number < views)


def test_labels_are_the_heaviest_two_that_count():
    names = ("ant", "bee", "cat")
    assert (
        view_sheet._format_weights(torch.tensor([0.38, 0.0, 0.62]), names) == "0.62 cat + 0.38 ant"
    )
    assert view_sheet._format_weights(torch.tensor([0.0, 1.0, 0.0]), names) == "1.00 bee"
    assert view_sheet._format_weights(torch.tensor([0.2, 0.3, 0.5]), names) == "0.50 cat + 0.30 bee"
    assert view_sheet._format_weights(torch.tensor([0.996, 0.004, 0.0]), names) == "1.00 ant"


@pytest.mark.parametrize("width", [60, 200, 268])
def test_long_lines_are_cut_where_they_would_run_into_the_next_cell(width):
    font = ImageFont.load_default(size=13)
    assert view_sheet._truncate("bee", width, font) == "bee"
    line = f"#3 {'hippopotamus ' * 9}"
    cut = view_sheet._truncate(line, width, font)
    assert cut.endswith("...")
    assert line.startswith(cut[:-3])
    assert width - 15 < font.getlength(cut) <= width


def test_long_class_names_and_titles_stay_within_their_cells(tmp_path):
    names = ("a" * 90, "b" * 90)
    root = write_image_folder(tmp_path / "images", classes=names, number=8)
    config = configuration(root, mixup_alpha=0.0)
    draw_view_sheet(config, tmp_path / "long.png", num_views=4)
    sheet = np.asarray(Image.open(tmp_path / "long.png"))
    width, height = 2 * (TILE + 2) + GAP, TILE + 2 * LINE + 2 * GAP
    for number in range(4):
        left, top = GAP + number % 2 * width, HEADER + number // 2 * height
        gap = sheet[top + TILE : top + height, left + width - GAP : left + width]
        assert (gap == 255).all()


def test_views_of_digits_are_drawn_without_and_with_their_teacher(tmp_path):
    done = run_in(tmp_path, "deit", "show-views", "digits", "--out", "alone.png", "--epoch", "3")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\w+ done\.png\b\D*\b12\b\D*\n", done.stdout)
    [warning] = done.stderr.splitlines()
    assert warning.startswith("deit: warning: ")
    assert "teacher.source checkpoints/digits-teacher" in warning
    fake_teacher(tmp_path / "teacher", TEN)
    command = ("show-views", "digits", "--teacher.source=teacher", "--num-views=33")
    taught = run_in(tmp_path, "deit", *command, "--out", "taught.webp")
    assert (taught.returncode, taught.stderr) == (0, "")
    # More than the batch of 32.
    assert re.fullmatch(r"\w+ taught\.webp\b\D*\b33\b\D*\n", taught.stdout)
    with Image.open(tmp_path / "alone.png") as sheet, Image.open(tmp_path / "taught.webp") as other:
        # 12 cells of two pictures and two lines, 33 of three and three.
        assert (sheet.width - GAP) % (2 * (TILE + 2) + GAP) == 0
        assert (other.width - GAP) % (3 * (TILE + 2) + GAP) == 0
        assert (other.height - HEADER) % (TILE + 3 * LINE + 2 * GAP) == 0
        assert max(*sheet.size, *other.size) < 3000
    assert set(tree(tmp_path)) >= {"alone.png", "taught.webp"}


@pytest.mark.parametrize(
    ("code", "fragments", "arguments"),
    [
        (5, ("--out precious.png", "--force"), ["--out=precious.png"]),
        (5, ("--out folder.png",), ["--out=folder.png", "--force"]),
        (5, ("--out gone/x.png", "/gone"), ["--out=gone/x.png"]),
        (2, ("--out sheet.txt", ".png"), ["--out=sheet.txt"]),
        (2, ("--num-views 0",), ["--num-views=0"]),
        (2, ("--num-views", "'many'", "deit show-views --help"), ["--num-views=many"]),
        (2, ("optim.epcohs", "optim.epochs"), ["--optim.epcohs=3"]),
    ],
    ids=["exists", "folder", "missing folder", "suffix", "number", "no number", "field"],
)
def test_refused_before_any_work(code, fragments, arguments, tmp_path):
    (tmp_path / "precious.png").write_text("precious")
    (tmp_path / "folder.png").mkdir()
    before = tree(tmp_path)
    assert_refused(run_in(tmp_path, "deit", "show-views", "digits", *arguments), code, *fragments)
    assert tree(tmp_path) == before


def test_force_replaces_a_picture(root, tmp_path):
    (tmp_path / "sheet.png").write_text("old")
    command = (
        "deit",
        "show-views",
        "folder-teacher",
        f"--data.root={root}",
        "--data.storage=files",
    )
    done = run_in(
        tmp_path, *command, "--optim.batch_size=2", "--out=sheet.png", "--force", "--num-views=3"
    )
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
