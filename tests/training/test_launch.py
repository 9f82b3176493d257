"""Launch configurations and scripts for one GPU, several GPUs, several machines and SLURM.

No GPU is needed.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from deit.core import run_folder
from tests.helpers.processes import SETTINGS

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
EXPECTED_ARGUMENTS = {
    "eight_gpus.yaml": {"nproc_per_node": "8"},
    "four_nodes.yaml": {
        "nproc_per_node": "8",
        "nnodes": "4",
        "node_rank": "2",
        "rdzv_endpoint": "HOST:29500",
    },
}


def parsed(name, *more, script=("train_deit.py", "cifar10")):
    """Return the arguments that accelerate launch parses with a configuration."""
    arguments = ["--config_file", str(LAUNCH / name), *more, *script]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_launch_parses_every_config(name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    config = load_config_from_file(str(LAUNCH / name))
    assert config.mixed_precision == "bf16"
    arguments = parsed(name, *(("--machine_rank", "2") if name == "four_nodes.yaml" else ()))
    if name in EXPECTED_ARGUMENTS:
        environment = prepare_multi_gpu_env(arguments)
        for key, value in EXPECTED_ARGUMENTS[name].items():
            assert str(getattr(arguments, key)) == value, key
    else:
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        assert command[-2:] == ["train_deit.py", "cifar10"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_run_starts_with_the_one_gpu_config(command_server, tmp_path):
    """On the CPU, without accelerate launch, which tests/training/test_peers.py runs."""
    run_arguments = ("digits-teacher", "--dry-run", "--out", str(tmp_path / "run"))
    arguments = parsed(
        "one_gpu.yaml", "--cpu", script=(str(ROOT / "train_deit.py"), *run_arguments)
    )
    (python, *command), environment = prepare_simple_launcher_cmd_env(arguments)
    assert Path(python).name.startswith("python")
    assert command == [str(ROOT / "train_deit.py"), *run_arguments]
    added = {name: text for name, text in environment.items() if os.environ.get(name) != text}
    done = command_server.run(*run_arguments, script="train_deit.py", cwd=tmp_path, **added)
    assert done.code == 0, done.err
    assert re.search(r"^hardware .*\bbf16\b", done.out, re.MULTILINE)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_slurm_script_starts_and_resumes_a_run(tmp_path):
    """With replacements of srun and scontrol, and two processes instead of a node's GPUs."""
    commands = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo localhost",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    torchrun = folder / "torchrun"
    torchrun.write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "DEIT_PORT": str(free_port()),
    }
    arguments = ("digits", "--loss", "none", "--teacher.source", "none", *SETTINGS)
    out = tmp_path / "run"

    def submit(**more):
        return subprocess.run(
            ["bash", str(LAUNCH / "slurm.sh"), *arguments, "--out", str(out)],
            cwd=ROOT,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    done = submit(DEIT_FAULT="step:7:kill")  # of ten steps
    assert done.returncode != 0
    assert not (out / "result.json").exists()
    saved = run_folder.checkpoint_step(run_folder.latest_checkpoint(out))
    done = submit()
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(str(out))}: .*\b{saved}\b.*\b10\b", done.stdout, re.MULTILINE)
    assert json.loads((out / run_folder.RESUMED).read_text())["processes"] == 2
    assert json.loads((out / "result.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("variable", "named", "option"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "torch.compile", "--run.compile"),
        ("ACCELERATE_USE_FSDP", "FSDP", "--run.sharding"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "--run.sharding"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "--run.sharding"),
    ],
)
def test_unsupported_accelerate_plugin_is_refused_before_training(
    command_server, tmp_path, variable, named, option
):
    out = tmp_path / "run"
    done = command_server.run("train", "digits-teacher", "--out", out, **{variable: "true"})
    assert done.code == 5
    for name in (variable, named, option):
        assert name in done.err
    assert not out.exists()
