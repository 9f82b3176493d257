"""Versions compared with the declared ones."""

import configparser
from importlib import metadata

import pytest

import deit
from deit.core.machine import packages
from deit.core.machine.packages import FEATURES, is_at_least, package_checks
from tests.helpers.processes import ROOT


class FakeDistribution:
    """The metadata of an installation with two requirements and two extras."""

    version = deit.__version__
    metadata = {"Requires-Python": ">=3.11"}
    requires = (
        "torch>=2.10",
        "rich>=14.3",
        'onnx>=1.23; extra == "export"',
        'matplotlib>=3.10; extra == "plot"',
        'pytest>=8; extra == "dev"',
    )


def checks_with(monkeypatch, versions, distribution=FakeDistribution):
    """Return the checks by name, where only packages with the given versions are installed."""

    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(packages.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(packages.metadata, "version", version)
    return {check.name: check for check in package_checks()}


@pytest.mark.parametrize(
    ("version", "least", "is_enough"),
    [
        ("2.10.0", "2.10", True),
        ("2.10", "2.10.0", True),
        ("2.9.1", "2.10", False),
        ("2.14.1+cu130", "2.10", True),
        ("3.0.0rc1", "2", True),
        ("1.0.25", "1.0.26", False),
        ("2026.1", "14.3", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, least, is_enough):
    assert is_at_least(version, least) is is_enough


def test_every_extra_has_a_feature():
    settings = configparser.RawConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert {*FEATURES, "dev", "docs"} == set(settings["options.extras_require"])


def test_installed_packages_are_ok(monkeypatch):
    versions = {"torch": "2.14.1", "rich": "14.3", "onnx": "1.23", "matplotlib": "4"}
    checks = checks_with(monkeypatch, versions)
    assert {checks[name].status for name in ("python", "deit", "torch", "rich")} == {"ok"}
    assert checks["torch"].detail == "2.14.1 (needs 2.10)"
    assert checks["extra export"] == ("extra export", "ok", checks["extra export"].detail, "")
    assert "onnx 1.23" in checks["extra export"].detail
    assert "extra dev" not in checks


def test_missing_and_old_packages_are_faults_and_missing_extras_are_notes(monkeypatch):
    checks = checks_with(monkeypatch, {"torch": "2.9.1", "matplotlib": "3.9.1"})
    assert checks["torch"].status == "fault"
    assert "2.9.1" in checks["torch"].detail
    assert checks["torch"].hint == 'pip install "torch>=2.10"'
    assert (checks["rich"].status, "missing" in checks["rich"].detail) == ("fault", True)
    assert (checks["extra export"].status, "onnx" in checks["extra export"].detail) == (
        "note",
        True,
    )
    assert checks["extra export"].hint == 'pip install "deit[export]"'
    assert FEATURES["export"] in checks["extra export"].detail
    assert "3.9.1" in checks["extra plot"].detail
    assert checks["extra plot"].status == "note"


def test_old_python_is_a_fault(monkeypatch):
    class Newer(FakeDistribution):
        metadata = {"Requires-Python": ">=9.1"}

    assert checks_with(monkeypatch, {}, Newer)["python"].status == "fault"


def test_metadata_of_another_release_is_a_note(monkeypatch):
    class Older(FakeDistribution):
        version = "0.0.1"

    check = checks_with(monkeypatch, {}, Older)["deit"]
    assert (check.status, "0.0.1" in check.detail) == ("note", True)


def test_checkout_that_is_not_installed_is_a_note(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "distribution", missing)
    checks = {check.name: check.status for check in package_checks()}
    assert checks == {"python": "ok", "deit": "note"}
