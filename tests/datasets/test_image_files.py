"""Folders, shards and tars as people have them: splits by any usual name, links, endings, what
systems leave, odd names; whatever is not read is named."""

import io
import json
import os
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from deit.cli import run_command
from deit.config.data_section import DataConfig
from deit.core.errors import DataError
from deit.datasets import decoding, timm_readers
from deit.datasets.listing import PassedOver, ending_of, is_hidden
from deit.datasets.sources import LISTINGS, exclude_list_line
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises

CLASSES = ("ant", "bee")
NUMBERS = {"train": 4, "validation": 3, "test": 2}
AVIF = pytest.mark.skipif(
    "avif" not in features.get_supported_modules(), reason="this Pillow reads no AVIF"
)


def picture(seed: int = 0, size: tuple[int, int] = (9, 8)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def encoded(kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded()


def put(path: Path, content: bytes = PNG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names_of(number: int) -> list[str]:
    return [f"{name}/{index}.png" for name in CLASSES for index in range(number)]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, names: list[str]) -> Path:
    members = {}
    for name in names:
        key, ending = os.path.splitext(name)
        members |= {f"{key}{ending}": PNG, f"{key}.cls": name.split("/")[0].encode()}
    return tar(path, members)


def lay_out(way: str, root: Path, splits: dict[str, str]) -> DataConfig:
    """The same images as class folders, shards or a tar; splits: what each is called."""
    for split, called in splits.items():
        names = names_of(NUMBERS[split])
        if way == "shards":
            shard(root / called / "0.tar", names)
        elif way == "tar reader":
            tar(root / f"{called}.tar", dict.fromkeys(names, PNG))
        else:
            for name in names:
                put(root / called / name)
    return config(way, root)


def config(way: str, root: Path, **fields: object) -> DataConfig:
    kind, _, reader = way.partition(" ")
    source = {"source": "reader", "reader": kind} if reader else {"source": kind}
    return DataConfig(root=str(root), image_size=8, storage="files", **source, **fields)


def split_sizes(found: DataConfig) -> dict[str, int]:
    listing = LISTINGS[found.source](found, ())
    return {split: len(rows) for split, rows in listing.splits.items()}


def notes(found: DataConfig) -> tuple[str, ...]:
    return LISTINGS[found.source](found, ()).passed.notes()


WAYS = ("folder", "shards", "folder reader", "tar reader")


# Splits.


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "called",
    [
        ("train", "valid", "test"),
        ("Train", "Valid", "Test"),
        ("training", "dev", "evaluation"),
        ("TRAIN", "Validation", "testing"),
    ],
    ids=" ".join,
)
def test_a_split_has_any_usual_name(way, called, tmp_path):
    found = lay_out(way, tmp_path, dict(zip(NUMBERS, called)))
    assert split_sizes(found) == {split: 2 * number for split, number in NUMBERS.items()}
    assert notes(found) == ()


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("called", ["val", "valid", "Validation", "dev", "eval"])
def test_one_labelled_split_beside_the_training_images_is_the_test(way, called, tmp_path):
    found = lay_out(way, tmp_path, {"train": "train", "validation": called})
    assert split_sizes(found) == {"train": 8, "test": 6}


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", WAYS)
def test_two_names_of_one_split_are_refused(way, tmp_path):
    found = lay_out(way, tmp_path, {"train": "train", "validation": "val", "test": "valid"})
    with raises(DataError, "'val'", "'valid'"):
        split_sizes(found)


@pytest.mark.parametrize("way", ["folder", "shards", "folder reader"])
def test_splits_without_one_to_train_on_are_no_classes(way, tmp_path):
    found = lay_out(way, tmp_path, {"validation": "Valid", "test": "test"})
    with raises(DataError, "'Valid'"):
        split_sizes(found)


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", WAYS)
def test_images_beside_the_splits_are_named(way, tmp_path):
    found = lay_out(way, tmp_path, {"train": "train", "validation": "val", "test": "fold2"})
    put(tmp_path / "notes" / "readme.txt", b"no images here")
    (note,) = notes(found)
    assert str(tmp_path / "fold2") in note
    assert load_splits(found).passed == (note,)


class FakeHub:
    """A data set of Hugging Face's in miniature, with the splits of one that is there."""

    class_to_idx = {"ant": 0, "bee": 1}
    image_key, label_key = "image", "label"
    info = SimpleNamespace(splits={"train": None, "valid": None, "unsupervised": None})

    def __init__(self, name: str, root: Path, split: str = "train") -> None:
        self.dataset, self.number = self, {"train": 8, "valid": 6}[split]

    def remove_columns(self, key: str) -> dict[str, list[int]]:
        return {"label": [row % 2 for row in range(self.number)]}

    def __len__(self) -> int:
        return self.number


@pytest.mark.fault("C25")
def test_the_splits_of_a_hub_are_found_by_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.data.readers.create_reader", FakeHub)
    there = SimpleNamespace(origin="there")
    monkeypatch.setattr(timm_readers.importlib.util, "find_spec", lambda name: there)
    fields = {"source": "reader", "reader": "hfds/x", "download": True}
    found = DataConfig(root=str(tmp_path), **fields)
    assert split_sizes(found) == {"train": 8, "test": 6}
    (note,) = notes(found)
    assert "hfds/x unsupervised" in note


def test_a_scan_names_what_is_beside_the_splits(tmp_path, monkeypatch, capsys):
    lay_out("folder", tmp_path / "data", {"train": "train", "validation": "val", "test": "fold2"})
    for name in ("cover.png", "back.png", "train/stray.png"):
        put(tmp_path / "data" / name)
    put(tmp_path / "data" / "train" / "labels.csv", b"a,b\n")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", ["data", "--json", "found.json"], "deit check-data") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    folder, beside, outside = found["not_read"]
    assert folder.startswith("data/fold2 ")
    assert beside.startswith("2 ")
    assert outside.startswith("1 ")
    assert all(f" {one}\n" in said for one in found["not_read"])
    assert found["passed_over"] == {".csv": 1}


def test_a_run_says_at_its_start_what_it_does_not_read(tmp_path, monkeypatch, capsys):
    lay_out("folder", tmp_path / "data", {"train": "Train", "validation": "fold2", "test": "Test"})
    put(tmp_path / "data" / "Train" / "ant" / "photo.heic", b"x")
    monkeypatch.chdir(tmp_path)
    options = "--teacher.source none --loss none --optim.epochs 1 --optim.warmup_epochs 0"
    options += " --optim.batch_size 2 --data.image_size 8 --student.image_size 8 --student.depth 1"
    words = ["folder", "--data.root", "data", *options.split(), "--dry-run"]
    assert run_command("train", words, "deit train") == 0
    said = capsys.readouterr().out.splitlines()
    (at,) = [index for index, line in enumerate(said) if re.match(r"data +folder\b", line)]
    numbers = re.findall(r"(\d+) (classes|train|validation|test)\b", said[at])
    assert numbers == [("2", "classes"), ("6", "train"), ("2", "validation"), ("4", "test")]
    assert re.match(r" .*\b1 \.heic$", said[at + 1])
    assert re.match(r" .*\bdata/fold2\b", said[at + 2])


def test_images_without_classes_are_refused_with_advice(tmp_path):
    """A test split without labels, as contests have it, or a class that is called train."""
    found = lay_out("folder", tmp_path, {"train": "train"})
    put(tmp_path / "test" / "1.png")
    with raises(DataError, tmp_path / "test", "deit predict"):
        split_sizes(found)


# Links.


@pytest.mark.fault("C26")
@pytest.mark.parametrize("way", ["folder", "folder reader"])
def test_images_behind_links_are_read(way, tmp_path):
    root = tmp_path / "data"
    found = lay_out(way, root, {"train": "train"})
    for index in range(3):
        put(tmp_path / "lake" / "ant" / f"more{index}.png")
    # timm's class is the innermost folder.
    (root / "train" / "ant" / "ant").symlink_to(tmp_path / "lake" / "ant")
    (root / "train" / "bee" / "link.png").symlink_to(tmp_path / "lake" / "ant" / "more0.png")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "lake")
    (root / "val").symlink_to(tmp_path / "other" / "val")
    for name in names_of(2):
        put(tmp_path / "other" / "val" / name)
    assert split_sizes(found) == {"train": 8 + 3 + 1, "test": 4}
    listing = LISTINGS[found.source](found, ())
    assert "train/ant/ant/more2.png" in map(listing.store.key, range(len(listing.store)))
    assert all(listing.store.read(row) == PNG for row in range(len(listing.store)))


@pytest.mark.fault("C26")
def test_shards_behind_links_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    shard(tmp_path / "lake" / "0.tar", names_of(4))
    (tmp_path / "data" / "train").symlink_to(tmp_path / "lake")
    assert split_sizes(config("shards", tmp_path / "data")) == {"train": 8}


@pytest.mark.fault("C26")
@pytest.mark.parametrize("way", ["folder", "folder reader"])
@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_that_leads_back_is_named_and_not_followed(way, target, tmp_path):
    root = tmp_path / "data"
    found = lay_out(way, root, {"train": "train"})
    (root / "train" / "ant" / "again").symlink_to(target)
    assert split_sizes(found) == {"train": 8}
    (note,) = notes(found)
    assert f"{root}/train/ant/again " in note
    assert " link " in note


@pytest.mark.fault("C26")
def test_links_that_lead_to_each_other_end(tmp_path):
    found = lay_out("folder", tmp_path / "data", {"train": "train"})
    for here, there in (("x", "y"), ("y", "x")):
        put(tmp_path / here / f"{here}.png")
        (tmp_path / here / there).symlink_to(tmp_path / there)
    (tmp_path / "data" / "train" / "ant" / "x").symlink_to(tmp_path / "x")
    assert split_sizes(found) == {"train": 8 + 2}
    assert re.search(r"\bx/y/x\b.* link\b", notes(found)[0])


@pytest.mark.fault("C26")
@pytest.mark.parametrize("place", ["train/ant/more", "train/cow", "val"])
def test_a_link_to_nothing_is_refused_by_name(place, tmp_path):
    found = lay_out("folder", tmp_path, {"train": "train"})
    (tmp_path / place).symlink_to("/unmounted/lake")
    with raises(DataError, place):
        split_sizes(found)


def test_an_image_that_is_a_link_to_nothing_can_be_left_out(tmp_path):
    found = lay_out("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "gone.png").symlink_to("/unmounted/x.png")
    with raises(DataError, "gone.png"):
        load_splits(found)
    bad = put(tmp_path / "bad.txt", b"train/ant/gone.png\n")
    load_splits(config("folder", tmp_path, exclude_list=str(bad)))


def test_another_file_that_is_a_link_to_nothing_is_passed_over(tmp_path):
    found = lay_out("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "labels.csv").symlink_to("/unmounted/labels.csv")
    (note,) = notes(found)
    assert note.endswith(" 1 .csv")


@pytest.mark.fault("C26")
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_refused_and_never_waited_for(linked, tmp_path):
    found = lay_out("folder", tmp_path / "data", {"train": "train"})
    place = tmp_path / "data" / "train" / "ant" / "pipe.png"
    os.mkfifo(tmp_path / "pipe" if linked else place)
    if linked:
        place.symlink_to(tmp_path / "pipe")
    with raises(DataError, "pipe.png"):
        split_sizes(found)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    found = lay_out("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "closed").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with raises(DataError, "ant/closed: ", "Permission denied"):
        split_sizes(found)


# Endings.


def test_the_endings_are_pillows_for_the_formats_that_are_read():
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".webp"} <= decoding.EXTENSIONS
    assert (".avif" in decoding.EXTENSIONS) == ("avif" in features.get_supported_modules())
    assert not {".pdf", ".eps", ".heic", ".svg", ".ico"} & decoding.EXTENSIONS


@pytest.mark.fault("C27")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ending", "kind"),
    [("jfif", "JPEG"), ("JPE", "JPEG"), ("webp", "WEBP"), pytest.param("avif", "AVIF", marks=AVIF)],
)
def test_every_source_reads_what_pillow_reads(way, ending, kind, tmp_path):
    content = encoded(kind)
    members = {f"{name}/{index}.{ending}": content for name in CLASSES for index in range(4)}
    if way == "shards":
        labels = {f"{name}/{index}.cls": name.encode() for name in CLASSES for index in range(4)}
        tar(tmp_path / "train" / "0.tar", members | labels)
    elif way == "tar reader":
        tar(tmp_path / "train.tar", members)
    else:
        for name, one in members.items():
            put(tmp_path / "train" / name, one)
    assert split_sizes(config(way, tmp_path)) == {"train": 8}
    assert len(load_splits(config(way, tmp_path)).mean) == 3


@AVIF
def test_an_avif_is_decoded_upright_and_a_film_is_refused():
    flat = Image.new("RGB", (16, 8), (200, 100, 50))
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    flat.save(buffer, "AVIF", exif=exif, quality=95)
    found = decoding.read_picture(buffer.getvalue(), "place/x")
    assert found.format == "AVIF"
    assert found.image.size == (8, 16)
    assert np.abs(np.asarray(found.image).astype(int) - (200, 100, 50)).max() <= 4
    buffer = io.BytesIO()
    flat.save(buffer, "AVIF", save_all=True, append_images=[picture(1, (16, 8))])
    with raises(DataError, "place/x: ", "AVIF", " 2 "):
        decoding.read_picture(buffer.getvalue(), "place/x")
    with raises(DataError, "place/x: "):
        decoding.read_picture(buffer.getvalue()[:200], "place/x")


@pytest.mark.fault("C27")
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_read_is_counted_by_ending(way, tmp_path, monkeypatch, capsys):
    others = {
        "ant/photo.HEIC": b"x",
        "ant/page.html": b"x",
        "bee/also.heic": b"x",
        "ant/LICENSE": b"x",
    }
    root = tmp_path / "data"
    found = lay_out(way, root, {"train": "train"})
    if way == "shards":
        tar(root / "train" / "1.tar", others)
    elif way == "tar reader":
        tar(root / "train.tar", dict.fromkeys(names_of(4), PNG) | others)
    else:
        for name, content in others.items():
            put(root / "train" / name, content)
    (note,) = notes(found)
    assert re.search(r"\b2 \.heic, 1 \.html, 1 ", note)
    assert load_splits(found).passed == (note,)
    monkeypatch.chdir(tmp_path)
    options = ["data", "--source", found.source]
    options += ["--reader", found.reader] if found.reader else []
    assert run_command("check-data", options, "deit check-data") == 0
    assert f"{note}\n" in capsys.readouterr().out


@pytest.mark.fault("C27")
def test_a_class_of_what_cannot_be_read_says_so(tmp_path):
    found = lay_out("folder", tmp_path, {"train": "train"})
    for index in range(3):
        put(tmp_path / "train" / "cow" / f"{index}.heic", b"x")
    with raises(DataError, "train/cow: ", "3 .heic"):
        split_sizes(found)
    tar(tmp_path / "shards" / "0.tar", {"a.heic": b"x", "a.cls": b"ant"})
    with raises(DataError, "a.cls", "a.heic"):
        split_sizes(config("shards", tmp_path / "shards"))


def test_many_kinds_and_places_are_cut_short():
    passed = PassedOver(places=[f"place {number}" for number in range(6)])
    for number in range(12):
        for _ in range(20 - number):
            passed.add(f"a.x{number}")
    first, *rest = passed.notes()
    assert " 20 .x0, 19 .x1, " in first
    assert re.search(r", 42 [^,.]+$", first)
    assert [line[-len("place 0") :] for line in rest[:4]] == passed.places[:4]
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
def test_an_ending_is_a_short_word(name, ending):
    assert ending_of(name) == ending


# Hidden files.

HIDDEN = (".git", ".DS_Store", "._000.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db")
HIDDEN += ("desktop.ini", "@eaDir", "lost+found", "$RECYCLE.BIN", "Icon\r")


@pytest.mark.parametrize("name", HIDDEN)
def test_what_systems_leave_is_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["__background__", "_x.png", "a.png", "thumbs", ".", ".."])
def test_what_a_user_named_is_not(name):
    assert not is_hidden(name)


@pytest.mark.fault("C14")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_hidden_is_neither_read_nor_counted(way, tmp_path):
    junk = {f"ant/{name}": b"x" for name in ("._0.png", "Thumbs.db", "desktop.ini")}
    junk |= {f"{name}/0.png": b"x" for name in ("ant/.ipynb_checkpoints", "__MACOSX", "bee/@eaDir")}
    found = lay_out(way, tmp_path, {"train": "train"})
    if way == "shards":
        tar(tmp_path / "train" / "1.tar", junk)
    elif way == "tar reader":
        tar(tmp_path / "train.tar", dict.fromkeys(names_of(4), PNG) | junk)
    else:
        for name, content in junk.items():
            put(tmp_path / "train" / name, content)
    assert split_sizes(found) == {"train": 8}
    assert notes(found) == ()
    assert LISTINGS[found.source](found, ()).class_names == CLASSES


def test_an_image_outside_the_folders_of_a_tar_has_no_class(tmp_path):
    tar(tmp_path / "train.tar", dict.fromkeys([*names_of(4), "loose.png"], PNG))
    with raises(DataError, "loose.png"):
        split_sizes(config("tar reader", tmp_path))


def test_a_tar_for_the_reader_that_is_cut_short_is_refused(tmp_path):
    path = tar(tmp_path / "train.tar", dict.fromkeys(names_of(4), PNG))
    path.write_bytes(path.read_bytes()[:3072])
    with raises(DataError, "data.root"):
        split_sizes(config("tar reader", tmp_path))


# Names.

ODD = (b"caf\xe9.png", b"[red]x[[]].png", "smile \U0001f600.png".encode(), b"a\nb.png")
ODD += (b"#first.png", b' "quoted" .png', b"tab\there.png", "\u2028line.png".encode(), b"%s{}.png")


@pytest.mark.fault("C30")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_goes_through_listing_scan_and_exclude_list(
    name, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "data"
    found = lay_out("folder", root, {"train": "train"})
    odd = os.fsencode(root / "train" / "ant") + b"/" + name
    try:
        Path(os.fsdecode(odd)).write_bytes(b"no picture")
    except OSError:
        pytest.skip("a file system without such names")
    assert split_sizes(found) == {"train": 9}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deit.analysis.dataset_scan.info", lambda *line: None)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 3
    )
    capsys.readouterr()
    splits = load_splits(config("folder", root, exclude_list="bad.txt"))
    assert any(re.search(r"exclude list.* 1 .*bad\.txt", note) for note in splits.notes)


def test_a_plain_name_is_listed_as_it_is():
    assert exclude_list_line("train/a b/ü.png") == "train/a b/ü.png"
    assert exclude_list_line("train/a\nb.png") == '"train/a\\nb.png"'


# Classes.


def test_a_class_without_images_in_one_split_is_named(tmp_path):
    found = lay_out("folder", tmp_path, {"train": "train", "validation": "val"})
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    with raises(DataError, "val/bee: "):
        split_sizes(found)
    (tmp_path / "val" / "bee").rmdir()
    with raises(DataError, "'bee'"):
        split_sizes(found)


# Pictures of every kind.


def write_kinds(folder: Path) -> None:
    folder.mkdir(parents=True)
    rgb, grey = picture(9, (60, 50)), picture(9, (60, 50)).convert("L")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    grey.save(folder / "grey.png")
    rgb.convert("1").save(folder / "bits.tif")
    deep = np.asarray(grey).astype("uint16") * 257
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


def test_pictures_of_every_kind_are_read(tmp_path):
    write_kinds(tmp_path / "train" / "ant")
    for index in range(4):
        put(tmp_path / "train" / "bee" / f"{index}.png")
    number = len(list((tmp_path / "train" / "ant").iterdir()))
    splits = load_splits(DataConfig(source="folder", root=str(tmp_path), image_size=8))
    assert sum(len(split.labels) for split in splits[1:4]) == number + 4
    assert splits.passed == ()


def test_bad_pictures_of_every_kind_are_listed_by_one_scan(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    lay_out("folder", root, {"train": "train"})
    folder, rgb = root / "train" / "ant", picture(9, (60, 50))
    jpeg = encoded("JPEG")
    bad = {"cut.jpg": jpeg[: len(jpeg) // 2], "empty.jpg": b"", "page.jpg": b"<html>403</html>"}
    bad |= {"lfs.png": b"version https://git-lfs.github.com/spec/v1\n", "svg.png": b"<svg/>"}
    for name, content in bad.items():
        put(folder / name, content)
    rgb.save(folder / "film.gif", save_all=True, append_images=[picture(1, (60, 50))])
    Image.new("1", (15000, 15000)).save(folder / "bomb.png")
    Image.fromarray(np.random.default_rng(0).random((9, 9), "float32")).save(folder / "float.tif")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", ["data"], "deit check-data") == 3
    said = capsys.readouterr()
    listed = re.findall(r" train/ant/(\S+): ", said.out)
    assert sorted(listed) == sorted([*bad, "film.gif", "bomb.png", "float.tif"])
    assert f"data: {len(listed)} " in said.err
