"""Two processes compared with one: equal learning rates and order, losses equal to rounding."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits_teacher
from tests.helpers.images import write_image_folder
from tests.helpers.processes import SETTINGS, last_json, output_of
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]


def torchrun(*arguments, cwd):
    """Return the output of two processes that torchrun starts."""
    program = (sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2")
    done = subprocess.run(
        [*program, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, command_server):
    """Train a student with one process and with two; return the folder and the outputs."""
    folder = tmp_path_factory.mktemp("runs")
    script = ROOT / "train_deit.py"
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    arguments = ("digits", "--teacher.source", "teacher", *SETTINGS)
    single_process = output_of(command_server, 1, script, *arguments, "--out", "of-1", cwd=folder)
    return folder, {1: single_process, 2: torchrun(script, *arguments, "--out", "of-2", cwd=folder)}


def rows(folder, num_processes):
    lines = (folder / f"of-{num_processes}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_with_two_processes_matches_one(runs):
    folder, _ = runs
    single, double = rows(folder, 1), rows(folder, 2)
    assert len(single) == len(double) == 2
    for actual, expected in zip(double, single):
        assert actual["step"] == expected["step"]
        assert actual["train"]["lr"] == expected["train"]["lr"]
        for name, value in expected["train"].items():
            assert actual["train"][name] == pytest.approx(value, abs=1e-5), name
        for name, value in expected["validation"].items():
            assert actual["validation"][name] == pytest.approx(value, abs=1e-9), name


def test_only_the_main_process_logs_epochs_and_batch_sizes(runs):
    _, outputs = runs
    assert len(re.findall(r"^epoch 1/2\b", outputs[2], re.MULTILINE)) == 1
    assert re.search(r"\b64 = 2\b\D+\b1\b\D+\b32\b", outputs[2])
    assert re.search(r"\b64 = 1\b\D+\b1\b\D+\b64\b", outputs[1])


def test_evaluation_by_two_processes_counts_each_image_once(runs, command_server):
    folder, _ = runs
    results = {}
    for num_processes in (1, 2):
        file = folder / f"evaluation-{num_processes}.json"
        output_of(
            command_server, num_processes, "evaluate_deit.py", "of-1", "--json", file, cwd=folder
        )
        results[num_processes] = json.loads(file.read_text())
    assert results[2]["num_samples"] == results[1]["num_samples"] == 359
    assert results[2]["heads"] == results[1]["heads"]
    assert results[2]["per_class"] == results[1]["per_class"]
    assert results[2]["agreement"] == results[1]["agreement"]


def test_command_destroys_its_process_group(command_server, tmp_path):
    code = (
        "import torch.distributed as d\n"
        "from pathlib import Path\n"
        "from deit.cli import run_command\n"
        f"arguments = ['digits', '--loss=none', '--out=run', *{SETTINGS}]\n"
        "arguments += ['--run.gradient_compression=bf16']  # runs Python in threads of Gloo\n"
        "assert run_command('train', arguments, 'deit train') == 0\n"
        "assert not d.is_initialized()\n"
        "names = {file.read_text() for file in Path('/proc/self/task').glob('*/comm')}\n"
        "assert not any('gloo' in name for name in names), names"
    )
    (tmp_path / "main.py").write_text(code)
    output_of(command_server, 2, tmp_path / "main.py", cwd=tmp_path)


def test_accelerate_launch_sets_the_precision(runs):
    folder, _ = runs
    out = folder / "launched"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
            *("--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"),
            *(str(ROOT / "train_deit.py"), "digits", "--teacher.source", "teacher"),
            *("--out", str(out), *SETTINGS, "--optim.epochs", "1", "--optim.warmup_epochs", "0"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    environment = json.loads((out / "environment.json").read_text())
    assert environment["precision"] == "bf16"  # as set by the launcher


def test_training_on_files_with_two_processes_matches_one(command_server, tmp_path):
    write_image_folder(tmp_path / "images", images_per_class=16)
    command = (
        *("train_deit.py", "folder", "--data.root", "images", "--loss", "none"),
        *("--student.name", "vit_micro", "--student.depth", "1", "--student.embed_dim", "16"),
        *("--student.num_heads", "2", "--student.image_size", "16", "--data.image_size", "18"),
        *("--optim.batch_size", "16", "--optim.epochs", "1", "--optim.warmup_epochs", "0"),
        *("--run.eval_batch_size", "2"),
    )
    files = ("--data.storage", "files", "--data.num_workers", "1")
    outputs = {
        num_processes: output_of(
            command_server,
            num_processes,
            *command,
            *files,
            "--out",
            f"of-{num_processes}",
            cwd=tmp_path,
        )
        for num_processes in (1, 2)
    }
    assert re.search(r"\b1 worker\b", outputs[1])
    for actual, expected in zip(rows(tmp_path, 2), rows(tmp_path, 1), strict=True):
        assert actual["train"] == pytest.approx(expected["train"], abs=1e-5)
        assert actual["validation"] == pytest.approx(expected["validation"], abs=1e-9)
        assert {"reading", "waiting", "views"} <= actual["loader"]["images_per_s"].keys()
    output_of(
        command_server, 1, *command, "--data.storage", "memory", "--out", "of-3", cwd=tmp_path
    )
    assert rows(tmp_path, 3)[-1]["train"]["loss"] > 0


@pytest.mark.fault("C1")
def test_unreadable_file_in_a_worker_is_reported_in_one_line(command_server, tmp_path):
    for split in ("train", "val", "test"):
        write_image_folder(tmp_path / "images" / split, images_per_class=8)
    broken = tmp_path / "images" / "val" / "bee" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = command_server.run(
        *("folder", "--data.root=images", "--loss=none", "--out=run"),
        *("--student.name=vit_micro", "--student.depth=1", "--student.image_size=16"),
        "--student.patch_size=4",
        *("--data.image_size=18", "--optim.batch_size=8", "--optim.epochs=1"),
        *("--optim.warmup_epochs=0", "--data.storage=files", "--data.num_workers=2"),
        script="train_deit.py",
        cwd=tmp_path,
    )
    assert done.code == 3
    assert done.err.startswith("deit: error: ")
    assert "images/val/bee/03.jpg" in done.err
    assert len(done.err.splitlines()) == 1


EXCHANGE = """
import json, sys
import torch
from safetensors.torch import save_file
from deit.config.sections.optim import OptimConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.core.accelerator import destroy_process_group
from deit.distill.build import build_accelerator
from deit.models.saved_student import ModelInfo, student_from_info
from deit.training.optimizer import build_optimizer

sent = []
original_all_reduce = torch.distributed.all_reduce
def counting_all_reduce(tensor, *rest, **more):
    sent.append(tensor.nbytes)
    return original_all_reduce(tensor, *rest, **more)
torch.distributed.all_reduce = counting_all_reduce

def exchange():
    accelerator = build_accelerator(RunConfig(device="cpu", gradient_compression=sys.argv[1]))
    torch.manual_seed(0)
    config = StudentConfig(name="deit_tiny", image_size=32, patch_size=4)
    info = ModelInfo(config, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, 1.0)
    student = student_from_info(info)
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    student, optimizer = accelerator.prepare(student, build_optimizer(student, OptimConfig()))
    torch.manual_seed(accelerator.process_index)
    images = torch.rand(2, 3, 32, 32)
    for _ in range(3):
        sent.clear()
        outputs = student(images)
        loss = outputs.class_logits.sum() + outputs.distillation_logits.square().sum()
        accelerator.backward(loss)
        assert student.modules_buffers == []
        gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
        optimizer.zero_grad()
    if accelerator.is_main_process:
        info = student._get_ddp_logging_data()
        buckets = [int(size) for size in info["rebuilt_bucket_sizes"].split(", ")]
        save_file({"gradient": gradient}, sys.argv[2])
        print(json.dumps({"parameters": num_parameters, "buckets": buckets, "sent": sent}))

exchange()
destroy_process_group()
"""


def test_gradients_take_four_bytes_per_parameter_or_two_compressed(command_server, tmp_path):
    """In buckets, so that the exchange starts before the last gradient is computed."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    results = {}
    for compression in ("none", "bf16"):
        output = output_of(
            command_server, 2, script, compression, f"{compression}.pt", cwd=tmp_path
        )
        results[compression] = last_json(output)
        assert sum(results[compression]["buckets"]) == 4 * results[compression]["parameters"]
        assert len(results[compression]["buckets"]) >= 5
    assert results["none"]["sent"] == []  # PyTorch exchanges these buckets without all_reduce
    assert sum(results["bf16"]["sent"]) == 2 * results["bf16"]["parameters"]
    exact, rounded = (
        load_file(tmp_path / f"{compression}.pt")["gradient"] for compression in results
    )
    assert torch.allclose(exact, rounded, rtol=2**-6, atol=1e-3 * exact.abs().max().item())
    assert not torch.equal(exact, rounded)
