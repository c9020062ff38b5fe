"""What tools write and people have on their disks is read with the right boxes; what is wrong is one line."""
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from support import UserError, check_data, data
from tests.folders import change, edit, write_image, write_json, write_label, write_noise

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
        image = {"id": int(stem), "file_name": name.format(stem), "width": 64, "height": 48}
        contents["images"].append(image)
        for label, x0, y0, x1, y1 in found:
            contents["annotations"].append({
                "id": len(contents["annotations"]) + 1, "image_id": int(stem), "iscrowd": 0,
                "category_id": CLASSES.index(label) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    write_json(path, contents | more)


def voc(folder, split="train", first=1, filename="{}.png", boxes=None):
    """VOC's XML files of a split; first: the number of the first pixel."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, found in (boxes or TRUTH[split]).items():
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmax>{x1}</xmax><xmin>{x0 + first}</xmin>"
            f"<ymin>{y0 + first}</ymin><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1 in found)
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        name = f"<filename>{filename.format(stem)}</filename>" if filename else ""
        (folder / f"{stem}.xml").write_text(f"<annotation>{name}{size}{objects}</annotation>")


def yolo(folder, split="train", boxes=None):
    """YOLO's label files of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, found in (boxes or TRUTH[split]).items():
        write_label(folder / f"{stem}.txt", *[
            (CLASSES.index(label), (x0 + x1) / 128, (y0 + y1) / 96, (x1 - x0) / 64, (y1 - y0) / 48)
            for label, x0, y0, x1, y1 in found])


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
    "a signed address": ("annotations/instances_{}.json", "images", "https://b.s3.com/x/{}.png?Sig=a%2Fb&X=1"),
    "Windows unpacked it": ("annotations_x/annotations/instances_{}.json", "{}", "{}.png"),
    "FLIR": ("thermal_{}/coco.json", "thermal_{}/data", "data/{}.png"),
    "a folder for each split": ("annotations/{}/instances.json", "images/{}", "{}.png"),
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
    "Windows": ("path: D:\\pets\ntrain: images\\train\nval: images\\val" + NAMES,
                "images/{}", "labels/{}", {}),
    "supervision": ("nc: 2\nnames:\n- cat\n- dog\n", "{}/images", "{}/labels", {}),
    "labels beside": ("train: train\nval: ./val" + NAMES, "{}", "{}", {}),
    "capitals": ("train: images/train\nval: images/val" + NAMES, "Images/{}", "Labels/{}", {}),
    "a deep path": ("path: ../pets/d\ntrain: a/train\nval: a/val" + NAMES, "d/a/{}", "d/a/{}", {}),
    "lists of folders": ("train: [images/train]\nval:\n- images/val" + NAMES, "images/{}", "labels/{}", {}),
    "CVAT": ("path: .\ntrain: train.txt\nval: val.txt" + NAMES, "images/{}", "labels/{}",
             {name: text.replace("{}", "data") for name, text in LISTS.items()}),
    "lists of Windows": ("train: train.txt\nval: val.txt" + NAMES, "images/{}", "labels/{}",
                         {name: text.replace("{}", "C:").replace("/", "\\") for name, text in LISTS.items()}),
    "Label Studio": (None, "images/{}", "labels/{}", {"classes.txt": "cat\ndog\n", "notes.json": "{}"}),
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


def darknet(folder):
    """CVAT's "YOLO 1.1"."""
    for split in TRUTH:
        images(folder / f"obj_{split}_data", split), yolo(folder / f"obj_{split}_data", split)
        lines = [f"data/obj_{split}_data/{k}.png\n" for k in TRUTH[split]]
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "obj.names").write_text("cat\ndog\n")
    (folder / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\nbackup = b/\n")


def voc_as_published(folder, first=1, lists="{}.txt", line="{}\n"):
    (folder / "ImageSets/Main").mkdir(parents=True)
    for split in TRUTH:
        voc(folder / "Annotations", split, first), images(folder / "JPEGImages", split)
        text = "# ours\n\n" + "".join(line.format(name) for name in TRUTH[split])
        (folder / "ImageSets/Main" / lists.format(split)).write_text(text)


def coco_folders(folder, **more):
    for split in TRUTH:
        coco(folder / f"annotations/instances_{split}.json", split, **more), images(folder / split, split)


def yolo_folders(folder, config="train: images/train\nval: images/val\nnames: [cat, dog]"):
    for split in TRUTH:
        images(folder / f"images/{split}", split), yolo(folder / f"labels/{split}", split)
    (folder / "data.yaml").write_text(config)


def test_darknet(tmp_path):
    darknet(tmp_path)
    assert_truth(read(tmp_path))


@pytest.mark.parametrize("line", ["{}\n", "{}.png\n", '"{}"\n', "{} 1\n", "{}\r\n"])
def test_voc_lists_are_read_as_tools_write_them(tmp_path, line):
    voc_as_published(tmp_path, line=line)
    assert_truth(read(tmp_path))


def test_the_four_paths_do_as_well_as_a_folder(tmp_path):
    coco_folders(tmp_path / "coco"), yolo_folders(tmp_path / "yolo"), voc_as_published(tmp_path / "voc")
    for form, annotations, place in (("coco", "annotations/instances_{}.json", "{}"),
                                     ("yolo", "data.yaml", "images/{}"),
                                     ("voc", "ImageSets/Main/{}.txt", "JPEGImages")):
        paths = {f"{split}_{kind}": tmp_path / form / path.format(split) for split in TRUTH
                 for kind, path in (("json", annotations), ("images", place))}
        assert_truth(read(None, **paths))
        val = {name: path for name, path in paths.items() if name.startswith("val")}
        assert_truth(read(None, splits=("val",), **val))
        with pytest.raises(UserError, match="--train-json and --train-images are both needed"):
            read(None, **val)
        with pytest.raises(UserError, match="not both"):
            read(tmp_path / form, **val)


def test_links_to_folders_are_followed_and_not_in_circles(tmp_path):
    yolo_folders(tmp_path / "there"), (tmp_path / "here").mkdir()
    for name in ("images", "labels", "data.yaml"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there/images/again").symlink_to(tmp_path / "there"), (tmp_path / "here/all").symlink_to("/")
    assert_truth(read(tmp_path / "here"))


def test_a_data_folder_may_have_brackets_and_stars_in_its_name(tmp_path):
    folder = tmp_path / "pets [v2] *1"
    for split in TRUTH:
        coco(folder / f"my_{split}.json", split), images(folder / "images", split)
    assert_truth(read(folder))


def test_data_yaml_may_name_folders_beside_its_own_of_nearly_the_same_name(tmp_path):
    yolo_folders(tmp_path / "pets_"), (tmp_path / "pets").mkdir()
    (tmp_path / "pets/data.yaml").write_text("train: ../pets_/images/train\nval: ../pets_/images/val" + NAMES)
    assert_truth(read(tmp_path / "pets"))


def test_an_image_with_two_endings_is_one_image_and_hides_no_other(tmp_path):
    yolo_folders(tmp_path)
    write_image(tmp_path / "images/train/8.jpg"), write_image(tmp_path / "images/train/8.jpg.png")  # a mask
    found = [Path(image.path).name for image in read(tmp_path)["train"].images]
    assert found == ["1.png", "2.png", "3.png", "8.jpg", "8.jpg.png"]


def test_accents_in_one_character_or_in_two(tmp_path):
    coco_folders(tmp_path, name="e\u0301{}.png")
    for path in [*tmp_path.glob("*/*.png")]:
        path.rename(path.with_name(f"\u00e9{path.name}"))
    assert len(read(tmp_path)["train"]) == 3


def test_label_files_in_other_capitals(tmp_path):
    yolo_folders(tmp_path)
    for path in [*tmp_path.glob("labels/*/*.txt")]:
        path.rename(path.with_suffix(".TXT"))
    (tmp_path / "labels").rename(tmp_path / "Labels")
    assert_truth(read(tmp_path))


# ---- COCO --------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    coco_folders(tmp_path)
    return tmp_path


def as_text(contents):
    for entry in contents["images"]:
        entry["id"] = str(entry["id"])
    for entry in contents["annotations"]:
        entry |= {"image_id": str(entry["image_id"]), "category_id": float(entry["category_id"]), "id": "a"}
    for entry in contents["categories"]:
        entry["id"] = str(entry["id"])


REPAIRED = {  # what tools write, and the note about it
    "annotation ids given twice": (edit("annotations", 1, id=1), "missing, text or given twice, not used: 1"),
    "no annotation id": (edit("annotations", 1, id=...), "ids that are missing"),
    "ids as text": (as_text, "image ids that are text or fractions, read as numbers: 3"),
    "bbox as text": (edit("annotations", 0, bbox=["10", "8", "20.0", "16"]), ""),
    "no size": (edit("images", 0, width=..., height=0), ""),
    "a number as file_name": (edit("images", 0, file_name=1), ""),
    "size as text": (edit("images", 0, width="64", height=48.0), ""),
    "no iscrowd": (edit("annotations", 0, iscrowd=...), ""),
    "false iscrowd": (edit("annotations", 0, iscrowd=False, area=0), ""),
    "a negative area": (edit("annotations", 0, area=-1), ""),
    "only polygons": (edit("annotations", 0, bbox=..., segmentation=[
        [10, 8, 30, 8, 30, 9], [10, 20, 12, 24, 11, 9]]), "from outlines, because there is no bbox: 1"),
    "VIA's polygon": (edit("annotations", 0, bbox=[], segmentation=[10, 8, 30, 8, 30, 24]), "from outlines"),
    "a mask": (edit("annotations", 0, bbox=None, segmentation={
        "size": [48, 64], "counts": [10 * 48 + 8, *[16, 32] * 19, 16, 34 * 48 - 24]}), "from outlines"),
    "LVIS": (edit("images", 0, file_name=..., coco_url="http://images.cocodataset.org/train2017/1.png"),
             "in another folder than the annotations say"),
    "a file given twice": (lambda c: c["images"].append(c["images"][0]), ""),
    "a class given twice": (lambda c: c["categories"].append(c["categories"][0]), ""),
}


@pytest.mark.parametrize("what", REPAIRED)
def test_coco_as_tools_write_it(folder, what):
    how, note = REPAIRED[what]
    change(folder, how)
    sets = read(folder)
    assert_truth(sets)
    assert note in said(sets["train"]) and sets["train"].images[0].areas.tolist() == [20 * 16]


def test_ids_beyond_53_bits_stay_as_they_are(folder):
    def how(contents):
        for entry in contents["images"] + contents["annotations"]:
            key = "id" if "file_name" in entry else "image_id"
            entry[key] += 2 ** 53

    change(folder, how)
    sets = read(folder)
    assert_truth(sets)
    assert [image.id - 2 ** 53 for image in sets["train"].images] == [1, 2, 3]


def test_image_ids_that_are_names_are_numbered(folder):
    def how(contents):
        for entry in contents["images"] + contents["annotations"]:
            key = "id" if "file_name" in entry else "image_id"
            entry[key] = f"photo {entry[key]}"

    change(folder, how)
    sets = read(folder)
    assert_truth(sets)
    assert [image.id for image in sets["train"].images] == [1, 2, 3]


def test_a_box_in_0_to_1_among_pixels_is_tiny_but_most_are_an_error(folder):
    change(folder, edit("annotations", 0, bbox=[0.1, 0.2, 0.3, 0.4]))
    assert boxes_in(read(folder)["train"])["1"] == [("cat", 0.1, 0.2, 0.4, 0.6)]
    change(folder, edit("annotations", 1, bbox=[0.5, 0.5, 0.25, 0.5]))
    with pytest.raises(UserError, match="most boxes are from 0 to 1.*: 2 .first: 1.png, image id 1"):
        read(folder)


def test_one_instances_file_is_chosen_among_several_and_keypoints_by_their_path(folder):
    for name in ("person_keypoints", "captions", "stuff", "image_info", "panoptic"):
        coco(folder / f"annotations/{name}_train.json", boxes={"9": []})
    (folder / "annotations/instances_train.json").rename(folder / "annotations/instances_train_v2.json")
    assert_truth(read(folder))
    keypoints = folder / "annotations/person_keypoints_train.json"
    coco(keypoints)
    assert_truth(read(None, train_json=keypoints, train_images=folder / "train", splits=("train",)))


def test_classes_are_those_of_train_and_val_together(tmp_path):
    boxes = {"4": [("bird", 5, 6, 45, 46), ("cat", 1, 2, 9, 9)], "5": []}
    coco_folders(tmp_path / "coco"), voc_as_published(tmp_path / "voc")
    CLASSES.append("bird")
    coco(tmp_path / "coco/annotations/instances_val.json", boxes=boxes)
    CLASSES.pop()
    voc(tmp_path / "voc/Annotations", boxes=boxes)
    for form in ("coco", "voc"):
        sets = read(tmp_path / form)
        assert sets["train"].class_names == sets["val"].class_names == ["cat", "dog", "bird"], form
        assert boxes_in(sets["val"]) == {"4": sorted(boxes["4"]), "5": []} and "bird" in said(sets["val"])
        assert read(tmp_path / form, splits=("val",))["val"].class_names == ["cat", "dog", "bird"], form


def test_classes_of_other_ids_are_matched_by_name(folder):
    def how(contents):
        for entry in contents["categories"] + contents["annotations"]:
            key = "category_id" if "bbox" in entry else "id"
            entry[key] = 3 - entry[key]

    change(folder, how, "val")
    sets = read(folder)
    assert_truth(sets)
    assert sets["val"].category_ids == [1, 2] and "with another id than in train" in said(sets["val"])
    change(folder, edit("categories", 0, name="Cat"), "val")
    with pytest.raises(UserError, match="written in another way than in train"):
        read(folder)


@pytest.mark.parametrize("name", ["1.png", "x/1.png"])
def test_an_image_that_is_lost_is_looked_for_but_not_in_the_other_split(folder, name):
    change(folder, edit("images", 0, file_name=name))
    (folder / "elsewhere").mkdir()
    (folder / "train/1.png").rename(folder / "elsewhere/1.png")
    sets = read(folder)
    assert_truth(sets)
    assert "in another folder than the annotations say" in said(sets["train"])
    (folder / "elsewhere/1.png").rename(folder / "val/1.png")
    with pytest.raises(UserError, match="image files that do not exist: 1 "):
        read(folder)
    for place in ("a", "b"):
        (folder / place).mkdir()
        write_image(folder / place / "1.png")
    with pytest.raises(UserError, match="several of that name elsewhere: 1 .*a/1.png, .*b/1.png"):
        read(folder)


@pytest.mark.parametrize("name, other", [("http://coco.org/train2017/{}.png", "val2017"), ("{}.png", "x")])
def test_images_of_val_may_be_in_train2017_if_it_is_said_or_there_is_no_val(name, other, tmp_path):
    for split in TRUTH:  # LVIS says so; others split the annotations of one folder
        coco(tmp_path / f"lvis_v1_{split}.json", split, name), images(tmp_path / "train2017", split)
    (tmp_path / other).mkdir()
    assert_truth(read(tmp_path))
    if other == "x":  # but not if the names are those of train's images
        shutil.copy(tmp_path / "lvis_v1_train.json", tmp_path / "lvis_v1_val.json")
        with pytest.raises(UserError, match="images that are in train already: 3"):
            read(tmp_path)


def test_images_outside_of_the_data_folder_are_noted(tmp_path):
    coco_folders(tmp_path / "data", name="../../more/{}.png")
    for split in TRUTH:
        images(tmp_path / "more", split), shutil.rmtree(tmp_path / "data" / split)
    sets = read(tmp_path / "data")
    assert_truth(sets)
    assert "outside of the data folder: 3" in said(sets["train"])


OTHER_JSON = {
    "labelme": ({"version": "5", "shapes": [], "imagePath": "1.png"}, "labelme"),
    "VIA": ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA"),
    "VIA's regions": ({"1.png99": {"filename": "1.png", "regions": []}}, "VIA"),
    "VoTT": ({"name": "x", "assets": {}, "tags": []}, "VoTT"),
    "results": ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "results"),
    "panoptic": ({"images": [], "categories": [], "annotations": [{"segments_info": []}]}, "take instances_"),
    "captions": ({"images": [], "annotations": [{"image_id": 1, "caption": "a cat"}]}, "take instances_"),
    "Label Studio": ([{"id": 1, "data": {"image": "1.png"}, "annotations": []}], "Label Studio"),
    "Label Studio's JSON-MIN": ([{"image": "1.png", "label": [], "annotator": 1}], "Label Studio"),
    "classes without ids": ({"images": [], "annotations": [], "categories": ["cat", "dog"]}, ""),
    "CreateML": ([{"image": "1.png", "annotations": []}], "CreateML"),
    "Datumaro": ({"info": {}, "categories": {}, "items": []}, "Datumaro"),
    "a list of numbers": ([1, 2], ""),
    "images as a dict": ({"images": {}, "annotations": [], "categories": []}, ""),
}


@pytest.mark.parametrize("what", OTHER_JSON)
def test_json_that_is_not_coco_is_called_so(folder, what):
    contents, words = OTHER_JSON[what]
    (folder / "annotations/instances_train.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=f"instances_train.json: is no COCO file.*{words}"):
        read(folder)
    other = folder.parent / "other"
    other.mkdir()
    (other / "export.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=f"export.json is no COCO file.*{words}"):
        read(other)
    shutil.rmtree(other)


BROKEN = {  # a change to COCO's file, and what is said
    "no such image": (edit("annotations", 1, image_id=99), "among the images: 1 .first: annotation id 2: 99"),
    "no such class": (edit("annotations", 1, category_id=9), "2.png, image id 2, annotation id 2: 9"),
    "three numbers": (edit("annotations", 1, bbox=[1, 2, 3]), "annotation id 2: .1, 2, 3."),
    "a text": (edit("annotations", 1, bbox="[1, 2, 3, 4]"), "annotation id 2: '.1, 2, 3, 4.'"),
    "a dict": (edit("annotations", 1, bbox={"x": 1}, segmentation=[[1, 2, 3, 4, 5, 6]]), "id 2: {'x': 1}"),
    "no box": (edit("annotations", 1, bbox=...), "bbox is not four numbers: 1 .first: 2.png, image id 2"),
    "no file_name": (edit("images", 1, file_name=...), "do not exist: 1 .*train/, image id 2"),
    "no such file": (edit("images", 1, file_name="x.png"), "do not exist: .*x.png, image id 2, copy it"),
    "an image id twice": (edit("images", 1, id=1), "image ids that occur twice: 1 .first: image id 1"),
    "a class id twice": (edit("categories", 1, id=1), "category ids that occur twice: 1"),
    "a negative size": (edit("images", 1, width=-64), "2.png .image id 2.: .*48 and -64"),
    "no images": (lambda c: c.update(images=[], annotations=[]), "there are no images"),
    "no boxes": (lambda c: c.update(annotations=[]), "not a single usable box to train on in 3 images"),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]] and None, "crowd regions"),
    "HEIC": (edit("images", 1, file_name="2.HEIC"), "that Pillow does not read"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_in_coco_is_said_with_its_place(folder, what, capsys):
    how, words = BROKEN[what]
    (folder / "train/2.HEIC").write_bytes(b"x")
    change(folder, how)
    with pytest.raises(UserError, match=words) as error:
        read(folder)
    assert f"{folder}/annotations/instances_train.json" in str(error.value) and str(error.value).isprintable()
    assert check_data.main([str(folder), "--no-images"]) == 1 and "error: " in capsys.readouterr().out


DROPPED = {  # a box [x, y, width, height] in an image of 64 x 48, what is left of it, and the note
    "no height": ([3, 3, 9, 0], None, "or height, dropped: 1 .first: 1.png, image id 1, annotation id 1"),
    "not finite": ([3, float("nan"), 9, 9], None, "not finite"),
    "outside": ([300, 3, 9, 9], None, "outside their image, dropped"),
    "over the edge": ([60, 3, 9, 9], ("cat", 60, 3, 64, 12), "reaching over the image edge, clipped"),
    "rounding": ([60, 3, 4.25, 9], ("cat", 60, 3, 64, 12), ""),
}


@pytest.mark.parametrize("what", DROPPED)
def test_boxes_are_clipped_or_dropped_with_a_note(folder, what):
    box, left, words = DROPPED[what]
    change(folder, edit("annotations", 0, bbox=box))
    dataset = read(folder)["train"]
    assert boxes_in(dataset)["1"] == [left] * (left is not None)
    assert re.search(words, said(dataset))


# ---- VOC ---------------------------------------------------------------------------------------------------
def test_a_zero_proves_that_voc_counts_pixels_from_0(tmp_path):
    voc_as_published(tmp_path / "a", first=0)  # one box begins at 0, 0
    sets = read(tmp_path / "a")
    assert_truth(sets)
    assert all("counted from 0" in said(dataset) for dataset in sets.values())
    val = read(tmp_path / "a", splits=("val",))["val"]  # its own boxes prove nothing
    assert boxes_in(val) == boxes_in(sets["val"])
    voc_as_published(tmp_path / "b", first=1)
    assert "counted from 0" not in said(read(tmp_path / "b")["train"])


def test_voc_in_subfolders_with_the_same_names(tmp_path):
    for place in ("x", "y"):
        write_image(tmp_path / f"JPEGImages/{place}/1.png", width=64 if place == "x" else 80)
        voc(tmp_path / f"Annotations/{place}", boxes={"1": [("cat", 2, 3, 9, 10)]})
        text = (tmp_path / f"Annotations/{place}/1.xml").read_text()
        text = text.replace("64", "80") if place == "y" else text
        (tmp_path / f"Annotations/{place}/1.xml").write_text(text)
    sets = read(tmp_path, split=0.5)
    assert sorted(dataset.images[0].path[-7:] for dataset in sets.values()) == ["x/1.png", "y/1.png"]


def test_a_listed_image_without_xml_has_no_objects(tmp_path):
    voc_as_published(tmp_path)  # Datumaro, and CVAT with it, writes none
    (tmp_path / "Annotations/3.xml").unlink()
    sets = read(tmp_path)
    assert_truth(sets)
    assert "without an XML file, taken as images without objects: 1" in said(sets["train"])
    (tmp_path / "Annotations/1.xml").unlink(), (tmp_path / "Annotations/2.xml").unlink()
    with pytest.raises(UserError, match="no name in this list has an XML file"):
        read(tmp_path)


def test_a_filename_that_others_have_too_gives_way_to_the_name_of_the_xml(tmp_path):
    voc_as_published(tmp_path)
    voc(tmp_path / "Annotations", "train", filename="1.png")  # copied by hand, or by a tool that augments
    assert_truth(read(tmp_path))


def test_difficult_objects_are_neither_trained_on_nor_evaluated(tmp_path):
    voc_as_published(tmp_path)
    path = tmp_path / "Annotations/2.xml"
    path.write_text(path.read_text().replace("<name>dog", "<difficult>1</difficult><name>dog"))
    dataset = read(tmp_path)["train"]
    assert dataset.num_boxes == 2 and dataset.images[1].crowd.tolist() == [True, False]


def test_classes_that_differ_in_capitals_are_noted(tmp_path):
    yolo_folders(tmp_path, "names: [Cat, cat]")
    assert "differ only in capitals, kept apart: 1 (first: Cat, cat)" in said(read(tmp_path)["train"])


def test_the_folder_one_level_up_names_the_one_that_is_meant(tmp_path):
    coco(tmp_path / "pets/annotations/instances_default.json")
    with pytest.raises(UserError, match=f"Did you mean {tmp_path}/pets"):
        read(tmp_path)
    voc_as_published(tmp_path / "VOCdevkit/VOC2007")
    for folder in (tmp_path / "VOCdevkit", tmp_path):
        with pytest.raises(UserError, match=f"Did you mean {tmp_path}/VOCdevkit/VOC2007"):
            read(folder)


VOC_BROKEN = {
    "not XML": (lambda text: text[:-20], "cannot be used: 1 .first: .*1.xml cannot be read"),
    "CVAT": (lambda text: "<annotations><version/></annotations>", "CVAT's own form: export as COCO 1.0"),
    "another root": (lambda text: "<svg/>", "has no VOC annotations, but <svg>"),
    "no name": (lambda text: text.replace("<name>cat</name>", ""), "objects without name: 1 .*object 1"),
    "no box": (lambda text: text.replace("bndbox", "robndbox"), "without four numbers.*: 1 .*object 1"),
    "no number": (lambda text: text.replace("<xmin>11", "<xmin>x"), "without four numbers.*: x, 9, 30, 24"),
    "said to be GBK": (lambda text: '<?xml version="1.0" encoding="GBK"?>' + text, "expected UTF-8, also in"),
    "GBK": (lambda text: text.replace("cat", "\u72d7").encode("gbk"), "save it as UTF-8"),
}


@pytest.mark.parametrize("what", VOC_BROKEN)
def test_what_is_wrong_in_voc_is_said_with_its_place(tmp_path, what):
    how, words = VOC_BROKEN[what]
    voc_as_published(tmp_path)
    path = tmp_path / "Annotations/1.xml"
    text = how(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read(tmp_path)


# ---- YOLO --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, names", {
    "names: ['0', \"b, c\"]": ["0", "b, c"],
    "names: {0: a, 1: 'b: c'}": ["a", "b: c"],
    "names:\n- no\n- 10:30": ["no", "10:30"],
    "\ufeffnames:\n  1: b\n  0: a\n": ["a", "b"],
    "---\r\nnames:\r\n  0: a  # first\r\n  1: b\r\n": ["a", "b"],
    "nc: 2": ["0", "1"],
    "names: obj.names": ["a", "b"],
}.items())
def test_data_yaml_as_people_write_it(text, names, tmp_path):
    yolo_folders(tmp_path, text)
    (tmp_path / "obj.names").write_text("a\nb\n")
    assert read(tmp_path)["val"].class_names == names


@pytest.mark.parametrize("text, words", {
    "names: [a, b": "cannot be read as YAML: .*line",
    "names: {dog: 0}": "names should be a list",
    "names: []": "names should be a list",
    "train: images/train": "names should be a list",
    "names: cat": "names: cat does not exist.*such as .cat, dog.",
    "val: null\nnames: [cat, dog]": "val: null does not exist.*without a val, add --split 0.2",
    "[a, b]": "should have lines such as",
    "train: {a: b}\nnames: [a]": "train should be a path or a list of paths",
    "train: /\nnames: [a]": "train: / does not exist",
    "train: ../..\nnames: [a]": "does not exist",
    "train: images/b\nnames: [a]": "train: images/b does not exist",
    b"names: [\xc3\x28]": "save it as UTF-8",
}.items())
def test_a_data_yaml_that_is_not_understood_gets_one_line(text, words, tmp_path):
    yolo_folders(tmp_path)
    (tmp_path / "data.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read(tmp_path)


LABELS = {  # lines of the label file of image 1, and what is said
    "four numbers": ("0 .5 .5 .2", "neither class, x, y, width, height nor"),
    "six numbers": ("0 .5 .5 .2 .2 .9", "neither class, x, y, width, height nor"),
    "a word": ("cat .5 .5 .2 .2", "label lines with more than numbers: 1 .*labels/train/1.txt, line 1: 'cat"),
    "a class beyond": ("7 .5 .5 .2 .2", "not among the 2 names: 1 .*line 1: 7"),
    "a negative class": ("-1 .5 .5 .2 .2", "not among the 2 names"),
    "pixels": ("0 32 24 10 10", "not shares of the image.*pixels"),
    "keypoints": ("0 .5 .5 .2 .2 .5 .5 2 .6 .6 1", "not shares of the image.*keypoints, and no kpt_shape"),
    "not UTF-8": (b"\xc3\x28", "label files that cannot be read: 1 .*UTF-8"),
}


@pytest.mark.parametrize("what", LABELS)
def test_what_is_wrong_in_labels_is_said_with_its_place(tmp_path, what):
    text, words = LABELS[what]
    yolo_folders(tmp_path)
    (tmp_path / "labels/train/1.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_labels_that_count_from_1_are_found_out(tmp_path):
    yolo_folders(tmp_path)
    for path in tmp_path.glob("labels/*/*.txt"):
        path.write_text("".join(f"{int(line[0]) + 1}{line[1:]}\n" for line in path.read_text().splitlines()))
    assert check_data.main([str(tmp_path), "--no-images"]) == 1
    with pytest.raises(UserError, match="not among the 2 names; they seem to count from 1"):
        read(tmp_path)


def test_polygons_and_keypoints_count_as_their_boxes(tmp_path):
    yolo_folders(tmp_path)
    (tmp_path / "labels/train/1.txt").write_text("1 .25 .5 .5 .25 .75 .5 .5 .75")
    sets = read(tmp_path)
    assert boxes_in(sets["train"])["1"] == [("dog", 16, 12, 48, 36)] and "polygons" in said(sets["train"])
    yolo_folders(tmp_path, "kpt_shape: [1, 2]\nnames: [cat, dog]")
    for path in tmp_path.glob("labels/*/*.txt"):
        path.write_text("1 .5 .5 .25 .25 .1 .1")
    assert boxes_in(read(tmp_path)["train"])["1"] == [("dog", 24, 18, 40, 30)]


def test_labels_and_images_without_each_other(tmp_path):
    yolo_folders(tmp_path)
    (tmp_path / "labels/train/3.txt").unlink()
    (tmp_path / "labels/train/9.txt").write_text("0 .5 .5 .2 .2")
    sets = read(tmp_path)
    assert_truth(sets)
    assert "without a label file, taken as images without objects: 1" in said(sets["train"])
    assert "label files without an image, not used: 1" in said(sets["train"])
    shutil.rmtree(tmp_path / "labels/train")
    with pytest.raises(UserError, match="no image has labels; .*images/train/.*labels/"):
        read(tmp_path)


def test_yolo_without_val_without_names_without_images(tmp_path):
    yolo_folders(tmp_path, "train: images/train\nnames: [cat, dog]")
    shutil.rmtree(tmp_path / "images/val")
    with pytest.raises(UserError, match="data.yaml has no val: add --split 0.2"):
        read(tmp_path)
    assert len(read(tmp_path, split=0.4)["val"]) == 1
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match="is a YOLO label file: write the names .*classes.txt"):
        read(tmp_path)
    for name in TRUTH["train"]:
        (tmp_path / f"images/train/{name}.png").rename(tmp_path / f"images/train/{name}.HEIC")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(UserError, match="cannot be used: 3 .*1.HEIC: a format that Pillow does not read"):
        read(tmp_path)
    yolo_folders(tmp_path)
    for path in tmp_path.glob("images/train/*"):
        path.unlink()
    with pytest.raises(UserError, match="no images in .*images/train"):
        read(tmp_path)


def test_labels_without_images_are_called_so(tmp_path):
    yolo(tmp_path / "labels", boxes=TRUTH["train"]), (tmp_path / "classes.txt").write_text("cat\ndog")
    (tmp_path / "notes.json").write_text("{}")  # Label Studio's YOLO, exported without images
    with pytest.raises(UserError, match=f"classes.txt is YOLO's, and no images .*into {tmp_path}/images"):
        read(tmp_path, split=0.4)


# ---- Files -------------------------------------------------------------------------------------------------
def test_a_folder_without_a_known_layout_lists_what_is_there(tmp_path):
    (tmp_path / "photos").mkdir(), (tmp_path / "labels.csv").touch()
    write_image(tmp_path / "photos/1.png")
    with pytest.raises(UserError, match="no train annotations here.*photos/.*1 .csv.*Export"):
        read(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a file, not a folder"):
        read(tmp_path / "labels.csv")


@pytest.mark.parametrize("content, words", {
    b"": "is empty", b"{": "cannot be read as JSON: .*line 1", b"[" * 99999: "cannot be read as JSON",
    b'{"a": "\xff"}': ".*save it as UTF-8", b"version https://git-lfs.github.com/spec/v1\n": ".*git lfs pull",
    b'{"a": ' + b"9" * 20000 + b"}": "cannot be read as JSON",
}.items())
def test_a_file_that_is_no_json_is_named(folder, content, words):
    (folder / "annotations/instances_train.json").write_bytes(content)
    with pytest.raises(UserError, match=f"instances_train.json: {words}"):
        read(folder)


def test_utf_16_is_read(folder):
    path = folder / "annotations/instances_train.json"
    path.write_text(path.read_text(), encoding="utf-16")
    assert_truth(read(folder))


def test_devices_fifos_and_giants_are_not_read(folder, tmp_path):
    path = folder / "annotations/instances_train.json"
    path.unlink(), path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is not a file"):
        data.load(train_json=path, train_images=folder / "train", splits=("train",))
    path.unlink(), os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file"):
        data.load(train_json=path, train_images=folder / "train", splits=("train",))
    path.unlink(), path.touch(), os.truncate(path, 10 ** 10)
    with pytest.raises(UserError, match="has 10.0 GB"):
        read(folder)
    coco(path)
    (folder / "train/1.png").unlink(), os.mkfifo(folder / "train/1.png")
    with pytest.raises(UserError, match="do not exist: 1 .*train/1.png"):
        read(folder)


def test_files_of_systems_and_notebooks_are_skipped_and_said(tmp_path):
    yolo_folders(tmp_path)
    write_image(tmp_path / "images/train/.ipynb_checkpoints/1-checkpoint.png")
    (tmp_path / "images/train/._1.png").write_bytes(b"x")
    sets = read(tmp_path)
    assert_truth(sets)
    assert "files that systems or notebooks make, not used: 2" in said(sets["train"])


def test_a_damaged_exif_block_does_not_matter(tmp_path, recwarn):
    yolo_folders(tmp_path)
    write_noise(tmp_path / "images/train/1.png", exif=b"Exif\0\0II*\0\x08\0\0\0")  # without entries
    assert_truth(read(tmp_path))
    assert check_data.main([str(tmp_path)]) == 0 and not recwarn.list


# ---- --split -----------------------------------------------------------------------------------------------
TOGETHER = {  # all images in one folder, as tools export them: annotations, images
    "beside": lambda f, boxes: (coco(f / "all.json", boxes=boxes), "."),
    "Label Studio": lambda f, boxes: (coco(f / "result.json", name="images\\{}.png", boxes=boxes), "images"),
    "CVAT": lambda f, boxes: (coco(f / "annotations/instances_default.json", boxes=boxes), "images/default"),
    "FiftyOne": lambda f, boxes: (coco(f / "labels.json", boxes=boxes), "data"),
    "TACO": lambda f, boxes: (coco(f / "annotations.json", name="batch_1/{}.png", boxes=boxes), "batch_1"),
    "Roboflow": lambda f, boxes: (coco(f / "train/_annotations.coco.json", boxes=boxes), "train"),
    "labelImg": lambda f, boxes: (voc(f, boxes=boxes), "."),
    "VOC": lambda f, boxes: (voc(f / "annotations", boxes=boxes), "images"),
    "YOLO": lambda f, boxes: (yolo(f / "labels", boxes=boxes), "images"),
    "YOLO, labels beside": lambda f, boxes: (yolo(f, boxes=boxes), "."),
}


@pytest.mark.parametrize("layout", TOGETHER)
def test_the_same_images_are_held_out_whatever_the_format(layout, tmp_path):
    boxes = TRUTH["train"] | TRUTH["val"]
    for name in ("beside", layout):
        _, place = TOGETHER[name](tmp_path / name, boxes)
        for split in TRUTH:
            images(tmp_path / name / place, split)
        if "YOLO" in name:
            (tmp_path / name / "classes.txt").write_text("cat\ndog\n")
    if layout != "Roboflow":
        with pytest.raises(UserError, match="add --split 0.2"):
            read(tmp_path / layout)
    wanted, found = (read(tmp_path / name, split=0.4) for name in ("beside", layout))
    for split, count in (("train", 3), ("val", 2)):
        assert boxes_in(found[split]) == boxes_in(wanted[split]) and len(found[split]) == count
    assert found["val"].held_out == wanted["val"].held_out and found["train"].held_out is None
    assert "2 of 5 images, held out of the training set by --split 0.4, seed 0" in said(found["val"])


def test_a_split_is_a_function_of_names_and_seed_with_every_class_in_both_parts(tmp_path):
    rare = {"5", "17", "29", "41", "53"}  # five images with a dog, ten with nothing, the others with a cat
    boxes = {str(k): [("dog" if str(k) in rare else "cat", 4, 4, 24, 24)] * (str(k) in rare or k % 6 > 0)
             for k in range(60)}
    coco(tmp_path / "a/all.json", boxes=boxes)
    for name in boxes:
        write_image(tmp_path / f"a/{name}.png")
    val = read(tmp_path / "a", split=0.2)["val"]
    classes = [label for image in val.images for label in image.labels.tolist()]
    assert [len(val), classes.count(0), classes.count(1)] == [12, 9, 1], "a fifth of 60, 45 and 5"
    again = read(shutil.move(tmp_path / "a", tmp_path / "b"), split=0.2, splits=("val",))["val"]
    assert boxes_in(again) == boxes_in(val) and again.held_out == val.held_out, "the place changes nothing"
    assert read(tmp_path / "b", split=0.2, seed=1)["val"].held_out != val.held_out


def test_what_cannot_be_split_gets_one_line(folder):
    for share, words in ((0.2, "has a val of its own, .*instances_val.json: leave out --split"),
                         (1.0, "a share between 0 and 1")):
        with pytest.raises(UserError, match=words):
            read(folder, split=share)
    with pytest.raises(UserError, match="have a val of their own"):
        read(None, split=0.2)
    (folder / "annotations/instances_val.json").unlink()
    with pytest.raises(UserError, match="of 3 images leaves none"):
        read(folder, split=0.1)
    paths = dict(train_json=folder / "annotations/instances_train.json", train_images=folder / "train")
    assert len(read(None, **paths, split=0.4)["val"]) == 1
    with pytest.raises(UserError, match="leave out --val-json"):
        read(None, **paths, val_json="a.json", val_images="b", split=0.2)
