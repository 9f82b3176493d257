"""Commands of several processes."""

from pathlib import Path

SETTINGS = (
    *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
    *("--views.mixup_alpha", "0.8", "--views.cutmix_alpha", "1", "--optim.batch_size", "64"),
    *("--optim.epochs", "2", "--optim.warmup_epochs", "1", "--run.eval_every_epochs", "1"),
    *("--data.train_fraction", "0.25"),  # 324 images, five batches
    # 143 validation images: two chunks in the first of two processes, one in the second.
    *("--run.eval_batch_size", "71"),
    # Not what a busy moment measures, in one of them and not the other.
    *("--run.linear_backend", "torch", "--teacher.memory_format", "contiguous"),
)


def said_by(zygote, number, script, *arguments, cwd):
    """Return the output of a script run in `number` processes with the environment of torchrun."""
    done = zygote.together(*arguments, processes=number, script=str(script), cwd=cwd)
    assert [one.code for one in done] == [0] * number, "".join(one.err for one in done)
    return "".join(one.out for one in done)


def stand_in(site: Path) -> str:
    """A stand-in for Hugging Face's distribution, which says when it is imported; the path to put
    it on."""
    package, facts = site / "datasets", site / "datasets-9.9.9.dist-info"
    package.mkdir(parents=True)
    facts.mkdir()
    (package / "__init__.py").write_text(
        "print('stand-in imported')\nclass Dataset: pass\nclass IterableDataset: pass\n"
    )
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 9.9.9\n")
    return str(site)


STUCK_TEACHER = """
import ctypes
from torch import nn

class Stuck(nn.Module):
    def forward(self, images):
        lock = ctypes.create_string_buffer(256)
        system = ctypes.CDLL(None)
        print("stuck", flush=True)
        for _ in range(2):
            system.pthread_mutex_lock(lock)

def teacher():
    return Stuck()
"""
