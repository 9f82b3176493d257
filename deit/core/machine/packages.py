"""Versions of Python and of packages, compared with those that this project declares."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import deit
from deit.core.machine.checks import Check, fault, note, ok

FEATURES = {
    "digits": "recipes on scikit-learn's digits (digits, digits-teacher, ...)",
    "plot": "charts: report, show-views, attention maps, --plot",
    "search": "searches in deit sweep",
    "tensorboard": "run.trackers tensorboard",
    "wandb": "run.trackers wandb",
    "mlflow": "run.trackers mlflow",
    "trackio": "run.trackers trackio",
    "export": "deit export to transformers and ONNX, deit quantize",
}
"""What each optional extra is for; `dev` and `docs` are for work on this project."""


class Requirement(NamedTuple):
    """A package that this project declares. least: its lowest version; extra: that needs it."""

    package: str
    least: str
    extra: str


def parse_requirement(text: str) -> Requirement:
    """Return a line of the metadata `Requires-Dist` as a requirement.

    >>> parse_requirement('onnx>=1.23; extra == "export"')
    Requirement(package='onnx', least='1.23', extra='export')
    >>> parse_requirement("torch>=2.10")
    Requirement(package='torch', least='2.10', extra='')
    """
    needed, _, marker = text.partition(";")
    name = re.match(r"\s*[\w.-]+", needed)
    least = re.search(r"[>=~]=\s*([\w.]+)", needed)
    extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", marker)
    return Requirement(
        name[0].strip() if name else text,
        least[1] if least else "0",
        extra[1] if extra else "",
    )


def is_at_least(version: str, least: str) -> bool:
    """Return whether a version is not below another; parts that are not numbers do not count.

    >>> is_at_least("2.10.0+cu128", "2.9"), is_at_least("2.9.1", "2.10"), is_at_least("3", "3.0")
    (True, False, True)
    """

    def release(text: str) -> list[int]:
        numbers = re.match(r"\d+(\.\d+)*", text)
        parts = [int(part) for part in numbers[0].split(".")] if numbers else []
        while parts and parts[-1] == 0:
            parts.pop()
        return parts

    return release(version) >= release(least)


def package_checks() -> Iterator[Check]:
    """Yield a check for Python, deit, each package that it needs, and each optional extra."""
    try:
        distribution = metadata.distribution("deit")
    except metadata.PackageNotFoundError:
        yield ok("python", f"{platform.python_version()}, {sys.executable}")
        yield note(
            "deit",
            f"{deit.__version__} in {deit.__path__[0]}, not installed: no lowest versions to check",
            "pip install -e . in the checkout",
        )
        return
    yield _python_check(distribution.metadata["Requires-Python"] or "")
    yield _deit_check(distribution.version)
    requirements = [parse_requirement(text) for text in distribution.requires or ()]
    for needed in requirements:
        if not needed.extra:
            yield _package_check(needed)
    for extra, feature in FEATURES.items():
        yield _extra_check(extra, feature, [r for r in requirements if r.extra == extra])


def _python_check(required: str) -> Check:
    version = platform.python_version()
    least = required.lstrip(">= ") or "0"
    if not is_at_least(version, least):
        return fault("python", f"{version}, needs {required}", f"install Python {least} or newer")
    return ok("python", f"{version} on {platform.platform()}, {sys.executable}")


def _deit_check(installed: str) -> Check:
    detail = f"{deit.__version__} in {deit.__path__[0]}"
    if installed != deit.__version__:
        return note(
            "deit",
            f"{detail}; the installed metadata is that of {installed}",
            "pip install -e . in the checkout, so that the versions below are those it needs",
        )
    return ok("deit", detail)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package_check(needed: Requirement) -> Check:
    version, hint = _installed(needed.package), f'pip install "{needed.package}>={needed.least}"'
    if version is None:
        return fault(needed.package, f"missing, needs {needed.least} or newer", hint)
    if not is_at_least(version, needed.least):
        return fault(needed.package, f"{version}, needs {needed.least} or newer", hint)
    return ok(needed.package, f"{version} (needs {needed.least})")


def _extra_check(extra: str, feature: str, needed: list[Requirement]) -> Check:
    versions = {item.package: _installed(item.package) for item in needed}
    missing = [name for name, version in versions.items() if version is None]
    old = [
        f"{item.package} {versions[item.package]} (needs {item.least})"
        for item in needed
        if not is_at_least(versions[item.package] or item.least, item.least)
    ]
    name, hint = f"extra {extra}", f'pip install "deit[{extra}]"'
    if missing:
        return note(name, f"{', '.join(missing)} missing, for {feature}", hint)
    if old:
        return note(name, f"{', '.join(old)} too old, for {feature}", hint)
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return ok(name, f"{installed}, for {feature}")
