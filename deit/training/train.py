"""The wiring of a training run, from a configuration to a finished run folder."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.schema import Config, to_dict
from deit.config.validation import validate
from deit.core import run_folder
from deit.core.accelerator import (
    compile_module,
    environment_info,
    peak_memory_mb,
    uses_cuda_graphs,
)
from deit.core.console import info, is_main_process, progress
from deit.core.errors import (
    ConfigError,
    DataError,
    NumericsError,
    StoppedBySignal,
    is_out_of_memory,
)
from deit.core.fault_injection import fault_point
from deit.core.filesystem import check_space, check_writable, clean_leftovers, lock_dir, write_json
from deit.core.metrics import agreement, topk_accuracy
from deit.core.parent_process import STOPPING
from deit.core.sharding import device_mesh, shard_degree, shard_model
from deit.core.signals import GracefulStop
from deit.core.types import logits_by_head
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import load_splits
from deit.distill.build import (
    build_accelerator,
    init_masks,
    init_student,
    load_init_weights,
    model_info_from,
    with_init_normalization,
)
from deit.distill.inference import predict_split
from deit.distill.run_teachers import RunTeachers
from deit.models.load_weights import LoadedWeights
from deit.models.metadata import AdapterBase, base_of
from deit.models.onednn_linear import resolve_linear_backend, use_onednn
from deit.models.parameters import freeze_except, layer_depths
from deit.models.saved import build_student
from deit.models.student import has_distillation_head
from deit.models.surgery.pruning_masks import PruningMasks
from deit.training.loop import MetricAccumulator, StepContext, train_epoch
from deit.training.nonfinite import (
    NonFiniteMonitor,
    check_memory,
    find_micro_batch,
    recomputes,
    translate_errors,
)
from deit.training.optimizer import EMA, build_optimizer, layer_lr_scales, lr_at
from deit.training.progress_log import log_epoch, log_setup
from deit.training.resume import (
    check_best,
    check_same_run,
    resume_run,
    warn_if_not_reproducible,
    with_resolved_choices,
)
from deit.training.save import finish_epoch, required_bytes, save_checkpoint, write_result
from deit.training.state import TrainingRun, TrainState
from deit.training.summary import SUMMARY, print_summary, summary_of
from deit.training.trackers import check_trackers, track, tracked


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Train the student of a configuration and leave a run folder. Returns what its result.json
    holds.

    dry_run: one training and one evaluation step, nothing written.
    Raises the errors of deit.core.errors; everything a check can find is found before the first
    step."""
    config = validate(config)
    check_trackers(config)
    if not dry_run:
        run_folder.check_run_dir(out, resume=resume)
    finished = run_folder.read_result(out) if resume else None
    if not dry_run and finished is None:
        check_writable(out, option="--out")
    # A run that goes on has weights of its own: what it started from may be gone by now.
    resuming = resume and bool(run_folder.list_checkpoints(out))
    with ExitStack() as stack:
        guard = None
        if resuming and finished is None and not dry_run and is_main_process():
            guard = stack.enter_context(
                lock_dir(out, option="--out")
            )  # the work below takes a while
        found = None if resuming else load_init_weights(config)
        config = (
            with_resolved_choices(config, out)
            if resuming
            else with_init_normalization(config, found)
        )
        accelerator = build_accelerator(config.run, grad_accum_steps=config.optim.grad_accum_steps)
        config = config.replace(
            run={"linear_backend": resolve_linear_backend(config.run, accelerator)}
        )
        faculty = RunTeachers(config)
        run = _build(config, out, accelerator, faculty, found, resumed=resuming)
        stack.callback(run.loader.close)
        environment = environment_info(accelerator, arguments or [])
        environment["teachers"] = faculty.class_orders
        log_setup(run, environment)
        if finished is not None and not dry_run:
            check_same_run(run, finished)
            check_best(run)
            info(f"{out}: already complete after {finished['epochs']} epochs")
            return finished
        if not dry_run:
            check_space(out, required_bytes(run), option="--out")
        check_memory(run, faculty.answering)
        _check_teachers(run, faculty)
        if config.run.auto_micro_batch:
            find_micro_batch(run)
        if dry_run:
            _dry_run(run)
            return asdict(run.state)
        # Nothing was written so far; and every process has checked the folder before one fills it.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run_folder.create_run_dir(out)
            if not resuming:
                guard = stack.enter_context(lock_dir(out, option="--out"))
                run_folder.check_run_dir(out, resume=resume)  # another may have been quicker
            clean_leftovers(out)
            run.check_lock = guard
        accelerator.wait_for_everyone()
        interruption = stack.enter_context(GracefulStop(accelerator))
        stack.enter_context(translate_errors(run, lambda: interruption.noted))
        _restore_and_record(run, environment, resume=resume)
        with tracked(accelerator, config, out):
            _train_epochs(run, interruption)
        result = write_result(run)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            told = summary_of(config, out, result)
            write_json(out / SUMMARY, told)
            print_summary(told)
        interruption.raise_if_stopped(now=True)  # who called may have more to do, and should not
    return result


def build_run(config: Config) -> TrainingRun:
    """The parts of a run that is only to be looked at: as `train` builds them, teachers and stores
    checked, networks compiled if that is asked for; nothing is written, `out` is no folder.

    Raises the errors of deit.core.errors.
    """
    found = load_init_weights(config)
    config = with_init_normalization(config, found)
    accelerator = build_accelerator(config.run, grad_accum_steps=config.optim.grad_accum_steps)
    config = config.replace(run={"linear_backend": resolve_linear_backend(config.run, accelerator)})
    faculty = RunTeachers(config)
    run = _build(config, Path("nowhere"), accelerator, faculty, found)
    _check_teachers(run, faculty)
    return run


def _check_teachers(run: TrainingRun, faculty: RunTeachers) -> None:
    """Check teachers and stores, and have the networks compiled that stay."""
    run.teacher_predictions = faculty.check(run.splits, run.accelerator, run.loader)
    run.num_view_epochs = faculty.num_stored_epochs
    if run.config.run.compile != "none" and run.panel is not None:
        run.panel.compile(run.config.run.compile)  # not before: it was shown other batches


def _restore_and_record(run: TrainingRun, environment: dict[str, Any], *, resume: bool) -> None:
    """Go back to where the run was, and write down what it is and where it goes on."""
    out = run.out
    first = not (out / run_folder.CONFIG).is_file()
    if resume and not first and resume_run(run):
        warn_if_not_reproducible(out, environment, run.config)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        name = run_folder.ENVIRONMENT if first else run_folder.RESUMED
        write_json(out / run_folder.CONFIG, to_dict(run.config))
        # From the folder, above it: it moves with what lies around it, and holds no user's name.
        directory = os.path.relpath(Path.cwd(), out.resolve())
        above = all(part == ".." for part in Path(directory).parts)
        write_json(out / name, {**environment, "directory": directory if above else None})
        if run.init_report is not None:
            write_json(out / "init.json", run.init_report)


def _build(
    config: Config,
    out: Path,
    accelerator: Accelerator,
    faculty: RunTeachers,
    init_weights: LoadedWeights | None,
    *,
    resumed: bool = False,
) -> TrainingRun:
    """Build every part of a run. found: what the student starts from; None: random weights.
    resumed: whether a checkpoint will bring weights and masks."""
    splits = load_splits(config.data)
    if len(splits.validation.labels) < accelerator.num_processes:
        raise DataError("data.validation_fraction: fewer validation images than processes")
    facts = model_info_from(config, splits)
    loader, panel = faculty.load(splits, accelerator)
    _check_update(config, loader)
    config = config.replace(teacher={"memory_format": faculty.layouts})
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        student = build_student(facts)
    notes = (
        None if init_weights is None else init_student(student.network, init_weights, config, facts)
    )
    masks = None if resumed else init_masks(config, init_weights, student.network)
    freeze_except(student.network, config.optim.trainable)
    student.frozen_backbone = config.optim.trainable in ("heads", "adapters")
    if config.run.linear_backend == "onednn":
        use_onednn(student)
    if config.run.activation_checkpointing:
        _recompute(config, student.network)
    pieces = shard_degree(config.run.sharding, accelerator.num_processes)
    if pieces == 1:  # else no device is asked to hold it whole, not even for a moment
        student = student.to(accelerator.device)
    _check_student(config, student)
    average = None
    if config.optim.ema_epochs > 0:
        # Copied before Accelerate binds its own forward to the student.
        horizon = config.optim.ema_epochs * loader.steps_per_epoch
        average = EMA(student, horizon=horizon, device=accelerator.device)
    if pieces > 1:
        mesh = device_mesh(
            pieces, accelerator.num_processes, accelerator.device, config.run.timeout_s
        )
        for model in (student, average.model) if average is not None else (student,):
            shard_model(model, mesh, compressed=config.run.gradient_compression == "bf16")
    held = None if masks is None else PruningMasks(masks, student.network)
    optimizer = build_optimizer(student, config.optim, _scales(config, student))
    if config.run.compile != "none":
        compile_module(student, config.run.compile)
    student = accelerator.prepare_model(student, evaluation_mode=pieces > 1)  # then not in DDP too
    optimizer = accelerator.prepare_optimizer(optimizer)
    return TrainingRun(
        config=config,
        out=out,
        accelerator=accelerator,
        splits=splits,
        facts=facts,
        panel=panel,
        loader=loader,
        student=student,
        optimizer=optimizer,
        average=average,
        state=TrainState(
            epoch=config.init.start_step // loader.steps_per_epoch,
            step=config.init.start_step,
            fingerprint=splits.fingerprint,
            targets=faculty.digests,
            teachers=faculty.weight_digests,
        ),
        masks=held,
        adapter_base=None if notes is None else _base_of(config, out, notes),
        init_report=notes,
    )


def _base_of(config: Config, out: Path, notes: dict[str, Any]) -> AdapterBase | None:
    """What adapters that are trained alone belong to. notes: what `begin` gave."""
    if config.optim.trainable != "adapters":
        return None
    return base_of(notes["source"], notes["weights"], config.init.pos_embed_resize, out=out)


def _check_update(config: Config, loader: TrainLoader) -> None:
    """Refuse to begin behind the end. Raises ConfigError."""
    updates = config.optim.epochs * loader.steps_per_epoch
    if config.init.start_step >= updates:
        raise ConfigError(
            f"init.start_step = {config.init.start_step}: the run has {updates} updates"
        )
    if late := [one for one in config.run.keep_steps if one > updates]:
        raise ConfigError(f"run.keep_steps = {late[0]}: the run has {updates} updates")


def _recompute(config: Config, network: nn.Module) -> None:
    """Have a network compute its blocks again in the backward pass. Raises ConfigError."""
    if not recomputes(network):
        raise ConfigError(
            f"run.activation_checkpointing = True: {config.student.name} has no blocks that it "
            "could compute "
            "again; --optim.grad_accum_steps saves memory too"
        )


def _scales(config: Config, student: nn.Module) -> dict[str, float] | None:
    """The factor of the learning rate of each of the student's parameters; None: 1 for all."""
    if config.optim.layer_decay == 1:
        return None
    scales = layer_lr_scales(layer_depths(student.network), config.optim.layer_decay)
    return {f"network.{name}": scale for name, scale in scales.items()}


def _check_student(config: Config, student: nn.Module) -> None:
    """What the name of a timm model cannot promise, the built network must show."""
    name, side = config.student.name, config.student.image_size
    taught = config.loss.kind != "none" and config.loss.head == "distillation"
    if taught and not has_distillation_head(student.network):
        raise ConfigError(f"student.name = {name!r}: has no distillation head to distil through")
    images = torch.zeros(2, 3, side, side, device=next(student.parameters()).device)
    try:
        with torch.no_grad():
            student.eval()(images)
    except RuntimeError as error:
        if is_out_of_memory(error):  # which says nothing of the size
            raise
        raise ConfigError(
            f"student.image_size = {side}: {name} cannot take images of this size "
            f"({str(error).splitlines()[0]})"
        ) from None


def _dry_run(run: TrainingRun) -> None:
    """One training epoch of one update and one evaluation step."""
    config = run.config
    batches = run.loader.epoch(0)
    first = (next(batches) for _ in range(config.optim.grad_accum_steps))
    tally = MetricAccumulator(run.accelerator, {})
    steps = run.loader.steps_per_epoch
    for update in train_epoch(step_context(run), first, tally, step=0, steps=steps):
        if not update.applied:
            raise NumericsError("the loss or gradient of the first update is not finite")
    number = max(config.run.eval_batch_size, run.accelerator.num_processes)
    few = run.splits.validation.select(slice(number))
    predict_split(run.accelerator, run.student, few, config, "dry run")
    loss = tally.compute()["loss"]
    info(f"dry run: one update (loss {loss:.4f}) and one evaluation step; nothing written")


def step_context(run: TrainingRun) -> StepContext:
    """What the training loop needs of a run's parts."""
    return StepContext(
        accelerator=run.accelerator,
        student=run.student,
        teacher=run.panel,
        optimizer=run.optimizer,
        average=run.average,
        loss=run.config.loss,
        optim=run.config.optim,
        seed=run.config.run.seed,
        cuda_graphs=uses_cuda_graphs(run.config.run.compile),
        masks=run.masks,
    )


def _train_epochs(run: TrainingRun, interruption: GracefulStop) -> None:
    """Train, save, evaluate and log, epoch by epoch, from wherever the state is.

    Saved before the evaluation: a run that is killed there evaluates again, and trains nothing
    again. Raises Stopped, after a checkpoint, where a signal asks for it.
    """
    config, state, steps = run.config, run.state, run.loader.steps_per_epoch
    while state.epoch < config.optim.epochs:
        tally = MetricAccumulator(run.accelerator, state.metric_sums)
        speed = _train_epoch(run, tally, interruption)
        started = time.monotonic()
        state.epoch += 1
        last = lr_at(state.step - 1, optim=config.optim, steps_per_epoch=steps)
        row = {"epoch": state.epoch, "step": state.step, "train": {**tally.compute(), "lr": last}}
        row |= speed
        if state.epoch % config.run.eval_every_epochs == 0 or state.epoch == config.optim.epochs:
            row["validation"] = _validate(run, interruption)
        state.metric_sums = {}
        state.seconds += time.monotonic() - started
        row["seconds"] = state.seconds
        finish_epoch(run, row)
        track(run.accelerator, row)
        log_epoch(row, config.optim.epochs, config.loss)


def _train_epoch(
    run: TrainingRun, tally: MetricAccumulator, interruption: GracefulStop
) -> dict[str, Any]:
    """Train what is left of the epoch, with a checkpoint at its end; how fast that was."""
    config, state, loader = run.config, run.state, run.loader
    epoch, steps = state.epoch, loader.steps_per_epoch
    resuming = state.step - epoch * steps
    if resuming == steps:
        return {}  # a resumed run that was evaluating
    views = epoch if run.num_view_epochs is None else epoch % run.num_view_epochs
    batches = progress(
        interruption.micro_batches(
            loader.epoch(views, done=resuming), each=config.optim.grad_accum_steps
        ),
        total=steps * config.optim.grad_accum_steps,
        done=resuming * config.optim.grad_accum_steps,
        title=f"epoch {epoch + 1}/{config.optim.epochs}",
    )
    started, before = time.monotonic(), state.seconds
    interruption.reset_timing()
    watch, ended, saved = NonFiniteMonitor(run), False, True
    for update in train_epoch(step_context(run), batches, tally, step=state.step, steps=steps):
        state.step += 1
        state.samples_seen += config.optim.batch_size
        state.seconds = before + time.monotonic() - started
        watch(state.step, update)
        fault_point("update")
        ended = state.step == (epoch + 1) * steps
        every = config.run.save_every_steps
        regular = ended or (every is not None and state.step % every == 0)
        regular |= state.step in config.run.keep_steps
        signal = interruption.pending_signal(now=ended)
        saved = bool(regular or signal)
        if saved:
            watch.flush()
            save_checkpoint(run, tally, in_hash_chain=regular)
        if signal in STOPPING:
            raise StoppedBySignal(signal)
    if not ended:  # a signal came before the next images
        if not saved:
            watch.flush()
            save_checkpoint(run, tally, in_hash_chain=False)
        raise StoppedBySignal(interruption.noted)
    trained_s, trained = state.seconds - before, (steps - resuming) * config.optim.batch_size
    return {
        "images_per_s": trained / trained_s,
        "memory_mb": peak_memory_mb(run.accelerator.device),
        "loader": _of_loader(loader, trained_s),
    }


def _of_loader(loader: TrainLoader, trained_s: float) -> dict[str, Any]:
    """Images/s of each stage (`reading`: of one worker) and the share of the time they took; both
    of the main process."""
    seconds = loader.stages.seconds()
    own = sum(took for stage, took in seconds.items() if stage != "reading")
    return {"share": own / trained_s, "images_per_s": loader.stages.rates()}


def _validate(run: TrainingRun, interruption: GracefulStop) -> dict[str, float]:
    """Top-1 by head on the validation split, of the average too where there is one, and how often
    the fused (or only) head agrees with the teacher."""
    labels = run.splits.validation.labels
    models = {"": run.student}
    if run.average is not None:
        models["average_"] = run.average.model
    found: dict[str, float] = {}
    for prefix, model in models.items():
        interruption.reset_timing()
        with interruption.parallel():
            outputs = predict_split(
                run.accelerator,
                model,
                run.splits.validation,
                run.config,
                "evaluating",
                interruption=interruption,
            )
        heads = logits_by_head(outputs)
        heads.pop("fused_softmax", None)
        for name, logits in heads.items():
            found[f"{prefix}{name}_top1"] = topk_accuracy(logits, labels)
        if run.teacher_predictions is not None:
            fused = heads.get("fused", heads["class"]).argmax(dim=1)
            found[f"{prefix}agreement"] = agreement(fused, run.teacher_predictions)
    return found
