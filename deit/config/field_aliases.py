"""The field or option that a wrong name means: by the names of other programs, then by spelling."""

import difflib
from collections.abc import Iterable, Mapping

from deit.core.errors import single_line

_OTHER_NAMES = {
    "out": "output output_dir out_dir outdir save_dir save_path log_dir logdir run_dir dest",
    "resume": "auto_resume continue resume_from",
    "loss": "distillation_type distillation kd_type kd_loss loss_type loss_fn distill",
    "augmentation": "augment augmentations aug transforms",
    "data.root": "data data_dir data_path data_folder dataset_dir dataset_path dataset_root path "
    "root_dir image_dir train_dir imagenet_path data.path data.dir data.folder",
    "data.source": "dataset data_set data_name dataset_name data.name data.dataset source",
    "data.num_workers": "workers num_worker n_workers j dataloader_num_workers",
    "data.storage": "cache cache_mode cache_images in_memory",
    "data.validation_fraction": "val_split validation_split val_fraction val_ratio val_size",
    "data.test_fraction": "test_split test_size test_ratio",
    "data.train_fraction": "subset subset_fraction fraction train_size",
    "data.classes": "class_names class_map names classes",
    "views.flip": "hflip horizontal_flip fliplr random_flip",
    "views.crop_scale": "scale rrc_scale crop_min_scale random_resized_crop_scale",
    "views.crop_ratio": "ratio rrc_ratio aspect_ratio",
    "views.auto_augment": "aa autoaug auto_aug randaug randaugment rand_augment trivial_augment",
    "views.color_jitter": "jitter colorjitter color",
    "views.erasing_prob": "reprob random_erase random_erasing erasing re_prob cutout",
    "views.aug_repeats": "repeated_aug repeats aug_repeat ra_repeats",
    "views.mixup_alpha": "mixup",
    "views.cutmix_alpha": "cutmix",
    "views.mixup_switch_prob": "switch_prob",
    "views.eval_crop_pct": "val_crop_pct test_crop_pct center_crop_pct",
    "views.mean": "mean img_mean normalize_mean",
    "views.std": "std img_std normalize_std",
    "student.name": "model arch model_name architecture backbone student student_model network net "
    "name student.model student.arch student.architecture model_type",
    "student.image_size": "img_size imgsz input_size image_size resolution size "
    "img_sz input_resolution",
    "student.patch_size": "patch patch_sz",
    "student.embed_dim": "dim hidden_size hidden_dim width embed embedding_dim d_model",
    "student.depth": "layers num_layers n_layers num_blocks blocks n_layer",
    "student.num_heads": "heads n_heads n_head num_attention_heads",
    "student.drop_path": "drop_path_rate stochastic_depth stochastic_depth_prob droppath",
    "student.dropout": "drop drop_rate dropout_rate drop_out",
    "init.weights": "pretrained weights checkpoint ckpt finetune load init_weights pretrained_path "
    "initial_checkpoint pretrained_weights",
    "teacher.source": "teacher teacher_path teacher_model teacher_name teacher_checkpoint "
    "teacher_weights teacher_ckpt teachers kd_model_name teacher.path teacher.model teacher.name "
    "teacher.checkpoint",
    "teacher.architecture": "teacher_arch teacher.arch",
    "teacher.target_stores": "targets target_store stored_targets soft_labels teacher_logits store "
    "stores fkd_path",
    "loss.distillation_weight": "alpha distillation_alpha distill_weight kd_weight kd_loss_weight "
    "lambda lam distill_alpha teacher_weight loss.alpha",
    "loss.temperature": "tau t temp distillation_tau distillation_temperature kd_temperature "
    "kd_temp softmax_temperature",
    "loss.label_weight": "ce_weight task_loss_weight hard_weight",
    "loss.label_smoothing": "smoothing label_smooth ls",
    "loss.kind": "loss.type loss.name",
    "optim.lr": "learning_rate lr learningrate base_lr peak_lr max_lr lr0 blr",
    "optim.min_lr": "lr_min eta_min final_lr lrf end_lr min_learning_rate",
    "optim.warmup_lr": "warmup_learning_rate warmup_start_lr warmup_lr_init",
    "optim.weight_decay": "wd decay weightdecay l2 weight_decay_rate",
    "optim.batch_size": "bs batch batchsize b batch_size train_batch_size global_batch_size "
    "per_device_train_batch_size total_batch_size",
    "optim.epochs": "num_epochs epoch max_epochs n_epochs epochs num_train_epochs train_epochs ep",
    "optim.warmup_epochs": "warmup warmup_steps num_warmup_steps warm_up lr_warmup_epochs "
    "warmup_epoch",
    "optim.name": "opt optimizer optim",
    "optim.grad_accum_steps": "accum_iter grad_accum accum gradient_accumulation_steps accumulate "
    "accumulate_grad_batches update_freq accumulation_steps",
    "optim.clip_grad_norm": "clip_grad grad_clip max_grad_norm gradient_clip_val clip_norm clip "
    "clip_value gradient_clip",
    "optim.layer_decay": "llrd layerwise_lr_decay lr_decay_rate",
    "optim.lr_milestones": "milestones decay_milestones decay_epochs lr_steps",
    "optim.ema_epochs": "ema model_ema ema_decay model_ema_decay ema_momentum",
    "optim.trainable": "freeze frozen freeze_backbone train_only",
    "run.seed": "seed random_seed manual_seed rng_seed",
    "run.device": "gpu gpus cuda cpu accelerator dev",
    "run.precision": "amp dtype fp16 bf16 mixed_precision half amp_dtype",
    "run.compile": "torchcompile torch_compile",
    "run.activation_checkpointing": "grad_checkpointing gradient_checkpointing checkpointing",
    "run.sharding": "fsdp shard zero strategy",
    "run.trackers": "wandb tensorboard mlflow logger loggers report_to tracker log_wandb track",
    "run.save_every_steps": "save_every save_steps save_freq checkpoint_every save_interval",
    "run.eval_every_epochs": "eval_every eval_interval val_interval eval_freq val_freq",
    "run.num_checkpoints": "save_total_limit keep_checkpoints checkpoint_hist",
    "run.eval_batch_size": "val_batch_size validation_batch_size vbs test_batch_size batch_size "
    "per_device_eval_batch_size",
}
"""Names in DeiT, timm, torchvision, transformers, Lightning, ultralytics and papers, by our field
or option. A name with several fields means the first one that the command has. Our own names are
here if several sections have a field of that name."""


def _by_alias() -> dict[str, tuple[str, ...]]:
    aliases: dict[str, tuple[str, ...]] = {}
    for target, names in _OTHER_NAMES.items():
        for name in names.split():
            aliases[name] = (*aliases.get(name, ()), target)
    return aliases


ALIASES = _by_alias()
"""The fields and options that a name of other programs means, the likeliest first."""


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known field or option that a name means; None if none is close.

    name, known: without `--`; hyphens and underscores are equal. A name means, in this order: a
    known name with other hyphens; an option without a section of nearly this name; the field that
    has this name in another program; a field of this name in another section; the closest spelling
    of one of these, in the same section if possible.

    >>> closest_name("optim.learning_rate", ["optim.lr", "optim.min_lr"])
    'optim.lr'
    >>> closest_name("momentum", ["out", "optim.momentum"])
    'optim.momentum'
    >>> closest_name("optim.epochz", ["optim.epochs", "optim.lr"])
    'optim.epochs'
    """
    by_spelling = {_spelling(text): text for text in known}
    name = _spelling(name)
    section, _, leaf = name.rpartition(".")
    leaves: dict[str, list[str]] = {}
    for text in by_spelling:
        leaves.setdefault(text.rpartition(".")[2], []).append(text)
    for alias, targets in ALIASES.items():
        if "." not in alias and (present := [text for text in targets if text in by_spelling]):
            leaves.setdefault(alias, []).extend(present)
    own_options = [] if section else [text for text in by_spelling if "." not in text]
    candidates = (
        name,
        *difflib.get_close_matches(name, own_options, n=1, cutoff=0.85),
        *_targets(name),
        *_targets(leaf),
        *leaves.get(leaf, ()),
        *difflib.get_close_matches(name, by_spelling, n=1, cutoff=0.75),
        *_in_section(section, difflib.get_close_matches(leaf, leaves, n=1), leaves),
        *difflib.get_close_matches(name, by_spelling, n=1),
    )
    return next((by_spelling[text] for text in candidates if text in by_spelling), None)


def _in_section(section: str, names: Iterable[str], leaves: Mapping[str, list[str]]) -> list[str]:
    """Return the fields with one of some names, those of a section first."""
    fields = [field for name in names for field in leaves[name]]
    return sorted(fields, key=lambda field: field.rpartition(".")[0] != section)


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean X?` for the closest name, or an empty text. prefix: written before X.

    >>> suggestion("wd", ["optim.weight_decay"], prefix="--")
    '; did you mean --optim.weight_decay?'
    """
    closest = closest_name(name, known)
    return "" if closest is None else f"; did you mean {prefix}{single_line(closest)}?"


def _targets(name: str) -> tuple[str, ...]:
    return ALIASES.get(name, ALIASES.get(name.removeprefix("no_"), ()))


def _spelling(name: str) -> str:
    return name.replace("-", "_").lower()
