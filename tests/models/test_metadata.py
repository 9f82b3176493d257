"""The metadata next to the weights of a student: base.json."""

from pathlib import Path

from deit.models.metadata import AdapterBase, base_of


def test_base_of_source_has_absolute_and_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    expected = AdapterBase(str(tmp_path / "base"), "../../base", "ab", "timm")
    assert base_of("base", "ab", "timm", out=Path("runs/one")) == expected
    named = AdapterBase("deit_tiny", None, "ab", "deit")
    assert base_of("deit_tiny", "ab", "deit", out=Path("x")) == named
