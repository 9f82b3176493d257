"""Checks of the optimizer and the run."""

from deit.config.checks.effects import without_effect
from deit.config.schema import Config
from deit.core.errors import ConfigProblem


def check_optim(config: Config) -> list[ConfigProblem]:
    optim = config.optim
    found = []
    if optim.lr_milestones:
        advice = "has no effect, the learning rate falls at optim.lr_milestones"
        found += without_effect("optim", optim, ("min_lr",), advice)
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
    found += without_effect("optim", optim, others, advice)
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


def check_run(config: Config) -> list[ConfigProblem]:
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
