"""What the tests of the grading share: a small backbone, and the marks that a module loses."""

from torch import nn

from tests.grading import marks
from tests.grading.files import ours_named
from tests.grading.grader import MARKS, marks_of

CHEAP = {file: [m for m in names if m != "official"] for file, names in MARKS.items()}


class Block(nn.Module):
    def __init__(self, in_dim, out_dim, stride, norm_layer):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(out_dim)

    def forward(self, x):
        return self.bn1(self.conv1(x)).relu()


class SmallResNet(nn.Module):
    """What our Backbone takes of a ResNet, with one convolution for each part: a tenth of the time."""

    def __init__(self, norm_layer):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Identity()
        for i, (a, b) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)]):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(a, b, 1 + (i > 0), norm_layer)))
        self.fc = nn.Linear(64, 10)


def lost(student, file, names):
    """{mark: sentence} of the marks that a module does not get."""
    ours, found = ours_named(file), {}
    for name in names:
        try:
            getattr(marks, name)(student, ours, 0)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def cheap(file):
    """The marks of a file but for the one that builds a ResNet-50."""
    return [mark for mark in marks_of(file) if mark != "official"]
