"""A teacher that records what it is shown."""

from torch import nn

from deit.models.teachers import LoadedNetwork, Teacher

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("ant", "bee", "cat")


class Recorder(nn.Module):
    """Remembers its input and answers with the mean colour."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = None

    def forward(self, images):
        self.seen = images
        return self.norm(images).mean(dim=(2, 3))


def recorder_teacher(**changes):
    origin = LoadedNetwork(Recorder(), "recorder", None, MEAN, STD, NAMES)._replace(**changes)
    return Teacher(origin)


ROOMS = ("room1", "room10", "room2")
