"""Run the teachers of an evaluation on its images."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.schema import Config
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import given_sources, teacher_specs
from deit.core.console import warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.host_memory import check_inference_memory
from deit.core.signals import GracefulStop
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.view_samplers import source_size, view_sizes
from deit.distill.build import teacher_input_size
from deit.distill.inference import predict_split
from deit.distill.teacher_check import check_class_order, log_class_order
from deit.distill.teacher_ensemble import combine_teachers
from deit.models.teacher_sources import teacher_from_spec
from deit.models.teachers import Teacher


def teacher_logits(
    accelerator: Accelerator,
    config: Config,
    source: str | Sequence[str] | None,
    class_names: tuple[str, ...],
    images: InMemoryImages | EncodedImages,
    interruption: GracefulStop,
) -> dict[str, Tensor]:
    """Return the logits [images, classes] of each teacher by its description.

    source: source or sources of teachers; "none": no teacher; None: the run's own. Of
    the run's own, one that is missing only causes a warning. Raises DataError, CheckpointError and
    ConfigError.
    """
    teachers = _load_teachers(config, source, class_names)
    if not teachers:
        return {}
    teacher_size = teacher_input_size([teacher.image_size for teacher in teachers])
    source = source_size(images, config.views, config.data.image_size)
    size = view_sizes(config.student.image_size, teacher_size, source).teacher
    logits: dict[str, Tensor] = {}
    for teacher in teachers:
        network = teacher.to(accelerator.device)
        check_inference_memory(
            network, network.forward, size, accelerator, largest_batch(config, images)
        )
        outputs = predict_split(
            accelerator,
            network,
            images,
            config.evaluation,
            "teacher",
            size=size,
            interruption=interruption,
        )
        log_class_order(teacher, class_names)
        try:
            predictions = outputs.class_logits.argmax(dim=1)
            check_class_order(teacher, predictions, images.labels, class_names)
        except DataError as error:
            if source is not None:
                raise
            warn(str(error))  # the run was trained with this class order
        name = teacher.description
        logits[f"{name} ({len(logits) + 1})" if name in logits else name] = outputs.class_logits
    return logits


def _load_teachers(
    config: Config, source: str | Sequence[str] | None, class_names: tuple[str, ...]
) -> list[Teacher]:
    """Load the teachers; the run's own may be missing, silently if it was trained without them."""
    is_own, is_quiet = source is None, config.loss.kind == "none"
    spec = config.teacher
    if not is_own:
        sources = given_sources(source)
        same = len(sources) == len(spec.source)  # moved teachers keep the settings of the run
        spec = replace(spec, source=sources) if same else TeacherConfig(source=sources)
    if not spec.source:
        return []
    if is_own and spec.code_sources:
        if not is_quiet:
            warn(
                f"the run's teacher is skipped: {', '.join(spec.code_sources)} is code; give it "
                "as teacher if you trust it"
            )
        return []
    side = config.student.image_size
    try:
        return [
            teacher_from_spec(member, class_names, image_size=side)
            for member in teacher_specs(spec)
        ]
    except (DataError, CheckpointError, ConfigError) as error:
        if not is_own:
            raise
        if not is_quiet:
            warn(f"the run's teacher is skipped: {error}")
        return []


def largest_batch(config: Config, images: InMemoryImages | EncodedImages) -> int:
    """Return the largest number of images that a network gets at once."""
    return min(config.run.eval_batch_size, len(images.labels))


def combine_logits(config: Config, logits: list[Tensor]) -> Tensor:
    """Return the logits of the ensemble [images, classes], from those of each teacher.

    Teachers other than the run's own number have equal weights.
    """
    weights = tuple(member.weight for member in teacher_specs(config.teacher))
    if len(weights) != len(logits):
        weights = (1 / len(logits),) * len(logits)
    mode = "logits" if config.teacher.combine == "logits" else "probabilities"
    stacked = torch.stack(logits, dim=1)
    return combine_teachers(stacked, weights, mode, temperature=1.0).logits[:, 0]
