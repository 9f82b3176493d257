"""Encoding, launcher, cluster job and compiler of this process."""

import locale
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from deit.core.machine.checks import Check, note, ok, ok_or_note

_ACCELERATE_CONFIG = "~/.cache/huggingface/accelerate/default_config.yaml"
_SLURM = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_checks() -> Iterator[Check]:
    """Yield a check for encoding and compiler; for launcher and cluster if there is one."""
    yield encoding_check(sys.getfilesystemencoding(), getattr(sys.stdout, "encoding", None))
    yield compiler_check()
    if "HF_ENDPOINT" in os.environ or "HF_HUB_OFFLINE" in os.environ:
        yield ok("hub", _settings(os.environ, ("HF_ENDPOINT", "HF_HUB_OFFLINE")))
    yield from launcher_checks(os.environ)


def encoding_check(of_names: str, of_output: str | None) -> Check:
    """Check the encodings of file names and of standard output."""
    output = of_output or "none"
    detail = f"file names {of_names}, output {output}, locale {locale.setlocale(locale.LC_CTYPE)}"
    encodings = {of_names.lower().replace("-", ""), output.lower().replace("-", "")}
    return ok_or_note(
        "encoding",
        detail,
        "set PYTHONUTF8=1, so that class names and files may have any letter",
        limited=not encodings <= {"utf8", "none"},
    )


def compiler_check() -> Check:
    """Check whether there is a C++ compiler, which torch.compile needs."""
    names = (os.environ.get("CXX") or "g++", "c++", "clang++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        return note("compiler", "no C++ compiler", "install g++ for --run.compile")
    return ok("compiler", f"{compiler}, for --run.compile")


def launcher_checks(environment: Mapping[str, str]) -> Iterator[Check]:
    """Yield a check for torchrun, accelerate and SLURM, each if this process has its settings."""
    if "TORCHELASTIC_RUN_ID" in environment or "WORLD_SIZE" in environment:
        yield ok("torchrun", _settings(environment, _TORCHRUN))
    given = {name for name in environment if name.startswith("ACCELERATE_")}
    if names := sorted(given - {"ACCELERATE_CONFIG_FILE"}):
        yield ok("accelerate launch", _settings(environment, names))
    config = environment.get("ACCELERATE_CONFIG_FILE") or _ACCELERATE_CONFIG
    if Path(config).expanduser().is_file():
        yield ok("accelerate config", f"{config}, read by accelerate launch")
    if "SLURM_JOB_ID" in environment:
        yield ok("SLURM", _settings(environment, _SLURM))
    elif shutil.which("sbatch"):
        yield ok("SLURM", "commands found, not in a job; scripts/launch has a job script")


def _settings(environment: Mapping[str, str], names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{name} {environment[name]}" for name in names if name in environment)
