"""Checks of the optimizer and the run."""

from deit.config.cross_field_checks.unused_fields import without_effect
from deit.config.schema import Config
from deit.core.errors import ConfigProblem


def check_optim(config: Config) -> list[ConfigProblem]:
    """Check the optim section, and the warm-up of the distillation term."""
    optim = config.optim
    problems = []
    if optim.lr_milestones:
        hint = "has no effect because optim.lr_milestones is set"
        problems += without_effect("optim", optim, ("min_lr",), hint)
    if optim.batch_size % optim.grad_accum_steps:
        problems.append(
            ConfigProblem(
                "optim.grad_accum_steps",
                optim.grad_accum_steps,
                f"should divide optim.batch_size ({optim.batch_size})",
            )
        )
    elif config.views.uses_mixing and (optim.batch_size // optim.grad_accum_steps) % 2:
        problems.append(
            ConfigProblem(
                "optim.batch_size",
                optim.batch_size,
                "mixing uses pairs, so a micro-batch (optim.batch_size / optim.grad_accum_steps) "
                "should be even",
            )
        )
    unused = ("momentum",) if optim.name == "adamw" else ("beta1", "beta2")
    hint = f"has no effect because optim.name is {optim.name!r}"
    problems += without_effect("optim", optim, unused, hint)
    if optim.warmup_epochs >= optim.epochs:
        problems.append(
            ConfigProblem(
                "optim.warmup_epochs",
                optim.warmup_epochs,
                f"should be less than optim.epochs ({optim.epochs}); set optim.warmup_epochs as "
                "well (0: no warm-up)",
            )
        )
    if config.loss.distillation_warmup_epochs > optim.epochs:
        hint = f"should be at most optim.epochs ({optim.epochs})"
        warmup = config.loss.distillation_warmup_epochs
        problems.append(ConfigProblem("loss.distillation_warmup_epochs", warmup, hint))
    for leaf in ("warmup_lr",) if optim.lr_milestones else ("min_lr", "warmup_lr"):
        if getattr(optim, leaf) > optim.peak_lr:
            problems.append(
                ConfigProblem(
                    f"optim.{leaf}",
                    getattr(optim, leaf),
                    f"should not exceed the peak learning rate ({optim.peak_lr:.3g} = "
                    "optim.lr * optim.batch_size / optim.lr_base_batch_size)",
                )
            )
    if optim.ema_epochs > optim.epochs:
        problems.append(
            ConfigProblem(
                "optim.ema_epochs",
                optim.ema_epochs,
                f"should be at most optim.epochs ({optim.epochs}), or the average keeps the "
                "initial weights",
            )
        )
    return problems


def check_run(config: Config) -> list[ConfigProblem]:
    """Check the run section: combinations that are not supported."""
    run, problems = config.run, []
    if run.linear_backend == "onednn" and run.compile != "none":
        hint = f"cannot be combined with run.compile {run.compile}; use auto"
        problems.append(ConfigProblem("run.linear_backend", run.linear_backend, hint))
    if run.sharding != "none":
        hint = f"cannot be combined with run.sharding {run.sharding}; use run.sharding none"
        unsupported = {"precision": "fp16", "auto_micro_batch": True}
        problems += [
            ConfigProblem(f"run.{leaf}", value, hint)
            for leaf, value in unsupported.items()
            if getattr(run, leaf) == value
        ]
        if run.compile != "none":
            problems.append(ConfigProblem("run.compile", run.compile, hint))
        if config.student.shared_block_size > 1:
            problems.append(
                ConfigProblem("student.shared_block_size", config.student.shared_block_size, hint)
            )
    accumulates = config.optim.grad_accum_steps > 1 or run.auto_micro_batch
    if run.compile in ("reduce-overhead", "max-autotune") and accumulates:
        # A CUDA graph writes the gradients of each micro-batch to the same memory.
        hint = (
            "cannot be combined with optim.grad_accum_steps or run.auto_micro_batch, whose "
            "gradients it would overwrite; use default, or neither of them"
        )
        problems.append(ConfigProblem("run.compile", run.compile, hint))
    return problems
