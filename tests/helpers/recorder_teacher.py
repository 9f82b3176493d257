"""A teacher that records its input."""

from torch import nn

from deit.models.teachers import LoadedNetwork, Teacher

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("ant", "bee", "cat")
ROOM_CLASSES = ("room1", "room10", "room2")  # sorted as text


class Recorder(nn.Module):
    """Keeps its last input and returns the mean color as logits."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = None

    def forward(self, images):
        self.seen = images
        return self.norm(images).mean(dim=(2, 3))


def recorder_teacher(**changes):
    loaded = LoadedNetwork(Recorder(), "recorder", None, MEAN, STD, NAMES)._replace(**changes)
    return Teacher(loaded)
