"""The checks of a configuration: what single fields cannot say, each problem with what to do."""

import dataclasses
from typing import Any

from deit.config.data_section import ViewsConfig
from deit.config.schema import CLASS_ORDERS, Config, LossConfig
from deit.config.student_section import STUDENTS, StudentConfig
from deit.core.errors import ConfigProblem, did_you_mean
from deit.core.user_code import HUB, about_address

TIMM_LOADS = ("init.weights", "teacher.source")
"""Fields that take a repository of the Hugging Face hub, as timm names it."""


def _check_addresses(config: Config) -> list[ConfigProblem]:
    """Addresses, where files and folders are named."""
    found = []
    for section in dataclasses.fields(config):
        for leaf in dataclasses.fields(section.type):
            name, value = f"{section.name}.{leaf.name}", getattr(config, section.name)
            value = getattr(value, leaf.name)
            for word in value if isinstance(value, tuple) else (value,):
                if not isinstance(word, str) or (name in TIMM_LOADS and word.startswith(HUB)):
                    continue
                if (advice := about_address(word.removeprefix("@"))) is not None:
                    found.append(ConfigProblem(name, word, advice))
    return found


def _check_student(config: Config) -> list[ConfigProblem]:
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
            found += _without_effect("student", student, ("num_distillation_tokens",), advice)
        if student.embed_dim and student.num_heads and student.embed_dim % student.num_heads:
            found.append(
                ConfigProblem(
                    "student.num_heads",
                    student.num_heads,
                    f"should divide student.embed_dim ({student.embed_dim})",
                )
            )
        if student.num_blocks % student.shared_block_size:
            advice = f"should divide the number of blocks ({student.num_blocks})"
            found.append(
                ConfigProblem("student.shared_block_size", student.shared_block_size, advice)
            )
        if student.shared_block_size > 1 and student.adapters != "none":
            advice = (
                f"not for blocks that share their weights (student.shared_block_size "
                f"{student.shared_block_size}); use "
                "none (and not --schedule convpass), or start from a network whose blocks share "
                "none"
            )
            found.append(ConfigProblem("student.adapters", student.adapters, advice))
        if student.shared_block_size > 1 and (
            student.heads_per_block or student.mlp_hidden_per_block
        ):
            advice = (
                "blocks that share their weights cannot be pruned apart (student.heads_per_block, "
                "student.mlp_hidden_per_block); use 1"
            )
            found.append(
                ConfigProblem("student.shared_block_size", student.shared_block_size, advice)
            )
        for leaf in ("heads_per_block", "mlp_hidden_per_block"):
            values = getattr(student, leaf)
            if len(values) not in (0, 1, student.num_blocks):
                advice = f"should be one value, or one for each of {student.num_blocks} blocks"
                found.append(ConfigProblem(f"student.{leaf}", values, advice))
        if student.adapters == "none":
            advice = "has no effect, student.adapters is 'none'"
            found += _without_effect("student", student, _OF_ADAPTERS, advice)
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
        found += _without_effect("student", student, shape, only)
    return found


_OF_ADAPTERS = ("adapter_dim", "adapter_scale")


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


def _without_effect(
    section: str, values: Any, leaves: tuple[str, ...], advice: str
) -> list[ConfigProblem]:
    """A problem for each field that was changed although it cannot take effect."""
    defaults = type(values)()
    return [
        ConfigProblem(f"{section}.{leaf}", getattr(values, leaf), advice)
        for leaf in leaves
        if getattr(values, leaf) != getattr(defaults, leaf)
    ]


def _check_start(config: Config) -> list[ConfigProblem]:
    if config.init.weights is not None:
        return []
    advice = "has no effect on random weights; give init.weights (finetune_deit.py --from)"
    found = _without_effect("init", config.init, ("head", "pos_embed_resize"), advice)
    if config.optim.trainable != "all":
        advice = "would leave the rest of the student at random weights; give init.weights"
        found.append(ConfigProblem("optim.trainable", config.optim.trainable, advice))
    return found


def _check_adapters(config: Config) -> list[ConfigProblem]:
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


def _check_rounding(config: Config) -> list[ConfigProblem]:
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


def _check_data(config: Config) -> list[ConfigProblem]:
    data, found = config.data, []
    if data.source == "reader":
        if data.reader is None:
            advice = "data.source 'reader' needs one: folder, tar, hfds/NAME or torch/NAME"
            found.append(ConfigProblem("data.reader", None, advice))
    else:
        advice = f"only data.source 'reader' takes it, data.source is {data.source!r}"
        found += _without_effect("data", data, ("reader",), advice)
    if data.source not in ("mnist", "cifar10", "cifar100", "reader"):
        advice = "only mnist, cifar10, cifar100, or what data.reader names, can be downloaded"
        found += _without_effect("data", data, ("download",), advice)
    if data.source not in ("folder", "shards", "reader"):
        advice = f"only image files take it, data.source {data.source!r} is always in memory"
        found += _without_effect("data", data, ("storage", "num_workers", "exclude_list"), advice)
    elif data.storage == "memory":
        advice = "has no effect, data.storage is 'memory'"
        found += _without_effect("data", data, ("num_workers",), advice)
    return found


def _check_objective(config: Config) -> list[ConfigProblem]:
    loss, student, teacher = config.loss, config.student, config.teacher
    if loss.kind == "none":
        leaves = tuple(
            leaf.name
            for leaf in dataclasses.fields(LossConfig)
            if leaf.name not in ("kind", "label_smoothing")
        )
        advice = "has no effect, loss.kind is 'none'; --loss none clears it"
        return _without_effect("loss", loss, leaves, advice)
    found = _check_loss(loss)
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


def _check_loss(loss: LossConfig) -> list[ConfigProblem]:
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
        found += _without_effect("loss", loss, ("temperature",), advice)
        found += _without_effect(
            "loss", loss, ("standardize_logits",), "has no effect on a hard label"
        )
    if loss.kind != "dkd":
        advice = "has an effect with loss.kind dkd only"
        found += _without_effect("loss", loss, ("dkd_alpha", "dkd_beta"), advice)
    return found


def _check_teachers(config: Config) -> list[ConfigProblem]:
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
        found += _without_effect("teacher", teacher, ("weights", "combine"), advice)
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


def _check_mean(config: Config) -> list[ConfigProblem]:
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


def _check_teacher_view(config: Config) -> list[ConfigProblem]:
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


def _check_crops(config: Config) -> list[ConfigProblem]:
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


def _check_views(config: Config) -> list[ConfigProblem]:
    views = config.views
    found = []
    for leaf in ("crop_scale", "crop_ratio", "erasing_scale", "erasing_ratio"):
        low, high = getattr(views, leaf)
        if low > high:
            found.append(ConfigProblem(f"views.{leaf}", (low, high), "should go from low to high"))
    for leaf in ("crop_scale", "erasing_scale"):
        if getattr(views, leaf)[1] > 1:
            advice = "a box cannot exceed the image (1.0)"
            found.append(ConfigProblem(f"views.{leaf}", getattr(views, leaf), advice))
    for leaves, on, advice in _effects(views):
        if not on:
            found += _without_effect("views", views, leaves, advice)
    if (views.mean is None) != (views.std is None):
        found.append(ConfigProblem("views.mean", views.mean, "goes together with views.std"))
    if views.std is not None and min(views.std) <= 0:
        found.append(ConfigProblem("views.std", views.std, "should be positive"))
    return found


def _effects(views: ViewsConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    """Fields of the views, whether they take effect, and why they would not."""
    return [
        (
            (
                "randaugment_magnitude",
                "randaugment_magnitude_std",
                "randaugment_num_ops",
                "randaugment_prob",
            ),
            views.auto_augment == "randaugment",
            "has an effect with views.auto_augment randaugment only",
        ),
        (
            ("erasing_mode", "erasing_scale", "erasing_ratio"),
            views.erasing_prob > 0,
            "has no effect, views.erasing_prob is 0",
        ),
        (("crop_pct",), views.crop == "random", "has an effect with views.crop random only"),
    ]


def _check_optim(config: Config) -> list[ConfigProblem]:
    optim = config.optim
    found = []
    if optim.lr_milestones:
        advice = "has no effect, the learning rate falls at optim.lr_milestones"
        found += _without_effect("optim", optim, ("min_lr",), advice)
    if optim.batch_size % optim.grad_accum_steps:
        found.append(
            ConfigProblem(
                "optim.grad_accum_steps",
                optim.grad_accum_steps,
                f"should divide optim.batch_size ({optim.batch_size})",
            )
        )
    elif config.views.uses_mixing and (optim.batch_size // optim.grad_accum_steps) % 2:
        found.append(
            ConfigProblem(
                "optim.batch_size",
                optim.batch_size,
                "mixing takes pairs: each micro-batch (optim.batch_size / optim.grad_accum_steps) "
                "should "
                "be even",
            )
        )
    others = ("momentum",) if optim.name == "adamw" else ("beta1", "beta2")
    advice = f"has no effect, optim.name is {optim.name!r}"
    found += _without_effect("optim", optim, others, advice)
    if optim.warmup_epochs >= optim.epochs:
        found.append(
            ConfigProblem(
                "optim.warmup_epochs",
                optim.warmup_epochs,
                f"should be less than optim.epochs ({optim.epochs}); with few epochs give "
                "optim.warmup_epochs as well (0: no warm-up)",
            )
        )
    if config.loss.distillation_warmup_epochs > optim.epochs:
        advice = f"would never be over; should be at most optim.epochs ({optim.epochs})"
        warmup = config.loss.distillation_warmup_epochs
        found.append(ConfigProblem("loss.distillation_warmup_epochs", warmup, advice))
    for leaf in ("warmup_lr",) if optim.lr_milestones else ("min_lr", "warmup_lr"):
        if getattr(optim, leaf) > optim.peak_lr:
            found.append(
                ConfigProblem(
                    f"optim.{leaf}",
                    getattr(optim, leaf),
                    f"should not exceed the peak learning rate ({optim.peak_lr:.3g} = "
                    "optim.lr * optim.batch_size / optim.lr_base_batch_size)",
                )
            )
    if optim.ema_epochs > optim.epochs:
        found.append(
            ConfigProblem(
                "optim.ema_epochs",
                optim.ema_epochs,
                "an average longer than the run keeps the initial weights; "
                f"should be at most optim.epochs ({optim.epochs})",
            )
        )
    return found


def _check_run(config: Config) -> list[ConfigProblem]:
    run, found = config.run, []
    if run.linear_backend == "onednn" and run.compile != "none":
        advice = "is not for compiled networks (run.compile); leave it at auto"
        found.append(ConfigProblem("run.linear_backend", run.linear_backend, advice))
    if run.sharding != "none":
        whole = "is for students that are whole in every process; leave run.sharding at none"
        off = {"precision": "fp16", "auto_micro_batch": True}
        found += [
            ConfigProblem(f"run.{leaf}", value, whole)
            for leaf, value in off.items()
            if getattr(run, leaf) == value
        ]
        if run.compile != "none":
            found.append(ConfigProblem("run.compile", run.compile, whole))
        if config.student.shared_block_size > 1:
            found.append(
                ConfigProblem("student.shared_block_size", config.student.shared_block_size, whole)
            )
    several = config.optim.grad_accum_steps > 1 or run.auto_micro_batch
    if run.compile in ("reduce-overhead", "max-autotune") and several:
        advice = (
            "records gradients where the next micro-batch overwrites them; use default, or neither "
            "optim.grad_accum_steps nor run.auto_micro_batch"
        )
        found.append(ConfigProblem("run.compile", run.compile, advice))
    return found


CHECKS = {
    _check_addresses: {"data", "init", "teacher", "student", "run"},
    _check_data: {"data"},
    _check_student: {"student"},
    _check_start: {"init", "optim"},
    _check_adapters: {"init", "student", "optim"},
    _check_rounding: {"student", "optim", "run"},
    _check_objective: {"loss", "student", "teacher"},
    _check_teachers: {"teacher", "student", "loss"},
    _check_mean: {"teacher", "loss"},
    _check_views: {"views"},
    _check_teacher_view: {"views", "teacher", "loss"},
    _check_optim: {"optim", "views", "loss"},
    _check_run: {"run", "student", "optim"},
}
"""What single fields cannot say, and the sections each check reads."""

LIVE_TEACHER_CHECKS = {_check_crops: {"views", "teacher", "loss"}}
"""Likewise, where targets are not about to be written."""
