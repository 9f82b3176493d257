"""Checks of teachers and loss."""

import dataclasses

from deit.config.cross_field_checks.unused_fields import without_effect
from deit.config.schema import Config
from deit.config.sections.loss import LossConfig
from deit.config.sections.student import STUDENTS
from deit.config.sections.teacher import CLASS_ORDERS
from deit.core.errors import ConfigProblem, did_you_mean


def check_losses(config: Config) -> list[ConfigProblem]:
    """Check the loss section, and that teacher and student fit it."""
    loss, student, teacher = config.loss, config.student, config.teacher
    problems = check_loss_fields(loss)
    if loss.kind == "none":
        return problems
    if not teacher.source and not teacher.target_stores:
        problems.append(
            ConfigProblem(
                "teacher.source",
                None,
                f"loss.kind {loss.kind!r} needs a teacher; give one, or --loss none",
            )
        )
    if loss.kind == "dkd" and config.views.uses_mixing:
        hint = "needs one true class, but mixed views have two; use --augmentation none, or soft"
        problems.append(ConfigProblem("loss.kind", "dkd", hint))
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        return problems  # the heads of an unknown network are not known
    has_token = student.has_distillation_token
    if loss.head == "distillation" and not has_token:
        twin = student.name.replace("vit_", "deit_")
        has_twin = twin in STUDENTS and twin != student.name
        suggestion = f"student.name {twin}" if has_twin else "a deit_* student"
        problems.append(
            ConfigProblem(
                "student.name",
                student.name,
                f"has no distillation token; use {suggestion}, or loss.head class",
            )
        )
    if loss.head == "class" and has_token:
        twin = student.name.replace("deit_", "vit_")
        suggestion = f"student.name {twin}" if twin in STUDENTS else "a student without the token"
        problems.append(
            ConfigProblem(
                "loss.head",
                "class",
                f"would leave the distillation head of {student.name} untrained; use "
                f"{suggestion}, or loss.head distillation",
            )
        )
    if loss.effective_label_weight == 0 and has_token and loss.head == "distillation":
        problems.append(
            ConfigProblem(
                "loss.distillation_weight",
                loss.distillation_weight,
                f"would leave the class head of {student.name} untrained; use less than 1, or "
                "loss.head all",
            )
        )
    return problems


def check_loss_fields(loss: LossConfig) -> list[ConfigProblem]:
    """Check the fields of the loss section against each other."""
    if loss.kind == "none":
        leaves = tuple(
            leaf.name
            for leaf in dataclasses.fields(LossConfig)
            if leaf.name not in ("kind", "label_smoothing")
        )
        hint = "has no effect because loss.kind is 'none'; the loss preset none resets it"
        return without_effect("loss", loss, leaves, hint)
    problems = []
    if loss.distillation_weight == 0:
        hint = "the teacher would have no effect; use the loss preset none, or loss.kind none"
        problems.append(ConfigProblem("loss.distillation_weight", 0, hint))
    if loss.effective_label_weight < 0:
        hint = "is above 1, so the label weight would be negative; set loss.label_weight as well"
        problems.append(ConfigProblem("loss.distillation_weight", loss.distillation_weight, hint))
    if loss.kind == "hard":
        hint = "has no effect with loss.kind hard"
        problems += without_effect("loss", loss, ("temperature",), f"{hint}; use 1")
        problems += without_effect("loss", loss, ("standardize_logits",), hint)
    if loss.kind != "dkd":
        hint = "has an effect with loss.kind dkd only"
        problems += without_effect("loss", loss, ("dkd_alpha", "dkd_beta"), hint)
    return problems


def check_teachers(config: Config) -> list[ConfigProblem]:
    """Check the teacher section: the number of values in each list, and their combination."""
    teacher, student, problems = config.teacher, config.student, []
    num_teachers = max(len(teacher.source), len(teacher.target_stores))
    joint_store = (1,) if teacher.combine != "tokens" else ()  # one store of combined outputs
    counts = {"source": (0, num_teachers), "target_stores": (0, *joint_store, num_teachers)}
    if num_teachers > 1:
        counts["classes"] = (0, 1, num_teachers)
    counts |= dict.fromkeys(
        ("architecture", "image_size", "weights", "memory_format"), (0, 1, num_teachers)
    )
    counts |= dict.fromkeys(("mean", "std"), (0, 3, 3 * num_teachers))
    for leaf, allowed in counts.items():
        if len(getattr(teacher, leaf)) not in allowed:
            hint = f"should hold {allowed[-1]} values for {num_teachers} teacher(s)"
            problems.append(ConfigProblem(f"teacher.{leaf}", getattr(teacher, leaf), hint))
    if num_teachers > 1 or len(teacher.classes) == 1:
        known = CLASS_ORDERS if num_teachers < 2 else (*CLASS_ORDERS, "none")
        for value in teacher.classes:
            if not value.startswith("@") and value not in known:
                hint = f"should be @FILE with one name per line, or one of {', '.join(known)}"
                problems.append(
                    ConfigProblem("teacher.classes", value, hint + did_you_mean(value, known))
                )
    if bool(teacher.mean) != bool(teacher.std):
        hint = "set both teacher.mean and teacher.std, or neither"
        problems.append(ConfigProblem("teacher.mean", teacher.mean, hint))
    for leaf in ("std", "weights"):
        if any(value <= 0 for value in getattr(teacher, leaf)):
            problems.append(
                ConfigProblem(f"teacher.{leaf}", getattr(teacher, leaf), "should be positive")
            )
    if "none" in teacher.target_stores and not teacher.source:
        hint = "contains 'none', a teacher that is run, so teacher.source is required"
        problems.append(ConfigProblem("teacher.target_stores", teacher.target_stores, hint))
    if num_teachers < 2:
        hint = "has no effect with one teacher"
        problems += without_effect("teacher", teacher, ("weights", "combine"), hint)
    elif teacher.combine == "tokens":
        problems += _check_tokens(config, num_teachers)
    num_tokens = student.num_distillation_tokens
    if num_tokens > 1 and (num_teachers < 2 or teacher.combine != "tokens"):
        hint = f"needs {num_tokens} teachers, and teacher.combine tokens"
        problems.append(ConfigProblem("student.num_distillation_tokens", num_tokens, hint))
    return problems


def check_teacher_mean(config: Config) -> list[ConfigProblem]:
    """Check that probabilities are not averaged with standardized logits.

    Each row of logits has its own scale then, so there is no common temperature.
    """
    teacher, loss = config.teacher, config.loss
    is_ensemble = max(len(teacher.source), len(teacher.target_stores)) > 1
    if not (is_ensemble and loss.standardize_logits and teacher.combine == "probabilities"):
        return []
    hint = "is not defined for a mean of probabilities; use teacher.combine logits or tokens"
    return [ConfigProblem("loss.standardize_logits", True, hint)]


def _check_tokens(config: Config, num_teachers: int) -> list[ConfigProblem]:
    """Check teacher.combine tokens: each teacher has its own distillation token."""
    problems = []
    if config.loss.kind != "none" and config.student.num_distillation_tokens != num_teachers:
        hint = f"should be {num_teachers}, one per teacher (teacher.combine tokens)"
        num_tokens = config.student.num_distillation_tokens
        problems.append(ConfigProblem("student.num_distillation_tokens", num_tokens, hint))
    if config.loss.kind != "none" and config.loss.head != "distillation":
        hint = "teacher.combine tokens needs loss.head distillation"
        problems.append(ConfigProblem("loss.head", config.loss.head, hint))
    return problems


def check_teacher_view(config: Config) -> list[ConfigProblem]:
    """Check that views with mixing are the same for teacher and student."""
    view = config.views.teacher_view
    # With loss.kind none, training ignores the teacher and its view.
    if config.loss.kind == "none" or view == "same" or not config.views.uses_mixing:
        return []
    hint = (
        "shows the teacher one image, but mixing shows the student two; use --augmentation none, "
        "a mode of --view-mode, or views.teacher_view same"
    )
    return [ConfigProblem("views.teacher_view", view, hint)]


def check_crops(config: Config) -> list[ConfigProblem]:
    """Check that the mean over crops comes from stored targets: it is too slow in training."""
    views, stores, problems = config.views, config.teacher.target_stores, []
    if config.loss.kind == "none":
        return problems
    if views.teacher_view == "crops" and (not stores or "none" in stores):
        hint = (
            f"needs the teacher's outputs for {views.teacher_num_crops} crops of each image; "
            "compute them once with `deit targets write`, then set teacher.target_stores"
        )
        problems.append(ConfigProblem("views.teacher_view", "crops", hint))
    return problems
