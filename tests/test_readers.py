"""What tools write and people have on their disks is read with the right boxes; what is wrong is one line."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import UserError, check_data, data
from tests.folders import coco_folder, write_image

TRUTH = {  # of each split and image: class and x0, y0, x1, y1 in pixels of 64 x 48
    "train": {"1": [("cat", 10, 8, 30, 24)], "2": [("dog", 30, 4, 42, 34), ("cat", 0, 0, 64, 48)], "3": []},
    "val": {"4": [("dog", 5, 6, 45, 46)], "5": [("cat", 2, 2, 7, 7)]},
}
CLASSES = ["cat", "dog"]


def images(folder, split, ending=".png"):
    for name in TRUTH[split]:
        write_image(folder / (name + ending))


def coco(path, split="train", name="{}.png", boxes=None, **more):
    """A COCO file of a split; name: how it writes file_name."""
    contents = {"images": [], "annotations": [], "categories": [
        {"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]}
    for stem, found in (boxes or TRUTH[split]).items():
        contents["images"].append({"id": int(stem), "file_name": name.format(stem), "width": 64, "height": 48})
        for label, x0, y0, x1, y1 in found:
            contents["annotations"].append({
                "id": len(contents["annotations"]) + 1, "image_id": int(stem), "iscrowd": 0,
                "category_id": CLASSES.index(label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents | more))
    return contents


def voc(folder, split="train", first=1, filename="{}.png", boxes=None):
    """VOC's XML files of a split; first: the number of the first pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, found in (boxes or TRUTH[split]).items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmax>{x1}</xmax><xmin>{x0 + first}</xmin>"
            f"<ymin>{y0 + first}</ymin><ymax>{y1}</ymax></bndbox></object>" for label, x0, y0, x1, y1 in found)
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        name = f"<filename>{filename.format(stem)}</filename>" if filename else ""
        (folder / f"{stem}.xml").write_text(f"<annotation>{name}{size}{objects}</annotation>")


def yolo(folder, split="train", boxes=None):
    """YOLO's label files of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, found in (boxes or TRUTH[split]).items():
        lines = [f"{CLASSES.index(label)} {(x0 + x1) / 128} {(y0 + y1) / 96} {(x1 - x0) / 64} {(y1 - y0) / 48}\n"
                 for label, x0, y0, x1, y1 in found]
        (folder / f"{stem}.txt").write_text("".join(lines))


def read(folder, **how):
    return data.load(folder, size=64, augment="none", **how)


def boxes_in(dataset):
    """{name of the image without ending: sorted [(class, x0, y0, x1, y1)]}."""
    return {Path(image.path).stem: sorted(
        (dataset.class_names[label], *(round(float(v), 3) for v in box))
        for label, box in zip(image.labels, image.boxes_xyxy)) for image in dataset.images}


def assert_truth(sets):
    for split, dataset in sets.items():
        assert boxes_in(dataset) == {name: sorted(boxes) for name, boxes in TRUTH[split].items()}, split


def said(dataset):
    return " ".join(dataset.notes)


# ---- Layouts -----------------------------------------------------------------------------------------------
def both(write):
    """A layout in which each split is written in the same way; val under its own name."""
    def make(folder, val="val"):
        for split, name in (("train", "train"), ("val", val)):
            write(folder, split, name)
    return make


def yolo_yaml(text, image_place, label_place, names=None, **texts):
    def make(folder, val="val"):
        for split, name in (("train", "train"), ("val", val)):
            images(folder / image_place.format(name), split)
            yolo(folder / label_place.format(name), split)
        for file, content in {"data.yaml": text, **texts}.items():
            (folder / file.replace("__", ".")).write_text(content)
    return make


def obj_data(folder, val="val"):
    """darknet, as CVAT's "YOLO 1.1" writes it."""
    for split, name in (("train", "train"), ("val", "valid")):
        images(folder / f"obj_{name}_data", split)
        yolo(folder / f"obj_{name}_data", split)
        (folder / f"{name}.txt").write_text("".join(f"data/obj_{name}_data/{k}.png\n" for k in TRUTH[split]))
    (folder / "obj.names").write_text("cat\ndog\n")
    (folder / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\n"
                                     "names = data/obj.names\nbackup = backup/\n")


LISTS = {f"{name}.txt": "".join(f"{{}}/images/{name}/{k}.png\n" for k in TRUTH[name]) for name in TRUTH}
NAMES = "\nnames:\n  0: cat\n  1: dog\n"
COCO = {  # where the annotations and the images of a split are, and how file_name is written
    "COCO's own": ("annotations/instances_{}2017.json", "{}2017", "{}.png"),
    "without the year": ("annotations/instances_{}.json", "{}", "{}.png"),
    "images below images": ("annotations/instances_{}.json", "images/{}", "{}.png"),
    "the year below images": ("annotations/instances_{}2017.json", "images/{}2017", "{}.png"),
    "all images in one folder": ("annotations/instances_{}.json", "images", "{}.png"),
    "CVAT with subsets": ("annotations/instances_{}.json", "images/{}", "{}.png"),
    "Roboflow": ("{}/_annotations.coco.json", "{}", "{}.png"),
    "FiftyOne": ("{}/labels.json", "{}/data", "{}.png"),
    "MMDetection": ("annotations/{}.json", "{}", "{}.png"),
    "files beside": ("{}.json", "images", "images/{}.png"),
    "another name": ("annotations/my_{}_set.json", "deep/er", "{}.png"),
    "capitals": ("Annotations/instances_{}.JSON", "Images/{}", "{}.png"),
    "folders": ("annotations/instances_{}.json", "images/a b/c", "a b/c/{}.png"),
    "dots": ("annotations/instances_{}.json", "images", "./images/{}.png"),
    "Windows": ("annotations/instances_{}.json", "images/sub", "images\\sub\\{}.png"),
    "another machine": ("annotations/instances_{}.json", "pics/{}", "/home/me/pets/pics/{}.png"),
    "another Windows machine": ("annotations/instances_{}.json", "pics", "C:\\Users\\me\\pics\\{}.png"),
    "Label Studio's local files": (
        "annotations/instances_{}.json", "images", "data/local-files/?d=my%20pets/images/{}.png"),
    "Label Studio's uploads": ("annotations/instances_{}.json", "images", "../../media/upload/1/{}.png"),
    "an address": ("annotations/instances_{}.json", "images", "https://pets.org/images/{}.png"),
    "no ending": ("annotations/instances_{}.json", "images/{}", "{}"),
    "other capitals": ("annotations/instances_{}.json", "images/{}", "{}.PNG"),
}
VOC = {  # where the XML files and the images of a split are, and how filename is written
    "Roboflow": ("{}", "{}", "{}.png"),
    "TensorFlow's tutorial": ("images/{}", "images/{}", "{}.png"),
    "lower case": ("annotations/{}", "images/{}", "{}.png"),
    "FiftyOne": ("{}/labels", "{}/data", "{}.png"),
    "supervision": ("{}/annotations", "{}/images", "{}.png"),
    "a whole path": ("Annotations/{}", "JPEGImages", "/home/me/JPEGImages/{}.png"),
    "no ending": ("Annotations/{}", "JPEGImages/{}", "{}"),
    "no filename": ("Annotations/{}", "images", ""),
    "another ending": ("Annotations/{}", "images", "{}.jpg"),
}
YOLO = {  # data.yaml, images, labels, other files
    "Ultralytics": ("path: ../datasets/pets\ntrain: images/train\nval: images/val" + NAMES,
                    "images/{}", "labels/{}", {}),
    "Roboflow": ("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']",
                 "{}/images", "{}/labels", {}),
    "another machine": ("path: /home/me/pets\ntrain: /home/me/pets/images/train\nval: images/val" + NAMES,
                        "images/{}", "labels/{}", {}),
    "Windows": ("path: D:\\pets\ntrain: images\\train\nval: images\\val" + NAMES, "images/{}", "labels/{}", {}),
    "supervision": ("nc: 2\nnames:\n- cat\n- dog\n", "{}/images", "{}/labels", {}),
    "labels beside": ("train: train\nval: ./val" + NAMES, "{}", "{}", {}),
    "lists of folders": ("train: [images/train]\nval:\n- images/val" + NAMES, "images/{}", "labels/{}", {}),
    "CVAT": ("path: .\ntrain: train.txt\nval: val.txt" + NAMES, "images/{}", "labels/{}",
             {name: text.replace("{}", "data") for name, text in LISTS.items()}),
    "lists of Windows": ("train: train.txt\nval: val.txt" + NAMES, "images/{}", "labels/{}",
                         {name: text.replace("{}", "C:/me").replace("/", "\\") for name, text in LISTS.items()}),
    "Label Studio": (None, "images/{}", "labels/{}", {"classes.txt": "cat\ndog\n", "notes.json": '{"a": []}'}),
    "labelImg": (None, "images/{}", "labels/{}", {"labels/classes.txt": "cat\ndog\n"}),
    "Roboflow's darknet": (None, "{}", "{}", {
        "train/_darknet.labels": "cat\ndog\n", "val/_darknet.labels": "cat\ndog\n"}),
    "a folder for all data": (None, "data/{}", "labels/{}", {"classes.txt": "cat\ndog"}),
}


def write(folder, form, layout, split, name):
    if form == "COCO":
        annotations, place, file_name = COCO[layout]
        coco(folder / annotations.format(name), split, file_name)
    elif form == "VOC":
        annotations, place, filename = VOC[layout]
        voc(folder / annotations.format(name), split, filename=filename)
    else:
        config, place, labels, files = YOLO[layout]
        yolo(folder / labels.format(name), split)
        for file, text in {**({"data.yaml": config} if config else {}), **files}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    images(folder / place.format(name), split)


@pytest.mark.parametrize("form, layout", [
    (form, layout) for form, layouts in (("COCO", COCO), ("VOC", VOC), ("YOLO", YOLO)) for layout in layouts])
def test_every_layout_gives_the_same_boxes(form, layout, tmp_path):
    for split in TRUTH:
        write(tmp_path, form, layout, split, split)
    sets = read(tmp_path)
    assert_truth(sets)
    assert sets["train"].class_names == sets["val"].class_names == CLASSES
    assert boxes_in(read(tmp_path, splits=("val",))["val"]) == boxes_in(sets["val"])


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
@pytest.mark.parametrize("form", ["COCO", "VOC", "YOLO"])
def test_val_may_have_other_names(form, name, tmp_path):
    layout = {"COCO": "Roboflow", "VOC": "Roboflow", "YOLO": "supervision"}[form]
    write(tmp_path, form, layout, "train", "train"), write(tmp_path, form, layout, "val", name)
    assert_truth(read(tmp_path))


def test_darknet(tmp_path):
    obj_data(tmp_path)
    assert_truth(read(tmp_path))


def test_voc_as_published(tmp_path):
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    for split in TRUTH:
        voc(tmp_path / "Annotations", split), images(tmp_path / "JPEGImages", split)
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("# ours\n\n" + "".join(f"{k}\n" for k in TRUTH[split]))
    assert_truth(read(tmp_path))
    with pytest.raises(UserError, match=f"Did you mean {tmp_path}?"):
        read(tmp_path.parent)
