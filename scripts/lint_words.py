"""Check that documents, docstrings, comments, messages and names use the field's plain words.

    python scripts/lint_words.py [PATH ...] [--count]

Prose is what people read: Markdown outside code, docstrings, comments, and strings that hold a
space. Names are those that the code gives: functions, parameters, variables, fields. Each word that
is not wanted comes with what to write instead. docs/log.md is not checked: it is a record of its
days. Nor are the strings of tests, most of which are input.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.md", "docs/**/*.md", "*.py", *(f"{name}/**/*.py" for name in (
    "deit", "models", "datasets", "scripts", "tests", "checkpoints")))  # fmt: skip
UNCHECKED = ("docs/log.md", "scripts/lint_words.py")

PROSE = {
    # Programs print, report, log, receive, query and predict; they do not talk.
    r"tells?|told|telling|says?|said|saying|hears?|heard|hearing|speaks?|spoken?|speaking": (
        "print, report, log, show, mean"
    ),
    r"asks?|asked|asking|unasked": "request, query, set, given",
    r"answers?|answered|answering": "output, prediction, logits, result",
    r"go(?:es|ing)? on|went on|gone on": "resume, continue",
    r"anew": "again, recomputed",
    r"so many|so-many-th": "N, in batches of N, every Nth",
    r"of (?:ours|theirs|yours|one's own)|somebody's|everybody's": "our, your, a third party's",
    r"besides?": "next to, alongside, in parallel with, compared with",
    r"held against|holds? against": "compare with, verify against",
    r"lies?|lay|lain|lying": "is stored, is in, is located",
    r"no (?:say|more\b(?! than| of))|in two minds|comes? round|come round again|takes? along": (
        "say what happens"
    ),
    r"on (?:its|their) way|whatever it is called|likewise|in the place of|as soon had": (
        "say it without the idiom"
    ),
    r"else(?=[.,;:)]|$)": "otherwise",
    r"by now|at last|henceforth|thereby|therein|thereof|whose it is": "already, finally, now",
    r"(?:is|are|was|were) not to be (?:had|found|seen|read)": "is missing, cannot be read",
    r"may pass|will not do|need not|needs not": "can be transient, is unsuitable, does not have to",
    r"none (?:named|given):": "Default: ...",
    r"whoever|whomever|whom|nobody|everyone|everybody|somebody|strangers?": "name who",
    # Metaphors of a house, a choir and a road.
    r"houses?|doors?|rooms?|floors? (?:of|plan|\d)|seats?|seated|voices?|panels?|chorus|ladders?|"
    r"rungs?": (
        "space, layer, slot, teacher, ensemble, plot, variant"
    ),
    r"laid|apart|aloud|nowhere": "placed, separate, not anywhere",
    r"came|comes? (?:to nothing|of it|out of it)": "result, was",
    r"mishaps?": "error, failure",
    r"pictures?": "image (data), plot or figure (drawn)",
    r"learnt|spelt|burnt|dreamt|whilst|amongst|judgement|artefacts?|licences?|towards|centred?|"
    r"grey": (
        "American spelling"
    ),
    r"\w*(?:initiali|normali|standardi|optimi|quanti|seriali|regulari|summari|minimi|maximi|generali|"
    r"recogni|organi|synchroni|visuali|tokeni|randomi|penali|reali|utili|binari|parallel?i)s"
    r"(?:e|es|ed|er|ers|ing|ation|ations)": "American spelling: -ize",
    r"\w*(?:colou|behaviou|neighbou|favou|honou|labou)r\w*|label+led|cancelled|modelled|unlabelled|"
    r"analys(?:e|es|ed|ing)\b": "American spelling",
}  # fmt: skip

NAMES = {
    r"told|said|says|heard|hears|asked|asks|spoken|anew|beside|apart|aloud|begun|laid|kept|lain|"
    r"mine|ours|theirs|yours|there|here|everyone|everybody|whoever|nobody|alone|together|alike|"
    r"shown|gone|made|meant|wanted|wrong|ways|zygote|straight|voice|voices|seat|seats|panel|"
    r"lay|settle|settled|colours?|colour|grey|normalis\w*|initialis\w*|standardis\w*|behaviour|neighbours?|"
    r"centres?": (
        "a noun or a verb of the field"
    ),
}  # fmt: skip
WHOLE_NAMES = {
    r"found|one|own|place|places|number|several|how|watch|rise|there|here|"
    r"picture|pictures|answer|answers|words": (
        "what it holds: result, path, index, count, mode, image, output"
    ),
}  # fmt: skip

_PROSE = {re.compile(rf"(?<![\w-])(?:{key})(?![\w-])", re.I): hint for key, hint in PROSE.items()}
_NAMES = {re.compile(rf"(?:.*_)?(?:{key})(?:_.*)?"): hint for key, hint in NAMES.items()}
_NAMES |= {re.compile(rf"_?(?:{key})"): hint for key, hint in WHOLE_NAMES.items()}
_CODE = re.compile(
    r"```.*?```|`[^`]*`|https?://\S+|<!--.*?-->|\]\([^)]*\)|^\s*>>> [^\n]*", re.S | re.M
)


class Hit(NamedTuple):
    """A word that is not wanted."""

    file: str
    line: int
    word: str
    hint: str


def hits_in(file: Path, name: str) -> list[Hit]:
    """Return the unwanted words of one Markdown or Python file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return list(_of_prose(text, 1, name))
    hits = [hit for line, prose in _prose_of(text, name) for hit in _of_prose(prose, line, name)]
    for line, identifier in _names_of(ast.parse(text)):
        for pattern, hint in _NAMES.items():
            if pattern.fullmatch(identifier.lower()):
                hits.append(Hit(name, line, identifier, hint))
    return sorted(set(hits), key=lambda hit: (hit.line, hit.word))


def _of_prose(text: str, first_line: int, name: str) -> Iterator[Hit]:
    """Yield the unwanted words of a passage; code in it is blanked, so that lines stay."""
    text = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    for pattern, hint in _PROSE.items():
        for match in pattern.finditer(text):
            line = first_line + text.count("\n", 0, match.start())
            yield Hit(name, line, match[0], hint)


def _prose_of(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring, comment and string with a space."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("#!"):
            yield token.start[0], token.string
    tree = ast.parse(text)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(value)) if " " in value:
                if id(node) in docstrings or not name.startswith("tests/"):
                    yield node.lineno, value


def _names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each thing that the code names."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if not node.name.startswith("test_"):
                    yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def files_under(paths: list[Path]) -> list[Path]:
    """Return the files to check: all of the project, or those at and under `paths`."""
    files = sorted({file for place in PLACES for file in ROOT.glob(place)})
    if paths:
        wanted = [path.resolve() for path in paths]
        files = [f for f in files if any(f == w or w in f.parents for w in wanted)]
    return [file for file in files if file.relative_to(ROOT).as_posix() not in UNCHECKED]


def main() -> int:
    """Print the hits; return 1 where there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; default: all")
    parser.add_argument("--count", action="store_true", help="print the number of hits a file")
    options = parser.parse_args()
    if missing := [str(path) for path in options.paths if not path.exists()]:
        parser.error(f"no such file or folder: {missing[0]}")
    total = 0
    for file in files_under(options.paths):
        hits = hits_in(file, file.relative_to(ROOT).as_posix())
        total += len(hits)
        if options.count and hits:
            print(f"{len(hits):5} {hits[0].file}")
        elif hits:
            print("\n".join(f"{h.file}:{h.line}: {h.word!r}: {h.hint}" for h in hits))
    print(f"words: {total} to replace" if total else "words: fine")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
