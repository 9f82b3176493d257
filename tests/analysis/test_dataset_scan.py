"""`deit check-data` as a user runs it: everything bad in one pass, and a list that training
accepts."""

import errno
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit.analysis import dataset_scan
from deit.cli import run_command
from deit.config.data_section import DataConfig
from deit.core.errors import TRANSIENT, DataError, NotAllowedError, SystemFault
from deit.datasets import stores
from deit.datasets.images import ImageStore
from deit.datasets.splits import load_splits
from deit.datasets.stores import FolderStore, ReaderStore, ShardStore
from tests.helpers.commands import assert_refused, run_in
from tests.helpers.errors import raises


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def sound(root: Path) -> Path:
    """Three classes, 6 training and 2 test images each, all different."""
    seed = 0
    for split, number in (("train", 6), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                seed += 1
                picture(seed).save(root / split / name / f"{index}.png")
    return root


def spoil(root: Path) -> dict[str, str]:
    """Damage some images; key -> what scan should say of it, among other words."""
    train = root / "train"
    (train / "ant" / "0.png").write_bytes(b"")
    (train / "ant" / "1.png").write_text("<html>404</html>")
    content = (train / "bee" / "2.png").read_bytes()
    (train / "bee" / "2.png").write_bytes(content[: len(content) // 2])
    frames = [picture(90), picture(91)]
    frames[0].save(root / "val" / "cat" / "0.png", "GIF", save_all=True, append_images=frames[1:])
    return {
        "train/ant/0.png": "empty",
        "train/ant/1.png": "16 bytes",
        "train/bee/2.png": "truncated",
        "val/cat/0.png": "GIF",
    }


def test_a_sound_data_set_is_described(tmp_path):
    root = sound(tmp_path / "data")
    picture(50).convert("L").save(root / "train" / "ant" / "grey.png")
    picture(51, (40, 30)).convert("CMYK").save(root / "train" / "ant" / "print.jpg")
    done = run_in(tmp_path, "deit", "check-data", "data", "--json", "found.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (shown,) = [line for line in done.stdout.splitlines() if "PNG 19" in line]
    grey = dataset_scan.MODES["L"]
    told = ("train", "12 x 10", "40 x 30", "JPEG 1", "RGB 18", f"{grey} 1", "CMYK 1")
    assert [one for one in told if one not in shown] == []
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["class_names"] == ["ant", "bee", "cat"]
    train = found["splits"]["train"]
    assert (train["images"], train["classes"]) == (20, 3)
    assert (train["smallest"], train["median"], train["largest"]) == ([12, 10], [12, 10], [40, 30])
    assert train["formats"] == {"PNG": 19, "JPEG": 1}
    assert train["modes"] == {"RGB": 18, grey: 1, "CMYK": 1}
    assert found["splits"]["test"]["images"] == 6
    assert found["unreadable"] == {}


@pytest.mark.fault("C2")
def test_every_bad_image_is_listed_and_the_list_is_accepted(tmp_path, monkeypatch, capsys):
    root = sound(tmp_path / "data")
    bad = spoil(root)
    done = run_in(
        tmp_path,
        "deit",
        "check-data",
        "data",
        "--write-exclude-list",
        "bad.txt",
        "--json",
        "found.json",
    )
    assert_refused(done, 3, "data: 4 ", "--data.exclude_list bad.txt")
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["unreadable"]) == list(bad)
    for key, reason in found["unreadable"].items():
        assert bad[key] in reason
        assert f"{key}: {reason}\n" in done.stdout
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == list(bad)

    monkeypatch.chdir(tmp_path)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 5
    )
    said = capsys.readouterr().err
    assert "--write-exclude-list bad.txt: " in said
    assert "--force" in said
    assert (
        run_command(
            "check-data", ["data", "--write-exclude-list", "bad.txt", "--force"], "deit check-data"
        )
        == 3
    )
    assert "exclude" not in capsys.readouterr().out
    options = ["--exclude-list", "bad.txt", "--json", "found.json", "--force"]
    assert run_command("check-data", ["data", *options], "deit check-data") == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "exclude" in line]
    assert re.search(r"\b4\b", told)
    assert json.loads((tmp_path / "found.json").read_text())["excluded"] == 4

    config = DataConfig(
        source="folder", root=str(root), image_size=8, exclude_list=str(tmp_path / "bad.txt")
    )
    splits = load_splits(config)
    assert sum(len(split.labels) for split in splits[1:4]) == 24 - 4
    assert any(re.search(r"exclude list.* 4 .*bad\.txt", note) for note in splits.notes)


def at(ending: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reading of a file with this ending fail."""
    read = Path.read_bytes

    def instead(path: Path) -> bytes:
        if str(path).endswith(ending):
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", instead)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_fault_of_the_machine_ends_it_and_lists_no_image(number, tmp_path, monkeypatch, capsys):
    """What stands in the list is left out of every later run."""
    spoil(sound(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    at("train/cat/3.png", OSError(number, "said by the system"), monkeypatch)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 5
    )
    said = capsys.readouterr().err
    assert re.search(r"data/train/cat/3\.png: .*said by the system", said)
    assert not (tmp_path / "bad.txt").exists()


def test_a_file_that_may_not_be_read_is_told_and_not_listed(tmp_path, monkeypatch, capsys):
    """Nothing is wrong with the image, and nothing passes by itself."""
    bad = spoil(sound(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    closed = PermissionError(errno.EACCES, "Permission denied")
    at("train/cat/3.png", closed, monkeypatch)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 3
    )
    said = capsys.readouterr()
    assert re.search(r"data/train/cat/3\.png: .*Permission denied", said.out)
    assert re.search(r"data: 4 .* 1 .*--data\.exclude_list bad\.txt", said.err)
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == list(bad)


class Torn:
    """A data set of one row, which cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> object:
        raise self.error


@pytest.mark.parametrize("number", TRANSIENT)
@pytest.mark.parametrize("kind", ["folder", "shards", "reader"])
def test_no_store_takes_a_fault_of_the_machine_for_one_of_the_image(kind, number, monkeypatch):
    def failing(error: Exception) -> ImageStore:
        def instead(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(Path, "read_bytes", instead)
        monkeypatch.setattr(stores, "open", instead, raising=False)
        return {
            "folder": FolderStore(Path("data"), ["a.png"]),
            "shards": ShardStore(Path("data"), ["0.tar"], ["a.png"], [(0, 0, 9)]),
            "reader": ReaderStore("torch/own", {"train": Torn(error)}),
        }[kind]

    image = "torch/own: train/0" if kind == "reader" else "a.png"
    with raises(SystemFault, image, "said by the system"):
        failing(OSError(number, "said by the system")).read(0)
    with pytest.raises(MemoryError):
        failing(MemoryError()).read(0)
    with raises(NotAllowedError, image, "Operation not permitted"):
        failing(PermissionError(errno.EPERM, "Operation not permitted")).read(0)
    with raises(DataError, image, "No such file or directory") as raised:
        failing(FileNotFoundError(errno.ENOENT, "No such file or directory")).read(0)
    assert raised.type is DataError


@pytest.mark.parametrize("name", ["missing.png", "folder.png", "x" * 300 + ".png", "loop.png"])
def test_what_is_wrong_with_a_file_is_wrong_with_the_data(name, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    store = FolderStore(tmp_path, [name])
    with raises(DataError, tmp_path / name) as raised:
        store.read(0)
    assert raised.type is DataError


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_nor_is_it_a_problem_of_the_layout(source, tmp_path, monkeypatch):
    """A shard that cannot be opened now is not cut short."""
    sound(tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "0.tar").touch()

    def failing(*arguments: object) -> None:
        raise OSError(errno.ENFILE, "Too many open files in system")

    if source == "shards":
        monkeypatch.setattr(tarfile, "open", failing)
    else:
        monkeypatch.setattr("deit.datasets.listing.os.scandir", failing)
    with raises(SystemFault, tmp_path / "data", "Too many open files in system"):
        dataset_scan.scan(DataConfig(source=source, root=str(tmp_path / "data")))


def test_bad_class_folders_are_listed_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = sound(tmp_path / "data")
    (root / "train" / "empty").mkdir()
    (root / "val" / "zebra").mkdir()
    picture(70).save(root / "val" / "zebra" / "0.png")
    assert run_command("check-data", ["data"], "deit check-data") == 3
    said = capsys.readouterr()
    places = re.findall(r" (data/\S+): (.+)", said.out)
    assert [place for place, _ in places] == ["data/train/empty", "data/val", "data/val/zebra"]
    assert "'empty'" in places[1][1]  # the class whose folder is missing there
    assert re.search(r"data: 3\b", said.err)


@pytest.mark.fault("C23")
def test_duplicates_are_warned_of_by_where_they_lie(tmp_path):
    root = sound(tmp_path / "data")
    ant = root / "train" / "ant"
    with Image.open(ant / "0.png") as image:
        image.save(ant / "again.png", compress_level=1)  # other bytes, the same picture
        image.save(root / "val" / "ant" / "leak.png")
        image.save(root / "val" / "cat" / "mislabelled.png")
    done = run_in(tmp_path, "deit", "check-data", "data", "--json", "found.json")
    assert done.returncode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    copies = [found[where] for where in ("within_split", "across_splits", "across_classes")]
    assert [one["count"] for one in copies] == [2, 2, 1]
    assert re.findall(r" (\d+) .*\((.+)\)\n", done.stderr) == [
        (number, "train/ant/0.png = train/ant/again.png = val/ant/leak.png") for number in "221"
    ]


def test_shards_and_readers_are_scanned_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = sound(tmp_path / "data")
    bad = spoil(root)
    shards = tmp_path / "shards"
    for split in ("train", "val"):
        (shards / split).mkdir(parents=True)
        with tarfile.open(shards / split / "0.tar", "w") as archive:
            for path in sorted((root / split).rglob("*.png")):
                name = path.relative_to(root / split)
                archive.add(path, name)
                label = tmp_path / "label"
                label.write_text(name.parts[0])
                archive.add(label, name.with_suffix(".cls"))
    from_shards = ["shards", "--source", "shards"]
    assert (
        run_command(
            "check-data", [*from_shards, "--write-exclude-list", "bad.txt"], "deit check-data"
        )
        == 3
    )
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    expected = [key.replace("train/", "train/0.tar/").replace("val/", "val/0.tar/") for key in bad]
    assert [line for line in lines if not line.startswith("#")] == expected
    assert (
        run_command("check-data", [*from_shards, "--exclude-list", "bad.txt"], "deit check-data")
        == 0
    )
    capsys.readouterr()
    options = ["data", "--source", "reader", "--reader", "folder"]
    assert run_command("check-data", options, "deit check-data") == 3
    assert re.search(r"data: 4 .*--data\.exclude_list", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("nowhere",), 3, ["data.root nowhere"]),
        ((), 2, ["DATA"]),
        (("data", "--source", "reader"), 2, ["--source reader", "--reader NAME"]),
        (("data", "--reader", "folder"), 2, ["--source reader", "--reader NAME"]),
        (("data", "--source", "cifar10"), 2, ["--source", "'cifar10'"]),
        (
            ("data", "--write-exclude-list", "missing/bad.txt"),
            5,
            ["--write-exclude-list missing/bad.txt"],
        ),
        (("data", "--json", "missing/x.json"), 5, ["--json missing/x.json"]),
        (("data", "--exclude-list", "missing.txt"), 3, ["data.exclude_list missing.txt"]),
    ],
)
def test_mistakes_have_their_exit_codes(options, code, named, tmp_path, monkeypatch, capsys):
    sound(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", list(options), "deit check-data") == code
    said = capsys.readouterr().err
    assert [one for one in named if one not in said] == []
    assert len(said.strip().splitlines()) == 1
