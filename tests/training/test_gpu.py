"""Tests that need a GPU: results equal to the CPU's, half precision, whole runs."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from deit.config.field_types import Compile, Crop
from deit.config.finetune_schedules import at_resolution
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.views import ViewsConfig
from deit.core import fault_injection, run_folder
from deit.core.rng import Keys, beta, random_words
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.mixing import sample_mix
from deit.datasets.operations import CODES, FillOptions, apply_operations
from deit.datasets.resizing import resize_boxes
from deit.datasets.views import ChannelStats, apply_views, sample_views
from deit.distill.target_format import view_checksum
from deit.distill.write_targets import write_targets
from deit.evaluation.evaluate import evaluate
from deit.models.attention_rollout import rollout, token_cosines
from deit.models.cost import cost_of
from deit.models.rednet import involve
from deit.models.registry import create_network
from deit.training.build import build_run
from deit.training.epochs import step_context
from deit.training.loop import MetricAccumulator, train_epoch
from deit.training.train import train
from tests.helpers.images import pixels_of, real_images
from tests.helpers.resume_helpers import assert_same_end, stop_and_resume

CHANNEL_STATS = ChannelStats((0.5, 0.4, 0.3), (0.2, 0.15, 0.1))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_random_words_on_the_gpu_equal_the_cpu():
    samples = torch.arange(100_000)
    on_cpu, on_gpu = Keys(3, 1, samples), Keys(3, 1, samples.cuda())
    assert torch.equal(random_words(on_cpu, "crop", 9), random_words(on_gpu, "crop", 9).cpu())
    assert torch.allclose(beta(on_cpu, "mix", 0.8), beta(on_gpu, "mix", 0.8).cpu(), atol=1e-12)


def views_of(preset, crop):
    return ViewsConfig(crop=crop, rotation=10, **AUGMENTATIONS[preset])


@pytest.mark.parametrize("crop", Crop.__args__)
@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_views_on_the_gpu_match_within_one_gray_level(preset, crop):
    views = views_of(preset, crop)
    pixels = pixels_of([image.resize((40, 40)) for image in real_images()]).repeat(20, 1, 1, 1)
    samples = torch.arange(len(pixels))
    sizes = {"height": 40, "width": 40, "size": 32}
    on_cpu = sample_views(Keys(3, 1, samples), views, **sizes)
    on_gpu = sample_views(Keys(3, 1, samples.cuda()), views, **sizes)
    for cpu_value, gpu_value in zip(on_cpu, on_gpu):
        assert (cpu_value is None) == (gpu_value is None)
        assert cpu_value is None or torch.equal(cpu_value, gpu_value.cpu())
    settings = {"views": views, "size": 32, "channel_stats": CHANNEL_STATS}
    difference = (
        apply_views(pixels, on_cpu, **settings).int()
        - apply_views(pixels.cuda(), on_gpu, **settings).cpu().int()
    ).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("size", [24, 32, 72, 96, 224])
def test_resize_on_the_gpu_is_exact_under_tf32_and_autocast(size):
    pixels = pixels_of(real_images(64, 64))
    boxes = torch.tensor([[n, 2 * n, 40 - n, 30 + n] for n in range(12)])
    on_cpu = resize_boxes(pixels, boxes, size, "bicubic")
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            on_gpu = resize_boxes(pixels.cuda(), boxes.cuda(), size, "bicubic")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("name", CODES)
def test_image_operations_on_the_gpu_equal_the_cpu(name):
    pixels = pixels_of(real_images())
    codes = torch.full((len(pixels),), CODES[name])
    arguments = torch.linspace(0.1, 1.9, len(pixels))
    for interpolation in ("bilinear", "bicubic"):
        fill_options = FillOptions(torch.tensor([9, 8, 7], dtype=torch.uint8), interpolation)
        on_cpu = apply_operations(pixels, codes, arguments, fill_options)
        on_gpu = apply_operations(pixels.cuda(), codes, arguments.cuda(), fill_options).cpu()
        assert torch.equal(on_cpu, on_gpu), interpolation


def test_sampled_mixes_on_the_gpu_equal_the_cpu():
    pairs, views = torch.arange(10_000), views_of("deit", "padded")
    on_cpu = sample_mix(Keys(3, 1, pairs), views=views, size=32)
    on_gpu = sample_mix(Keys(3, 1, pairs.cuda()), views=views, size=32)
    assert torch.equal(on_cpu.boxes, on_gpu.boxes.cpu())
    assert torch.equal(on_cpu.is_cutmix, on_gpu.is_cutmix.cpu())
    assert torch.allclose(on_cpu.lam, on_gpu.lam.cpu(), atol=1e-12)


def test_loader_on_the_gpu_yields_the_batches_of_the_cpu():
    images = InMemoryImages(
        torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 4
    )

    def batches(device):
        loader = TrainLoader(
            images,
            4,
            views=views_of("deit", "random_resized"),
            optim=OptimConfig(batch_size=16),
            student_size=32,
            teacher_size=24,
            channel_stats=CHANNEL_STATS,
            seed=1,
            device=device,
        )
        fields = ("images", "teacher_images", "targets", "sample_ids", "target_rows")
        fields_by_batch = [
            [getattr(batch, name).cpu() for name in fields] for batch in loader.epoch(0)
        ]
        assert loader.stages.rates()["views"] > 0
        return fields_by_batch

    for on_cpu, on_gpu in zip(batches("cpu"), batches("cuda")):
        for cpu_value, gpu_value in zip(on_cpu, on_gpu):
            assert torch.allclose(cpu_value.double(), gpu_value.double(), atol=1.01 / 255)


@pytest.mark.parametrize("mode", VIEW_MODES)
def test_view_checksums_on_the_gpu_equal_the_cpu(mode):
    images = InMemoryImages(
        torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 4
    )
    views = views_of("deit", "random_resized")
    views = dataclasses.replace(views, **VIEW_MODES[mode].fields(dataclasses.asdict(views)))

    def checksums(device):
        loader = TrainLoader(
            images,
            4,
            views=views,
            optim=OptimConfig(batch_size=16),
            student_size=32,
            teacher_size=24,
            channel_stats=CHANNEL_STATS,
            seed=1,
            device=device,
        )
        blocks = loader.teacher_inputs(0, torch.arange(64), batch_size=16)
        return [view_checksum(part.views, row) for part in blocks for row in range(0, 16, 2)]

    assert checksums("cpu") == checksums("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_involution_on_the_gpu_matches_the_cpu(dtype):
    features = torch.randn(4, 32, 15, 15).to(dtype)
    kernels = torch.randn(4, 2, 49, 8, 8).to(dtype)
    on_cpu = involve(features.float(), kernels.float(), stride=2)
    on_gpu = involve(features.cuda(), kernels.cuda(), stride=2).cpu()
    assert on_gpu.dtype == dtype
    assert torch.allclose(on_cpu, on_gpu.float(), rtol=0.02, atol=0.05)


def test_store_written_on_the_cpu_trains_on_the_gpu(tmp_path):
    teacher = digits_teacher().replace(optim={"epochs": 3}, run={"device": "cpu"})
    train(teacher, tmp_path / "teacher")
    config = digits().replace(
        student={"depth": 1},
        teacher={"source": (str(tmp_path / "teacher"),)},
        loss=LOSS_PRESETS["deit-hard"],
        optim={"epochs": 2, "warmup_epochs": 1},
        run={"device": "cpu"},
    )
    write_targets(config, tmp_path / "store")
    gpu_training = config.replace(
        teacher={"target_stores": (str(tmp_path / "store"),)}, run={"device": "cuda"}
    )
    train(gpu_training, tmp_path / "run")  # compares checksums and targets with the GPU's


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_the_gpu_learns_in_every_precision(tmp_path, precision):
    config = digits_teacher().replace(run={"device": "cuda", "precision": precision})
    result = train(config, tmp_path / precision)
    assert result["best"]["top1"] > 0.97


def test_cost_on_the_gpu_has_the_counts_of_the_cpu():
    network = create_network(StudentConfig(name="deit_micro"), 10)
    on_cpu = cost_of(network, side=32, batch=8)
    on_gpu = cost_of(network.to("cuda"), side=32, batch=8)
    assert (on_gpu.parameters, on_gpu.gmacs) == (on_cpu.parameters, on_cpu.gmacs)
    assert on_gpu.memory_mb > 4 * on_gpu.parameters / 1e6
    assert on_gpu.images_per_s > 0


def test_attention_rollout_on_the_gpu_matches_the_cpu():
    torch.manual_seed(0)
    network = create_network(StudentConfig(name="deit_micro", depth=3), 10).eval()
    images = torch.rand(4, 3, 32, 32)
    on_cpu, cpu_cosines = rollout(network, images), token_cosines(network, images)
    network = network.to("cuda")
    on_gpu = rollout(network, images.cuda())
    torch.testing.assert_close(on_gpu.maps, on_cpu.maps, atol=1e-4, rtol=1e-3)
    gpu_cosines = token_cosines(network, images.cuda())
    torch.testing.assert_close(gpu_cosines, cpu_cosines, atol=1e-4, rtol=1e-3)


def test_finetune_on_the_gpu_trains_and_evaluates(tmp_path):
    one_epoch = {"epochs": 1, "warmup_epochs": 0}
    train(digits_teacher().replace(optim=one_epoch), tmp_path / "teacher")
    config = digits_teacher().replace(optim=one_epoch, run={"device": "cuda"})
    larger = at_resolution(config, 16).replace(init={"weights": str(tmp_path / "teacher")})
    train(larger.replace(optim={"trainable": "heads"}), tmp_path / "finer")
    assert evaluate(tmp_path / "finer", cost=True).metrics["cost"]["images_per_s"] > 0


def gpu_config(**run):
    """Return the configuration of a student without a teacher on the GPU."""
    config = digits().replace(teacher={"source": ()}, loss=LOSS_PRESETS["none"])
    return config.replace(
        views={"auto_augment": "randaugment", "erasing_prob": 0.5},
        optim={"epochs": 2, "warmup_epochs": 1, "ema_epochs": 1},
        run={"device": "cuda", **run},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compile", ["none", "default"])
def test_training_loop_does_not_synchronize_with_the_gpu(precision, compile):
    """After the first step, which samples the views of many steps."""
    run = build_run(gpu_config(precision=precision, compile=compile))
    batches, metrics = run.loader.epoch(0), MetricAccumulator(run.accelerator, {})
    updates = train_epoch(step_context(run), batches, metrics, step=0, steps=100)
    next(updates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(updates)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", Compile.__args__)
def test_nonfinite_step_on_the_gpu_is_skipped(tmp_path, compile):
    fault_injection.install_faults("loss:3:nan")
    result = train(gpu_config(compile=compile), tmp_path / "run")
    assert result["skipped"] == 1
    weights = load_file(run_folder.latest_checkpoint(tmp_path / "run") / "average.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("compile", ["none", "default"])
def test_resumed_gpu_run_is_bit_identical(tmp_path, compile):
    config = gpu_config(compile=compile)
    train(config, tmp_path / "uninterrupted")
    stop_and_resume(config, tmp_path / "run", "step:20:term")
    assert_same_end(tmp_path / "run", tmp_path / "uninterrupted")
