"""A small residual ConvNet for images of 8 to 64 px: the teacher for the handwritten digits."""

from itertools import pairwise

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Three stages of 3x3 convolutions (32, 64, 128 channels), halving the side between them.

    0.3 M parameters at 10 classes. Input [batch, 3, side, side]; output [batch, num_classes].
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
    """side^2 grey levels -> side^2 / 4 units with ReLU -> classes: 784, 196 and 10 for MNIST, the
    student of AditMeh/Distillation.

    Input [batch, 3, side, side], of which it takes the mean over the channels; output
    [batch, num_classes].
    """

    def __init__(self, side: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.hidden = nn.Linear(side**2, max(side**2 // 4, 1))
        self.head = nn.Linear(self.hidden.out_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images.mean(dim=1).flatten(1)).relu())
