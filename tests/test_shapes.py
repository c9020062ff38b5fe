"""support/shapes.py: the embedded data set."""
import numpy as np
import pytest
import torch

from support import data, shapes
from support.shapes import Shapes
from tests.folders import assert_same, bright, pixel_boxes


def test_shapes_box_is_tight_around_the_pixels_drawn(monkeypatch):
    monkeypatch.setattr(shapes, "draw_background", lambda rng, h, w: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(shapes, "pick_colour", lambda rng, label, background: np.full(3, 255, np.float32))
    monkeypatch.setattr(shapes, "draw_texture", lambda rng, h, w: np.ones((h, w), np.float32))
    monkeypatch.setattr(shapes, "MAX_OBJECTS", 1)
    for size in (32, 128):
        dataset = Shapes(40, size)
        for image, target in (dataset[i] for i in range(40)):
            if len(target["boxes"]):
                assert torch.allclose(pixel_boxes(image, target)[0], bright(image), atol=1e-3), \
                    "the box should touch the outermost white pixels of the only object, none more, none less"


def test_shapes_have_what_a_detector_needs_to_be_tested_on():
    dataset = Shapes(200, 128)
    drawn = [dataset.draw(i) for i in range(200)]
    labels = np.concatenate([annotated.labels for _, annotated, _ in drawn])
    sides = np.concatenate([annotated.areas for _, annotated, _ in drawn]) ** 0.5
    counts = [len(annotated.labels) for _, annotated, _ in drawn]
    assert min(np.bincount(labels, minlength=4)) > 0.1 * len(labels), "every class should be common"
    assert sides.min() < 20 and 25 < np.median(sides) < 45 and sides.max() > 65, "sizes: varied, many small"
    assert 4 < counts.count(0) < 30 and max(counts) == 4, "some empty images, at most 4 objects"
    heights, widths = zip(*(image.shape[:2] for image, _, _ in drawn))
    assert (min(heights), max(heights)) == (min(widths), max(widths)) == (96, 128), "3/4 to all of size"
    assert dataset.num_boxes == sum(counts) and dataset.max_boxes >= max(counts)
    for _, annotated, owner in drawn:
        for k in range(len(annotated.labels)):
            assert (owner == k).sum() > 0.05 * annotated.areas[k], "an object should not vanish behind others"


def test_shapes_depend_on_seed_split_and_number_only():
    one, two = (data.load("shapes", size=64, seed=5) for _ in range(2))
    two["train"][7], two["val"][3]  # drawing something else in between changes nothing
    assert_same(one["train"][0, 2], two["train"][9, 2], "the same shape picture in another epoch")
    assert_same(one["val"][2], data.load(size=64, seed=6)["val"][2], "validation pictures under another seed")
    other = data.load(size=64, seed=6)["train"]
    assert not torch.equal(one["train"][2][0], other[2][0]), "another seed, the same picture"
    default = data.load(size=64)
    assert not torch.equal(default["train"][2][0], default["val"][2][0]), "val should not repeat train"
    assert (len(one["train"]), len(one["val"])) == (20000, 250)


def test_shapes_are_what_they_have_always_been():
    """Numbers of earlier runs compare only if the images stay the same, whatever the code that draws them."""
    dataset = Shapes(20, 96, seed=0)
    images, mask, targets = data.collate([dataset[i] for i in range(20)])
    assert images.shape == (20, 3, 96, 96)
    assert images.double().mean().item() == pytest.approx(0.141965, abs=2e-5)
    assert "".join(str(len(target["labels"])) for target in targets) == "41413312331421223344"
    assert targets[0]["labels"].tolist() == [0, 3, 2, 2] and targets[1]["labels"].tolist() == [2]
    drawn = [Shapes(200, 48).draw(i)[1].labels for i in range(200)]
    assert np.bincount(np.concatenate(drawn)).tolist() == [98, 122, 135, 118]  # of 200 images
    box = targets[1]["boxes"][0].tolist()
    assert box == pytest.approx([0.114458, 0.138298, 0.204819, 0.148936], abs=1e-5)


def test_shapes_answer_what_folders_answer():
    dataset = Shapes(30, 64, split="val")
    assert len(dataset.coco.imgs) == 30
    assert dataset.path_of(7) == "shapes-7" and dataset.count_boxes(7) == len(dataset[7][1]["boxes"])
    some = dataset.subset([7, 3])
    assert (len(some), some.path_of(1), list(some.coco.imgs)) == (2, "shapes-3", [7, 3])
    assert_same(some[0], dataset[7], "image 7 of the whole set, 0 of the subset")
    assert len(dataset) == 30 and dataset.notes == []
