"""The self-test of `deit doctor`: devices, one training step, and a small run."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from deit.config.presets import AUGMENTATIONS
from deit.config.schema import Config
from deit.core.accelerator import resolve_device
from deit.core.console import quiet
from deit.core.errors import DeitError
from deit.core.filesystem import format_bytes
from deit.core.host_memory import free_memory
from deit.core.machine.checks import Check, fault, note, ok, ok_or_note
from deit.core.run_folder import read_result
from deit.distill.losses import label_loss, soft_distillation_loss
from deit.evaluation.evaluate import evaluate
from deit.models.saved_student import build_student
from deit.training.train import train

_CLASSES, _SIDE, _IMAGES = 4, 16, 16
_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Largest relative error of a step's gradient in float32; convolutions on a GPU use TF32."""
_LOSS_TOLERANCE = 0.05
"""Largest relative error of the loss in a lower precision."""
_MEMORY_BYTES = 2 * 10**9


def device_checks() -> Iterator[Check]:
    """Yield a check for the build of torch, each GPU, threads and memory."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    yield ok("torch build", f"{torch.__version__}, {build}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu_check(index)
    elif Path("/proc/driver/nvidia/version").is_file():
        yield note(
            "device",
            "an NVIDIA driver, but no GPU that this torch can use: training runs on the CPU",
            "nvidia-smi shows the driver; install the build of torch for it (pytorch.org)",
        )
    else:
        yield ok("device", "cpu; no CUDA device found")
    yield ok("threads", f"{torch.get_num_threads()} of torch, {_engines()}")
    memory = free_memory(torch.device("cpu"))
    yield ok_or_note(
        "memory",
        f"{format_bytes(memory)} free for this process, limits of containers included",
        "end other programs, raise the limit of the container, or use smaller batches",
        limited=memory < _MEMORY_BYTES,
    )


def _gpu_check(index: int) -> Check:
    name, device = f"device cuda:{index}", torch.device("cuda", index)
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        return fault(
            name,
            str(error).strip().split("\n")[0],
            "install a build of torch for this GPU and its driver, or use --run.device cpu",
        )
    detail = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{format_bytes(free)} free of {format_bytes(total)}"
    )
    return ok_or_note(
        name,
        detail,
        "another process uses its memory; nvidia-smi lists it",
        limited=free < _MEMORY_BYTES,
    )


def _engines() -> str:
    backends = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}
    available = [name for name, backend in backends.items() if backend.is_available()]
    return f"with {' and '.join(available)}" if available else "without MKL and oneDNN"


def step_check(device: str = "auto") -> Check:
    """Check one seeded training step on the device against the CPU in float64."""
    device = resolve_device(device)
    loss, gradient = training_step(torch.device("cpu"), torch.float64)
    other_loss, other_gradient = training_step(torch.device(device), torch.float32)
    error = (other_gradient - gradient).norm().item() / gradient.norm().item()
    detail = (
        f"on {device} in float32: loss {other_loss:.6f}, on the CPU in float64 {loss:.6f}; "
        f"relative error of the gradient {error:.1e}"
    )
    if not error <= _TOLERANCE[device]:  # also NaN
        return fault(
            "training step",
            f"{detail}, at most {_TOLERANCE[device]:g} is expected",
            "the device or its libraries compute wrong results: update the driver and torch, or "
            "use --run.device cpu",
        )
    return ok("training step", detail)


def precision_check(device: str = "auto") -> Check:
    """Check that a training step in each lower precision of the device has about the same loss."""
    device = resolve_device(device)
    types = {"bf16": torch.bfloat16}
    if device == "cuda":
        types |= {"fp16": torch.float16}
        if not torch.cuda.is_bf16_supported():
            del types["bf16"]
    loss, _ = training_step(torch.device("cpu"), torch.float64)
    failed = []
    for name, dtype in types.items():
        with torch.autocast(device, dtype):
            value, gradient = training_step(torch.device(device), torch.float32)
        if not (abs(value - loss) <= _LOSS_TOLERANCE * loss and gradient.isfinite().all()):
            failed.append(f"{name} (loss {value:.4f} instead of {loss:.4f})")
    if failed:
        return note(
            "precision", f"wrong results in {', '.join(failed)}", "use --run.precision fp32"
        )
    return ok("precision", f"{', '.join(('fp32', *types))} on {device} (--run.precision)")


def training_step(device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Return the loss and the gradient, float64 [parameters], of a small step of distillation.

    The student, the teacher, the images and the labels are the same at every call.
    """
    shape = {"image_size": _SIDE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    sizes = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build_student("deit_micro", _CLASSES, **shape, **sizes)
        teacher = build_student("small_convnet", _CLASSES, **shape).eval()
        images = torch.rand(_IMAGES, 3, _SIDE, _SIDE)
        labels = torch.nn.functional.one_hot(torch.arange(_IMAGES) % _CLASSES, _CLASSES)
    student, teacher = student.to(device, dtype), teacher.to(device, dtype)
    images, labels = images.to(device, dtype), labels.to(device)
    with torch.no_grad():
        target = teacher(images).class_logits
    output = student(images)
    distillation = soft_distillation_loss(output.distillation_logits[:, 0], target, 3.0)
    loss = (label_loss(output.class_logits, labels, 0.1) + distillation) / 2
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in student.network.parameters()]
    return loss.item(), torch.cat(gradients).double().cpu()


def run_check(device: str = "auto") -> Check:
    """Train a small student in a temporary folder, read its run back, and evaluate it again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return note("run folder", "not tested in several processes", "run it without the launcher")
    started = time.monotonic()
    with TemporaryDirectory(prefix="deit-doctor-", ignore_cleanup_errors=True) as folder:
        try:
            trained, evaluated = _train_and_evaluate(Path(folder), device)
        except (DeitError, OSError) as error:
            return fault(
                "run folder",
                str(error).strip().split("\n")[0],
                "what the message names has to be mended before training",
            )
    if not math.isclose(trained, evaluated, abs_tol=1e-9):
        return fault(
            "run folder",
            f"top-1 was {trained:.4f} in training, and is {evaluated:.4f} from the saved weights",
            "memory or disk return wrong data: test both",
        )
    seconds = time.monotonic() - started
    return ok("run folder", f"trained, saved, read back and evaluated in {seconds:.1f} s")


def _train_and_evaluate(folder: Path, device: str) -> tuple[float, float]:
    """Return top-1 on the validation split, as recorded in training and from the saved weights."""
    for label in range(_CLASSES):
        (folder / "images" / f"class-{label}").mkdir(parents=True)
        for index in range(_IMAGES):
            color = (40 * label + index, 255 - 60 * label, 10 * index)
            image = Image.new("RGB", (_SIDE, _SIDE), color)
            image.save(folder / "images" / f"class-{label}" / f"{index}.png")
    config = Config().replace(
        data={
            "source": "folder",
            "root": str(folder / "images"),
            "image_size": _SIDE,
            "storage": "memory",
            "validation_fraction": 0.5,
        },
        student={
            "name": "vit_micro",
            "image_size": _SIDE,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
        },
        views={**AUGMENTATIONS["none"], "crop": "none", "flip": 0.0},
        loss={"kind": "none"},
        optim={
            "epochs": 2,
            "batch_size": 4,
            "lr": 5e-3,
            "lr_base_batch_size": None,
            "warmup_epochs": 0.0,
        },
        run={"device": device, "precision": "fp32", "eval_every_epochs": 1},
    )
    with quiet():
        train(config, folder / "run", command="deit doctor")
        result = read_result(folder / "run")
        assert result is not None
        metrics = evaluate(folder / "run", split="validation").metrics
    return result["best"]["top1"], metrics["heads"]["fused"]["top1"]
