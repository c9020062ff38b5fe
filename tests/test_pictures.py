"""Predictions on photos, labels inside of them, names of any characters, curves."""
import json
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from support import pictures
from support.images import AnnotatedImage
from support.pictures import Scene
from support.predict import Found


class Photos:
    """A data set of two photos of 400 x 600 pixels: one of a dog and a crowd of cats, one without objects."""

    def __init__(self, class_names=("cat", "dog"), width=600):
        self.class_names, self.images = class_names, []
        for n in (2, 0):
            boxes = np.array([[150, 100, 450, 300], [0, 0, 99, 99]], np.float32)[:n]
            self.images.append(AnnotatedImage(
                10 + n, "", 400, width, labels=np.array([1, 0])[:n], boxes_xyxy=boxes, areas=boxes.sum(1),
                crowd=np.array([False, True])[:n], pixels=Image.new("RGB", (width, 400))))

    def __len__(self):
        return len(self.images)

    def count_boxes(self, index):
        return int((~self.images[index].crowd).sum())

    def subset(self, indices):
        some = Photos(self.class_names)
        some.images = [self.images[index] for index in indices]
        return some


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in place of files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def outlines(axes):
    return [patch for patch in axes.patches if not patch.get_fill()]


# ---- Predictions -------------------------------------------------------------------------------------------
def test_predictions_and_truth_are_drawn_on_the_photo_in_its_own_pixels(figures):
    found = {"boxes": torch.tensor([[5.0, 5, 9, 9], [-90, 10, 20, 30]]), "labels": torch.tensor([1, 0]),
             "scores": torch.tensor([0.1, 0.9])}
    pictures.draw_predictions(Photos(), {12: found}, "x.png")
    axes = figures[0].axes[0]
    assert axes.images[0].get_array().shape == (400, 600, 3)
    assert axes.images[0].get_extent() == [0, 600, 400, 0]
    boxes = [patch.get_bbox().bounds for patch in outlines(axes)]
    assert boxes == [(150, 100, 300, 200), (-90, 10, 110, 20)]  # no crowd, and no score below 0.3
    assert [text.get_text() for text in axes.texts] == ["dog", "cat 0.90"]
    assert axes.get_xlim() == (0, 600) and axes.get_ylim() == (400, 0), "a blank band"
    assert not any(other.images for other in figures[0].axes[1:]), "the photo without objects is left out"


def test_images_without_objects_are_no_error(figures):
    dataset = Photos().subset([1])
    pictures.draw_predictions(dataset, {}, "x.png")
    assert len(figures) == 1


def test_a_large_photo_is_drawn_smaller():
    photo, annotated, _ = pictures.photo_and_truth(Photos(width=2500), 0)
    assert photo.shape == (134, 834, 3) and annotated.width == 2500


def test_a_label_at_the_edge_of_the_photo_stays_inside():
    figure, axes = pictures.photo_panels([(100, 100)], columns=1, width=5)
    pictures.show(axes[0], np.zeros((100, 100, 3)), (100, 100))
    for box in [[-5, -5, 20, 20], [80, 80, 105, 105], [40, 0, 60, 100]]:
        for below in (False, True):
            pictures.draw_label(axes[0], torch.tensor(box), "a class 0.95", "red", (100, 100), below)
    figure.draw_without_rendering()
    panel = axes[0].get_window_extent()
    for text in axes[0].texts:
        label = text.get_window_extent()
        assert panel.x0 <= label.x0 and label.x1 <= panel.x1
        assert panel.y0 - 3 <= label.y0 and label.y1 <= panel.y1 + 3


def scene(names, truth=()):
    return Scene(np.zeros((60, 90, 3)), (60, 90), None, names, list(truth), None, None, None, {}, 0.3)


def test_every_class_has_its_own_colour():
    names = [f"class {i}" for i in range(30)]
    found = Found("", (60, 90), torch.rand(30, 4) * 40, torch.rand(30), torch.arange(30), names)
    axes, = pictures.draw_detections(scene(names), found).axes
    assert len({patch.get_edgecolor() for patch in outlines(axes)}) == 30


# ---- Names -------------------------------------------------------------------------------------------------
NAMES = ["$x{$", r"\$", "$$", "\ud800", "\udcff", "\u732b", "\U0001f600", "a\nb", "\t", "",
         "{}", "%s", "_" * 99]


@pytest.mark.parametrize("name, drawn", [
    ("café", "café"), ("$x{$", r"\$x{\$"), ("\ud800", r"\ud800"), ("\u732b", r"\u732b"), ("a\nb", r"a\nb"),
])
def test_characters_that_cannot_be_drawn_are_written_as_a_code(name, drawn):
    assert pictures.drawable(name) == drawn


def test_any_name_is_drawn_without_a_warning(tmp_path):
    found = {"boxes": torch.rand(len(NAMES), 4) * 300, "labels": torch.arange(len(NAMES)),
             "scores": torch.linspace(0.4, 1, len(NAMES))}
    truth = [(name, torch.tensor([1.0, 2, 30, 40])) for name in NAMES + ["of another data set \u732b"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_predictions(Photos(NAMES), {12: found}, tmp_path / "predictions.png")
        found = Found("", (60, 90), **found, names=NAMES)
        pictures.save(pictures.draw_detections(scene(NAMES, truth), found), tmp_path / "detections.png")
    for name in "predictions.png", "detections.png":
        assert min(Image.open(tmp_path / name).size) > 100


# ---- Curves ------------------------------------------------------------------------------------------------
def write_log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_show_every_loss_of_the_log(figures, tmp_path):
    losses = {"total": 3, "class": 1, "l1": 1, "giou": 1, "proposal_class": 2, "grad_norm": 5}
    log = write_log(tmp_path / "log.jsonl", {"step": 1, **losses}, {"step": 2, **losses},
                    {"step": 2, "eval": {"AP": 0.5, "AP50": 0.6, "AP75": 0.4}})
    pictures.draw_curves(log, "x.png")
    left, right = figures[0].axes
    assert [line.get_label() for line in left.lines] == ["class", "l1", "giou", "proposal_class"]
    assert [line.get_label() for line in right.lines] == ["AP", "AP50", "AP75"]
    assert left.lines[3].get_xydata().tolist() == [[1, 2], [2, 2]]


@pytest.mark.parametrize("lines", [[], [{"step": 1, "total": 1, "class": float("nan")}]])
def test_a_log_with_little_in_it_gives_curves_without_a_warning(lines, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_curves(write_log(tmp_path / "log.jsonl", *lines), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
