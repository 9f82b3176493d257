"""A small training run in memory, for tests of the training loop."""

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.presets import LOSS_PRESETS
from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.views import ViewsConfig
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.views import ChannelStats
from deit.distill.losses import needs_logits
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble
from deit.models.saved_student import ModelInfo, student_from_info
from deit.models.teachers import LoadedNetwork, Teacher
from deit.training.loop import StepContext
from deit.training.optimizer import EMA, build_optimizer

CLASSES = 4
IMAGES = InMemoryImages(
    torch.randint(
        256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ),
    torch.arange(32) % CLASSES,
)


class RecordingTeacher(nn.Module):
    """A teacher that records its inputs; it has statistics that training mode would change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, CLASSES)
        self.inputs = []

    def forward(self, images):
        self.inputs.append(images.clone())
        return self.head(self.norm(images).mean(dim=(2, 3)))


def teacher_ensemble(teacher, accelerator, loss):
    """Return one teacher as an ensemble."""
    return TeacherEnsemble(
        [OnlineTeacher(teacher, accelerator)],
        weights=(1.0,),
        mode="probabilities",
        temperature=loss.temperature,
        needs_logits=needs_logits(loss),
        name="image {}".format,
    )


def make_step_context(
    loss=LOSS_PRESETS["deit-hard"],
    *,
    optim=None,
    name="deit_micro",
    average=None,
    drop_path=0.0,
    tokens=1,
    **loader,
):
    """Return the context of training steps of a small student, and the loader of its images."""
    torch.manual_seed(0)
    optim = optim or OptimConfig(
        epochs=40, batch_size=16, lr=3e-3, lr_base_batch_size=None, warmup_epochs=1
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=optim.grad_accum_steps)
    student_config = StudentConfig(
        name=name,
        image_size=16,
        embed_dim=24,
        depth=2,
        drop_path=drop_path,
        num_distillation_tokens=tokens,
    )
    info = ModelInfo(student_config, tuple("abcd"), (0.5,) * 3, (0.25,) * 3, 1.0)
    student = student_from_info(info)
    teacher = Teacher(
        LoadedNetwork(RecordingTeacher(), "recording", None, (0.0,) * 3, (1.0,) * 3, None)
    )
    ensemble = None if loss.kind == "none" else teacher_ensemble(teacher, accelerator, loss)
    weights = None if average is None else EMA(student, horizon=average)
    optimizer = build_optimizer(student, optim)
    prepared, optimizer = accelerator.prepare(student, optimizer)
    data = TrainLoader(
        IMAGES,
        CLASSES,
        views=loader.get("views", ViewsConfig(flip=0)),
        optim=optim,
        student_size=16,
        channel_stats=ChannelStats((0.5,) * 3, (0.25,) * 3),
        seed=0,
    )
    context = StepContext(accelerator, prepared, ensemble, optimizer, weights, loss, optim, 0)
    return context, data
