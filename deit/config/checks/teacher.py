"""Checks of teachers and loss."""

import dataclasses

from deit.config.checks.effects import without_effect
from deit.config.schema import CLASS_ORDERS, Config, LossConfig
from deit.config.student_section import STUDENTS
from deit.core.errors import ConfigProblem, did_you_mean


def check_losses(config: Config) -> list[ConfigProblem]:
    loss, student, teacher = config.loss, config.student, config.teacher
    if loss.kind == "none":
        leaves = tuple(
            leaf.name
            for leaf in dataclasses.fields(LossConfig)
            if leaf.name not in ("kind", "label_smoothing")
        )
        advice = "has no effect, loss.kind is 'none'; --loss none clears it"
        return without_effect("loss", loss, leaves, advice)
    found = check_loss_fields(loss)
    if not teacher.source and not teacher.target_stores:
        found.append(
            ConfigProblem(
                "teacher.source",
                None,
                f"loss.kind {loss.kind!r} needs a teacher; give one, or --loss none",
            )
        )
    if loss.kind == "dkd" and config.views.uses_mixing:
        advice = "needs one true class, mixed views have two; use --augmentation none, or soft"
        found.append(ConfigProblem("loss.kind", "dkd", advice))
    if student.name not in STUDENTS and not student.name.startswith("timm:"):
        return found  # which heads an unknown name has, nobody knows
    token = student.has_distillation_token
    if loss.head == "distillation" and not token:
        twin = student.name.replace("vit_", "deit_")
        other = twin in STUDENTS and twin != student.name
        suggestion = f"student.name {twin}" if other else "a deit_* student"
        found.append(
            ConfigProblem(
                "student.name",
                student.name,
                "has no distillation token to distil through; use "
                f"{suggestion}, or loss.head class",
            )
        )
    if loss.head == "class" and token:
        twin = student.name.replace("deit_", "vit_")
        suggestion = f"student.name {twin}" if twin in STUDENTS else "a student without the token"
        found.append(
            ConfigProblem(
                "loss.head",
                "class",
                f"would leave the distillation head of {student.name} untrained; use "
                f"{suggestion}, or loss.head distillation",
            )
        )
    if loss.effective_label_weight == 0 and token and loss.head == "distillation":
        found.append(
            ConfigProblem(
                "loss.distillation_weight",
                loss.distillation_weight,
                f"would leave the class head of {student.name} untrained; use less than 1, or "
                "loss.head all",
            )
        )
    return found


def check_loss_fields(loss: LossConfig) -> list[ConfigProblem]:
    """What the fields of the loss section say against each other."""
    found = []
    if loss.distillation_weight == 0:
        found.append(
            ConfigProblem(
                "loss.distillation_weight", 0, "leaves the teacher no say; use --loss none"
            )
        )
    if loss.effective_label_weight < 0:
        advice = "leaves the label less than nothing; give loss.label_weight as well"
        found.append(ConfigProblem("loss.distillation_weight", loss.distillation_weight, advice))
    if loss.kind == "hard":
        advice = "has no effect on a hard label; use 1"
        found += without_effect("loss", loss, ("temperature",), advice)
        found += without_effect(
            "loss", loss, ("standardize_logits",), "has no effect on a hard label"
        )
    if loss.kind != "dkd":
        advice = "has an effect with loss.kind dkd only"
        found += without_effect("loss", loss, ("dkd_alpha", "dkd_beta"), advice)
    return found


def check_teachers(config: Config) -> list[ConfigProblem]:
    teacher, student, found = config.teacher, config.student, []
    number = max(len(teacher.source), len(teacher.target_stores))
    together = (1,) if teacher.combine != "tokens" else ()  # one store of what all say
    counts = {"source": (0, number), "target_stores": (0, *together, number)}
    if number > 1:
        counts["classes"] = (0, 1, number)
    counts |= dict.fromkeys(
        ("architecture", "image_size", "weights", "memory_format"), (0, 1, number)
    )
    counts |= dict.fromkeys(("mean", "std"), (0, 3, 3 * number))
    for leaf, allowed in counts.items():
        if len(getattr(teacher, leaf)) not in allowed:
            advice = f"should hold {allowed[-1]} values for {number} teacher(s)"
            found.append(ConfigProblem(f"teacher.{leaf}", getattr(teacher, leaf), advice))
    if number > 1 or len(teacher.classes) == 1:
        known = CLASS_ORDERS if number < 2 else (*CLASS_ORDERS, "none")
        for word in teacher.classes:
            if not word.startswith("@") and word not in known:
                advice = f"should be @FILE with one name a line, or one of {', '.join(known)}"
                found.append(
                    ConfigProblem("teacher.classes", word, advice + did_you_mean(word, known))
                )
    if bool(teacher.mean) != bool(teacher.std):
        found.append(ConfigProblem("teacher.mean", teacher.mean, "goes together with teacher.std"))
    for leaf in ("std", "weights"):
        if any(value <= 0 for value in getattr(teacher, leaf)):
            found.append(
                ConfigProblem(f"teacher.{leaf}", getattr(teacher, leaf), "should be positive")
            )
    if "none" in teacher.target_stores and not teacher.source:
        advice = "'none' answers itself and needs its teacher.source"
        found.append(ConfigProblem("teacher.target_stores", teacher.target_stores, advice))
    if number < 2:
        advice = "has no effect with one teacher"
        found += without_effect("teacher", teacher, ("weights", "combine"), advice)
    elif teacher.combine == "tokens":
        found += _check_tokens(config, number)
    if student.num_distillation_tokens > 1 and (number < 2 or teacher.combine != "tokens"):
        advice = "needs as many teachers, and teacher.combine tokens"
        found.append(
            ConfigProblem(
                "student.num_distillation_tokens", student.num_distillation_tokens, advice
            )
        )
    return found


def check_teacher_mean(config: Config) -> list[ConfigProblem]:
    """A mean of probabilities is taken at a temperature, which standardised logits do not have."""
    teacher, loss = config.teacher, config.loss
    several = max(len(teacher.source), len(teacher.target_stores)) > 1
    if not (several and loss.standardize_logits and teacher.combine == "probabilities"):
        return []
    advice = "is not defined for a mean of probabilities; use teacher.combine logits or tokens"
    return [ConfigProblem("loss.standardize_logits", True, advice)]


def _check_tokens(config: Config, number: int) -> list[ConfigProblem]:
    """A distillation token for each of several teachers."""
    found = []
    if config.loss.kind != "none" and config.student.num_distillation_tokens != number:
        advice = f"should be {number}, one for each teacher (teacher.combine tokens)"
        tokens = config.student.num_distillation_tokens
        found.append(ConfigProblem("student.num_distillation_tokens", tokens, advice))
    if config.loss.kind != "none" and config.loss.head != "distillation":
        advice = "one teacher a token (teacher.combine tokens) needs loss.head distillation"
        found.append(ConfigProblem("loss.head", config.loss.head, advice))
    return found


def check_teacher_view(config: Config) -> list[ConfigProblem]:
    """A teacher's view of its own beside mixing, which shows the student two images."""
    view = config.views.teacher_view
    # Without an objective for it training ignores the teacher's view, as it does the teacher.
    if config.loss.kind == "none" or view == "same" or not config.views.uses_mixing:
        return []
    advice = (
        "shows the teacher one image, mixing shows the student two; use --augmentation none or a "
        "mode of --view-mode, or views.teacher_view same"
    )
    return [ConfigProblem("views.teacher_view", view, advice)]


def check_crops(config: Config) -> list[ConfigProblem]:
    """The mean over many crops is not to be had within a training step."""
    views, stored, found = config.views, config.teacher.target_stores, []
    if config.loss.kind == "none":
        return found
    if views.teacher_view == "crops" and (not stored or "none" in stored):
        advice = (
            f"takes {views.teacher_num_crops} answers of the teacher for each image: once, by "
            "`deit targets write`, then give teacher.target_stores"
        )
        found.append(ConfigProblem("views.teacher_view", "crops", advice))
    return found
