"""Build teachers, their ensemble and the loader of training views from sections of a configuration.

Only `build_train_loader` takes the whole configuration: it maps five sections onto one object.
"""

from accelerate import Accelerator

from deit.config.schema import Config
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.sections.views import ViewsConfig
from deit.config.teachers import TeacherSpec, teacher_specs
from deit.core.accelerator import create_accelerator
from deit.datasets.loader import TrainLoader
from deit.datasets.loader_factories import channel_stats, loader_of
from deit.datasets.splits import Splits
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble
from deit.models.memory_format import default_memory_format
from deit.models.saved_student import ModelInfo
from deit.models.teacher_sources import teacher_from_spec
from deit.models.teachers import Teacher


def build_accelerator(run: RunConfig, *, grad_accum_steps: int = 1) -> Accelerator:
    """Return Accelerate's object for the device, precision and processes of a configuration.

    Raises SystemFault if the device or the precision is not available.
    """
    return create_accelerator(
        device=run.device,
        precision=run.precision,
        grad_accum_steps=grad_accum_steps,
        sharding=run.sharding,
        gradient_compression=run.gradient_compression,
        timeout_s=run.timeout_s,
    )


def model_info_from(student: StudentConfig, views: ViewsConfig, splits: Splits) -> ModelInfo:
    """Return what is saved with a student: its options, class names and `channel_stats`."""
    mean, std = channel_stats(views, splits)
    return ModelInfo(
        student=student,
        class_names=splits.class_names,
        mean=mean,
        std=std,
        evaluation_crop=views.eval_crop_pct,
    )


def build_teacher(
    spec: TeacherSpec, class_names: tuple[str, ...], image_size: int, accelerator: Accelerator
) -> Teacher:
    """Return a teacher on its device, in its memory format.

    image_size: side of the student's images [px]. Raises the errors of `teacher_from_spec`.
    """
    teacher = teacher_from_spec(spec, class_names, image_size=image_size).to(accelerator.device)
    if spec.memory_format == "auto":
        mixed = accelerator.mixed_precision != "no"
        device = accelerator.device.type
        best = default_memory_format(teacher.network, device, mixed_precision=mixed)
        teacher.set_memory_format(best)
    return teacher


def build_teachers(
    teacher: TeacherConfig, class_names: tuple[str, ...], image_size: int, accelerator: Accelerator
) -> list[Teacher]:
    """Return all teachers of a configuration. Raises the errors of `teacher_from_spec`.

    image_size: side of the student's images [px].

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.datasets.splits import load_splits
        >>> config = find_recipe("digits")
        >>> names, accelerator = load_splits(config.data).class_names, build_accelerator(config.run)
        >>> (teacher,) = build_teachers(config.teacher, names, 8, accelerator)
        >>> teacher.description, teacher.class_order
        ('small_convnet from checkpoints/digits-teacher', 'its own class names')
    """
    return [
        build_teacher(spec, class_names, image_size, accelerator) for spec in teacher_specs(teacher)
    ]


def build_online_ensemble(
    teachers: list[Teacher], config: TeacherConfig, splits: Splits, accelerator: Accelerator
) -> TeacherEnsemble:
    """Return the networks as one call that gives what a target store keeps: logits, at temperature
    1, whatever the loss needs.

    teachers: all of the configuration, or one of them. Its output has the logits of each teacher,
    float32 [B, T, C], with teacher.combine `tokens`, otherwise their mean [B, 1, C].
    """
    is_single = len(teachers) == 1
    return TeacherEnsemble(
        [OnlineTeacher(teacher, accelerator) for teacher in teachers],
        weights=(1.0,) if is_single else tuple(spec.weight for spec in teacher_specs(config)),
        mode=config.combine,
        temperature=1.0,
        needs_logits=True,
        name=splits.train.name,
    )


def teacher_input_size(sizes: list[int | None]) -> int | None:
    """Return the side [px] of the teachers' images: the largest of `sizes`, None if all are None.

    A teacher with a smaller input resizes the images itself; None means that it takes any size.

    Example:
        >>> teacher_input_size([224, None, 256])
        256
    """
    return max((size for size in sizes if size is not None), default=None)


def build_train_loader(
    config: Config,
    splits: Splits,
    accelerator: Accelerator,
    *,
    teacher_size: int | None,
    with_teacher_images: bool = True,
    all_processes: bool = False,
) -> TrainLoader:
    """Return the loader of this process's training views, or with `all_processes` those of all.

    teacher_size: from `teacher_input_size`. with_teacher_images: whether batches contain the images
    of the teachers.
    Raises ConfigError and DataError as TrainLoader does.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.datasets.splits import load_splits
        >>> config = find_recipe("digits").replace(optim={"batch_size": 16})
        >>> splits, accelerator = load_splits(config.data), build_accelerator(config.run)
        >>> loader = build_train_loader(config, splits, accelerator, teacher_size=None)
        >>> batch = next(loader.epoch(0))
        >>> tuple(batch.images.shape), tuple(batch.targets.shape)
        ((16, 3, 8, 8), (16, 10))
    """
    process = (accelerator.process_index, accelerator.num_processes)
    return loader_of(
        config,
        splits,
        teacher_size=teacher_size,
        device=accelerator.device,
        process=(0, 1) if all_processes else process,
        with_teacher_images=with_teacher_images,
    )
