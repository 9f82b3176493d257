"""README.md is short and easy to read, and shows the essentials first."""

import re

import pyphen
import pytest

from tests.documentation.documents import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
_MAX_BYTES, _MAX_LINES = 8192, 170
_MIN_READING_EASE = 50


def prose_of(text: str) -> str:
    """Return the sentences of a document: no code, tables, headings, images and addresses."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#"))]
    return re.sub(r"`[^`]*`", "code", "\n".join(lines))


def reading_ease(text: str) -> float:
    """Return the Flesch reading ease: 206.835 - 1.015 words/sentence - 84.6 syllables/word."""
    dictionary = pyphen.Pyphen(lang="en_US")
    all_words = re.findall(r"[A-Za-z][A-Za-z'-]*", text)
    sentences = len(re.findall(r"[.!?:](?=\s|$)", text))
    syllables = sum(len(dictionary.positions(word.lower())) + 1 for word in all_words)
    return 206.835 - 1.015 * len(all_words) / sentences - 84.6 * syllables / len(all_words)


def test_reading_ease_of_known_text():
    # 6 words, 1 sentence, 6 syllables: 206.835 - 1.015 * 6 - 84.6
    assert reading_ease("The cat sat on the mat.") == pytest.approx(116.145)


def test_readme_is_short_and_easy_to_read():
    assert len(README.encode()) <= _MAX_BYTES
    assert README.count("\n") <= _MAX_LINES
    assert reading_ease(prose_of(README)) >= _MIN_READING_EASE


def test_readme_shows_a_picture_commands_and_python_first():
    first_section = README.index("\n## ")
    assert README.index("docs/images/digits-few-labels.png") < first_section
    screens = README.splitlines()[:50]
    assert "make quickstart" in "\n".join(screens[:30])
    assert "import deit" in "\n".join(screens)
    assert len(blocks(README, "python")) == 1
