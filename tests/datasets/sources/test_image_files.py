"""Files in image folders, shards and tars: suffixes, hidden files, unusual names, image modes."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from deit.cli import run_command
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets import decoding
from deit.datasets.sources.listing import SkippedFiles, is_hidden, suffix_of
from deit.datasets.sources.registry import LISTINGS, exclude_list_line
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.layouts import (
    CLASSES,
    LAYOUTS,
    PNG,
    encoded,
    file_names,
    random_image,
    skipped_notes,
    source_config,
    split_sizes,
    write_file,
    write_images,
    write_tar,
)

AVIF = pytest.mark.skipif(
    "avif" not in features.get_supported_modules(), reason="this Pillow reads no AVIF"
)


# Endings.


def test_extensions_are_pillows_for_supported_formats():
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".webp"} <= decoding.EXTENSIONS
    assert (".avif" in decoding.EXTENSIONS) == ("avif" in features.get_supported_modules())
    assert not {".pdf", ".eps", ".heic", ".svg", ".ico"} & decoding.EXTENSIONS


@pytest.mark.fault("C27")
@pytest.mark.parametrize("way", LAYOUTS)
@pytest.mark.parametrize(
    ("ending", "kind"),
    [("jfif", "JPEG"), ("JPE", "JPEG"), ("webp", "WEBP"), pytest.param("avif", "AVIF", marks=AVIF)],
)
def test_every_source_reads_supported_formats(way, ending, kind, tmp_path):
    content = encoded(kind)
    members = {f"{name}/{index}.{ending}": content for name in CLASSES for index in range(4)}
    if way == "shards":
        labels = {f"{name}/{index}.cls": name.encode() for name in CLASSES for index in range(4)}
        write_tar(tmp_path / "train" / "0.tar", members | labels)
    elif way == "tar reader":
        write_tar(tmp_path / "train.tar", members)
    else:
        for name, item in members.items():
            write_file(tmp_path / "train" / name, item)
    assert split_sizes(source_config(way, tmp_path)) == {"train": 8}
    assert len(load_splits(source_config(way, tmp_path)).mean) == 3


@AVIF
def test_avif_is_decoded_upright_and_animation_raises():
    flat = Image.new("RGB", (16, 8), (200, 100, 50))
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    flat.save(buffer, "AVIF", exif=exif, quality=95)
    result = decoding.decode_image(buffer.getvalue(), "place/x")
    assert result.format == "AVIF"
    assert result.image.size == (8, 16)
    assert np.abs(np.asarray(result.image).astype(int) - (200, 100, 50)).max() <= 4
    buffer = io.BytesIO()
    flat.save(buffer, "AVIF", save_all=True, append_images=[random_image(1, (16, 8))])
    with raises(DataError, "place/x: ", "AVIF", " 2 "):
        decoding.decode_image(buffer.getvalue(), "place/x")
    with raises(DataError, "place/x: "):
        decoding.decode_image(buffer.getvalue()[:200], "place/x")


@pytest.mark.fault("C27")
@pytest.mark.parametrize("way", LAYOUTS)
def test_skipped_files_are_counted_by_suffix(way, tmp_path, monkeypatch, capsys):
    others = {
        "ant/photo.HEIC": b"x",
        "ant/page.html": b"x",
        "bee/also.heic": b"x",
        "ant/LICENSE": b"x",
    }
    root = tmp_path / "data"
    config = write_images(way, root, {"train": "train"})
    if way == "shards":
        write_tar(root / "train" / "1.tar", others)
    elif way == "tar reader":
        write_tar(root / "train.tar", dict.fromkeys(file_names(4), PNG) | others)
    else:
        for name, content in others.items():
            write_file(root / "train" / name, content)
    (note,) = skipped_notes(config)
    assert re.search(r"\b2 \.heic, 1 \.html, 1 ", note)
    assert load_splits(config).skipped == (note,)
    monkeypatch.chdir(tmp_path)
    options = ["data", "--source", config.source]
    options += ["--reader", config.reader] if config.reader else []
    assert run_command("check-data", options, "deit check-data") == 0
    assert f"{note}\n" in capsys.readouterr().out


@pytest.mark.fault("C27")
def test_class_of_skipped_files_raises(tmp_path):
    config = write_images("folder", tmp_path, {"train": "train"})
    for index in range(3):
        write_file(tmp_path / "train" / "cow" / f"{index}.heic", b"x")
    with raises(DataError, "train/cow: ", "3 .heic"):
        split_sizes(config)
    write_tar(tmp_path / "shards" / "0.tar", {"a.heic": b"x", "a.cls": b"ant"})
    with raises(DataError, "a.cls", "a.heic"):
        split_sizes(source_config("shards", tmp_path / "shards"))


def test_long_notes_are_abbreviated():
    passed = SkippedFiles(paths=[f"place {index}" for index in range(6)])
    for index in range(12):
        for _ in range(20 - index):
            passed.add(f"a.x{index}")
    first, *rest = passed.notes()
    assert " 20 .x0, 19 .x1, " in first
    assert re.search(r", 42 [^,.]+$", first)
    assert [line[-len("place 0") :] for line in rest[:4]] == passed.paths[:4]
    (more,) = rest[4:]
    assert re.search(r"\b2\b", more)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.HEIC", ".heic"),
        ("a.tar.gz", ".gz"),
        ("a.7z", ".7z"),
        ("photo.jpg~", ""),
        ("v1.2", ""),
        ("a. sentence that ends", ""),
        ("a.\nb", ""),
        ("LICENSE", ""),
    ],
)
def test_suffix_is_a_short_word(name, ending):
    assert suffix_of(name) == ending


# Hidden files.

HIDDEN = (".git", ".DS_Store", "._000.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db")
HIDDEN += ("desktop.ini", "@eaDir", "lost+found", "$RECYCLE.BIN", "Icon\r")


@pytest.mark.parametrize("name", HIDDEN)
def test_system_files_are_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["__background__", "_x.png", "a.png", "thumbs", ".", ".."])
def test_user_files_are_not_hidden(name):
    assert not is_hidden(name)


@pytest.mark.fault("C14")
@pytest.mark.parametrize("way", LAYOUTS)
def test_hidden_files_are_neither_read_nor_counted(way, tmp_path):
    junk = {f"ant/{name}": b"x" for name in ("._0.png", "Thumbs.db", "desktop.ini")}
    junk |= {f"{name}/0.png": b"x" for name in ("ant/.ipynb_checkpoints", "__MACOSX", "bee/@eaDir")}
    config = write_images(way, tmp_path, {"train": "train"})
    if way == "shards":
        write_tar(tmp_path / "train" / "1.tar", junk)
    elif way == "tar reader":
        write_tar(tmp_path / "train.tar", dict.fromkeys(file_names(4), PNG) | junk)
    else:
        for name, content in junk.items():
            write_file(tmp_path / "train" / name, content)
    assert split_sizes(config) == {"train": 8}
    assert skipped_notes(config) == ()
    assert LISTINGS[config.source](config, ()).class_names == CLASSES


def test_tar_image_outside_folders_raises(tmp_path):
    write_tar(tmp_path / "train.tar", dict.fromkeys([*file_names(4), "loose.png"], PNG))
    with raises(DataError, "loose.png"):
        split_sizes(source_config("tar reader", tmp_path))


def test_truncated_tar_of_reader_raises(tmp_path):
    path = write_tar(tmp_path / "train.tar", dict.fromkeys(file_names(4), PNG))
    path.write_bytes(path.read_bytes()[:3072])
    with raises(DataError, "data.root"):
        split_sizes(source_config("tar reader", tmp_path))


# Names.

ODD = (b"caf\xe9.png", b"[red]x[[]].png", "smile \U0001f600.png".encode(), b"a\nb.png")
ODD += (b"#first.png", b' "quoted" .png', b"tab\there.png", "\u2028line.png".encode(), b"%s{}.png")


@pytest.mark.fault("C30")
@pytest.mark.parametrize("name", ODD)
def test_unusual_name_works_in_listing_scan_and_exclude_list(name, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    config = write_images("folder", root, {"train": "train"})
    odd = os.fsencode(root / "train" / "ant") + b"/" + name
    try:
        Path(os.fsdecode(odd)).write_bytes(b"no picture")
    except OSError:
        pytest.skip("a file system without such names")
    assert split_sizes(config) == {"train": 9}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deit.analysis.dataset_scan.info", lambda *line: None)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 3
    )
    capsys.readouterr()
    splits = load_splits(source_config("folder", root, exclude_list="bad.txt"))
    assert any(re.search(r"exclude list.* 1 .*bad\.txt", note) for note in splits.notes)


def test_plain_name_is_unchanged_in_exclude_list():
    assert exclude_list_line("train/a b/ü.png") == "train/a b/ü.png"
    assert exclude_list_line("train/a\nb.png") == '"train/a\\nb.png"'


# Images of every mode.


def write_kinds(folder: Path) -> None:
    folder.mkdir(parents=True)
    rgb, gray = random_image(9, (60, 50)), random_image(9, (60, 50)).convert("L")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    gray.save(folder / "grey.png")
    rgb.convert("1").save(folder / "bits.tif")
    deep = np.asarray(gray).astype("uint16") * 257
    Image.fromarray(deep).save(folder / "deep.png")
    rgb.quantize(16).save(folder / "palette.png", transparency=bytes(range(0, 256, 16)))
    clear = rgb.copy()
    clear.putalpha(120)
    clear.save(folder / "alpha.webp")
    clear.convert("LA").save(folder / "la.png")
    rgb.save(folder / "photo.mpo.jpg", format="MPO", save_all=True, append_images=[rgb])
    rgb.save(folder / "camera.mpo", format="MPO", save_all=True, append_images=[rgb])
    rgb.save(folder / "UPPER.JPEG", format="JPEG")
    rgb.save(folder / "lying.jpg", format="PNG")
    rgb.save(folder / "one.gif")
    for name, size in (("thin", (1, 300)), ("strip", (20000, 3)), ("dot", (1, 1))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    exif = Image.Exif()
    exif[274] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.save(folder / "badexif.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")


def test_images_of_every_mode_are_read(tmp_path):
    write_kinds(tmp_path / "train" / "ant")
    for index in range(4):
        write_file(tmp_path / "train" / "bee" / f"{index}.png")
    count = len(list((tmp_path / "train" / "ant").iterdir()))
    splits = load_splits(DataConfig(source="folder", root=str(tmp_path), image_size=8))
    assert sum(len(split.labels) for split in splits[1:4]) == count + 4
    assert splits.skipped == ()


def test_scan_lists_damaged_images_of_every_kind(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    write_images("folder", root, {"train": "train"})
    folder, rgb = root / "train" / "ant", random_image(9, (60, 50))
    jpeg = encoded("JPEG")
    bad = {"cut.jpg": jpeg[: len(jpeg) // 2], "empty.jpg": b"", "page.jpg": b"<html>403</html>"}
    bad |= {"lfs.png": b"version https://git-lfs.github.com/spec/v1\n", "svg.png": b"<svg/>"}
    for name, content in bad.items():
        write_file(folder / name, content)
    rgb.save(folder / "film.gif", save_all=True, append_images=[random_image(1, (60, 50))])
    Image.new("1", (15000, 15000)).save(folder / "bomb.png")
    Image.fromarray(np.random.default_rng(0).random((9, 9), "float32")).save(folder / "float.tif")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", ["data"], "deit check-data") == 3
    output = capsys.readouterr()
    listed = re.findall(r" train/ant/(\S+): ", output.out)
    assert sorted(listed) == sorted([*bad, "film.gif", "bomb.png", "float.tif"])
    assert f"data: {len(listed)} " in output.err
