"""Name the options of a command in the messages of library functions, which name parameters."""

import re

_OTHER_NAMES = {"json_file": "--json", "root": "--data.root", "run": "RUN", "source": "--from"}
"""The arguments of commands that are not spelled like the parameter."""

_REMEDY = re.compile(
    r"\b(give|or|set|use) ((?:data|views|init|student|teacher|loss|optim|run)\.[a-z_]+)\b(?! =)"
)
"""A verb and a field of the configuration."""


def with_option(message: str) -> str:
    """Return a message that begins with a parameter and its value with the option instead.

    Fields of the configuration keep their names, except in a remedy, which can be copied. The
    remedy `force=True (--force)` becomes --force, and `another folder` names --out.

    >>> with_option("prune_rate = 2: should be a share between 0 and 1")
    '--prune-rate 2: should be a share between 0 and 1'
    >>> with_option("run.device = 'cuda': no CUDA device found")
    "run.device = 'cuda': no CUDA device found"
    >>> with_option("out = page: exists already; use force=True (--force) to replace it")
    '--out page: exists already; use --force to replace it'
    >>> with_option("out = run: holds a run; use run.device cpu, or give another folder")
    '--out run: holds a run; use --run.device cpu, or give another folder (--out)'
    >>> with_option("resume = True: the configuration differs from the run's")
    "--resume: the configuration differs from the run's"
    """
    message = message.replace("force=True (--force)", "--force")
    message = message.replace("another folder", "another folder (--out)")
    message = _REMEDY.sub(r"\1 --\2", message)
    match = re.match(r"([a-z]\w*) = (True(?=:))?", message)
    if match is None:
        return message
    option = _OTHER_NAMES.get(match[1], "--" + match[1].replace("_", "-"))
    return option + ("" if match[2] else " ") + message[match.end() :]
