"""The sheet of `deit show-views`: cells, texts and invalid options."""

import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFont

from deit.analysis import view_sheet
from deit.analysis.view_sheet import draw_view_sheet
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.loss import LossConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.views import ViewsConfig
from deit.datasets.splits import load_splits
from deit.distill.build import build_train_loader
from tests.helpers.commands import TEN, assert_refused, fake_teacher, run_in, tree
from tests.helpers.images import write_image_folder

TILE, GAP, LINE = view_sheet._TILE, view_sheet._GAP, view_sheet._LINE
HEADER = LINE + 2 * GAP


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", images_per_class=8)


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


def tile(sheet, cell, column, num_tiles=2, num_lines=2):
    """Return a tile of the sheet, int64 [side, side, 3], by its cell and its column in the cell."""
    width = num_tiles * (TILE + 2) + GAP
    height = TILE + num_lines * LINE + 2 * GAP
    columns = (sheet.width - GAP) // width
    left = GAP + cell % columns * width + column * (TILE + 2)
    top = HEADER + cell // columns * height
    return np.asarray(sheet)[top : top + TILE, left : left + TILE].astype(int)


def test_transparent_sheet_has_equal_tiles_and_text_readable_on_any_background(root, tmp_path):
    for transparent in (False, True):
        draw_view_sheet(
            configuration(root),
            tmp_path / f"{transparent}.png",
            num_views=3,
            transparent=transparent,
        )
    opaque, transparent = (Image.open(tmp_path / f"{pixel}.png") for pixel in (False, True))
    assert (opaque.mode, transparent.mode) == ("RGB", "RGBA")
    assert np.array_equal(tile(transparent, 2, 1)[..., :3], tile(opaque, 2, 1))
    assert tile(transparent, 2, 1)[..., 3].min() == 255
    assert transparent.getpixel((0, 0))[3] == 0
    letters = np.asarray(transparent)[:HEADER].reshape(-1, 4)
    (ink,) = {tuple(int(level) for level in pixel[:3]) for pixel in letters if pixel[3]}
    assert contrast(ink, (255, 255, 255)) > 3
    assert contrast(ink, (0x12, 0x16, 0x1C)) > 3  # the background of a dark page


def contrast(first, second):
    """Contrast ratio of two colors, from 1 to 21 (WCAG 2.2, relative luminance)."""
    parts = [
        [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in c]
        for c in ([level / 255 for level in rgb] for rgb in (first, second))
    ]
    light = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in parts]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_sheet_tiles_are_the_stored_image_and_the_view_of_the_batch(
    storage, root, tmp_path, capsys
):
    config = configuration(root, storage)
    draw_view_sheet(config, tmp_path / "sheet.png", epoch=2, num_views=7)
    message = rf"\w+ {re.escape(str(tmp_path / 'sheet.png'))}\b\D*\b7\b\D*\n"
    assert re.fullmatch(message, capsys.readouterr().out)
    sheet = Image.open(tmp_path / "sheet.png")
    splits = load_splits(config.data)
    batches = build_train_loader(config, splits, Accelerator(cpu=True), teacher_size=None).epoch(2)
    pair = next(batches), next(batches)
    images, samples = (
        torch.cat([getattr(batch, field) for batch in pair])[:7]
        for field in ("images", "sample_ids")
    )
    enlarged = np.ones((TILE // 16, TILE // 16), dtype=int)
    for cell, (image, sample) in enumerate(zip(images, samples.tolist())):
        levels = (image * 255).round().long()
        view = np.stack([np.kron(channel, enlarged) for channel in levels.numpy()], axis=-1)
        assert np.array_equal(tile(sheet, cell, 1), view)
        stored_tile = tile(sheet, cell, 0)
        if storage == "memory":
            stored = splits.train.pixels[sample].numpy()
            whole = np.stack([np.kron(channel, enlarged) for channel in stored], axis=-1)
            assert np.array_equal(stored_tile, whole)
        else:
            # Resized from the full image, not from the stored small square.
            with Image.open(splits.train.name(sample)) as image_file:
                side = min(image_file.size)
                left, top = (image_file.width - side) // 2, (image_file.height - side) // 2
                square = image_file.convert("RGB").crop((left, top, left + side, top + side))
            close = np.asarray(square.resize((TILE, TILE), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(stored_tile - close).mean() < 7


@pytest.mark.parametrize(("repeats", "batch_size", "drawn"), [(1, 64, 14), (3, 48, 44)])
def test_sheet_of_fewer_images_than_the_batch_has_the_views_of_a_smaller_batch(
    repeats, batch_size, drawn, root, capsys
):
    """15 images: 14 are drawn in pairs; 44 views are 15 images, each up to three times."""
    config = configuration(root, aug_repeats=repeats)
    large = config.replace(optim={"batch_size": batch_size, "grad_accum_steps": 2})
    smaller = config.replace(optim={"batch_size": drawn})
    sheet, expected = (
        view_sheet.view_sheet(given, epoch=1, num_views=99) for given in (large, smaller)
    )
    assert sheet.info["num_views"] == drawn
    assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    output = capsys.readouterr().err
    assert all(
        text in output for text in (f"optim.batch_size = {batch_size}", f" {drawn},", " 15 ")
    )
    if repeats == 1:  # the first twelve views are also those of batches of 4
        small_batches = np.asarray(view_sheet.view_sheet(config, epoch=1, num_views=12))
        of_large = np.asarray(view_sheet.view_sheet(large, epoch=1, num_views=12))
        assert np.array_equal(of_large, small_batches)


@pytest.mark.parametrize("num_views", [1, 4, 6, 99])
def test_sheet_has_the_requested_views_up_to_one_epoch(num_views, root, tmp_path, capsys):
    draw_view_sheet(configuration(root), tmp_path / "sheet.png", num_views=num_views)
    views = min(num_views, 12)  # three batches of 4 of 15 images
    assert re.search(rf"sheet\.png\b\D*\b{views}\b", capsys.readouterr().out)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    # There is text below each cell, and background right of its tiles and below the last one.
    width, height = 2 * (TILE + 2) + GAP, TILE + 2 * LINE + 2 * GAP
    columns, rows = (sheet.shape[1] - GAP) // width, (sheet.shape[0] - HEADER) // height
    assert columns * rows >= views > columns * (rows - 1)
    for index in range(columns * rows):
        left, top = GAP + index % columns * width, HEADER + index // columns * height
        cell = sheet[top : top + height, left : left + width]
        assert (cell[:TILE, :TILE].std() > 5) == (index < views)
        assert (cell[TILE + 2 : TILE + 2 + 2 * LINE].min() < 130) == (index < views)


def test_format_weights_keeps_the_two_largest_above_rounding():
    names = ("ant", "bee", "cat")
    assert (
        view_sheet._format_weights(torch.tensor([0.38, 0.0, 0.62]), names) == "0.62 cat + 0.38 ant"
    )
    assert view_sheet._format_weights(torch.tensor([0.0, 1.0, 0.0]), names) == "1.00 bee"
    assert view_sheet._format_weights(torch.tensor([0.2, 0.3, 0.5]), names) == "0.50 cat + 0.30 bee"
    assert view_sheet._format_weights(torch.tensor([0.996, 0.004, 0.0]), names) == "1.00 ant"


@pytest.mark.parametrize("width", [60, 200, 268])
def test_truncate_shortens_lines_to_the_width(width):
    font = ImageFont.load_default(size=13)
    assert view_sheet._truncate("bee", width, font) == "bee"
    line = f"#3 {'hippopotamus ' * 9}"
    truncated = view_sheet._truncate(line, width, font)
    assert truncated.endswith("...")
    assert line.startswith(truncated[:-3])
    assert width - 15 < font.getlength(truncated) <= width


def test_sheet_with_long_class_names_keeps_the_gaps_empty(tmp_path):
    names = ("a" * 90, "b" * 90)
    root = write_image_folder(tmp_path / "images", classes=names, images_per_class=8)
    config = configuration(root, mixup_alpha=0.0)
    draw_view_sheet(config, tmp_path / "long.png", num_views=4)
    sheet = np.asarray(Image.open(tmp_path / "long.png"))
    width, height = 2 * (TILE + 2) + GAP, TILE + 2 * LINE + 2 * GAP
    for index in range(4):
        left, top = GAP + index % 2 * width, HEADER + index // 2 * height
        gap = sheet[top + TILE : top + height, left + width - GAP : left + width]
        assert (gap == 255).all()


def test_show_views_draws_with_and_without_the_teacher(tmp_path):
    without = run_in(tmp_path, "deit", "show-views", "digits", "--out", "alone.png", "--epoch", "3")
    assert without.returncode == 0, without.stderr
    assert re.fullmatch(r"\w+ alone\.png\b\D*\b12\b\D*\n", without.stdout)
    [warning] = without.stderr.splitlines()
    assert warning.startswith("deit: warning: ")
    assert "teacher.source checkpoints/digits-teacher" in warning
    fake_teacher(tmp_path / "teacher", TEN)
    command = ("show-views", "digits", "--teacher.source=teacher", "--num-views=33")
    with_teacher = run_in(tmp_path, "deit", *command, "--out", "taught.webp")
    assert (with_teacher.returncode, with_teacher.stderr) == (0, "")
    # More views than the batch size of 32.
    assert re.fullmatch(r"\w+ taught\.webp\b\D*\b33\b\D*\n", with_teacher.stdout)
    with (
        Image.open(tmp_path / "alone.png") as sheet,
        Image.open(tmp_path / "taught.webp") as taught_sheet,
    ):
        # 12 cells of two tiles and two lines, 33 cells of three tiles and three lines.
        assert (sheet.width - GAP) % (2 * (TILE + 2) + GAP) == 0
        assert (taught_sheet.width - GAP) % (3 * (TILE + 2) + GAP) == 0
        assert (taught_sheet.height - HEADER) % (TILE + 3 * LINE + 2 * GAP) == 0
        assert max(*sheet.size, *taught_sheet.size) < 3000
    assert set(tree(tmp_path)) >= {"alone.png", "taught.webp"}


@pytest.mark.parametrize(
    ("code", "names", "arguments"),
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
def test_show_views_with_invalid_options_writes_nothing(code, names, arguments, tmp_path):
    (tmp_path / "precious.png").write_text("precious")
    (tmp_path / "folder.png").mkdir()
    before = tree(tmp_path)
    assert_refused(run_in(tmp_path, "deit", "show-views", "digits", *arguments), code, *names)
    assert tree(tmp_path) == before


def test_show_views_with_force_replaces_the_file(root, tmp_path):
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
