"""The model card of an export: accuracy, training, usage and verification."""

import re
import shlex
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.core.console import format_percent
from deit.core.run_folder import ENVIRONMENT, read_environment
from deit.models.saved_student import ModelInfo
from deit.viz.tables import markdown_table

_LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "pt2": "pytorch"}


def write_card(
    path: Path,
    *,
    run: Path,
    format: str,
    config: Config,
    model_info: ModelInfo,
    metrics: dict[str, Any],
    verified: list[dict[str, Any]],
    license: str | None,
    quantized: str | None = None,
) -> None:
    """Write README.md with the YAML header of Hugging Face's Hub.

    run: the run's folder. format: a key of deit.deploy.export_formats.FORMATS. metrics: as
    deit.evaluation.evaluate.evaluate returns them. verified: the comparisons of the export with the
    run, one per loader, as in deit.deploy.export.Verification. license: of the weights. quantized:
    the section on quantization, as Markdown.
    """
    title = run.resolve().name
    heads = {head: row for head, row in metrics["heads"].items() if row is not None}
    if metrics["heads"]["distillation"] is None:
        heads = {"class": heads["class"]}
    final = heads.get("fused", heads["class"])
    data = ModelCardData(
        library_name=_LIBRARIES[format],
        pipeline_tag="image-classification",
        tags=["image-classification", "deit", *(["distillation"] if _is_distilled(config) else [])],
        license=license,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=_dataset_name(config),
                dataset_name=_dataset_name(config),
                dataset_split=metrics["split"],
                metric_type="accuracy",
                metric_value=round(final["top1"], 4),
            )
        ],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        _summary(config, model_info),
        f"## Accuracy\n\n{_results(heads, metrics)}",
        f"## Training\n\n{_training(run, config)}",
        f"## Usage\n\n{_SNIPPETS[format].format(**_snippet_values(model_info))}",
        *([] if quantized is None else [f"## Quantization\n\n{quantized}"]),
        f"## Predictions\n\n{_limits(model_info, metrics)}",
        f"## Comparison with the original\n\n{_verification(verified)}",
    ]
    ModelCard("\n\n".join(sections) + "\n").save(path)


def _dataset_name(config: Config) -> str:
    """Return the name of the data set, or of the folder with the images."""
    data = config.data
    folder = Path(data.root).resolve().name
    return {"folder": folder, "shards": folder}.get(data.source) or data.reader or data.source


def _without_folders(argument: str) -> str:
    """Return an argument of a command, or a source, without the folders of an absolute path.

    Cards are published, and the folders can contain a user's name.
    """
    option, sign, value = argument.rpartition("=")
    private = value.startswith("~") or PurePath(value).is_absolute()
    return f"{option}{sign}{PurePath(value).name}" if private else argument


def _escaped(text: str) -> str:
    """Return text as Markdown that displays it literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", " ".join(text.split()))


def _is_distilled(config: Config) -> bool:
    return config.loss.kind != "none"


def _summary(config: Config, model_info: ModelInfo) -> str:
    student = model_info.student
    training = ", trained on labels only"
    if _is_distilled(config):
        specs = teacher_specs(config.teacher)
        sources = (_without_folders(spec.source or "stored teacher outputs") for spec in specs)
        training = f", distilled from {' and '.join(sources)}"
    return (
        f"`{student.name}` at {student.image_size} px for {len(model_info.class_names)} classes of "
        f"`{_dataset_name(config)}`{training}."
    )


def _results(heads: dict[str, dict[str, float]], metrics: dict[str, Any]) -> str:
    rows = [
        (head.replace("_", " "), *(format_percent(row[key]) for key in _COLUMNS))
        for head, row in heads.items()
    ]
    if metrics["teacher"]:
        rows.append(("teacher", *(format_percent(metrics["teacher"][key]) for key in _COLUMNS)))
    table = markdown_table(("head", *_COLUMNS.values()), rows)
    note = f"On the {metrics['num_samples']} images of the {metrics['split']} split."
    if len(heads) > 1:
        note += " `fused` is the mean of the heads' logits; the exported `logits` are `fused`."
    return f"{table}\n\n{note}"


_COLUMNS = {"top1": "top-1 %", "top5": "top-5 %", "calibration_error": "calibration error %"}


_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def _training(run: Path, config: Config) -> str:
    optim, loss = config.optim, config.loss
    lines = [
        f"{optim.epochs} epochs of batches of {optim.batch_size}, "
        f"{_OPTIMIZERS[optim.name]} at {optim.peak_lr:.3g}, "
        f"weight decay {optim.weight_decay:g}",
        f"loss: {loss.kind}, head {loss.head}, weight {loss.distillation_weight:g}, "
        f"temperature {loss.temperature:g}"
        if _is_distilled(config)
        else f"loss: labels, smoothing {loss.label_smoothing:g}",
        f"seed {config.run.seed}",
    ]
    if config.init.weights is not None:
        lines.insert(0, f"initialized from {_without_folders(config.init.weights)}")
    if (run / ENVIRONMENT).is_file():
        environment = read_environment(run)
        lines.append(
            f"on {environment.device_name}, torch {environment.packages.torch}, commit "
            f"{environment.commit}"
        )
        if environment.command:
            arguments = map(_without_folders, shlex.split(environment.command))
            lines.append(f"command: `{shlex.join(arguments)}`")
    return "\n".join(f"- {line}" for line in lines)


def _limits(model_info: ModelInfo, metrics: dict[str, Any]) -> str:
    listed = ", ".join(_escaped(name) for name in model_info.class_names[:20])
    num_more = len(model_info.class_names) - 20
    more = f" and {num_more} more" if num_more > 0 else ""
    return (
        f"One of: {listed}{more}. Every image gets one of these classes, even if it belongs to "
        "none. The calibration error in the table holds for images like those of the "
        f"{metrics['split']} split."
    )


def _verification(verified: list[dict[str, Any]]) -> str:
    if not verified:
        return "Not verified: none of the packages that load it was installed."
    rows = [
        (
            comparison["loader"],
            str(comparison["images"]),
            f"{comparison['difference']:.1e}",
            f"{comparison['allowed']:.1e}",
        )
        for comparison in verified
    ]
    return markdown_table(("loaded by", "images", "largest difference of a logit", "allowed"), rows)


def _snippet_values(model_info: ModelInfo) -> dict[str, Any]:
    side = model_info.student.image_size
    return {
        "side": side,
        "edge": round(side / model_info.evaluation_crop),
        "mean": list(model_info.mean),
        "std": list(model_info.std),
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
logits = model(prepare(Image.open("image.png").convert("RGB")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
```

transformers loads the same folder, through timm:

```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("image.png"))
```""",
    "transformers": """```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("image.png"))
```

The class is for inference: it has no loss. With two heads, its outputs also have `cls_logits`
and `distillation_logits`. The accuracy above is for images cropped as torchvision does it; the
processor of transformers crops some images that are not square one pixel off the center.""",
    "onnx": """```python
import json

import onnxruntime
import torch
from PIL import Image
"""
    + _PREPARE
    + """
session = onnxruntime.InferenceSession("model.onnx")
metadata = session.get_modelmeta().custom_metadata_map  # mean, std, class_names and more
images = prepare(Image.open("image.png").convert("RGB")).unsqueeze(0).numpy()
logits = session.run(["logits"], {{"pixel_values": images}})[0]
print(json.loads(metadata["class_names"])[logits.argmax()])
```""",
    "pt2": """```python
import json

import torch
from PIL import Image
"""
    + _PREPARE
    + """
extra_files = {{"metadata.json": ""}}
model = torch.export.load("model.pt2", extra_files=extra_files).module()
images = prepare(Image.open("image.png").convert("RGB")).unsqueeze(0)
logits = model(images)[0]
print(json.loads(json.loads(extra_files["metadata.json"])["class_names"])[logits.argmax()])
```""",
}
