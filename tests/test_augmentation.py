"""support/data.py: augmentation, order of random numbers, and batches."""
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from support import data
from support.shapes import Shapes
from tests.folders import TRAIN, assert_same, bright, change, coco_folder, pixel_boxes


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path)


@pytest.mark.parametrize("augment, size", [("laptop", 96), ("paper", 160), ("none", 96)])
def test_box_and_pixels_go_the_same_way(folder, augment, size):
    dataset = data.load(folder, augment=augment, size=size)["train"]
    mirrored, cut = set(), set()
    for epoch in range(40):
        for index, (x, y, w, h) in enumerate(TRAIN[:2]):
            image, target = dataset[epoch, index]
            boxes, seen = pixel_boxes(image, target), bright(image)
            assert len(boxes) == len(target["labels"]) <= 1
            assert boxes.isfinite().all() and (target["boxes"] >= 0).all() and (target["boxes"] <= 1).all()
            if len(boxes) == 0:
                assert seen is None or (seen[2:] - seen[:2]).min() <= 3, "an object in sight has lost its box"
                continue
            assert (seen - boxes[0]).abs().max() < 2, f"epoch {epoch}: box {boxes[0]}, white pixels {seen}"
            whole = abs((seen[2] - seen[0]) / (seen[3] - seen[1]) / (w / h) - 1) < 0.1
            cut.add(not whole)
            if whole and image.shape[2] * 48 == image.shape[1] * 64:
                mirrored.add(bool(abs(target["boxes"][0, 0] - (x + w / 2) / 64) > 0.05))
    if augment == "none":
        assert mirrored == cut == {False}, '"none" should only resize'
    else:
        assert mirrored == cut == {True, False}, "80 draws should hold all kinds of images"


def test_an_object_cut_away_takes_its_label_along():
    image = tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0., 0, 9, 9], [31, 31, 40, 40]], format="XYXY", canvas_size=(40, 40))
    torch.manual_seed(0)
    counts = set()
    for _ in range(50):
        _, target = data.RandomSizeCrop(15, 25)(image, {"boxes": boxes, "labels": torch.tensor([5, 6])})
        counts.add(len(target["boxes"]))
        assert len(target["labels"]) == len(target["boxes"]) and (target["boxes"][:, 2:] > 0).all()
    assert counts == {0, 1}, "a window of at most 25 pixels holds one of the two or none, never both"


@pytest.mark.parametrize("augment, size, shape", [
    ("laptop", 96, (72, 96)), ("none", 96, (72, 96)), ("paper", 96, (96, 128)), ("paper", None, (800, 1066))])
def test_validation_images_have_one_size(folder, augment, size, shape):
    dataset = data.load(folder, augment=augment, size=size)["val"]
    assert tuple(dataset[0][0].shape[1:]) == shape and torch.equal(dataset[0, 0][0], dataset[5, 0][0])


def test_training_images_stay_within_the_size(folder):
    for augment, largest in (("laptop", (96, 96)), ("paper", (160, 160))):
        assert data.largest_canvas(96, augment) == largest
        dataset = data.load(folder, augment=augment, size=96)["train"]
        shapes = [dataset[epoch, 0][0].shape for epoch in range(40)]
        assert len(set(shapes)) > 3, "training should see several sizes"
        assert max(max(s[1:]) for s in shapes) <= largest[0], "no image may be larger than promised: memory"


def test_augmentation_depends_on_seed_epoch_and_index_only(folder):
    dataset, again = (data.load(folder, size=64, seed=3)["train"] for _ in range(2))
    keys = [(epoch, index) for epoch in range(3) for index in range(2)]
    wanted = [dataset[key] for key in keys]
    torch.manual_seed(99)
    for key, item in reversed(list(zip(keys, wanted))):
        assert_same(item, again[key], f"epoch and index {key}, asked for in another order")
    assert len({tuple(item[0].shape) + (item[0].sum().item(),) for item in wanted}) == 6, "6 keys, 6 images"
    other = data.load(folder, size=64, seed=4)["train"]
    assert any(not torch.equal(other[key][0], item[0]) for key, item in zip(keys, wanted)), "seed ignored"


def test_the_number_of_workers_changes_nothing(folder):
    keys = [[(epoch, index)] for epoch in range(2) for index in range(3)]
    for dataset in (data.load(folder, size=64)["train"], data.load(size=64)["train"]):
        alone, many = ([batch for batch in DataLoader(dataset, batch_sampler=keys, num_workers=workers,
                                                      collate_fn=data.collate)] for workers in (0, 2))
        for (a, _, s), (b, _, t) in zip(alone, many, strict=True):
            assert_same((a, s[0]), (b, t[0]), "0 workers against 2")


def test_loading_leaves_every_global_generator_alone(folder):
    datasets = data.load(folder, size=64)["train"], data.load(size=64)["train"]
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for dataset in datasets:
        dataset[2, 1]
    assert torch.equal(before, torch.get_rng_state()), "torch's generator moved: dropout would depend on data"
    assert (numpy_before == np.random.get_state()[1]).all(), "numpy's generator moved"


def test_padding_is_zero_and_masked_and_nothing_else_is():
    items = [Shapes(5, 64)[i] for i in range(5)]
    images, mask, targets = data.collate(items)
    assert images.shape == (5, 3, max(i.shape[1] for i, _ in items), max(i.shape[2] for i, _ in items))
    assert mask.shape == images.shape[:1] + images.shape[2:] and mask.dtype == torch.bool
    for (image, target), padded, padding, kept in zip(items, images, mask, targets, strict=True):
        _, height, width = image.shape
        assert torch.equal(padded[:, :height, :width], image), "images belong into the top left corner"
        assert not padding[:height, :width].any() and padding.sum() == padding.numel() - height * width, \
            "the mask is True on padding, and only there"
        assert (padded[:, padding] == 0).all() and kept is target


def test_first_takes_images_with_boxes_and_stops_augmenting(folder):
    change(folder, lambda c: c | {"annotations": c["annotations"][1:]})  # images 1 and 3 are empty
    dataset = data.load(folder, size=64)["train"]
    small = data.first_with_boxes(dataset, 1)
    assert (len(small), len(dataset), small.num_boxes, list(small.coco.imgs)) == (1, 3, 1, [2])
    assert all(torch.equal(small[epoch, 0][0], small[0][0]) for epoch in range(5)), "should hold still"
    moving = data.first_with_boxes(dataset, 1, augment=True)
    assert any(not torch.equal(moving[epoch, 0][0], small[0][0]) for epoch in range(5))
    shapes = data.first_with_boxes(data.load(size=64)["train"], 4)
    assert len(shapes) == len(shapes.coco.imgs) == 4 and all(len(shapes[i][1]["labels"]) for i in range(4))
    assert small.class_names == dataset.class_names


def test_datasets_travel_to_workers_on_windows_and_mac(folder):
    for dataset in (data.load(folder, size=64)["train"], Shapes(3, 64)):
        dataset.coco
        assert_same(pickle.loads(pickle.dumps(dataset))[1], dataset[1], "pickled and back")


def test_a_batch_padded_further_is_the_same_batch():
    images, mask, _ = data.collate([Shapes(3, 64)[i] for i in range(3)])
    height, width = images.shape[2:]
    larger, larger_mask = data.pad_batch(images, mask, 80, 96)
    assert larger.shape == (3, 3, 80, 96)
    assert larger_mask.shape == (3, 80, 96) and larger_mask.dtype == torch.bool
    assert torch.equal(larger[:, :, :height, :width], images)
    assert torch.equal(larger_mask[:, :height, :width], mask)
    assert larger.count_nonzero() == images.count_nonzero(), "what is added is zero"
    assert (~larger_mask).sum() == (~mask).sum(), "and masked"
    same, same_mask = data.pad_batch(images, mask, height, width)
    assert torch.equal(same, images) and torch.equal(same_mask, mask)


@pytest.mark.parametrize("augment, is_shapes, size", [
    ("laptop", True, 96), ("paper", True, 96),
    ("laptop", False, 256), ("none", False, 256), ("paper", False, 800)])
def test_the_default_size_is_the_one_that_load_takes(folder, augment, is_shapes, size):
    dataset = data.load(None if is_shapes else folder, augment=augment)["val"]
    assert data.default_size(augment, is_shapes) == dataset.size == size
    assert data.is_shapes("shapes") and data.is_shapes(None, None) and not data.is_shapes(None, "x.json")



