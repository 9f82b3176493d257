"""The exit code and the message of a command whose work raises an error or exits."""

import errno
import sys

import pytest

from deit.cli import commands, run_command

pytest.importorskip("sklearn")


class TritonMissing(RuntimeError):
    """Like an error of PyTorch's compiler, whose modules take seconds to import."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    ("error", "code", "names"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            5,
            ["/a/b: Permission denied"],
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 5, ["/a: Read-only file system"]),
        (OSError(errno.EMFILE, "Too many open files"), 5, ["Too many open files"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aa"), 5, ["aa: File name too long"]),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 5, ["a: File exists"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 5, ["a/b: Not a directory"]),
        (MemoryError(), 5, ["MemoryError"]),
        (
            RuntimeError("alloc: can't allocate memory: 9 bytes"),
            5,
            ["alloc: can't allocate memory: 9 bytes"],
        ),
        (
            RuntimeError("Storage size calculation overflowed"),
            5,
            ["memory", "Storage size calculation overflowed"],
        ),
        (RuntimeError("Symlink loop from '/a'"), 5, ["Symlink loop from '/a'"]),  # Path.resolve
        (RuntimeError("CUDA error: out of memory"), 5, ["CUDA error: out of memory"]),
        (TritonMissing(), 5, ["torch.compile", "TritonMissing", "--run.compile"]),
        (OSError(errno.ENOTCONN, "Not connected", "/fuse/a"), 5, ["/fuse/a: Not connected"]),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            5,
            ["No usable temporary directory found in ['/tmp']", "TMPDIR"],
        ),
        (FileNotFoundError(errno.ENOENT, "Gone", "/a"), 1, ["FileNotFoundError", "Gone", "/a"]),
        (ZeroDivisionError("zero"), 1, ["ZeroDivisionError", "zero"]),
    ],
)
def test_exit_codes_of_errors(error, code, names, monkeypatch, capsys):
    """A full disk or missing permission can occur with any file at any time."""

    def command(arguments, program):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == code
    output = capsys.readouterr().err
    assert output.startswith("deit: error: ")
    assert len(output.splitlines()) == 1
    for name in (*names, "--debug"):
        assert name in output


@pytest.mark.parametrize(
    ("code", "expected", "text"),
    [
        (1, 1, None),
        (3, 3, None),
        ("a reason", 1, "a reason"),
        (None, 1, __name__),
        (0, 1, __name__),
    ],
)
def test_user_code_that_exits_is_an_error(code, expected, text, monkeypatch, capsys):
    """Exit code 141 is for a broken pipe only."""

    def command(arguments, program):
        sys.exit(code)

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (text is not None)
    assert all(line.startswith("deit: error: ") and text in line for line in lines)
