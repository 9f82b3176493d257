"""Initial weights of a student: load them, adapt them to its network, and apply their masks."""

from pathlib import Path
from typing import Any

from torch import nn

from deit.config.schema import Config
from deit.config.sections.init import InitConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import CheckpointError, first_line, raise_if_transient
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.saved_student import ModelInfo
from deit.models.surgery.pruning_masks import Masks, apply, check_fits, read_masks
from deit.models.weight_files import digest_of, load_weights


def load_init_weights(init: InitConfig) -> LoadedWeights | None:
    """Return the initial weights; None if the student starts at random. Raises CheckpointError.

    Example:
        >>> loaded = load_init_weights(InitConfig(weights="checkpoints/digits"))
        >>> loaded.description, loaded.class_names[:3]
        ('deit_micro from checkpoints/digits', ('0', '1', '2'))
    """
    return None if init.weights is None else load_weights_from(init.weights)


def with_init_normalization(config: Config, loaded: LoadedWeights | None) -> Config:
    """Return the configuration with the normalization of its initial weights, if it sets none."""
    if config.views.mean is not None or loaded is None or None in (loaded.mean, loaded.std):
        return config
    return config.replace(views={"mean": loaded.mean, "std": loaded.std})


def init_student(
    network: nn.Module, loaded: LoadedWeights, init: InitConfig, info: ModelInfo
) -> dict[str, Any]:
    """Copy initial weights into the student's network; return a report of how they were adapted.

    The report is the content of init.json: `source`, `description`, `weights` (a SHA-256) and
    `notes`. Raises CheckpointError with the first ten differences, before anything is copied.
    """
    try:
        adapted = adapt_weights(loaded, network, info.class_names, init)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # shapes of unknown origin
        raise_if_transient(error, f"init.weights {init.weights}")
        raise CheckpointError(
            f"init.weights {init.weights}: made for another network ({first_line(error)})"
        ) from None
    load_weights(network, adapted.weights, origin=f"init.weights {init.weights}")
    notes = [*adapted.notes, *_check_heads(loaded, init, info.student)]
    _check_adapter_scale(loaded, init, info.student)
    return {
        "source": init.weights,
        "description": loaded.description,
        "weights": digest_of(loaded.weights),
        "notes": [*notes, *_normalization_notes(loaded, info)],
    }


def _check_heads(loaded: LoadedWeights, init: InitConfig, student: StudentConfig) -> list[str]:
    """Compare the numbers of attention heads, which do not show in the shapes of weights.

    Returns a note if the weights do not state theirs. Raises CheckpointError if they differ.
    """
    num_heads = student.heads if student.is_transformer else None
    if num_heads is None:
        return []
    if not loaded.heads_known or loaded.student is None:
        return [
            "its weights do not state the number of attention heads; using the student's, "
            f"{num_heads} (--student.num_heads)"
        ]
    if loaded.student.heads != num_heads:
        raise CheckpointError(
            f"init.weights {init.weights}: was trained with {loaded.student.heads} attention "
            f"heads, the student has {num_heads}; give --student.num_heads {loaded.student.heads}"
        )
    return []


def _check_adapter_scale(loaded: LoadedWeights, init: InitConfig, student: StudentConfig) -> None:
    """Raise CheckpointError if adapters were trained at another scale, which no shape shows."""
    if loaded.student is None or "none" in (loaded.student.adapters, student.adapters):
        return
    scale = loaded.student.adapter_scale
    if scale != student.adapter_scale:
        raise CheckpointError(
            f"init.weights {init.weights}: its adapters were trained with scale {scale}, "
            f"the student's have {student.adapter_scale}; give --student.adapter_scale {scale}"
        )


def _normalization_notes(loaded: LoadedWeights, info: ModelInfo) -> list[str]:
    """Return notes on the normalization of the weights: unknown, or not this run's."""
    notes = []
    if loaded.mean is None or loaded.std is None:
        notes.append(
            f"its normalization is unknown; using mean {_format(info.mean)} and std "
            f"{_format(info.std)} (--views.mean, --views.std)"
        )
    pairs = ((loaded.mean, info.mean), (loaded.std, info.std))
    if any(before is not None and not _is_close(before, now) for before, now in pairs):
        notes.append(
            f"it was trained with mean {_format(loaded.mean)} and std {_format(loaded.std)}; this "
            f"run uses {_format(info.mean)} and {_format(info.std)} (--views.mean, --views.std)"
        )
    return notes


def init_masks(init: InitConfig, loaded: LoadedWeights | None, network: nn.Module) -> Masks | None:
    """Return the pruning masks a student trains under and mask its weights; None if it is dense.

    loaded: the initial weights, whose masks are kept unless the configuration sets others.
    Raises CheckpointError if the masks cannot be read or belong to another network.
    """
    if init.pruning_masks == "none":
        return None
    if init.pruning_masks == "keep":
        origin = f"init.weights {init.weights}"
        masks = None if loaded is None else loaded.masks
    else:
        origin = f"init.pruning_masks {init.pruning_masks}"
        masks = read_masks(Path(init.pruning_masks).expanduser())
    if masks is not None:
        check_fits(masks, network, origin=origin)
        apply(masks, network)
    return masks


def _is_close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(abs(x - y) < 1e-3 for x, y in zip(a, b))


def _format(values: tuple[float, ...] | None) -> str:
    return "?" if values is None else ",".join(f"{value:.3g}" for value in values)
