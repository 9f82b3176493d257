"""Write the generated pages of the documentation, and build the site.

    python scripts/docs.py generate [--check]   pages of docs/reference/ that come from the code
    python scripts/docs.py build [--out DIR]    the site, in site/; fails on any warning
    python scripts/docs.py serve                the site on a local port, built again on changes

`build` and `serve` need the extra `docs`: pip install -e '.[docs]'.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.documentation.api import api_page
from scripts.documentation.commands import commands_page
from scripts.documentation.exit_codes import exit_codes_page
from scripts.documentation.recipes import recipes_page
from scripts.documentation.settings import settings_page
from scripts.wheel_layout import copy_package

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "recipes.md": recipes_page,
    "exit-codes.md": exit_codes_page,
    "api.md": api_page,
}
"""Generated pages of docs/reference/."""
NOTE = "<!-- written by scripts/docs.py; do not edit -->\n\n"


def generate(*, check: bool) -> bool:
    """Write the generated pages; with `check`, only compare. Return whether they are current."""
    current = True
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / "reference" / name, NOTE + page().rstrip("\n") + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            current = False
            if check:
                print(f"{path.relative_to(ROOT)} is old; run: python scripts/docs.py generate")
            else:
                path.write_text(text, encoding="utf-8")
    return current


@contextmanager
def _package() -> Iterator[None]:
    """Give mkdocstrings a copy of the code in which griffe finds every module."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder))
        os.environ["DEIT_DOCS_PACKAGE"] = folder
        yield


def build(out: Path) -> None:
    """Build the site. Exits with code 1 if there is any warning."""
    from mkdocs.__main__ import cli

    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    with _package():
        arguments = ["build", "--strict", "--quiet", "--config-file", str(ROOT / "mkdocs.yml")]
        cli.main([*arguments, "--site-dir", str(out)], standalone_mode=False)


def serve() -> None:
    """Serve the site on a local port until interrupted."""
    from mkdocs.__main__ import cli

    with _package():
        cli.main(["serve", "--config-file", str(ROOT / "mkdocs.yml")], standalone_mode=False)


def main() -> int:
    """Run one of the actions; return 1 if a generated page is not up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("generate", "build", "serve"))
    parser.add_argument("--check", action="store_true", help="only compare the generated pages")
    parser.add_argument("--out", type=Path, default=ROOT / "site", metavar="DIR")
    options = parser.parse_args()
    if options.action == "generate":
        return int(not generate(check=options.check) and options.check)
    generate(check=False)
    build(options.out) if options.action == "build" else serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
