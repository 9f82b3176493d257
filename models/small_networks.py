"""A small residual ConvNet and a dense network, for handwritten digits."""

from itertools import pairwise

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """A residual ConvNet: three stages of 3x3 convolutions with 32, 64 and 128 channels.

    The side is halved between the stages. 0.3 M parameters for 10 classes. Input: normalized
    images, float [batch, 3, side, side], side from 8 to 64 px; output: [batch, num_classes].

    >>> import torch
    >>> SmallConvNet(10)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = (32, 64, 128)
        self.stem = _convolution(3, widths[0])
        stages: list[nn.Module] = [_Residual(widths[0])]
        for narrow, wide in pairwise(widths):
            stages += [_convolution(narrow, wide, stride=2), _Residual(wide, repeats=1)]
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(images))).flatten(1))


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, repeats: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(*(_convolution(channels, channels) for _ in range(repeats)))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class Dense(nn.Module):
    """A network with one hidden layer: side^2 inputs, side^2 / 4 hidden units with ReLU, classes.

    For MNIST 784, 196 and 10 units, as the student of github.com/AditMeh/Distillation. Input:
    normalized images, float [batch, 3, side, side], averaged over the channels; output: [batch,
    num_classes].

    >>> Dense(28, 10).hidden
    Linear(in_features=784, out_features=196, bias=True)
    """

    def __init__(self, side: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.hidden = nn.Linear(side**2, max(side**2 // 4, 1))
        self.head = nn.Linear(self.hidden.out_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images.mean(dim=1).flatten(1)).relu())
