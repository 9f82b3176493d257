"""From a configuration and its images to the teachers and the loader of training views."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.schema import Config, RunConfig
from deit.config.teachers import TeacherSpec, teacher_specs
from deit.core.accelerator import create_accelerator
from deit.core.errors import CheckpointError, first_line, raise_transient
from deit.datasets.decode_workers import worker_count
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import Sizes, TrainLoader, view_sizes
from deit.datasets.splits import Splits
from deit.datasets.views import ChannelStats
from deit.distill.losses import needs_logits
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble, TeacherFn
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.memory_format import fastest_memory_format
from deit.models.saved import ModelInfo
from deit.models.surgery.pruning_masks import Masks, apply, check_fits, read_masks
from deit.models.teacher_sources import load_teacher
from deit.models.teachers import Teacher
from deit.models.weight_files import digest_of, load_weights

_ANY_SIDE = 32  # px: of what a teacher that takes any is measured with


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


def load_init_weights(config: Config) -> LoadedWeights | None:
    """The weights a configuration starts from; None: random ones. Raises CheckpointError."""
    return None if config.init.weights is None else load_weights_from(config.init.weights)


def with_init_normalization(config: Config, found: LoadedWeights | None) -> Config:
    """The configuration with the normalisation its start was trained with, unless it says one."""
    if found is None or config.views.mean is not None or found.mean is None or found.std is None:
        return config
    return config.replace(views={"mean": found.mean, "std": found.std})


def init_student(
    network: nn.Module, found: LoadedWeights, config: Config, facts: ModelInfo
) -> dict[str, Any]:
    """Put the weights a student starts from into its network; what was done to fit them.

    Raises CheckpointError listing the first ten differences, before any is copied.
    """
    try:
        fitted = adapt_weights(found, network, facts.class_names, config.init)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # shapes of unknown make
        raise_transient(error, f"init.weights {config.init.weights}")
        raise CheckpointError(
            f"init.weights {config.init.weights}: made for another network ({first_line(error)})"
        ) from None
    load_weights(network, fitted.weights, origin=f"init.weights {config.init.weights}")
    notes = list(fitted.notes)
    heads = config.student.heads if config.student.is_transformer else None
    if heads is not None and found.heads_known and found.student is not None:
        theirs = found.student.heads
        if theirs != heads:
            raise CheckpointError(
                f"init.weights {config.init.weights}: was trained with {theirs} attention heads, "
                f"the student has {heads}; give --student.num_heads {theirs}"
            )
    elif heads is not None:
        notes.append(
            f"its attention heads leave no trace in the weights: {heads} are taken "
            "(--student.num_heads)"
        )
    _check_scale(found, config)
    if found.mean is None or found.std is None:
        notes.append(
            f"its normalisation is not told; {_shown(facts.mean)} and {_shown(facts.std)} are "
            "taken (--views.mean, .std)"
        )
    colours = ((found.mean, facts.mean), (found.std, facts.std))
    if any(theirs is not None and not _close(theirs, ours) for theirs, ours in colours):
        notes.append(
            f"it was trained with mean {_shown(found.mean)} and std {_shown(found.std)}, this run "
            f"normalises with {_shown(facts.mean)} and {_shown(facts.std)} (--views.mean, .std)"
        )
    return {
        "source": config.init.weights,
        "found": found.description,
        "weights": digest_of(found.weights),
        "notes": notes,
    }


def _check_scale(found: LoadedWeights, config: Config) -> None:
    """Refuse trained adapters under another scale, which leaves no trace in their shapes either.
    Raises CheckpointError."""
    own = config.student
    if found.student is None or "none" in (found.student.adapters, own.adapters):
        return
    theirs = found.student.adapter_scale
    if theirs != own.adapter_scale:
        raise CheckpointError(
            f"init.weights {config.init.weights}: its adapters were trained with scale {theirs}, "
            f"the student's have {own.adapter_scale}; give --student.adapter_scale {theirs}"
        )


def init_masks(config: Config, found: LoadedWeights | None, network: nn.Module) -> Masks | None:
    """The masks a student is trained under, its weights masked; None for a dense one, and for a
    resumed run, whose checkpoint has them. Raises CheckpointError.

    found: what the student starts from, whose masks go on unless the configuration says otherwise.
    """
    said = config.init.pruning_masks
    if said == "none" or config.optim.trainable == "adapters":  # what is masked is not trained
        return None
    origin = f"init.pruning_masks {said}"
    if said == "keep":
        masks, origin = (
            None if found is None else found.masks,
            f"init.weights {config.init.weights}",
        )
    else:
        masks = read_masks(Path(said).expanduser())
    if masks is not None:
        check_fits(masks, network, origin=origin)
        apply(masks, network)
    return masks


def _close(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) < 1e-3 for a, b in zip(one, other))


def _shown(values: tuple[float, ...] | None) -> str:
    return "?" if values is None else ",".join(f"{value:.3g}" for value in values)


def build_teacher(
    member: TeacherSpec, config: Config, splits: Splits, accelerator: Accelerator
) -> Teacher:
    """A teacher on its device. Raises as load_teacher does."""
    size = config.student.image_size
    return load_teacher(member, splits.class_names, image_size=size).to(accelerator.device)


def build_teachers(config: Config, splits: Splits, accelerator: Accelerator) -> list[Teacher]:
    """All teachers of a configuration, none if its objective has none. Raises as load_teacher."""
    if config.loss.kind == "none":
        return []
    return [
        build_teacher(one, config, splits, accelerator) for one in teacher_specs(config.teacher)
    ]


def set_memory_formats(
    teachers: list[Teacher], layouts: tuple[str, ...], accelerator: Accelerator, *, images: int
) -> tuple[str, ...]:
    """Have teachers compute in these layouts; for auto in what measures faster in the main process
    with so many images at once. What it came to, one a teacher. (The layouts of a store may be of
    another number of teachers: its fingerprint tells, a little later.)"""
    for teacher, layout in zip(teachers, layouts):
        if layout == "auto":
            faster = False
            if accelerator.is_main_process:
                side = teacher.image_size or teacher.trained_size or _ANY_SIDE
                shown = torch.rand(images, 3, side, side, device=accelerator.device)
                with accelerator.autocast():
                    faster = fastest_memory_format(teacher.network, shown) == "channels_last"
            told = torch.tensor(float(faster), device=accelerator.device)
            last = accelerator.reduce(told, reduction="sum").item() > 0
            layout = "channels_last" if last else "contiguous"
        teacher.set_memory_format(layout)
    return tuple(teacher.memory_format for teacher in teachers)


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
        how=config.teacher.combine,
        temperature=1.0 if full_logits else config.loss.temperature,
        wants_logits=full_logits or needs_logits(config.loss),
        name=splits.train.name,
    )
