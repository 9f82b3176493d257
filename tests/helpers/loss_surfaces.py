"""A small student, its loss surface, and a check that a network is unchanged."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deit.analysis.loss_surface import LossSurface
from deit.config.sections.student import StudentConfig
from deit.core.types import StudentOutput
from deit.models.registry import create_network
from deit.models.student import Student

NUM_IMAGES, CLASSES = 12, 3
SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}


SECTIONS = {
    "distilled": {"name": "deit_micro", **SMALL},
    "two tokens": {"name": "deit_micro", "num_distillation_tokens": 2, **SMALL},
    "plain": {"name": "vit_micro", **SMALL},
    "convnet": {"name": "small_convnet", "image_size": 8},
    "dense": {"name": "dense", "image_size": 8},
}


def student(kind="distilled", dtype=torch.float64):
    """Return a student in training mode with weights large enough to be nonlinear everywhere."""
    torch.manual_seed(1)
    network = create_network(StudentConfig(**SECTIONS[kind]), CLASSES)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return Student(network, mean=(0.5,) * 3, std=(0.25,) * 3).to(dtype)


class Tied(nn.Module):
    """One layer under two names, a weight that two layers share, and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, images):
        features = images.mean(dim=(2, 3))
        return StudentOutput(self.other(self.again(self.first(features).tanh()).tanh()))


NETWORKS = {**{kind: lambda kind=kind: student(kind) for kind in SECTIONS}, "tied": Tied}


def loss(network, batch):
    images, labels = batch
    outputs = network(images)
    total = cross_entropy(outputs.class_logits, labels)
    if outputs.distillation_logits is not None:
        for logits in outputs.distillation_logits.unbind(dim=1):
            total = total + 0.7 * cross_entropy(logits, labels.flip(0) * 0 + 1)
    return total


def images_and_labels(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(NUM_IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (NUM_IMAGES,), generator=generator)


def surface(network, sizes=(NUM_IMAGES,), *, masks=None, loss=loss):
    images, labels = images_and_labels(next(network.parameters()).dtype)
    batches = list(zip(images.split(list(sizes)), labels.split(list(sizes))))
    return LossSurface(network, batches, loss, sizes=sizes, masks=masks)


def snapshot(network):
    """Return everything that a surface could have changed."""
    return (
        {name: value.clone() for name, value in network.state_dict().items()},
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [None if p.grad is None else p.grad.clone() for p in network.parameters()],
    )


def assert_unchanged(network, before):
    state, *flags = snapshot(network)
    assert flags[:2] == list(before[1:3])
    for name, value in state.items():
        assert torch.equal(value, before[0][name]), name
    for grad, grad_before in zip(flags[2], before[3], strict=True):
        assert (grad is None and grad_before is None) or torch.equal(grad, grad_before)


def half_masks(network):
    """Return masks over some tensors, one of them all False; mask the network with them."""
    generator = torch.Generator().manual_seed(3)
    masks, names = {}, [name for name, value in network.named_parameters() if value.ndim > 1]
    for name, parameter in network.named_parameters():
        if name in names[::2]:
            masks[name] = torch.rand(parameter.shape, generator=generator) < 0.5
    masks[names[2]] = torch.zeros_like(masks[names[2]])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return masks


def vectors(num_vectors, like, seed=7):
    """Return random vectors of length 1."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(num_vectors, len(like), generator=generator, dtype=torch.float64)
    return (samples / samples.norm(dim=1, keepdim=True)).to(like)
