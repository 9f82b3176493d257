"""Train vision transformers on small datasets by distillation.

The names below are imported at their first use, so that `import deit` does not import torch.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.2.0"

# In a checkout, `models/` and `datasets/` are next to this package. Appending the root to the
# search path makes them `deit.models` and `deit.datasets`, as in a wheel. They have no __init__.py,
# so that they cannot shadow another package named `datasets`.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file() and (_ROOT / "datasets").is_dir():
    __path__.append(str(_ROOT))

_MODULES = {
    "deit.config.recipes": ("list_recipes", "recipe"),
    "deit.config.schema": ("Config",),
    "deit.config.sections.data": ("DataConfig",),
    "deit.config.sections.views": ("ViewsConfig",),
    "deit.config.sections.student": ("StudentConfig",),
    "deit.config.sections.init": ("InitConfig",),
    "deit.config.sections.teacher": ("TeacherConfig",),
    "deit.config.sections.loss": ("LossConfig",),
    "deit.config.sections.optim": ("OptimConfig",),
    "deit.config.sections.run": ("RunConfig",),
    "deit.api.training": ("dry_run", "finetune", "train"),
    "deit.api.run": ("Run", "load_run"),
    "deit.api.doctor": ("doctor",),
    "deit.core.machine.checks": ("Check",),
    "deit.api.evaluation": ("evaluation_batches",),
    "deit.api.experiments": ("SweepResult", "compare", "sweep"),
    "deit.experiments.sweep_spec": ("Sweep",),
    "deit.training.epochs": ("EpochCallback",),
    "deit.evaluation.evaluate": ("EvaluationResult", "evaluate"),
    "deit.evaluation.predictions": ("ImageInput", "Prediction"),
    "deit.analysis.report": ("report",),
    "deit.analysis.view_sheet": ("view_sheet",),
    "deit.deploy.export": ("export",),
    "deit.deploy.quantize": ("quantize",),
    "deit.deploy.quantize_options": ("QuantizeOptions",),
    "deit.distill.load_teacher": ("load_teacher",),
    "deit.distill.teacher_ensemble": ("TeacherEnsemble", "TeacherFn"),
    "deit.distill.losses": ("DistillationLoss", "Losses", "distillation_loss"),
    "deit.distill.loss_inputs": ("StudentLogits", "TeacherTarget"),
    "deit.distill.target_store": ("TargetStore",),
    "deit.distill.write_targets": ("write_targets",),
    "deit.datasets.loader": ("TrainLoader",),
    "deit.datasets.splits": ("Splits", "load_splits"),
    "deit.datasets.images": ("EncodedImages", "InMemoryImages"),
    "deit.datasets.views": ("ChannelStats",),
    "deit.datasets.view_samplers": ("make_views",),
    "deit.models.saved_student": ("build_student", "load_student", "save_student"),
    "deit.models.student": ("Student",),
    "deit.models.metadata": ("ModelInfo",),
    "deit.models.teachers": ("Teacher",),
    "deit.core.types": ("Batch", "StudentOutput", "TeacherOutput", "logits_by_head"),
}
"""The public names by module; `errors` is a module itself."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", "errors", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> _Any:
    if name == "errors":
        value = _import_module("deit.errors")
    elif name in _MODULE_OF:
        value = getattr(_import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'deit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if TYPE_CHECKING:  # for editors and type checkers; a test compares it with the table above
    from deit import errors as errors
    from deit.analysis.report import report as report
    from deit.analysis.view_sheet import view_sheet as view_sheet
    from deit.api.doctor import doctor as doctor
    from deit.api.evaluation import evaluation_batches as evaluation_batches
    from deit.api.experiments import SweepResult as SweepResult
    from deit.api.experiments import compare as compare
    from deit.api.experiments import sweep as sweep
    from deit.api.run import Run as Run
    from deit.api.run import load_run as load_run
    from deit.api.training import dry_run as dry_run
    from deit.api.training import finetune as finetune
    from deit.api.training import train as train
    from deit.config.recipes import list_recipes as list_recipes
    from deit.config.recipes import recipe as recipe
    from deit.config.schema import Config as Config
    from deit.config.sections.data import DataConfig as DataConfig
    from deit.config.sections.init import InitConfig as InitConfig
    from deit.config.sections.loss import LossConfig as LossConfig
    from deit.config.sections.optim import OptimConfig as OptimConfig
    from deit.config.sections.run import RunConfig as RunConfig
    from deit.config.sections.student import StudentConfig as StudentConfig
    from deit.config.sections.teacher import TeacherConfig as TeacherConfig
    from deit.config.sections.views import ViewsConfig as ViewsConfig
    from deit.core.machine.checks import Check as Check
    from deit.core.types import Batch as Batch
    from deit.core.types import StudentOutput as StudentOutput
    from deit.core.types import TeacherOutput as TeacherOutput
    from deit.core.types import logits_by_head as logits_by_head
    from deit.datasets.images import EncodedImages as EncodedImages
    from deit.datasets.images import InMemoryImages as InMemoryImages
    from deit.datasets.loader import TrainLoader as TrainLoader
    from deit.datasets.splits import Splits as Splits
    from deit.datasets.splits import load_splits as load_splits
    from deit.datasets.view_samplers import make_views as make_views
    from deit.datasets.views import ChannelStats as ChannelStats
    from deit.deploy.export import export as export
    from deit.deploy.quantize import quantize as quantize
    from deit.deploy.quantize_options import QuantizeOptions as QuantizeOptions
    from deit.distill.load_teacher import load_teacher as load_teacher
    from deit.distill.loss_inputs import StudentLogits as StudentLogits
    from deit.distill.loss_inputs import TeacherTarget as TeacherTarget
    from deit.distill.losses import DistillationLoss as DistillationLoss
    from deit.distill.losses import Losses as Losses
    from deit.distill.losses import distillation_loss as distillation_loss
    from deit.distill.target_store import TargetStore as TargetStore
    from deit.distill.teacher_ensemble import TeacherEnsemble as TeacherEnsemble
    from deit.distill.teacher_ensemble import TeacherFn as TeacherFn
    from deit.distill.write_targets import write_targets as write_targets
    from deit.evaluation.evaluate import EvaluationResult as EvaluationResult
    from deit.evaluation.evaluate import evaluate as evaluate
    from deit.evaluation.predictions import ImageInput as ImageInput
    from deit.evaluation.predictions import Prediction as Prediction
    from deit.experiments.sweep_spec import Sweep as Sweep
    from deit.models.metadata import ModelInfo as ModelInfo
    from deit.models.saved_student import build_student as build_student
    from deit.models.saved_student import load_student as load_student
    from deit.models.saved_student import save_student as save_student
    from deit.models.student import Student as Student
    from deit.models.teachers import Teacher as Teacher
    from deit.training.epochs import EpochCallback as EpochCallback
