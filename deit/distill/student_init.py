"""Initial weights of a student: found, fitted to its network, and what they decide."""

from pathlib import Path
from typing import Any

from torch import nn

from deit.config.schema import Config
from deit.core.errors import CheckpointError, first_line, raise_transient
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.load_weights import load_weights_from
from deit.models.saved import ModelInfo
from deit.models.surgery.pruning_masks import Masks, apply, check_fits, read_masks
from deit.models.weight_files import digest_of, load_weights


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
