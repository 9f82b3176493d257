"""A loop of a user in two processes: our loader, loss and stored targets in plain DDP."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import deit
from tests.helpers.own_loop.parts import accuracy, make_loader, make_student, train
from tests.helpers.processes import ROOT

SCRIPT = """
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import deit
from tests.helpers.own_loop.parts import EPOCHS, make_loader, make_student, make_teacher, train

torch.distributed.init_process_group("gloo")
loader = make_loader()
deit.write_targets(loader, "targets", make_teacher(), epochs=EPOCHS)  # a part in each process
torch.distributed.barrier()
store = deit.TargetStore.open("targets", loader)
student = make_student(loader)
ids = train(DistributedDataParallel(student), loader, store)
rank = torch.distributed.get_rank()
save_file({"ids": ids, **student.state_dict()}, f"{rank}.safetensors")
if rank == 0:
    deit.save_student(student, "student", loader.class_names)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    loader = make_loader()
    student = make_student(loader)
    ids = train(student, loader, deit.TargetStore.open(tmp_path / "targets", loader))
    assert torch.equal(torch.cat([first["ids"], second["ids"]], dim=1), ids)
    for name, expected in student.named_parameters():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], expected, atol=1e-4), name
    loaded, _ = deit.load_student(tmp_path / "student")
    assert accuracy(loaded) == pytest.approx(accuracy(student), abs=0.05)
