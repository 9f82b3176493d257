"""The model card of an export: what it is, how good, how it was trained, how to load it."""

import re
import shlex
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.core.console import format_percent
from deit.core.run_folder import ENVIRONMENT, read_environment
from deit.models.saved import ModelInfo
from deit.viz.tables import markdown_table

_LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "pt2": "pytorch"}


def write_card(
    path: Path,
    *,
    run: Path,
    name: str,
    config: Config,
    facts: ModelInfo,
    found: dict[str, Any],
    verified: list[dict[str, Any]],
    licence: str | None,
    quantized: str | None = None,
) -> None:
    """Write README.md with its YAML header, as the Hub reads it.

    name: of the format. found: what deit.evaluation.evaluate.evaluate returns. verified: what
    holding the export against the run showed, one for each loader. quantized: Markdown on the way
    to integers."""
    title = run.resolve().name
    measured = {head: row for head, row in found["heads"].items() if row is not None}
    if found["heads"]["distillation"] is None:
        measured = {"class": measured["class"]}
    best = measured.get("fused", measured["class"])
    data = ModelCardData(
        library_name=_LIBRARIES[name],
        pipeline_tag="image-classification",
        tags=["image-classification", "deit", *(["distillation"] if _taught(config) else [])],
        license=licence,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=_data(config),
                dataset_name=_data(config),
                dataset_split=found["split"],
                metric_type="accuracy",
                metric_value=round(best["top1"], 4),
            )
        ],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        _what(config, facts),
        f"## How good it is\n\n{_results(measured, found)}",
        f"## How it was trained\n\n{_training(run, config)}",
        f"## How to use it\n\n{_SNIPPETS[name].format(**_names(facts))}",
        *([] if quantized is None else [f"## How it was quantized\n\n{quantized}"]),
        f"## What it answers\n\n{_limits(facts, found)}",
        f"## Held against the original\n\n{_checked(verified)}",
    ]
    ModelCard("\n\n".join(sections) + "\n").save(path)


def _data(config: Config) -> str:
    """What the images are called: the data set, or the folder that holds them."""
    data = config.data
    named = {"folder": Path(data.root).resolve().name, "shards": Path(data.root).resolve().name}
    return named.get(data.source) or data.reader or data.source


def _public(word: str) -> str:
    """A word of a command, or a source, without the folders that it lies in: a card goes out into
    the world, the names of somebody's home do not."""
    option, sign, value = word.rpartition("=")
    private = value.startswith("~") or PurePath(value).is_absolute()
    return f"{option}{sign}{PurePath(value).name}" if private else word


def _escaped(text: str) -> str:
    """Somebody's text as Markdown that shows it, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", " ".join(text.split()))


def _taught(config: Config) -> bool:
    return config.loss.kind != "none"


def _what(config: Config, facts: ModelInfo) -> str:
    student = facts.student
    sources = (_public(one.source or "stored answers") for one in teacher_specs(config.teacher))
    teachers = " and ".join(sources)
    taught = f", distilled from {teachers}" if _taught(config) else ", trained by labels alone"
    return (
        f"`{student.name}` at {student.image_size} px for {len(facts.class_names)} classes of "
        f"`{_data(config)}`{taught}."
    )


def _results(measured: dict[str, dict[str, float]], found: dict[str, Any]) -> str:
    rows = [
        (head.replace("_", " "), *(format_percent(row[key]) for key in _MEASURES))
        for head, row in measured.items()
    ]
    if found["teacher"]:
        rows.append(("teacher", *(format_percent(found["teacher"][key]) for key in _MEASURES)))
    table = markdown_table(("head", *_MEASURES.values()), rows)
    told = f"On the {found['num_samples']} images of the {found['split']} split."
    if len(measured) > 1:
        told += " `fused` is the mean of the heads' logits, and what the exported `logits` are."
    return f"{table}\n\n{told}"


_MEASURES = {"top1": "top-1 %", "top5": "top-5 %", "calibration_error": "calibration error %"}


_ALGORITHMS = {"adamw": "AdamW", "sgd": "SGD"}


def _training(run: Path, config: Config) -> str:
    optim, loss = config.optim, config.loss
    lines = [
        f"{optim.epochs} epochs of batches of {optim.batch_size}, "
        f"{_ALGORITHMS[optim.name]} at {optim.peak_lr:.3g}, "
        f"weight decay {optim.weight_decay:g}",
        f"objective: {loss.kind}, through {loss.head}, weight {loss.distillation_weight:g}, "
        f"temperature {loss.temperature:g}"
        if _taught(config)
        else f"objective: labels, smoothing {loss.label_smoothing:g}",
        f"seed {config.run.seed}",
    ]
    if config.init.weights is not None:
        lines.insert(0, f"from the weights of {_public(config.init.weights)}")
    if (run / ENVIRONMENT).is_file():
        about = read_environment(run)
        lines.append(f"on {about.device_name}, torch {about.packages.torch}, commit {about.commit}")
        if about.command:
            words = map(_public, shlex.split(about.command))
            lines.append(f"command: `{shlex.join(words)}`")
    return "\n".join(f"- {line}" for line in lines)


def _limits(facts: ModelInfo, found: dict[str, Any]) -> str:
    shown = ", ".join(_escaped(name) for name in facts.class_names[:20])
    more = f" and {len(facts.class_names) - 20} more" if len(facts.class_names) > 20 else ""
    return (
        f"One of: {shown}{more}. Every picture gets one of these answers, whatever it shows; "
        f"probabilities are as well calibrated as the table says, on pictures like those of the "
        f"{found['split']} split."
    )


def _checked(verified: list[dict[str, Any]]) -> str:
    if not verified:
        return "Not verified: none of the packages that load it was installed."
    rows = [
        (
            one["loader"],
            str(one["images"]),
            f"{one['difference']:.1e}",
            f"{one['allowed']:.1e}",
        )
        for one in verified
    ]
    return markdown_table(("loaded by", "images", "largest difference of a logit", "allowed"), rows)


def _names(facts: ModelInfo) -> dict[str, Any]:
    side = facts.student.image_size
    return {
        "side": side,
        "edge": round(side / facts.evaluation_crop),
        "mean": list(facts.mean),
        "std": list(facts.std),
    }


_PREPARE = """from torchvision.transforms import v2

prepare = v2.Compose([
    v2.PILToTensor(),
    v2.Resize({edge}, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
    v2.CenterCrop({side}),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean={mean}, std={std}),
])
"""

_SNIPPETS = {
    "timm": """```python
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(prepare(Image.open("picture.png").convert("RGB")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
```

transformers loads the same folder, through timm:

```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("picture.png"))
```""",
    "transformers": """```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("picture.png"))
```

The class is made for inference: it has no loss. Its outputs hold `cls_logits` and
`distillation_logits` beside `logits`, where there are two heads. The numbers above are of
pictures cut as torchvision cuts them; of some that are not square its processor cuts the centre
a pixel aside.""",
    "onnx": """```python
import json

import onnxruntime
import torch
from PIL import Image
"""
    + _PREPARE
    + """
session = onnxruntime.InferenceSession("model.onnx")
about = session.get_modelmeta().custom_metadata_map  # mean, std, class_names and more
images = prepare(Image.open("picture.png").convert("RGB")).unsqueeze(0).numpy()
logits = session.run(["logits"], {{"pixel_values": images}})[0]
print(json.loads(about["class_names"])[logits.argmax()])
```""",
    "pt2": """```python
import json

import torch
from PIL import Image
"""
    + _PREPARE
    + """
about = {{"metadata.json": ""}}
model = torch.export.load("model.pt2", extra_files=about).module()
images = prepare(Image.open("picture.png").convert("RGB")).unsqueeze(0)
logits = model(images)[0]
print(json.loads(json.loads(about["metadata.json"])["class_names"])[logits.argmax()])
```""",
}
