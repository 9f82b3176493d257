"""A run on disk as one object: its student, metrics, predictions, evaluation and exports."""

from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.api.figures import plot_curves
from deit.api.run_html import run_html
from deit.config.arguments import checks_types
from deit.config.command_choices import TOP_K, check_at_least, check_choice, check_path
from deit.config.input_paths import unreadable_error
from deit.config.schema import Config
from deit.core import run_folder, run_log
from deit.core.console import format_percent, warn
from deit.core.errors import CheckpointError, ConfigError
from deit.core.tensors import as_device
from deit.evaluation.attention import plot_attention
from deit.evaluation.evaluate import EvaluationResult, evaluate
from deit.evaluation.load_run import find_student, load_run_config, resolve_run
from deit.evaluation.predictions import (
    ImageInput,
    Prediction,
    image_batches,
    image_logits,
    student_heads,
    to_predictions,
)
from deit.models.attention_rollout import check_attention
from deit.models.metadata import ModelInfo
from deit.models.saved_student import load_student
from deit.models.student import Student

# What the methods that write files need is imported inside them: `deit.train` starts sooner.


class Run:
    """A run folder, finished or not. A notebook shows it with its results and curves.

    It can be passed wherever a run folder is expected, such as `deit.evaluate(run)` or
    `deit.load_teacher(run, class_names)`, which then use its checkpoint. Weights are loaded at the
    first use of `student`. checkpoint, device: as given.

    Example:
        >>> run = Run("checkpoints/digits")
        >>> run.config.student.name, run.class_names[:3], len(run.metrics)
        ('deit_micro', ('0', '1', '2'), 2)
        >>> logits = run.logits(torch.rand(5, 3, 8, 8))
        >>> {name: tuple(values.shape) for name, values in logits.items()}
        {'class': (5, 10), 'distillation': (5, 10), 'fused': (5, 10), 'fused_softmax': (5, 10)}
        >>> (prediction,) = run.predict(torch.rand(3, 8, 8), top_k=2)
        >>> len(prediction.top), prediction.class_name == prediction.top[0][0]
        (2, True)
    """

    @checks_types
    def __init__(
        self,
        path: str | PathLike,
        checkpoint: str = "best",
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """path: a run folder, which is read when it is needed; `load_run` checks that it is one. A
        folder of a saved student has `student`, `logits`, `predict` and `plot_attention` too.
        checkpoint: best or last. device: of the student: cpu, cuda, cuda:INDEX, or auto for a GPU
        if there is one."""
        check_choice("checkpoint", checkpoint, run_folder.NAMES)
        self._path = Path(check_path("run", path))
        self._absolute_path = self._path.absolute()
        self.checkpoint = checkpoint
        self.device = as_device(device)

    @property
    def path(self) -> Path:
        """The run folder: as given, or absolute if the working directory has changed."""
        is_same = self._path.absolute() == self._absolute_path
        return self._path if is_same else self._absolute_path

    def __fspath__(self) -> str:
        if self.checkpoint == run_folder.BEST:
            return fspath(self.path)
        return fspath(resolve_run(self.path, self.checkpoint)[1])

    def __repr__(self) -> str:
        result = self.result
        if not (self.path / run_folder.CONFIG).is_file():
            return f"Run({str(self.path)!r}, no run is in this folder)"
        if result is None:
            return f"Run({str(self.path)!r}, not finished: {len(self.metrics)} epochs so far)"
        best = format_percent(result["best"]["top1"])
        return f"Run({str(self.path)!r}, {result['epochs']} epochs, validation top-1 {best} %)"

    def _repr_html_(self) -> str:
        return run_html(self.path, self.config, self.result, self.metrics)

    @property
    def config(self) -> Config:
        """Its configuration, with paths as they are now. Raises ConfigError."""
        return load_run_config(self.path)

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None while the run is not finished."""
        return run_folder.read_result(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict per finished epoch: the rows of metrics.jsonl (docs/reference/run-folder.md)."""
        return run_log.read_metrics(self.path)

    @cached_property
    def _loaded(self) -> tuple[Student, ModelInfo]:
        saved = find_student(self.path, self.checkpoint)
        student, model_info = load_student(saved, device=self.device)
        return student.eval(), model_info

    @property
    def student(self) -> Student:
        """The student of the checkpoint, in evaluation mode. Raises CheckpointError."""
        return self._loaded[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, in the order of the logits. Raises CheckpointError."""
        return self._loaded[1].class_names

    @checks_types
    def logits(self, images: ImageInput, *, batch_size: int = 64) -> dict[str, Tensor]:
        """Return the logits of each head, float32 [B, C] on the CPU.

        images: see `ImageInput`; those of another size are resized and cropped as in an evaluation.
        batch_size: images that are decoded and in memory at a time.
        The heads are class and, with a distillation token, distillation, fused (the mean of both)
        and fused_softmax. Raises ConfigError and DataError for images that cannot be read.
        """
        check_at_least("batch_size", batch_size, 1)
        return self._heads_and_files(images, batch_size)[0]

    def _heads_and_files(
        self, images: ImageInput, batch_size: int, unreadable: dict[str, str] | None = None
    ) -> tuple[dict[str, Tensor], list[str | None]]:
        student, model_info = self._loaded
        heads_of = partial(student_heads, student)
        heads, files = image_logits(
            heads_of, images, model_info, batch_size=batch_size, unreadable=unreadable
        )
        if not files:
            side = model_info.student.image_size
            heads = heads_of(torch.zeros(0, 3, side, side))
        return heads, files

    @checks_types
    def predict(
        self,
        images: ImageInput,
        *,
        top_k: int = TOP_K,
        head: str = "fused",
        batch_size: int = 64,
        skip_unreadable: bool = False,
    ) -> list[Prediction]:
        """Return the most likely classes of each image.

        images, batch_size: as for `logits`. top_k: number of classes. head: class, distillation or
        fused; a student with one head has class only, which is its fused head. skip_unreadable:
        leave out files that cannot be read, with a warning that lists them. Raises as `logits`.
        """
        check_at_least("top_k", top_k, 1)
        check_at_least("batch_size", batch_size, 1)
        unreadable: dict[str, str] | None = {} if skip_unreadable else None
        heads, files = self._heads_and_files(images, batch_size, unreadable)
        if unreadable:
            warn(str(unreadable_error(unreadable, len(files))))
        heads.setdefault("fused", heads["class"])
        check_choice("head", head, heads)
        return to_predictions(heads[head], self.class_names, files, top_k=top_k)

    @checks_types
    def evaluate(
        self, split: str = "test", *, verbose: bool = True, **options: Any
    ) -> EvaluationResult:
        """Evaluate the student on a split: `deit.evaluate` with these options."""
        options |= {"checkpoint": self.checkpoint, "split": split, "verbose": verbose}
        return evaluate(self.path, **options)

    @checks_types
    def export(
        self,
        format: str,
        out: str | PathLike | None = None,
        *,
        verbose: bool = True,
        **options: Any,
    ) -> Path:
        """Write the student for timm, transformers, onnx or pt2, compare the export with it, and
        return the folder: `deit.export` with these options."""
        from deit.deploy.export import export

        options |= {"checkpoint": self.checkpoint, "format": format, "verbose": verbose}
        return export(self.path, out, **options)

    @checks_types
    def quantize(
        self, out: str | PathLike | None = None, *, verbose: bool = True, **options: Any
    ) -> Path:
        """Write the student as int8 ONNX with its measured accuracy, and return the folder.

        options: fields of QuantizeOptions, such as method or max_drop, and root or force as for
        `deit.quantize`.
        """
        from deit.deploy.quantize import quantize
        from deit.deploy.quantize_options import QuantizeOptions

        names = QuantizeOptions.__dataclass_fields__
        fields = {name: options.pop(name) for name in [*options] if name in names}
        settings = QuantizeOptions(**fields)
        options |= {"checkpoint": self.checkpoint, "verbose": verbose}
        return quantize(self.path, out, settings, **options)

    @checks_types
    def finetune(self, out: str | PathLike, **options: Any) -> "Run":
        """Train from the weights of this run: `deit.finetune` with these options."""
        from deit.api.training import finetune  # which imports this module

        return finetune(self, out, **options)

    @checks_types
    def report(
        self, out: str | PathLike | None = None, *, verbose: bool = True, force: bool = False
    ) -> Path:
        """Write an HTML report of the run, and return the page. out: default: report in the run."""
        from deit.analysis.report import report

        folder = self.path / "report" if out is None else Path(out)
        return report(self.path, folder, force=force, verbose=verbose)

    def plot_curves(self) -> Any:
        """Return a matplotlib figure of loss and validation accuracy over the epochs.

        Raises SystemFault if matplotlib is missing, CheckpointError if no epoch is finished.
        """
        if not self.metrics:
            raise CheckpointError(f"{self.path}: no epoch is finished yet")
        return plot_curves(self.metrics, self.result)

    @checks_types
    def plot_attention(self, images: ImageInput, *, max_images: int = 8) -> Any:
        """Return a matplotlib figure of the attention of each token on each image.

        images: as for `logits`. Raises ConfigError for a network without attention, and as
        `logits`.
        """
        check_at_least("max_images", max_images, 1)
        student, model_info = self._loaded
        check_attention(student.network)
        batches = image_batches(images, model_info, batch_size=max_images)
        views, files = next(batches, (None, []))
        if not files:
            raise ConfigError("images: there are none to draw")
        heads = student_heads(student, views)
        return plot_attention(student, views, heads, model_info.class_names, files)


@checks_types
def load_run(
    path: str | PathLike, checkpoint: str = "best", *, device: torch.device | str = "cpu"
) -> Run:
    """Return the run in a folder.

    checkpoint: best or last. device: of the student: cpu, cuda, cuda:INDEX, or auto for a GPU if
    there is one. Raises CheckpointError if the folder is no run, ConfigError for another checkpoint
    or device.

    Example:
        >>> load_run("checkpoints/digits-teacher").config.loss.kind
        'none'
    """
    run = Run(path, checkpoint, device=device)
    run_folder.require_run(run.path)
    return run
