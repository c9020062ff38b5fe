"""Shared by the tests of the grading: a small backbone, and the marks that a module loses."""
from collections import OrderedDict

from torch import nn

from tests.grading.files import ours_named
from tests.grading.grader import marks_of
from tests.grading.judge import settle
from tests.grading.marks import failure_of


def block(a, b, stride, norm_layer):
    parts = dict(conv1=nn.Conv2d(a, b, 3, stride, 1, bias=False), bn1=norm_layer(b), relu=nn.ReLU())
    return nn.Sequential(nn.Sequential(OrderedDict(parts)))


class SmallResNet(nn.Module):
    """The parts of a ResNet that our Backbone takes, with one convolution for each: a tenth of the time."""

    def __init__(self, norm_layer):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Identity()
        for i, (a, b) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)]):
            setattr(self, f"layer{i + 1}", block(a, b, 1 + (i > 0), norm_layer))
        self.fc = nn.Linear(64, 10)


def cheap(file):
    """The marks of a file except for the one that builds a ResNet-50."""
    return [mark for mark in marks_of(file) if mark != "official"]


def failing(student, file, names=None):  # {mark: sentence}
    found = {name: failure_of(name, student, ours_named(file), 0) for name in names or cheap(file)}
    return {name: failure.sentence for name, failure in found.items() if failure}


def lost(student, file):  # {mark: sentence}
    verdicts = settle({name: failure_of(name, student, ours_named(file), 0) for name in cheap(file)})
    return {name: verdict.why for name, verdict in verdicts.items() if verdict.status == "lost"}
