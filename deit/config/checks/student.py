"""Checks of the student and its initial weights."""

from deit.config.checks.effects import without_effect
from deit.config.schema import Config
from deit.config.student_section import STUDENTS, StudentConfig
from deit.core.errors import ConfigProblem, did_you_mean


def check_student(config: Config) -> list[ConfigProblem]:
    student = config.student
    found = []
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        found.append(
            ConfigProblem(
                "student.name",
                student.name,
                f"should be one of {', '.join(STUDENTS)}, or timm:NAME"
                + did_you_mean(student.name, STUDENTS),
            )
        )
    elif student.is_transformer:
        if student.image_size % student.patch_size:
            found.append(
                ConfigProblem(
                    "student.patch_size",
                    student.patch_size,
                    f"should divide student.image_size ({student.image_size})",
                )
            )
        if not student.has_distillation_token:
            advice = f"only deit_* take it, student.name is {student.name!r}"
            found += without_effect("student", student, ("num_distillation_tokens",), advice)
        if student.embed_dim and student.num_heads and student.embed_dim % student.num_heads:
            found.append(
                ConfigProblem(
                    "student.num_heads",
                    student.num_heads,
                    f"should divide student.embed_dim ({student.embed_dim})",
                )
            )
        found += _check_shared_blocks(student)
        for leaf in ("heads_per_block", "mlp_hidden_per_block"):
            values = getattr(student, leaf)
            if len(values) not in (0, 1, student.num_blocks):
                advice = f"should be one value, or one for each of {student.num_blocks} blocks"
                found.append(ConfigProblem(f"student.{leaf}", values, advice))
        if student.adapters == "none":
            advice = "has no effect, student.adapters is 'none'"
            found += without_effect("student", student, _OF_ADAPTERS, advice)
        if student.qat != "none":
            found += _beside_rounding(student)
    else:
        only = f"only deit_* and vit_* take it, student.name is {student.name!r}"
        shape = ("patch_size", "embed_dim", "depth", "num_heads", "weight_init")
        shape = (
            *shape,
            "heads_per_block",
            "mlp_hidden_per_block",
            "shared_block_size",
            "adapters",
            *_OF_ADAPTERS,
        )
        shape = (*shape, "num_distillation_tokens", "dropout", "qat")
        found += without_effect("student", student, shape, only)
    return found


_OF_ADAPTERS = ("adapter_dim", "adapter_scale")


def _check_shared_blocks(student: StudentConfig) -> list[ConfigProblem]:
    """Check student.shared_block_size beside the fields it excludes."""
    found = []
    if student.num_blocks % student.shared_block_size:
        advice = f"should divide the number of blocks ({student.num_blocks})"
        found.append(ConfigProblem("student.shared_block_size", student.shared_block_size, advice))
    if student.shared_block_size > 1 and student.adapters != "none":
        advice = (
            f"not for blocks that share their weights (student.shared_block_size "
            f"{student.shared_block_size}); use "
            "none (and not --schedule convpass), or start from a network whose blocks share "
            "none"
        )
        found.append(ConfigProblem("student.adapters", student.adapters, advice))
    if student.shared_block_size > 1 and (student.heads_per_block or student.mlp_hidden_per_block):
        advice = (
            "blocks that share their weights cannot be pruned apart (student.heads_per_block, "
            "student.mlp_hidden_per_block); use 1"
        )
        found.append(ConfigProblem("student.shared_block_size", student.shared_block_size, advice))
    return found


def _beside_rounding(student: StudentConfig) -> list[ConfigProblem]:
    """What an int8 file has no counterpart of."""
    advice = "is not for a student whose layers round (student.qat); use {}"
    found = []
    if student.shared_block_size > 1:
        found.append(
            ConfigProblem("student.shared_block_size", student.shared_block_size, advice.format(1))
        )
    if student.adapters != "none":
        found.append(ConfigProblem("student.adapters", student.adapters, advice.format("none")))
    return found


def check_init(config: Config) -> list[ConfigProblem]:
    if config.init.weights is not None:
        return []
    advice = "has no effect on random weights; give init.weights (finetune_deit.py --from)"
    found = without_effect("init", config.init, ("head", "pos_embed_resize"), advice)
    if config.optim.trainable != "all":
        advice = "would leave the rest of the student at random weights; give init.weights"
        found.append(ConfigProblem("optim.trainable", config.optim.trainable, advice))
    return found


def check_adapters(config: Config) -> list[ConfigProblem]:
    """Adapters that are trained alone, on weights that stay."""
    if config.optim.trainable != "adapters":
        return []
    found = []
    if config.student.adapters == "none":
        advice = (
            "there are none; give student.adapters convpass (--schedule convpass), or use heads"
        )
        found.append(ConfigProblem("optim.trainable", "adapters", advice))
    if config.init.pruning_masks != "keep":
        advice = "would change weights that optim.trainable 'adapters' leaves as they are; use keep"
        found.append(ConfigProblem("init.pruning_masks", config.init.pruning_masks, advice))
    return found


def check_qat(config: Config) -> list[ConfigProblem]:
    """Ranges are learnt by a student that is whole, and in training mode."""
    rounding, found = config.student.qat, []
    if rounding == "none":
        return found
    if config.optim.trainable in ("heads", "adapters"):
        advice = (
            f"leaves layers in evaluation mode that round ({rounding}) and have to learn; use all"
        )
        found.append(ConfigProblem("optim.trainable", config.optim.trainable, advice))
    if config.run.sharding != "none":
        advice = f"is not for a student whose layers round (student.qat {rounding}); use none"
        found.append(ConfigProblem("run.sharding", config.run.sharding, advice))
    return found
