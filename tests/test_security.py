"""No code is run from files and the network is not used: every kind of file has a canary."""

import io
import json
import os
import pickle  # noqa: TID251
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from deit.cli import run_command
from deit.core import run_folder
from deit.distill.target_store import manifest_bytes, read_manifest
from tests.helpers.processes import ROOT, Completed
from tests.helpers.small_runs import SMALL

pytest.importorskip("sklearn")
FEW = ("--data.train_fraction", "0.2")
BRIEF = (*SMALL, *FEW)


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def plain(canary: Canary) -> bytes:
    return pickle.dumps(canary)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def old_tar(canary: Canary) -> bytes:
    """Return a file in torch's format of 2016."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(canary)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def torchscript(canary: Canary) -> bytes:
    """Return a zip as torch.jit.save writes it, with the canary as its pickles."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(canary))
        archive.writestr("archive/constants.pkl", pickle.dumps(canary))
        archive.writestr("archive/version", "3")
        archive.writestr(
            "archive/code/__torch__.py", f"import os\nos.system('touch {canary.path}')"
        )
    return file.getvalue()


def array(canary: Canary) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([canary], dtype=object), allow_pickle=True)
    return file.getvalue()


PAYLOADS = {
    "a pickle": plain,
    "among tensors": lambda canary: saved({"model": {"a": torch.zeros(2)}, "args": canary}),
    "deep inside": lambda canary: saved({"model": {"a": [{"b": (canary,)}]}}),
    "old tar": old_tar,
    "torchscript": torchscript,
    "an array of objects": array,
    "eval": lambda canary: (
        b"cbuiltins\neval\n(V__import__('os').system('touch %s')\ntR." % str(canary.path).encode()
    ),
}


@pytest.fixture(scope="module")
def run(command_server, tmp_path_factory) -> Path:
    """A small finished run."""
    out = tmp_path_factory.mktemp("secure") / "run"
    done = command_server.run("train", *BRIEF, "--out", out)
    assert done.code == 0, done.err
    return out


ARCHITECTURE = (
    *("--teacher.architecture", "timm:resnet10t", "--teacher.image_size", "32"),
    *("--teacher.mean", "0.5,0.5,0.5", "--teacher.std", "0.5,0.5,0.5"),
)


@pytest.fixture
def started(command_server, capsys):
    """Run commands: the first in its own process, the others in this one, which is faster."""
    first = True

    def start(*command: object) -> Completed:
        nonlocal first
        if first:
            first = False
            return command_server.run(*command)
        capsys.readouterr()
        name, *arguments = map(str, command)
        code = run_command(name, arguments, f"deit {name}")
        return Completed(code, *capsys.readouterr())

    return start


@pytest.mark.fault("B12")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_weight_file_runs_code(payload, started, tmp_path):
    canary = tmp_path / "canary"
    files = [tmp_path / name for name in ("w.pth", "w.pt", "w.bin", "w.safetensors", "w.npy")]
    for file in files:
        file.write_bytes(PAYLOADS[payload](Canary(canary)))
    digits = ("digits", "--out", tmp_path / "out")
    for file in files:
        commands = (
            ("finetune", "--from", file, *digits, "--loss", "none"),
            ("train", *digits, "--teacher.source", file, *ARCHITECTURE),
        )
        for command in commands:
            done = started(*command)
            assert done.code == 4, done.err
            assert len(done.err.splitlines()) == 1
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("B12")
@pytest.mark.parametrize("payload", ["a pickle", "among tensors", "torchscript"])
def test_no_timm_or_transformers_folder_runs_code(payload, started, tmp_path):
    """With every file name of weights in these folders."""
    canary = tmp_path / "canary"
    for kind in ({"architecture": "resnet10t", "num_classes": 10}, {"model_type": "deit"}):
        for name in ("pytorch_model.bin", "model.safetensors", "open_clip_pytorch_model.bin"):
            folder = tmp_path / "folder"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            custom = {"custom_load": True, "hf_hub_filename": name, "file": str(folder / name)}
            about = {**kind, "pretrained_cfg": custom, "auto_map": {"AutoModel": "evil.Evil"}}
            (folder / "config.json").write_text(json.dumps(about))
            (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
            (folder / name).write_bytes(PAYLOADS[payload](Canary(canary)))
            digits = ("digits", "--out", tmp_path / "out")
            for command in (
                ("finetune", "--from", folder, *digits, "--loss", "none"),
                ("train", *digits, "--teacher.source", folder),
            ):
                done = started(*command)
                assert done.code in (3, 4), done.err
    assert not canary.exists()


def evil(folder: Path) -> tuple[Path, Path]:
    """Write a teacher that is code; return it and the file that it creates when it is run."""
    canary = folder / "canary"
    code = folder / "evil.py"
    code.write_text(f"open({str(canary)!r}, 'w')\ndef teacher():\n    raise SystemExit\n")
    return code, canary


def test_code_named_in_a_run_is_not_run(run, command_server, tmp_path):
    """A run folder from others names a function in one of its files as the teacher."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    code, canary = evil(folder)
    config = json.loads((folder / "config.json").read_text())
    config["teacher"]["source"] = [f"{code}:teacher"]
    config["loss"]["kind"] = "soft"
    config["loss"]["head"] = "distillation"
    (folder / "config.json").write_text(json.dumps(config))
    done = command_server.run("evaluate", folder, "--json", tmp_path / "evaluation.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "evaluation.json").read_text())["teacher"] is None
    assert f"{code}:teacher" in done.err
    (tmp_path / "p.png").write_bytes(PNG)
    for command in (
        ("train", folder / "config.json", "--out", tmp_path / "out"),
        ("finetune", "--from", folder, "--out", tmp_path / "out"),
        ("targets", "write", folder / "config.json", "--out", tmp_path / "out"),
        ("show-views", folder / "config.json", "--out", tmp_path / "views.png"),
        ("compare", folder / "config.json", "--out", tmp_path / "out"),
        ("predict", folder, tmp_path / "p.png", "--teacher", "run"),
    ):
        done = command_server.run(*command)
        assert done.code == 2, (command, done.err)
        is_predict = command[0] == "predict"
        option = "--teacher run" if is_predict else f"--teacher.source {code}:teacher"
        assert option in done.err
        assert f"{code}:teacher" in done.err
    assert not canary.exists()
    # On the command line it is run, so the canary works.
    command_server.run(
        "train", "digits", "--teacher.source", f"{code}:teacher", "--out", tmp_path / "out"
    )
    assert canary.exists()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763606060000000040001f61738550000000049454e44ae426082"
)


def test_code_named_in_a_store_of_targets_is_not_run(command_server, tmp_path):
    teacher = ("digits-teacher", "--optim.epochs", "1", "--optim.warmup_epochs", "0", *FEW)
    assert command_server.run("train", *teacher, "--out", tmp_path / "teacher").code == 0
    store = tmp_path / "store"
    options = ("--teacher.source", tmp_path / "teacher", "--teacher.allow_near_chance")
    options += ("--optim.epochs", "1", "--optim.warmup_epochs", "0", *FEW)
    done = command_server.run("targets", "write", "digits", "--out", store, *options)
    assert done.code == 0, done.err
    code, canary = evil(store)
    manifest = read_manifest(store)
    manifest["provenance"]["config"]["teacher"]["source"] = [f"{code}:teacher"]
    (store / "store.json").write_bytes(manifest_bytes(manifest))
    done = command_server.run("targets", "verify", store)
    assert done.code in (2, 4), done.err
    payload = PAYLOADS["a pickle"](Canary(canary))
    for name in ("store.json", "targets.bin", "checks.bin"):
        content = (store / name).read_bytes()
        (store / name).write_bytes(payload)
        assert command_server.run("targets", "verify", store).code == 4
        stored = ("--teacher.target_stores", store, "--out", tmp_path / "o")
        done = command_server.run("train", "digits", *FEW, *stored)
        assert done.code == 4
        (store / name).write_bytes(content)
    assert not canary.exists()


@pytest.mark.fault("C22")
@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_no_cifar_archive_runs_code(source, command_server, tmp_path):
    """CIFAR's files are pickles: with another checksum they are not opened."""
    canary = tmp_path / "canary"
    payload = PAYLOADS["a pickle"](Canary(canary))
    names = {
        "cifar10": [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"],
        "cifar100": ["train", "test", "meta"],
    }[source]
    folder = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[source]
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(payload)
    command = ("train", f"{source}-teacher" if source == "cifar10" else source)
    done = command_server.run(
        *command, "--data.root", tmp_path, "--out", tmp_path / "o", "--loss=none"
    )
    assert done.code == 3, done.err
    assert not canary.exists()


@pytest.mark.fault("C20")
def test_a_hostile_tar_shard_writes_no_file_and_follows_no_link(command_server, tmp_path):
    """Shards are read in place: no member becomes a file, no link is followed."""
    root = tmp_path / "shards"
    root.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    with tarfile.open(root / "a.tar", "w") as archive:
        for index in range(8):
            for name, content in ((f"../../{index}.png", PNG), (f"../../{index}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        for kind, name in ((tarfile.SYMTYPE, "l.png"), (tarfile.LNKTYPE, "h.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
            device = tarfile.TarInfo(f"device{kind!r}.png")
            device.type = kind
            archive.addfile(device)
    before = sorted(tmp_path.rglob("*"))
    shards = ("--data.source", "shards", "--data.root", root, "--loss", "none")
    done = command_server.run("train", "folder", *shards, "--out", tmp_path / "out", "--dry-run")
    assert done.code == 3, done.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault("B12", "B13")
@pytest.mark.parametrize("name", ["config.json", "environment.json", "result.json"])
def test_files_of_a_run_that_are_pickles_are_rejected(name, run, command_server, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    canary = tmp_path / "canary"
    (folder / name).write_bytes(PAYLOADS["a pickle"](Canary(canary)))
    done = command_server.run("train", *BRIEF, "--out", folder, "--resume")
    assert done.code in (0, 2, 4), done.err
    for checkpoint in (folder / "best", run_folder.latest_checkpoint(folder)):
        (checkpoint / "extra.pkl").write_bytes(PAYLOADS["a pickle"](Canary(canary)))
    command_server.run("evaluate", folder)
    assert not canary.exists()


OFFLINE = """
import json, runpy, socket, sys
def refuse(*arguments, **keywords):
    print("NETWORK", arguments, file=sys.stderr)
    raise OSError("no network")
real = socket.socket.connect
def connect(self, address):
    return real(self, address) if self.family == socket.AF_UNIX else refuse(address)
socket.socket.connect = connect
socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from deit.cli import main
from deit.distill.target_store import manifest_bytes, read_manifest
def run(program):
    if program == "deit":
        return main()
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as leaving:
        return leaving.code
for command in json.loads(sys.argv[1]):
    sys.argv[:] = command
    if code := run(command[0]):
        sys.exit(code)
    print("DONE", file=sys.stderr)
"""


def offline(*commands: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run commands with every network call blocked, and no setting that makes them offline."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(commands)],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.fault("E12")
def test_commands_do_not_use_the_network(run, tmp_path):
    """In a process that has imported nothing before."""
    shutil.copytree(run, tmp_path / "run")
    commands = (
        ("deit", "evaluate", "run"),
        ("deit", "export", "run", "--format", "timm"),
        # Must be last: it ends the process, as from a shell.
        (str(ROOT / "train_deit.py"), *map(str, BRIEF), "--out", "new"),
    )
    done = offline(*commands, cwd=tmp_path)
    assert (done.returncode, "NETWORK" in done.stderr) == (0, False), done.stderr
    evaluated, _, trained = done.stderr.split("DONE\n")[:3]
    assert trained == evaluated == ""
    assert "timm" in done.stdout
    environment = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert environment["command"].startswith("train_deit.py ")
    assert run_folder.read_result(tmp_path / "new") is not None


@pytest.mark.fault("E12")
def test_telemetry_of_libraries_is_off(tmp_path):
    code = "import deit.cli, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
