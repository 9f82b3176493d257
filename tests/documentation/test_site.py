"""The documentation site: it builds without a warning, needs no network, and its links resolve."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs")

LOADED = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "link": "href",
    "object": "data",
    "embed": "src",
    "video": "src",
}
"""Elements that a browser loads something for, with the attribute that holds the address."""


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NARROW_PX = 480
# Loads each page in a narrow frame, and lists those that are wider than the frame.
MEASURE_PAGES = """<iframe style="width:{width}px;height:900px;border:0"></iframe><script>
(async () => {{
  const frame = document.querySelector("iframe"), wide = [];
  for (const page of {pages}) {{
    await new Promise((loaded) => {{ frame.onload = loaded; frame.src = page; }});
    if (frame.contentDocument.documentElement.scrollWidth > {width}) wide.push(page);
  }}
  const result = document.createElement("pre");
  result.id = "wide";
  result.textContent = JSON.stringify(wide);
  document.body.append(result);
}})();
</script>"""


class Page(NamedTuple):
    """The links of a page (element, address) and the ids that links can point to."""

    links: list[tuple[str, str]]
    ids: set[str]


class _Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        address = values.get(LOADED.get(tag, "href" if tag == "a" else ""))
        if address is not None:
            self.links.append((tag, address))


def read_page(html: str) -> Page:
    collector = _Collector()
    collector.feed(html)
    return Page(collector.links, collector.ids)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "build", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): read_page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def broken_links(pages: dict[str, Page], files: set[str]) -> list[str]:
    """Return the internal links that lead to no file or no id, as `page: address`."""
    broken = []
    for name, page in pages.items():
        for _, address in page.links:
            target = urlsplit(urljoin(f"http://site/{name}", address))
            if target.netloc != "site" or target.scheme != "http":
                continue
            path = unquote(target.path).lstrip("/")
            path += "index.html" if path == "" or path.endswith("/") else ""
            fragment = unquote(target.fragment)
            known = path in files and (not fragment or fragment in pages.get(path, page).ids)
            if not known and name != "404.html":
                broken.append(f"{name}: {address}")
    return broken


def test_internal_links_images_and_ids_of_the_site_resolve(site, pages):
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert len(pages) > 30
    assert broken_links(pages, files) == []


def test_broken_links_finds_missing_pages_and_ids():
    pages = {
        "a/index.html": read_page('<a href="../b/#there">x</a><a href="../b/#no">x</a><img src=c>'),
        "b/index.html": read_page('<p id="there">x</p>'),
    }
    assert broken_links(pages, set(pages)) == ["a/index.html: ../b/#no", "a/index.html: c"]


def test_reading_a_page_of_the_site_needs_no_network(site, pages):
    loaded = [
        (name, address)
        for name, page in pages.items()
        for tag, address in page.links
        if tag in LOADED and urlsplit(address).scheme in ("http", "https", "ftp", "")
        if urlsplit(address).netloc
    ]
    assert loaded == []
    styles = list(site.rglob("*.css"))
    assert styles
    for style in styles:
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", text), style


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_pages_fit_a_narrow_screen(site, pages, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    (folder / "wide.html").write_text('<div style="width: 2000px">wide</div>')
    names = json.dumps([*sorted(set(pages) - {"404.html"}), "wide.html"])
    measure = folder / "measure.html"
    measure.write_text(MEASURE_PAGES.format(width=NARROW_PX, pages=names))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    command = [
        *(CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}"),
        *("--virtual-time-budget=60000", "--dump-dom", measure.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    wide = re.search(r'<pre id="wide">(.*?)</pre>', done.stdout)
    assert json.loads(wide[1]) == ["wide.html"]  # content that is wider scrolls in its own box


def test_code_of_models_and_datasets_is_in_the_reference(site):
    # In a checkout griffe does not see them without the layout of a wheel.
    text = (site / "explanation" / "losses" / "index.html").read_text(encoding="utf-8")
    assert 'id="deit.distill.losses.soft_distillation_loss"' in text
