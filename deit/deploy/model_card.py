"""The model card of an export: accuracy, training, usage and verification."""

import re
import shlex
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.core.run_folder import ENVIRONMENT, read_environment
from deit.evaluation.tables import head_cells
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
        f"## Accuracy\n\n{_results(heads, metrics, len(model_info.class_names))}",
        f"## Training\n\n{_training(run, config)}",
        f"## Usage\n\n{usage_of(format, model_info)}",
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


def _results(heads: dict[str, dict[str, float]], metrics: dict[str, Any], num_classes: int) -> str:
    if metrics["teacher"]:
        heads = {**heads, "teacher": metrics["teacher"]}
    columns, cells = head_cells(heads, metrics["num_samples"], num_classes)
    table = markdown_table(columns, cells)
    note = f"On the {metrics['num_samples']} images of the {metrics['split']} split."
    if "fused" in heads:
        note += " `fused` is the mean of the heads' logits; the exported `logits` are `fused`."
    return f"{table}\n\n{note}"


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


def usage_of(format: str, model_info: ModelInfo) -> str:
    """Return the section on usage: code that loads an export and predicts an image, as Markdown."""
    side = model_info.student.image_size
    edge = round(side / model_info.evaluation_crop)
    return _SNIPPETS[format].format(
        side=side,
        edge=edge,
        margin=(edge - side) // 2,
        mean=list(model_info.mean),
        std=list(model_info.std),
    )


_PREPARE = """

def prepare(file):
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    black = Image.new("RGBA", image.size, "black")  # transparent pixels become black
    image = Image.alpha_composite(black, image).convert("RGB")
    size = [{edge} * side // min(image.size) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = [round((side - {edge}) / 2) + {margin} for side in size]
    image = image.crop((left, top, left + {side}, top + {side}))
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.float32({mean})) / np.float32({std})
    return pixels.transpose(2, 0, 1)[None]


"""

_NOTE = """

`prepare` turns and scales an image as `deit predict` does, to the same pixels. Exceptions are
images with more than 8 bits per channel, and strips longer than eight times their width."""

_IMPORTS = "import numpy as np\n"
_PILLOW = "from PIL import Image, ImageOps\n"

_SNIPPETS = {
    "timm": f"""```python
{_IMPORTS}import timm
import torch
{_PILLOW}{_PREPARE}model = timm.create_model("local-dir:.", pretrained=True).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(prepare("image.png")))[0]
print(model.pretrained_cfg["label_names"][logits.argmax()])
```{_NOTE}

transformers loads the same folder, through timm:

```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("image.png"))
```

Its own preparation ignores transparency.""",
    "transformers": f"""```python
{_IMPORTS}import torch
{_PILLOW}from transformers import AutoModelForImageClassification
{_PREPARE}model = AutoModelForImageClassification.from_pretrained(".").eval()
with torch.no_grad():
    logits = model(torch.from_numpy(prepare("image.png"))).logits[0]
print(model.config.id2label[int(logits.argmax())])
```{_NOTE}

The pipeline is shorter. It ignores transparency, and it crops some images that are not square one
pixel off the center:

```python
from transformers import pipeline

print(pipeline("image-classification", model=".")("image.png"))
```

The class is for inference: it has no loss. With two heads, its outputs also have `cls_logits`
and `distillation_logits`.""",
    "onnx": f"""The code needs numpy, Pillow and onnxruntime.

```python
import json

{_IMPORTS}import onnxruntime
{_PILLOW}{_PREPARE}session = onnxruntime.InferenceSession("model.onnx")
metadata = session.get_modelmeta().custom_metadata_map  # mean, std, class_names and more
logits = session.run(["logits"], {{{{"pixel_values": prepare("image.png")}}}})[0][0]
print(json.loads(metadata["class_names"])[logits.argmax()])
```{_NOTE}""",
    "pt2": f"""```python
import json

{_IMPORTS}import torch
{_PILLOW}{_PREPARE}extra_files = {{{{"metadata.json": ""}}}}
model = torch.export.load("model.pt2", extra_files=extra_files).module()
with torch.no_grad():
    logits = model(torch.from_numpy(prepare("image.png")))[0][0]
print(json.loads(json.loads(extra_files["metadata.json"])["class_names"])[logits.argmax()])
```{_NOTE}""",
}
