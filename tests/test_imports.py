"""The floor plan: who may import whom, what no file may do, and whose `datasets` is found."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.processes import stand_in

ROOT = Path(__file__).parents[1]
FOLDERS = ("deit", "models", "datasets", "scripts")


class Place(NamedTuple):
    """A module's floor (0 lowest), its third-party packages, and its doors on the same floor."""

    floor: int
    packages: frozenset[str] = frozenset()
    doors: frozenset[str] = frozenset()


def place(floor: int, packages: str = "", doors: str = "") -> Place:
    return Place(floor, frozenset(packages.split()), frozenset(doors.split()))


def network(doors: str = "") -> Place:
    return place(
        1,
        "torch timm safetensors pydantic",
        " ".join(f"deit.models.{door}" for door in doors.split()),
    )


def image(doors: str = "", packages: str = "") -> Place:
    return place(
        1,
        f"torch torchvision numpy einops PIL psutil sklearn {packages}",
        " ".join(f"deit.datasets.{door}" for door in doors.split()),
    )


PLAN = {
    "deit": place(0),
    "deit.errors": place(0, doors="deit.text"),
    "deit.text": place(0),
    "deit.threads": place(0),
    "deit.inputs": place(0, doors="deit.errors"),
    "deit.files": place(0, doors="deit.errors deit.inputs"),
    "deit.faults": place(0, "torch", "deit.errors"),
    "deit.launcher": place(0, "psutil"),
    "deit.processes": place(1),
    "deit.disk": place(0, "safetensors", "deit.errors deit.faults deit.inputs"),
    "deit.manifest": place(0, "pydantic", "deit.errors deit.inputs deit.threads deit.typed_json"),
    "deit.typed_json": place(0, "pydantic", "deit.disk deit.errors deit.inputs"),
    "deit.console": place(0, "rich", "deit.errors deit.text"),
    "deit.config": place(0, "pydantic"),
    "deit.seats": place(0, doors="deit.config"),
    "deit.records": place(0, "torch"),
    "deit.memory": place(0, "torch accelerate psutil", "deit.errors deit.launcher"),
    "deit.keys": place(0, "torch"),
    "deit.sharding": place(0, "torch", "deit.errors"),
    "deit.transfer": place(0, "torch"),
    "deit.scopes": place(0, doors="deit.errors"),
    "deit.ticket_options": place(1),
    "deit.begun": place(1),
    "deit.processor": place(0),
    "deit.latency": place(0, "torch"),
    "deit.presets": place(1),
    "deit.checks": place(1),
    "deit.validation": place(1, "pydantic", "deit.checks"),
    "deit.journal": place(1, "pydantic"),
    "deit.checkpoint": place(1),
    "deit.optimizer_state": place(1, "torch safetensors"),
    "deit.losses": place(1, "torch"),
    "deit.ensembles": place(1, "torch"),
    "deit.optim": place(1, "torch"),
    "deit.metrics": place(1, "torch"),
    "deit.drawing": place(1, "matplotlib"),
    "deit.models.small_convnet": network(),
    "deit.models.dense": place(1, "torch"),
    "deit.models.rounding": place(1, "torch"),
    "deit.models.student": network("convpass rounding"),
    "deit.models.weights": network(),
    "deit.models.rednet": place(1, "torch einops"),
    "deit.models.linear": place(1, "torch", "deit.models.rounding"),
    "deit.models.layout": place(1, "torch"),
    "deit.models.multiplexing": place(1, "torch timm einops"),
    "deit.models.convpass": network(),
    "deit.models.networks": network("convpass dense multiplexing rednet rounding small_convnet"),
    "deit.models.facts": network(),
    "deit.models.base": network("weights"),
    "deit.models.saved": network("facts networks start student weights"),
    "deit.models.positions": place(1, "torch einops"),
    "deit.models.layers": network("convpass"),
    "deit.models.masks": network("layers weights"),
    "deit.models.slimming": place(1, "torch einops"),
    "deit.models.start": network(
        "base convpass facts layers masks networks positions rounding transformers_format weights"
    ),
    "deit.models.timm_format": network("facts layers networks"),
    "deit.models.transformers_format": place(
        1, "torch transformers", "deit.models.facts deit.models.networks"
    ),
    "deit.models.attention": place(1, "torch timm einops"),
    "deit.models.merging": network("convpass multiplexing"),
    "deit.models.cost": place(1, "torch"),
    "deit.models.teachers": network("facts layers layout networks saved student weights"),
    "deit.datasets.images": image(),
    "deit.datasets.decoding": image("images"),
    "deit.datasets.stores": image(),
    "deit.datasets.listing": image("decoding images"),
    "deit.datasets.folders": image("listing stores"),
    "deit.datasets.shards": image("decoding listing stores"),
    "deit.datasets.readers": image("listing shards stores", "timm"),
    "deit.datasets.sources": image("folders images listing readers shards"),
    "deit.datasets.mixing": image(),
    "deit.datasets.spread": image(),
    "deit.datasets.stages": image(),
    "deit.datasets.pieces": image(),
    "deit.datasets.resizing": image("pieces"),
    "deit.datasets.operations": image("pieces resizing"),
    "deit.datasets.policies": image("operations resizing"),
    "deit.datasets.views": image("operations pieces policies resizing"),
    "deit.datasets.reading": image("decoding images views"),
    "deit.datasets.looks": image("images reading resizing views"),
    "deit.datasets.splits": image("decoding images listing sources"),
    "deit.datasets.variants": image("folders images", "timm"),
    "deit.datasets.loader": image("images looks mixing reading resizing stages views"),
    "deit.free_weights": place(1, "torch"),
    "deit.krylov": place(1, "torch"),
    "deit.volume": place(1, "torch"),
    "deit.surface": place(2, "torch"),
    "deit.directions": place(2, "torch", "deit.surface"),
    "deit.curvature": place(2, "torch"),
    "deit.hyper_rule": place(2),
    "deit.tuning": place(2, doors="deit.hyper_rule"),
    "deit.recipes": place(3),
    "deit.studies": place(4),
    "deit.scan": place(2, "torch"),
    "deit.environment": place(2, "torch accelerate"),
    "deit.evaluation_tables": place(3),
    "deit.interruption": place(2, "torch accelerate"),
    "deit.panel": place(2, "torch accelerate", "deit.environment"),
    "deit.targets": place(2, "torch numpy"),
    "deit.engine": place(3, "torch accelerate einops"),
    "deit.options": place(1),
    "deit.grammar": place(1, doors="deit.options"),
    "deit.arguments": place(4),
    "deit.parts": place(3, "torch accelerate pydantic"),
    "deit.trackers": place(3, "accelerate mlflow"),
    "deit.preparation": place(3, "accelerate torch"),
    "deit.fingerprint": place(3),
    "deit.target_units": place(3, "numpy"),
    "deit.ground": place(5),
    "deit.prediction": place(4, "torch accelerate"),
    "deit.stored": place(4, "torch"),
    "deit.announce": place(4, "torch accelerate"),
    "deit.saving": place(4, "torch"),
    "deit.restoring": place(5, "torch accelerate"),
    "deit.mishaps": place(4, "torch"),
    "deit.contact_sheet": place(4, "torch numpy PIL accelerate"),
    "deit.preflight": place(5, "torch accelerate"),
    "deit.evaluation": place(5, "torch", "deit.preflight"),
    "deit.formats": place(2, "torch onnx onnxruntime"),
    "deit.quantization": place(2, "torch onnx onnxruntime", "deit.quantization_layers"),
    "deit.quantization_layers": place(2, "torch onnx onnxruntime"),
    "deit.quantization_tables": place(3),
    "deit.float_file": place(6, "torch", "deit.export"),
    "deit.side_by_side": place(6, "torch", "deit.export deit.float_file"),
    "deit.quantize": place(6, "torch", "deit.export deit.float_file deit.side_by_side"),
    "deit.pictures": place(1, "matplotlib", "deit.drawing"),
    "deit.predict": place(5, "torch", "deit.preflight"),
    "deit.model_card": place(2, "huggingface_hub"),
    "deit.export": place(6, "torch"),
    "deit.survey": place(6, "torch"),
    "deit.teaching": place(6, "torch accelerate"),
    "deit.target_writer": place(6, "torch numpy accelerate"),
    "deit.target_verifier": place(6),
    "deit.run": place(7, "torch accelerate"),
    "deit.at_once": place(2, "torch"),
    "deit.comparison": place(8),
    "deit.outcome": place(5),
    "deit.summary": place(5),
    "deit.measured": place(6),
    "deit.sweep_file": place(5, "yaml"),
    "deit.sweeps": place(6),
    "deit.sweep_results": place(6),
    "deit.sweep_pictures": place(7, "matplotlib"),
    "deit.shared_targets": place(7),
    "deit.finished": place(7),
    "deit.sweep_runs": place(8),
    "deit.sweep_training": place(8, doors="deit.sweep_runs"),
    "deit.sweep_search": place(8, doors="deit.sweep_runs deit.sweep_training"),
    "deit.sweep_rows": place(8, doors="deit.sweep_runs deit.sweep_training"),
    "deit.sweep": place(
        8, doors="deit.sweep_rows deit.sweep_runs deit.sweep_search deit.sweep_training"
    ),
    "deit.prune_options": place(1),
    "deit.prune_choice": place(8, "torch"),
    "deit.prune_results": place(7),
    "deit.prune": place(8, "torch", "deit.prune_choice deit.sweep_training"),
    "deit.landscape_options": place(2),
    "deit.landscape_charts": place(2),
    "deit.landscape_page": place(3),
    "deit.landscape_places": place(7, "torch"),
    "deit.landscape_parts": place(8, "torch"),
    "deit.landscape": place(8, doors="deit.landscape_parts"),
    "deit.ladder_page": place(2, "matplotlib"),
    "deit.ladder": place(7, "torch"),
    "deit.ticket_results": place(2),
    "deit.ticket_pictures": place(2),
    "deit.ticket_plan": place(6),
    "deit.ticket_masks": place(7, "torch"),
    "deit.tickets": place(8, doors="deit.sweep_rows deit.sweep_runs deit.sweep_training"),
    "deit.search": place(6, "optuna sqlalchemy"),
    "deit.page": place(1),
    "deit.charts": place(1, "matplotlib", "deit.drawing"),
    "deit.run_sections": place(7, "torch"),
    "deit.run_pictures": place(7, "torch numpy PIL"),
    "deit.sweep_sections": place(8),
    "deit.report": place(8, doors="deit.sweep_sections"),
    "deit.finetune_arguments": place(5),
    "deit.profiling": place(8, "torch"),
    "deit.commands.training": place(9),
    "deit.commands.measuring": place(9),
    "deit.commands.studies": place(9),
    "deit.commands.data": place(9),
    "deit.commands.smaller": place(9),
    "deit.commands.lottery": place(9),
    "deit.commands": place(
        9,
        doors="deit.commands.data deit.commands.lottery deit.commands.measuring "
        "deit.commands.smaller deit.commands.studies deit.commands.training",
    ),
    "deit.cli": place(10),
    "deit.__main__": place(11),
    "train_deit": place(11),
    "finetune_deit": place(11),
    "evaluate_deit": place(11),
    "scripts.results": place(11),
    "scripts.trust_cost": place(11, "torch"),
    "scripts.faults": place(11),
    "scripts.check_unchanged": place(11, "torch"),
    "scripts.fuzz": place(11, "tests"),
    "scripts.two_hosts": place(11),
    "scripts.sweep_cost": place(11),
    "scripts.smaller": place(11),
    "scripts.smaller_tables": place(10),
    "scripts.landscape_tables": place(10, "matplotlib"),
    "scripts.initialisation": place(11, "torch einops"),
    "scripts.turns": place(9, "torch numpy PIL sklearn"),
    "scripts.sides": place(9, "torch numpy PIL timm"),
    "scripts.benchmark_data": place(10, "torch numpy PIL"),
    "scripts.benchmark_targets": place(10, "torch PIL"),
    "scripts.benchmark_picture": place(9, "matplotlib"),
    "scripts.memory": place(9, "torch"),
    "scripts.training_sides": place(10, "torch PIL timm"),
    "scripts.benchmark_train": place(10, "torch", "scripts.training_sides"),
    "scripts.benchmark": place(11, "torch"),
}


def library() -> dict[str, Path]:
    """Every file of the library and the root scripts by the name it is imported by."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            prefix = ("deit",) if folder in ("models", "datasets") else ()
            name = ".".join(prefix + parts).removesuffix(".__init__")
            files[name] = path
    return files


LIBRARY = library()
EVERYTHING = {**LIBRARY, **{path.stem: path for path in (ROOT / "tests").rglob("*.py")}}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all imports, also of those inside functions; `.` leads a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            for alias in node.names:
                child = f"{origin}.{alias.name}"
                yield child if child in PLAN else origin


def floor_violations(name: str, source: str) -> list[str]:
    here, found = PLAN[name], []
    for target in imported(ast.parse(source)):
        package = target.split(".")[0]
        if target.startswith("."):
            found.append(f"{name}: relative import of {target}")
        elif package == "deit" or target in PLAN:
            there = PLAN.get(target)
            if there is None:
                found.append(f"{name}: {target} is not on the plan")
            elif there.floor >= here.floor and target not in here.doors:
                found.append(f"{name}: no door to {target}")
        elif package not in sys.stdlib_module_names and package not in here.packages:
            found.append(f"{name}: {package} is not for this file")
    return found


UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "system"}


def unsafe_lines(source: str) -> list[str]:
    """What could run foreign code: pickles, torch.load of more than tensors, shells, eval."""
    found = []
    tree = ast.parse(source)
    for name in imported(tree):
        if name.split(".")[0] in UNSAFE_MODULES:
            found.append(f"imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "os"):
            names = {alias.name for alias in node.names}
            found += [f"from {node.module} import {name}" for name in names & {"load", "system"}]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if called in UNSAFE_CALLS:
            found.append(f"line {node.lineno}: {called}")
        if called.endswith("torch.load") and not _true(keywords.get("weights_only")):
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        for keyword in ("shell", "allow_pickle"):
            if keyword in keywords:
                found.append(f"line {node.lineno}: {keyword}=")
    return found


def _true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def bare_imports(source: str) -> list[str]:
    return [
        name for name in imported(ast.parse(source)) if name.split(".")[0] in ("models", "datasets")
    ]


def test_every_file_is_on_the_plan_and_nothing_else():
    assert set(LIBRARY) == set(PLAN)


def test_doors_lead_to_the_same_floor():
    for name, here in PLAN.items():
        assert all(PLAN[door].floor == here.floor for door in here.doors), name


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_imports_point_down(name):
    assert name in PLAN, f"{LIBRARY[name]} is not on the plan"
    assert floor_violations(name, LIBRARY[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("deit.losses", "from deit.run import train"),
        ("deit.losses", "from deit import run"),
        ("deit.losses", "import deit.engine"),
        ("deit.losses", "from deit.optim import lr_at"),
        ("deit.losses", "def late():\n    import deit.cli"),
        ("deit.losses", "import timm"),
        ("deit.config", "import torch"),
        ("deit.records", "from . import text"),
        ("deit.models.student", "from deit.datasets.views import to_unit_float"),
        ("deit.models.student", "from deit.models.teachers import Teacher"),
        ("deit.datasets.views", "import deit.models.weights"),
        ("deit.cli", "import train_deit"),
        ("deit.run", "import deit.tests.test_imports"),
    ],
)
def test_a_planted_import_is_reported(name, source):
    assert len(floor_violations(name, source)) == 1


def test_allowed_imports_are_not_reported():
    source = "import math\nimport torch\nfrom torch import nn\nfrom deit import config\nimport deit"
    assert floor_violations("deit.losses", source) == []


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_no_file_can_run_foreign_code(name):
    assert unsafe_lines(LIBRARY[name].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_a_planted_danger_is_reported(source):
    assert len(unsafe_lines(source)) == 1


def test_safe_calls_are_not_reported():
    assert unsafe_lines("network.eval()\ntorch.load('x', weights_only=True)") == []


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_no_file_imports_models_or_datasets_bare(name):
    assert bare_imports(EVERYTHING[name].read_text()) == []


def test_a_planted_bare_import_is_reported():
    source = "import datasets\nfrom models import student\nimport models.student"
    assert bare_imports(source) == ["datasets", "models", "models.student"]


@pytest.mark.parametrize("folder", ["models", "datasets"])
def test_rooms_are_no_packages(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the root of the checkout, as a user starts one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_line_is_parsed_without_torch():
    code = (
        "import sys, deit.cli, deit.config, deit.validation, deit.recipes, deit.arguments\n"
        "print(sorted({'torch', 'timm', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_hugging_face_datasets_is_not_shadowed_and_accelerate_finds_it_from_our_root(tmp_path):
    """(test_peers.py trains beside it.)"""
    code = (
        "import sys\n"
        "from accelerate.data_loader import prepare_data_loader\n"
        "from torch.utils.data import DataLoader\n"
        "assert 'datasets' not in sys.modules\n"
        "prepare_data_loader(DataLoader([0, 1]), num_processes=2, process_index=0)\n"
        "assert 'datasets' in sys.modules\n"
        "import datasets, deit.datasets.views\n"
        "print(datasets.__file__, deit.datasets.views.__file__, sep='\\n')"
    )
    site = stand_in(tmp_path / "site")
    done = python("-c", code, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    said, theirs, ours = done.stdout.splitlines()
    assert said == "stand-in imported"
    assert Path(theirs) == Path(site) / "datasets" / "__init__.py"
    assert Path(ours) == ROOT / "datasets" / "views.py"


def test_no_test_imports_another():
    """What several need is in tests/helpers: a test file can be renamed, moved or removed alone."""
    importing = re.compile(r"^\s*(from tests\.test_\w+ import|from tests import test_)", re.M)
    files = (ROOT / "tests").rglob("*.py")
    assert [path.name for path in files if importing.search(path.read_text(encoding="utf-8"))] == []
