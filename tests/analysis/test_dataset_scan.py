"""`deit check-data`: every bad image in one pass, and an exclude list that training accepts."""

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
from deit.config.sections.data import DataConfig
from deit.core.errors import TRANSIENT, DataError, NotAllowedError, SystemFault
from deit.datasets.images import ImageStore
from deit.datasets.sources import image_stores as stores
from deit.datasets.sources.image_stores import FolderStore, ReaderStore, ShardStore
from deit.datasets.splits import load_splits
from tests.helpers.commands import assert_refused, run_in
from tests.helpers.errors import raises


def random_image(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))


def write_dataset(root: Path) -> Path:
    """Three classes, 6 training and 2 test images each, all different."""
    num_written = 0
    for split, num_images in (("train", 6), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for index in range(num_images):
                num_written += 1
                random_image(num_written).save(root / split / name / f"{index}.png")
    return root


def damage(root: Path) -> dict[str, str]:
    """Damage some images; return by key a word that the reason of the scan should contain."""
    train = root / "train"
    (train / "ant" / "0.png").write_bytes(b"")
    (train / "ant" / "1.png").write_text("<html>404</html>")
    content = (train / "bee" / "2.png").read_bytes()
    (train / "bee" / "2.png").write_bytes(content[: len(content) // 2])
    frames = [random_image(90), random_image(91)]
    frames[0].save(root / "val" / "cat" / "0.png", "GIF", save_all=True, append_images=frames[1:])
    return {
        "train/ant/0.png": "empty",
        "train/ant/1.png": "16 bytes",
        "train/bee/2.png": "truncated",
        "val/cat/0.png": "GIF",
    }


def test_check_data_of_valid_dataset_reports_sizes_formats_and_modes(tmp_path):
    root = write_dataset(tmp_path / "data")
    random_image(50).convert("L").save(root / "train" / "ant" / "gray.png")
    random_image(51, (40, 30)).convert("CMYK").save(root / "train" / "ant" / "print.jpg")
    done = run_in(tmp_path, "deit", "check-data", "data", "--json", "found.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (train_row,) = [line for line in done.stdout.splitlines() if "PNG 19" in line]
    gray = dataset_scan.MODES["L"]
    expected = ("train", "12 x 10", "40 x 30", "JPEG 1", "RGB 18", f"{gray} 1", "CMYK 1")
    assert [text for text in expected if text not in train_row] == []
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["class_names"] == ["ant", "bee", "cat"]
    train = report["splits"]["train"]
    assert (train["images"], train["classes"]) == (20, 3)
    assert (train["smallest"], train["median"], train["largest"]) == ([12, 10], [12, 10], [40, 30])
    assert train["formats"] == {"PNG": 19, "JPEG": 1}
    assert train["modes"] == {"RGB": 18, gray: 1, "CMYK": 1}
    assert report["splits"]["test"]["images"] == 6
    assert report["unreadable"] == {}


def test_check_data_names_images_that_are_too_small_to_train_on(tmp_path, capsys):
    root = write_dataset(tmp_path / "data")
    for index, size in enumerate([(1, 1), (200, 7), (3, 3), (8, 8), (7, 9)]):
        random_image(60 + index, size).save(root / "train" / "ant" / f"small{index}.png")
    assert run_command("check-data", [str(root)], "deit check-data") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    for part in ("4 with a side below 8 px", "64 px", "train/ant/small1.png 200 x 7", ", ..."):
        assert part in warning
    assert "small3" not in warning
    assert set(dataset_scan.scan(root).small.values()) == {(1, 1), (200, 7), (3, 3), (7, 9)}


def test_check_data_names_the_cause_of_a_problem_of_the_layout(tmp_path, capsys):
    root = write_dataset(tmp_path / "data")
    cause = f"{root / 'train' / 'zebra'}: no images in this class folder"
    for split in ("train", "val"):
        (root / split / "zebra").mkdir()
    (root / "train" / "ant" / "0.png").write_bytes(b"damaged")
    options = ["--write-exclude-list", str(tmp_path / "bad.txt")]
    assert run_command("check-data", [str(root), *options], "deit check-data") == 3
    error = capsys.readouterr().err
    assert cause in error
    assert error.index(cause) < error.index("1 unreadable image; replace them")
    (tmp_path / "bad.txt").write_text("train/zebra/0.png\n")
    options = ["--exclude-list", str(tmp_path / "bad.txt")]
    assert run_command("check-data", [str(root), *options], "deit check-data") == 3
    error = capsys.readouterr().err
    assert error.index(cause) < error.index("data.exclude_list")


@pytest.mark.fault("C2")
def test_check_data_lists_every_bad_image_and_training_accepts_the_list(
    tmp_path, monkeypatch, capsys
):
    root = write_dataset(tmp_path / "data")
    bad = damage(root)
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
    assert_refused(done, 3, "data: 4 unreadable images; ", "data.exclude_list bad.txt")
    report = json.loads((tmp_path / "found.json").read_text())
    assert list(report["unreadable"]) == list(bad)
    for key, reason in report["unreadable"].items():
        assert bad[key] in reason
        assert f"{key}: {reason}\n" in done.stdout
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == list(bad)

    monkeypatch.chdir(tmp_path)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 5
    )
    error_output = capsys.readouterr().err
    assert "--write-exclude-list bad.txt: " in error_output
    assert "--force" in error_output
    assert (
        run_command(
            "check-data", ["data", "--write-exclude-list", "bad.txt", "--force"], "deit check-data"
        )
        == 3
    )
    assert "exclude" not in capsys.readouterr().out
    options = ["--exclude-list", "bad.txt", "--json", "found.json", "--force"]
    assert run_command("check-data", ["data", *options], "deit check-data") == 0
    (excluded_line,) = [line for line in capsys.readouterr().out.splitlines() if "exclude" in line]
    assert re.search(r"\b4\b", excluded_line)
    assert json.loads((tmp_path / "found.json").read_text())["excluded"] == 4

    config = DataConfig(
        source="folder", root=str(root), image_size=8, exclude_list=str(tmp_path / "bad.txt")
    )
    splits = load_splits(config)
    assert sum(len(split.labels) for split in splits[1:4]) == 24 - 4
    assert any(re.search(r"exclude list.* 4 .*bad\.txt", note) for note in splits.notes)


def fail_reading(ending: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reading a file with this suffix raise the error."""
    read = Path.read_bytes

    def read_or_fail(path: Path) -> bytes:
        if str(path).endswith(ending):
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_fail)


@pytest.mark.parametrize("error_number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_check_data_with_system_fault_stops_without_a_list(
    error_number, tmp_path, monkeypatch, capsys
):
    """Images on the list are excluded from all later runs, so a valid image must not be on it."""
    damage(write_dataset(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    fail_reading("train/cat/3.png", OSError(error_number, "said by the system"), monkeypatch)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 5
    )
    error_output = capsys.readouterr().err
    assert re.search(r"data/train/cat/3\.png: .*said by the system", error_output)
    assert not (tmp_path / "bad.txt").exists()


def test_check_data_without_read_permission_reports_the_file_but_does_not_list_it(
    tmp_path, monkeypatch, capsys
):
    """The image may be valid, but the error does not disappear by itself."""
    bad = damage(write_dataset(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    closed = PermissionError(errno.EACCES, "Permission denied")
    fail_reading("train/cat/3.png", closed, monkeypatch)
    assert (
        run_command("check-data", ["data", "--write-exclude-list", "bad.txt"], "deit check-data")
        == 3
    )
    output = capsys.readouterr()
    assert re.search(r"data/train/cat/3\.png: .*Permission denied", output.out)
    assert re.search(r"data: 1 .*3\.png: .* 4 .*data\.exclude_list bad\.txt", output.err)
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == list(bad)


class UnreadableRow:
    """A dataset of one row that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> object:
        raise self.error


@pytest.mark.parametrize("error_number", TRANSIENT)
@pytest.mark.parametrize("kind", ["folder", "shards", "reader"])
def test_store_read_with_system_fault_does_not_blame_the_image(kind, error_number, monkeypatch):
    def failing(error: Exception) -> ImageStore:
        def fail(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(Path, "read_bytes", fail)
        monkeypatch.setattr(stores, "open", fail, raising=False)
        return {
            "folder": FolderStore(Path("data"), ["a.png"]),
            "shards": ShardStore(Path("data"), ["0.tar"], ["a.png"], [(0, 0, 9)]),
            "reader": ReaderStore("torch/own", {"train": UnreadableRow(error)}),
        }[kind]

    image = "torch/own: train/0" if kind == "reader" else "a.png"
    with raises(SystemFault, image, "said by the system"):
        failing(OSError(error_number, "said by the system")).read(0)
    with pytest.raises(MemoryError):
        failing(MemoryError()).read(0)
    with raises(NotAllowedError, image, "Operation not permitted"):
        failing(PermissionError(errno.EPERM, "Operation not permitted")).read(0)
    with raises(DataError, image, "No such file or directory") as raised:
        failing(FileNotFoundError(errno.ENOENT, "No such file or directory")).read(0)
    assert raised.type is DataError


@pytest.mark.parametrize("name", ["missing.png", "folder.png", "x" * 300 + ".png", "loop.png"])
def test_store_read_of_invalid_file_raises_data_error(name, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    store = FolderStore(tmp_path, [name])
    with raises(DataError, tmp_path / name) as raised:
        store.read(0)
    assert raised.type is DataError


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_scan_with_system_fault_does_not_report_a_layout_problem(source, tmp_path, monkeypatch):
    """For example, a shard that cannot be opened now is not reported as truncated."""
    write_dataset(tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "0.tar").touch()

    def failing(*arguments: object) -> None:
        raise OSError(errno.ENFILE, "Too many open files in system")

    if source == "shards":
        monkeypatch.setattr(tarfile, "open", failing)
    else:
        monkeypatch.setattr("deit.datasets.sources.listing.os.scandir", failing)
    with raises(SystemFault, tmp_path / "data", "Too many open files in system"):
        dataset_scan.scan(DataConfig(source=source, root=str(tmp_path / "data")))


def test_check_data_lists_all_bad_class_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "data")
    (root / "train" / "empty").mkdir()
    (root / "val" / "zebra").mkdir()
    random_image(70).save(root / "val" / "zebra" / "0.png")
    assert run_command("check-data", ["data"], "deit check-data") == 3
    output = capsys.readouterr()
    problems = re.findall(r" (data/\S+): (.+)", output.out)
    assert [path for path, _ in problems] == ["data/train/empty", "data/val", "data/val/zebra"]
    assert "'empty'" in problems[1][1]  # the class without a folder in val
    assert re.search(r"data: 3\b", output.err)


@pytest.mark.fault("C23")
def test_check_data_with_duplicates_warns_by_split_and_class(tmp_path):
    root = write_dataset(tmp_path / "data")
    ant = root / "train" / "ant"
    with Image.open(ant / "0.png") as image:
        image.save(ant / "again.png", compress_level=1)  # other bytes, equal pixels
        image.save(root / "val" / "ant" / "leak.png")
        image.save(root / "val" / "cat" / "mislabelled.png")
    done = run_in(tmp_path, "deit", "check-data", "data", "--json", "found.json")
    assert done.returncode == 0
    report = json.loads((tmp_path / "found.json").read_text())
    copies = [report[kind] for kind in ("within_split", "across_splits", "across_classes")]
    assert [duplicates["count"] for duplicates in copies] == [2, 2, 1]
    assert re.findall(r" (\d+) .*\((.+)\)\n", done.stderr) == [
        (count, "train/ant/0.png = train/ant/again.png = val/ant/leak.png") for count in "221"
    ]


def test_check_data_scans_shards_and_readers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "data")
    bad = damage(root)
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
    assert re.search(r"data: 4 .*data\.exclude_list", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "code", "names"),
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
def test_check_data_with_invalid_options_names_them(
    options, code, names, tmp_path, monkeypatch, capsys
):
    write_dataset(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", list(options), "deit check-data") == code
    error_output = capsys.readouterr().err
    assert [name for name in names if name not in error_output] == []
    assert len(error_output.strip().splitlines()) == 1
