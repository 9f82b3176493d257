"""Checks of the student and its initial weights."""

from deit.config.cross_field_checks.unused_fields import without_effect
from deit.config.schema import Config
from deit.config.sections.student import STUDENTS, StudentConfig
from deit.core.errors import ConfigProblem, did_you_mean


def check_student(config: Config) -> list[ConfigProblem]:
    """Check the student section."""
    student = config.student
    problems = []
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        problems.append(
            ConfigProblem(
                "student.name",
                student.name,
                f"should be one of {', '.join(STUDENTS)}, or timm:NAME"
                + did_you_mean(student.name, STUDENTS),
            )
        )
    elif student.is_transformer:
        if student.image_size % student.patch_size:
            problems.append(
                ConfigProblem(
                    "student.patch_size",
                    student.patch_size,
                    f"should divide student.image_size ({student.image_size})",
                )
            )
        if not student.has_distillation_token:
            hint = f"has an effect on deit_* only; student.name is {student.name!r}"
            problems += without_effect("student", student, ("num_distillation_tokens",), hint)
        if student.embed_dim and student.num_heads and student.embed_dim % student.num_heads:
            problems.append(
                ConfigProblem(
                    "student.num_heads",
                    student.num_heads,
                    f"should divide student.embed_dim ({student.embed_dim})",
                )
            )
        problems += _check_shared_blocks(student)
        for leaf in ("heads_per_block", "mlp_hidden_per_block"):
            values = getattr(student, leaf)
            if len(values) not in (0, 1, student.num_blocks):
                hint = f"should be one value, or one for each of the {student.num_blocks} blocks"
                problems.append(ConfigProblem(f"student.{leaf}", values, hint))
        if student.adapters == "none":
            hint = "has no effect because student.adapters is 'none'"
            problems += without_effect("student", student, _ADAPTER_FIELDS, hint)
        if student.qat != "none":
            problems += _check_int8_support(student)
    else:
        hint = f"has an effect on deit_* and vit_* only; student.name is {student.name!r}"
        problems += without_effect("student", student, _TRANSFORMER_FIELDS, hint)
    return problems


_ADAPTER_FIELDS = ("adapter_dim", "adapter_scale")
_TRANSFORMER_FIELDS = (
    *("patch_size", "embed_dim", "depth", "num_heads", "weight_init"),
    *("heads_per_block", "mlp_hidden_per_block", "shared_block_size", "adapters"),
    *_ADAPTER_FIELDS,
    *("num_distillation_tokens", "dropout", "qat"),
)


def _check_shared_blocks(student: StudentConfig) -> list[ConfigProblem]:
    """Check student.shared_block_size and the fields that exclude it."""
    problems = []
    if student.num_blocks % student.shared_block_size:
        hint = f"should divide the number of blocks ({student.num_blocks})"
        problems.append(ConfigProblem("student.shared_block_size", student.shared_block_size, hint))
    if student.shared_block_size > 1 and student.adapters != "none":
        hint = (
            f"cannot be combined with student.shared_block_size {student.shared_block_size}; use "
            "none (and not --schedule convpass), or pretrained weights without shared blocks"
        )
        problems.append(ConfigProblem("student.adapters", student.adapters, hint))
    if student.shared_block_size > 1 and (student.heads_per_block or student.mlp_hidden_per_block):
        hint = (
            "blocks that share weights cannot have different sizes (student.heads_per_block, "
            "student.mlp_hidden_per_block); use 1"
        )
        problems.append(ConfigProblem("student.shared_block_size", student.shared_block_size, hint))
    return problems


def _check_int8_support(student: StudentConfig) -> list[ConfigProblem]:
    """Check for features that `deit quantize` does not support."""
    hint = "cannot be combined with student.qat; use {}"
    problems = []
    if student.shared_block_size > 1:
        problems.append(
            ConfigProblem("student.shared_block_size", student.shared_block_size, hint.format(1))
        )
    if student.adapters != "none":
        problems.append(ConfigProblem("student.adapters", student.adapters, hint.format("none")))
    return problems


def check_init(config: Config) -> list[ConfigProblem]:
    """Check the fields that have an effect on pretrained weights only."""
    if config.init.weights is not None:
        return []
    hint = "has no effect on random weights; give init.weights (finetune_deit.py --from)"
    problems = without_effect("init", config.init, ("head", "pos_embed_resize"), hint)
    if config.optim.trainable != "all":
        hint = "would train only a part of a randomly initialized student; give init.weights"
        problems.append(ConfigProblem("optim.trainable", config.optim.trainable, hint))
    return problems


def check_adapters(config: Config) -> list[ConfigProblem]:
    """Check the fields for optim.trainable adapters, where the other weights are frozen."""
    if config.optim.trainable != "adapters":
        return []
    problems = []
    if config.student.adapters == "none":
        hint = "the student has none; use student.adapters convpass (--schedule convpass), or heads"
        problems.append(ConfigProblem("optim.trainable", "adapters", hint))
    if config.init.pruning_masks != "keep":
        hint = "would change weights that optim.trainable 'adapters' freezes; use keep"
        problems.append(ConfigProblem("init.pruning_masks", config.init.pruning_masks, hint))
    return problems


def check_qat(config: Config) -> list[ConfigProblem]:
    """Check student.qat: ranges are updated in training mode, on a student that is not sharded."""
    qat, problems = config.student.qat, []
    if qat == "none":
        return problems
    if config.optim.trainable in ("heads", "adapters"):
        hint = f"keeps layers in evaluation mode, where student.qat {qat} updates no range; use all"
        problems.append(ConfigProblem("optim.trainable", config.optim.trainable, hint))
    if config.run.sharding != "none":
        hint = f"cannot be combined with student.qat {qat}; use none"
        problems.append(ConfigProblem("run.sharding", config.run.sharding, hint))
    return problems
