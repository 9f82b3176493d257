"""Text files in the encodings and line ends that editors and shells write."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit.config.recipes.handwriting import digits
from deit.config.schema import to_dict
from deit.config.sections.data import DataConfig
from deit.config.validation import load_config
from deit.core.errors import ConfigError, DataError, format_counts
from deit.core.file_reading import read_lines, read_text
from deit.datasets.splits import load_splits
from deit.experiments.sweep_spec import read_sweep
from tests.helpers.errors import raises

ENCODINGS = {
    "plain": lambda text: text.encode(),
    "Notepad, UTF-8": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "PowerShell's >": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16, big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
}
BINARY = {
    "Latin-1": "\u00e4nt\n".encode("latin-1"),
    "UTF-16 without a mark": "ant\nbee\n".encode("utf-16-le"),
    "half of UTF-16": b"\xff\xfea\0b",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(20),
}


@pytest.fixture(params=ENCODINGS)
def written(request):
    return ENCODINGS[request.param]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "data"
    for name in ("\u00e4nt", "bee", "cat"):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((8, 8, 3), 20 * index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{index}.png")
    return folder


def config(root: Path, **fields: object) -> DataConfig:
    return DataConfig(source="folder", root=str(root), image_size=8, storage="files", **fields)


def test_read_text_in_all_encodings(written, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(written("\u00e4nt\n  bee \n\n"))
    assert [line for line in read_lines(file) if line] == ["\u00e4nt", "bee"]


@pytest.mark.parametrize("kind", BINARY)
def test_read_text_of_binary_files_raises(kind, tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(BINARY[kind])
    with pytest.raises(ValueError, match="UTF-8") as caught:
        read_text(file)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("C28")
def test_class_list_in_all_encodings(written, root, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(written("\u00e4nt\tan insect\ncat\n"))
    assert load_splits(config(root, classes=(f"@{file}",))).class_names == ("cat", "\u00e4nt")
    file.write_bytes(written("\u00e4nt\n"))
    splits = load_splits(config(root, unseen_classes=(f"@{file}",)))
    assert any("\u00e4nt" in note for note in splits.notes)
    seen, tested = (set(part.labels.tolist()) for part in (splits.train, splits.test))
    assert tested - seen == {splits.class_names.index("\u00e4nt")}


@pytest.mark.fault("C28")
@pytest.mark.parametrize("kind", BINARY)
def test_binary_class_list_raises(kind, root, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(BINARY[kind])
    with raises(DataError, "data.classes", "names.txt"):
        load_splits(config(root, classes=(f"@{file}",)))


@pytest.mark.fault("C28")
def test_exclude_list_in_all_encodings(written, root, tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(written("# bad\ntrain/\u00e4nt/0.png\n"))
    splits = load_splits(config(root, exclude_list=str(file)))
    assert any(str(file) in note for note in splits.notes)
    read = [part.name(row) for part in splits[1:4] for row in range(len(part.labels))]
    assert (len(read), str(root / "train/\u00e4nt/0.png") in read) == (11, False)


def test_class_names_of_shards_in_all_encodings(written, root, tmp_path):
    (tmp_path / "classes.txt").write_bytes(written("\u00e4nt\nbee\ncat\n"))
    label = tmp_path / "label"
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for index_of_class, name in enumerate(("\u00e4nt", "bee", "cat")):
            for index in range(4):
                archive.add(root / "train" / name / f"{index}.png", f"{index_of_class}{index}.png")
                label.write_bytes(b"\xef\xbb\xbf%d\r\n" % index_of_class)
                archive.add(label, f"{index_of_class}{index}.cls")
    label.unlink()
    data = DataConfig(source="shards", root=str(tmp_path), image_size=8)
    assert load_splits(data).class_names == ("bee", "cat", "\u00e4nt")


@pytest.mark.fault("C28")
def test_sweep_file_in_all_encodings(written, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(written("recipe: digits\ngrid:\n  optim: {lr: [0.001, 0.002]}\n"))
    sweep = read_sweep(file)
    as_json = tmp_path / "sweep.json"
    as_json.write_bytes(
        written('{"recipe": "digits",\n "grid": {"optim": {"lr": [0.001, 0.002]}}}\n')
    )
    assert read_sweep(as_json) == sweep
    file.write_bytes(BINARY["Latin-1"])
    with raises(ConfigError, file, "UTF-8"):
        read_sweep(file)


@pytest.mark.fault("C28")
def test_config_file_in_all_encodings(written, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(written(json.dumps(to_dict(digits()), indent=1)))
    assert load_config(file) == digits()
    file.write_bytes(BINARY["Latin-1"])
    with raises(ConfigError, file, "UTF-8"):
        load_config(file)


def test_counted_adds_up_the_rest():
    assert format_counts({"a": 1, "b": 3, "c": 3}) == "3 b, 3 c, 1 a"
    assert format_counts({"a": 1, "b": 3, "c": 3}, max_items=1).startswith("3 b, 4 ")
    assert format_counts({}) == ""
