"""Predictions on photos, labels that stay apart, names that hold anything, curves."""
import json
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from support import pictures
from support.look import Scene


class Photos:
    """A data set of two photos of 400 x 600 pixels that the network sees at 40 x 60. The second is empty."""
    class_names = ["cat", "dog"]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5]] * (1 - index)).reshape(-1, 4)
        return torch.zeros(3, 40, 60), {"labels": torch.ones(len(boxes), dtype=torch.int64), "boxes": boxes,
                                        "image_id": 10 + index, "size": (400, 600)}

    def draw(self, index):
        return np.full((400, 600, 3), 200, np.uint8), None, None


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in place of files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def texts(axes):
    return [text.get_text() for text in axes.texts]


# ---- Predictions -------------------------------------------------------------------------------------------
def test_predictions_are_drawn_on_the_photo_in_its_own_pixels(figures):
    found = {"boxes": torch.tensor([[-90.0, 10, 20, 30], [5, 5, 9, 9]]), "labels": torch.tensor([0, 1]),
             "scores": torch.tensor([0.9, 0.1])}
    pictures.draw_predictions(Photos(), {10: found}, "x.png")
    (axes,) = figures[0].axes  # the image without objects is left out
    assert axes.images[0].get_array().shape == (400, 600, 3)
    assert axes.images[0].get_extent() == [0, 600, 400, 0]
    boxes = [patch.get_bbox().bounds for patch in axes.patches if not patch.get_fill()]
    assert boxes == [(150, 100, 300, 200), (-90, 10, 110, 20)]  # the truth, and what is scored over 0.3
    assert texts(axes) == ["dog", "cat 0.90"]
    assert axes.get_xlim() == (0, 600) and axes.get_ylim() == (400, 0), "a blank band"


def test_a_large_photo_is_made_smaller_but_keeps_its_pixels_as_coordinates():
    photos = Photos()
    photos.draw = lambda index: [np.zeros((3000, 2500, 3), np.uint8)]
    assert pictures.small_photo(photos, 0).shape == (1000, 834, 3)


def test_rows_of_photos_leave_no_blank_bands():
    figure, panels = pictures.photo_grid([(100, 200), (300, 100), (50, 50)], columns=3, width=12, title=0)
    places = [axes.get_position() for axes in panels]
    assert len({(round(place.y0, 6), round(place.y1, 6)) for place in places}) == 1, "one height"
    gaps = [places[0].x0] + [b.x0 - a.x1 for a, b in zip(places, places[1:])] + [1 - places[2].x1]
    assert gaps == pytest.approx([0.06 / 12] * 4)
    width, height = figure.get_size_inches()
    for place, shape in zip(places, [2, 1 / 3, 1]):
        assert place.width * width / (place.height * height) == pytest.approx(shape)


def test_labels_that_would_cover_each_other_move():
    box, label, size = (20, 20, 60, 60), (30, 10), (100, 100)
    places = []
    for _ in range(4):
        places.append(pictures.label_place(box, label, size, places))
    assert places == [(20, 10, 50, 20), (20, 60, 50, 70), (20, 20, 50, 30), (20, 50, 50, 60)]
    # At the edge of the image a label stays inside
    assert pictures.label_place((80, 0, 100, 90), label, size, []) == (70, 0, 100, 10)


def test_every_class_has_its_own_colour():
    names = [f"class {i}" for i in range(30)]
    found = {"labels": torch.arange(30), "boxes": torch.rand(30, 4) * 40, "scores": torch.rand(30)}
    scene = Scene(np.zeros((60, 90, 3)), (60, 90), None, names, [], None, None, None, {}, 0.3)
    axes, = pictures.draw_detections(scene, found).axes
    outlines = {patch.get_edgecolor() for patch in axes.patches if not patch.get_fill()}
    assert len(outlines) == 30


# ---- Names -------------------------------------------------------------------------------------------------
NAMES = ["$x{$", r"\$", "$$", "\ud800", "\udcff", "\u732b", "\U0001f600", "a\nb", "\t", "",
         "{}", "%s", "_" * 99]


@pytest.mark.parametrize("name, drawn", [
    ("café", "café"), ("$x{$", r"\$x{\$"), ("\ud800", r"\ud800"), ("\u732b", r"\u732b"), ("a\nb", r"a\nb"),
])
def test_what_cannot_be_drawn_is_written_as_a_code(name, drawn):
    assert pictures.drawable(name) == drawn


def test_a_long_name_is_shortened():
    assert pictures.shorten("x" * 50) == "x" * 37 + "..." and pictures.shorten("x" * 40) == "x" * 40


def test_any_name_is_drawn_without_a_warning(tmp_path):
    photos = Photos()
    photos.class_names = NAMES
    found = {"boxes": torch.rand(len(NAMES), 4) * 300, "labels": torch.arange(len(NAMES)),
             "scores": torch.linspace(0.4, 1, len(NAMES))}
    truth = [(name, torch.tensor([1.0, 2, 30, 40])) for name in NAMES + ["of another data set \u732b"]]
    scene = Scene(photos.draw(0)[0], (400, 600), None, NAMES, truth, None, None, None, {}, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_predictions(photos, {10: found}, tmp_path / "predictions.png")
        pictures.draw_detections(scene, found).savefig(tmp_path / "detections.png")
    assert min(Image.open(tmp_path / "predictions.png").size) > 100


# ---- Curves ------------------------------------------------------------------------------------------------
def write_log(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_show_every_loss_of_the_log_and_leave_foreign_lines_out(figures, tmp_path):
    losses = {"total": 3, "class": 1, "l1": 1, "giou": 1, "proposal_class": 2, "grad_norm": 5}
    log = write_log(tmp_path / "log.jsonl", {"step": 1, **losses}, "what is this\n", "[1]\n", "7\n",
                    {"step": 2, "eval": {"AP": 0.5, "AP50": 0.6, "AP75": 0.4}}, {"step": 2, **losses},
                    '{"step": 3')
    pictures.draw_curves(log, "x.png")
    left, right = figures[0].axes
    assert [line.get_label() for line in left.lines] == ["class", "l1", "giou", "proposal_class"]
    assert [line.get_label() for line in right.lines] == ["AP", "AP50", "AP75"]
    assert left.lines[3].get_xydata().tolist() == [[1, 2], [2, 2]]


@pytest.mark.parametrize("lines", [[], [{"step": 1, "total": 1, "class": float("nan")}], ["\x00\xff"]])
def test_a_log_with_little_in_it_gives_curves_without_a_warning(lines, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_curves(write_log(tmp_path / "log.jsonl", *lines), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
