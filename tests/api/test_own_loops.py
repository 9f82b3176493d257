"""Our parts in other people's loops: views, loss, teachers and stored targets, together and alone.

Each loop is one that a user would write, with plain PyTorch, Lightning Fabric or timm's tasks.
"""

import pytest
import timm
import torch
from torch import nn

import deit
from deit.datasets.images import InMemoryImages
from deit.distill import target_format
from tests.helpers.errors import raises
from tests.helpers.own_loop.parts import (
    CROP,
    NAMES,
    PLAIN,
    MeanColor,
    accuracy,
    colored_images,
    make_loader,
    make_student,
    make_teacher,
)


@pytest.fixture(params=["live", "stored"])
def teacher(request, tmp_path):
    """A teacher, live or as stored targets of six epochs."""
    if request.param == "live":
        return deit.TeacherEnsemble([make_teacher()])
    loader = make_loader()
    deit.write_targets(loader, tmp_path / "targets", make_teacher(), epochs=6)
    return deit.TeacherEnsemble([deit.TargetStore.open(tmp_path / "targets", loader)])


def test_plain_pytorch_loop(teacher):
    loader = make_loader()
    student, loss_fn = make_student(loader), deit.DistillationLoss("hard")
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            losses = loss_fn(student(batch.images), batch.targets, teacher(batch))
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert accuracy(student) > 0.95


def test_fabric_loop(teacher):
    fabric_module = pytest.importorskip("lightning_fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    loader = make_loader(process_index=fabric.global_rank, num_processes=fabric.world_size)
    student, loss_fn = make_student(loader), deit.DistillationLoss("soft", temperature=2.0)
    model, optimizer = fabric.setup(student, torch.optim.AdamW(student.parameters(), 3e-3))
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            losses = loss_fn(model(batch.images), batch.targets, teacher(batch))
            fabric.backward(losses["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert accuracy(student) > 0.95


def timm_student():
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=8, patch_size=2, num_classes=3,
        embed_dim=16, depth=1, num_heads=2,
    )  # fmt: skip
    model.set_distilled_training(True)
    return model


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_our_loss_and_teacher_equal_timms_task(kind):
    """timm's task with our teacher in it gives the loss that ours gives."""
    tasks = pytest.importorskip("timm.task")
    model = timm_student()
    task = tasks.TokenDistillationTask(
        student_model=model, teacher_model=make_teacher(), criterion=nn.CrossEntropyLoss(),
        distill_type=kind, temperature=2.0, task_loss_weight=0.7, verbose=False,
    )  # fmt: skip
    loader = make_loader()
    batch = next(loader.epoch(0))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    inputs, labels = (batch.images - mean) / std, batch.targets.argmax(dim=1)
    expected = task(inputs, labels)
    options = {"temperature": 2.0} if kind == "soft" else {}  # without effect on hard labels
    loss_fn = deit.DistillationLoss(kind, distillation_weight=0.3, label_smoothing=0.0, **options)
    with torch.no_grad():
        teacher_logits = make_teacher()(batch.images)
    losses = loss_fn(model(inputs), labels, teacher_logits)
    assert torch.allclose(losses["loss"], expected["loss"], atol=1e-5)
    assert torch.allclose(losses["distillation_loss"], expected["distill_loss"], atol=1e-5)


def test_timm_training_task_with_our_loss_and_targets(teacher):
    """A task of timm's own kind: its train script calls `task(input, target)["loss"]`."""
    tasks = pytest.importorskip("timm.task")
    loader, model = make_loader(), timm_student()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    class StoredTargetTask(tasks.TrainingTask):
        def __init__(self):
            super().__init__(verbose=False)
            self.trainable_module = model
            self.loss = deit.DistillationLoss("hard")

        def forward(self, input, target):
            labels, teacher_output = target
            output = self.trainable_module(input)
            return {**self.loss(output, labels, teacher_output), "output": output[0]}

    task = StoredTargetTask().train()
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), 3e-3)
    first = last = None
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            inputs = (batch.images - mean) / std
            last = task(inputs, (batch.targets, teacher(batch)))["loss"]
            first = last.item() if first is None else first
            last.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert last.item() < first / 2


def test_views_alone_are_those_of_the_loader():
    """`make_views` in another data loader gives the loader's views, in any order."""
    views = deit.ViewsConfig(
        crop="random_resized", auto_augment="randaugment", erasing_prob=0.5, flip=0.5
    )
    images, labels = colored_images()
    loader = make_loader(views=views, seed=3)
    for batch in loader.epoch(2):
        ids = batch.sample_ids
        views_of_batch = deit.make_views(
            images[ids], views, seed=3, epoch=2, sample_ids=ids, mean=loader.mean, std=loader.std
        )
        assert torch.equal(views_of_batch.float() * (1 / 255), batch.images)
        assert torch.equal(labels[ids], batch.targets.argmax(dim=1))
    single = deit.make_views(
        images[5:6], views, seed=3, epoch=2, sample_ids=torch.tensor([5]),
        mean=loader.mean, std=loader.std,
    )  # fmt: skip
    batch = deit.make_views(
        images, views, seed=3, epoch=2, sample_ids=torch.arange(96),
        mean=loader.mean, std=loader.std,
    )  # fmt: skip
    assert torch.equal(single[0], batch[5])


def test_ensemble_alone_gives_the_mean_of_probabilities():
    other = nn.Sequential(MeanColor(), nn.Linear(3, 3))
    teachers = [make_teacher(), deit.load_teacher(other, NAMES, mean=(0, 0, 0), std=(1, 1, 1))]
    batch = next(make_loader().epoch(0))
    output = deit.TeacherEnsemble(teachers, weights=(3, 1))(batch)
    first, second = (teacher(batch.images).softmax(dim=1) for teacher in teachers)
    expected = 0.75 * first + 0.25 * second
    assert torch.allclose(output.logits[:, 0].softmax(dim=1), expected, atol=1e-6)
    assert torch.equal(output.labels[:, 0], expected.argmax(dim=1))


def test_processes_share_the_global_batches():
    whole = [batch.sample_ids for batch in make_loader().epoch(1)]
    parts = [
        [batch.sample_ids for batch in make_loader(process_index=rank, num_processes=2).epoch(1)]
        for rank in (0, 1)
    ]
    joined = [torch.cat(pair) for pair in zip(*parts)]
    assert all(torch.equal(a, b) for a, b in zip(whole, joined, strict=True))


def test_loader_from_a_configuration_and_from_a_folder(tmp_path):
    from tests.helpers.images import write_class_folders

    config = deit.recipe("digits", optim={"batch_size": 16})
    loader = deit.TrainLoader.from_config(config, device="cpu")
    assert loader.class_names == tuple("0123456789")
    assert len(loader.splits.test.labels) == 359
    assert next(loader.epoch(0)).images.shape == (16, 3, 8, 8)
    write_class_folders(tmp_path / "pictures", images_per_class=20)
    loader = deit.TrainLoader.from_folder(
        tmp_path / "pictures", image_size=12, batch_size=4, views={"crop": "random"}, device="cpu"
    )
    assert isinstance(loader.splits.train, InMemoryImages)
    assert next(loader.epoch(0)).images.shape == (4, 3, 12, 12)
    with raises(deit.errors.ConfigError, "views.crop", "rnadom"):
        deit.TrainLoader.from_folder(tmp_path, image_size=8, batch_size=4, views={"crop": "rnadom"})


@pytest.mark.parametrize(
    ("images", "labels", "options", "field"),
    [
        (torch.zeros(4, 3, 8, 8), [0, 1, 2, 0], {}, "images"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), [0, 1, 2, 0], {}, "images"),
        (torch.zeros(4, 3, 8, 9, dtype=torch.uint8), [0, 1, 2, 0], {}, "images"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 2], {}, "labels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0.0, 1, 2, 0], {}, "labels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 3, 0], {"class_names": NAMES}, "label"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, -1, 2, 0], {}, "labels"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 2, 0], {"batch_size": 0}, "batch_size"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 2, 0], {"seed": -1}, "seed"),
    ],
)
def test_wrong_arrays_raise(images, labels, options, field):
    with raises(deit.errors.ConfigError, field):
        deit.TrainLoader.from_arrays(images, torch.tensor(labels), **{"batch_size": 2} | options)


def test_store_of_other_views_images_or_classes_is_refused(tmp_path):
    loader = make_loader()
    deit.write_targets(loader, tmp_path / "targets", make_teacher(), epochs=1, content="hard")
    store = deit.TargetStore.open(tmp_path / "targets", make_loader())
    labels, logits = store(next(loader.epoch(0)))
    assert logits is None
    assert torch.equal(labels, next(loader.epoch(0)).targets.argmax(dim=1))
    images, _ = colored_images()
    others = {
        "seed": make_loader(seed=1),
        "views.crop": make_loader(views={"crop": "none"}),
        "classes": make_loader(class_names=("a", "b", "c")),
        "dataset": deit.TrainLoader.from_arrays(
            images, torch.arange(96) % 2, batch_size=16, class_names=NAMES, views=CROP
        ),
    }
    for name, other in others.items():
        with raises(deit.errors.DataError, name):
            deit.TargetStore.open(tmp_path / "targets", other)
    with raises(deit.errors.ConfigError, "loss.kind", "labels only"):
        deit.DistillationLoss("soft")((torch.zeros(16, 3),) * 2, labels, (labels, None))


def test_targets_are_written_silently(tmp_path, capfd):
    loader, teacher = make_loader(), make_teacher()
    deit.write_targets(loader, tmp_path / "targets", teacher, epochs=1, verbose=False)
    assert capfd.readouterr() == ("", "")
    deit.write_targets(loader, tmp_path / "targets", teacher, epochs=1)
    assert "complete" in capfd.readouterr().out


def test_targets_of_a_loader_continue_and_name_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(target_format, "_MIN_ROWS_PER_SHARD", 48)
    loader, teacher = make_loader(), make_teacher()
    first = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2, part=(0, 2))
    assert first is None
    whole = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
    assert whole.record_format.epochs == 2
    with raises(deit.errors.ConfigError, "epochs"):
        deit.write_targets(loader, tmp_path / "other", teacher)
    with raises(deit.errors.ConfigError, "teacher", "MeanColor"):
        deit.write_targets(loader, tmp_path / "other", MeanColor(), epochs=1)
    with raises(deit.errors.ConfigError, "teacher"):
        deit.write_targets(deit.recipe("digits"), tmp_path / "other", teacher)
    assert not (tmp_path / "other").exists()


def test_teachers_of_every_kind_load(tmp_path):
    module = MeanColor()
    with raises(deit.errors.ConfigError, "MeanColor", "mean"):
        deit.load_teacher(module, NAMES)
    with raises(deit.errors.ConfigError, "std", "three numbers"):
        deit.load_teacher(module, NAMES, mean=(0, 0, 0), std=(1, 1))
    with raises(deit.errors.DataError, "3 outputs"):
        deit.load_teacher(module, ("a", "b"), mean=(0, 0, 0), std=(1, 1, 1))
    reordered = deit.load_teacher(
        module, ("cat", "ant"), classes=NAMES, mean=(0, 0, 0), std=(1, 1, 1)
    )
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(reordered(images), module(images)[:, [2, 0]])
    network = timm.create_model("resnet10t", num_classes=3)
    stated = deit.load_teacher(network, NAMES, image_size=32)
    assert stated.normalization == (
        tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])
    )  # fmt: skip
    assert not any(parameter.requires_grad for parameter in network.parameters())
    student = make_student(make_loader())
    fused = deit.load_teacher(student, NAMES)(images)
    output = student(images)
    mean = (output.class_logits + output.distillation_logits[:, 0]) / 2
    assert torch.allclose(fused, mean, atol=1e-6)


def test_students_with_invalid_options_raise():
    with raises(deit.errors.ConfigError, "student.depht", "student.depth"):
        deit.build_student("deit_micro", 3, mean=(0.5,) * 3, std=(0.5,) * 3, depht=2)
    with raises(deit.errors.ConfigError, "diet_micro", "deit_micro"):
        deit.build_student("diet_micro", 3, mean=(0.5,) * 3, std=(0.5,) * 3)
    config = deit.recipe("digits", student={"depth": 2})
    student = deit.build_student(config, 3, mean=(0.5,) * 3, std=(0.5,) * 3, depth=1)
    assert len(student.network.blocks) == 1


def test_saved_student_is_loaded_and_taught_from(tmp_path):
    torch.manual_seed(3)
    student = make_student(make_loader()).eval()
    images = torch.rand(2, 3, 8, 8)
    folder = deit.save_student(student, tmp_path / "runs" / "mine", NAMES)
    loaded, model_info = deit.load_student(folder)
    assert model_info.class_names == NAMES
    for actual, expected in zip(loaded.eval()(images), student(images), strict=True):
        assert torch.equal(actual, expected)
    teacher = deit.load_teacher(folder, ("cat", "ant", "bee"))  # another order
    output = student(images)
    fused = (output.class_logits + output.distillation_logits.mean(dim=1)) / 2
    order = [NAMES.index(name) for name in ("cat", "ant", "bee")]
    assert torch.allclose(teacher(images), fused[:, order], atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        deit.load_run,
        deit.evaluate,
        lambda folder: deit.export(folder, format="timm"),
        deit.quantize,
    ],
)
def test_saved_student_is_no_run(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deit.save_student(make_student(make_loader()), "mine", NAMES)
    with raises(deit.errors.DeitError, "mine", "saved student", "deit.load_student", "finetune"):
        use("mine")


class Wrapper(nn.Module):
    """As DistributedDataParallel and Fabric wrap a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_student_is_saved(tmp_path):
    student = make_student(make_loader())
    plain = deit.save_student(student, tmp_path / "plain", NAMES) / "model.safetensors"
    wrappers = {"ddp": Wrapper(student), "compiled": torch.compile(student)}
    wrappers["both"] = torch.compile(Wrapper(student))
    for name, model in wrappers.items():
        folder = deit.save_student(model, tmp_path / name, NAMES)
        assert (folder / "model.safetensors").read_bytes() == plain.read_bytes()
    with raises(deit.errors.ConfigError, "student", "Wrapper"):
        deit.save_student(Wrapper(MeanColor()), tmp_path / "other", NAMES)


def test_input_that_a_teacher_of_timm_states_is_named(capsys):
    network = timm.create_model("resnet10t", num_classes=3)
    deit.load_teacher(network, NAMES)
    printed = capsys.readouterr().out
    assert "176 px" in printed
    assert "0.485" in printed
    assert "image_size, mean and std" in printed
    deit.load_teacher(network, NAMES, image_size=8, **PLAIN)
    assert capsys.readouterr().out == ""


def test_student_is_not_saved_over_other_files(tmp_path):
    student = make_student(make_loader())
    deit.save_student(student, tmp_path / "mine", NAMES)
    with raises(deit.errors.SystemFault, tmp_path / "mine", "exists already", "force=True"):
        deit.save_student(student, tmp_path / "mine", NAMES)
    deit.save_student(student, tmp_path / "mine", NAMES, force=True)
    (tmp_path / "other").mkdir()
    with raises(deit.errors.SystemFault, "no saved student"):
        deit.save_student(student, tmp_path / "other", NAMES, force=True)
    with raises(deit.errors.ConfigError, "2 names", "3 classes"):
        deit.save_student(student, tmp_path / "new", NAMES[:2])
    with raises(deit.errors.ConfigError, "student", "MeanColor"):
        deit.save_student(MeanColor(), tmp_path / "new", NAMES)
    assert not (tmp_path / "new").exists()
