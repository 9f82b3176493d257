"""The page of exit codes, from the error classes of deit/core/errors.py."""

import inspect
from signal import SIGHUP, SIGINT, SIGTERM

from deit.cli import BROKEN_PIPE
from deit.core import errors
from deit.core.errors import DeitError, StoppedBySignal
from scripts.documentation.markdown import code, escaped, text_table

_INTRODUCTION = """\
Every command exits with one of these codes. An error is printed as one message, which names the
cause and the remedy; `--debug` also prints the traceback. In Python the same errors are raised as
exceptions of `deit.errors`; all are subclasses of `DeitError`, with the code in `exit_code`.
"""
_AFTER = """\
Under torchrun and `accelerate launch` with several processes the launcher prints its own report and
exits with its own code, 1.
"""


def exit_codes_page() -> str:
    """Return the page as Markdown."""
    stops = ", ".join(
        str(StoppedBySignal(signum).exit_code) for signum in (SIGHUP, SIGINT, SIGTERM)
    )
    rows = [
        ("0", "", "Success."),
        ("1", "", "Unexpected error: a bug in deit or in your code. Please report it."),
        *_rows_of_classes(),
        (stops, code("StoppedBySignal"), _meaning(StoppedBySignal)),
        (str(BROKEN_PIPE), "", "The reader of the output has exited, as in `deit ... | head`."),
    ]
    table = text_table(("code", "exception", "meaning"), rows)
    return f"# Exit codes\n\n{_INTRODUCTION}\n{table}\n\n{_AFTER}"


def _rows_of_classes() -> list[tuple[str, str, str]]:
    """Return a row for each error class, sorted by exit code, base classes first."""
    classes = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, DeitError) and kind is not DeitError
    ]
    classes.sort(key=lambda kind: (kind.exit_code, len(kind.__mro__)))
    return [(str(kind.exit_code), code(kind.__name__), _meaning(kind)) for kind in classes]


def _meaning(kind: type) -> str:
    """Return the docstring of a class as one line, without its attributes and examples."""
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    plain = [text for text in paragraphs if not text.startswith((">>>", "problems:", "Not an Exc"))]
    return escaped(" ".join(" ".join(plain).split()))
