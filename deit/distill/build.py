"""From a configuration and its images to the teachers and the loader of training views."""

from accelerate import Accelerator

from deit.config.schema import Config, RunConfig
from deit.config.teachers import TeacherSpec, teacher_specs
from deit.core.accelerator import create_accelerator
from deit.datasets.decode_workers import worker_count
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import Sizes, TrainLoader, view_sizes
from deit.datasets.splits import Splits
from deit.datasets.views import ChannelStats
from deit.distill.losses import needs_logits
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble, TeacherFn
from deit.models.memory_format import default_memory_format
from deit.models.saved import ModelInfo
from deit.models.teacher_sources import load_teacher
from deit.models.teachers import Teacher


def build_accelerator(run: RunConfig, *, grad_accum_steps: int = 1) -> Accelerator:
    """Return Accelerate's object for the device, precision and processes of a configuration."""
    return create_accelerator(
        device=run.device,
        precision=run.precision,
        grad_accum_steps=grad_accum_steps,
        sharding=run.sharding,
        gradient_compression=run.gradient_compression,
        timeout_s=run.timeout_s,
    )


def model_info_from(config: Config, splits: Splits) -> ModelInfo:
    """What a trained network must remember of its data."""
    return ModelInfo(
        student=config.student,
        class_names=splits.class_names,
        mean=config.views.mean or splits.mean,
        std=config.views.std or splits.std,
        evaluation_crop=config.views.eval_crop_pct,
    )


def build_teacher(
    member: TeacherSpec, config: Config, splits: Splits, accelerator: Accelerator
) -> Teacher:
    """Return a teacher on its device, in its memory format. Raises as load_teacher does."""
    size = config.student.image_size
    teacher = load_teacher(member, splits.class_names, image_size=size).to(accelerator.device)
    if member.memory_format == "auto":
        mixed = accelerator.mixed_precision != "no"
        device = accelerator.device.type
        best = default_memory_format(teacher.network, device, mixed_precision=mixed)
        teacher.set_memory_format(best)
    return teacher


def build_teachers(config: Config, splits: Splits, accelerator: Accelerator) -> list[Teacher]:
    """All teachers of a configuration, none if its objective has none. Raises as load_teacher."""
    if config.loss.kind == "none":
        return []
    return [
        build_teacher(one, config, splits, accelerator) for one in teacher_specs(config.teacher)
    ]


def build_online_ensemble(
    config: Config, splits: Splits, teachers: list[Teacher], accelerator: Accelerator
) -> TeacherEnsemble:
    """Teachers answering themselves, together, as a store of them keeps it."""
    voices: list[TeacherFn] = [OnlineTeacher(teacher, accelerator) for teacher in teachers]
    weights = tuple(member.weight for member in teacher_specs(config.teacher))
    if len(weights) != len(teachers):  # some of them alone
        weights = (1 / len(teachers),) * len(teachers)
    return build_teacher_ensemble(config, splits, voices, weights=weights, full_logits=True)


def teacher_input_size(sizes: list[int | None]) -> int | None:
    """The side [px] at which teachers are shown the view, of those they want: the largest (each
    makes it smaller itself), None where none of them minds."""
    return max((size for size in sizes if size is not None), default=None)


def image_sizes(
    config: Config, images: InMemoryImages | EncodedImages, teacher_size: int | None
) -> Sizes:
    """What the networks are shown of these images, in training as in evaluation.

    teacher_size: what `teacher_input_size` says; None also without a teacher.
    """
    on_disk = isinstance(images, EncodedImages) and config.views.crop in (
        "random_resized",
        "random",
    )
    source = None if on_disk else config.data.image_size
    return view_sizes(config.student.image_size, teacher_size, source)


def build_train_loader(
    config: Config,
    splits: Splits,
    accelerator: Accelerator,
    *,
    teacher_size: int | None,
    for_teacher: bool = True,
    all_ranks: bool = False,
) -> TrainLoader:
    """This process's training views; `alone`: those of all processes.

    teacher_size: as in `image_sizes`. for_teacher: whether batches carry what the teacher sees.
    Raises ConfigError and DataError as TrainLoader does.
    """
    facts, images = model_info_from(config, splits), splits.train
    return TrainLoader(
        images,
        len(splits.class_names),
        views=config.views,
        optim=config.optim,
        sizes=image_sizes(config, images, teacher_size),
        colours=ChannelStats(facts.mean, facts.std),
        seed=config.views_seed,
        process=0 if all_ranks else accelerator.process_index,
        num_processes=1 if all_ranks else accelerator.num_processes,
        device=accelerator.device,
        workers=worker_count(config.data),
        square=config.data.image_size,
        for_teacher=for_teacher,
    )


def build_teacher_ensemble(
    config: Config,
    splits: Splits,
    voices: list[TeacherFn],
    *,
    weights: tuple[float, ...],
    full_logits: bool = False,
) -> TeacherEnsemble | None:
    """The teachers as one call; None without any. weights: one a voice. whole: with logits at
    temperature 1, as a store keeps them, whatever the objective needs."""
    if not voices:
        return None
    return TeacherEnsemble(
        voices,
        weights=weights,
        mode=config.teacher.combine,
        temperature=1.0 if full_logits else config.loss.temperature,
        needs_logits=full_logits or needs_logits(config.loss),
        name=splits.train.name,
    )
