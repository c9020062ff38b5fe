"""VOC folders: read like COCO's, and one clear line for whatever is wrong in an XML file."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import UserError, check_data, data
from tests.folders import VOC_TRAIN, VOC_VAL, assert_one_line, voc_box, voc_text, write_image, write_voc

ENTITIES = "".join(f"<!ENTITY {name} '{10 * f'&{of};'}'>" for of, name in zip("abcdefgh", "bcdefghi"))
BOMB = f"<!DOCTYPE a [<!ENTITY a 'ha'>{ENTITIES}]>" + voc_text([], "&i;")  # 200 million letters


def check(capsys, folder):
    """(exit status, what was printed) of python -m support.check_data."""
    return check_data.main([str(folder)]), capsys.readouterr().out


@pytest.fixture(params=["as published", "trainval and test", "as Roboflow exports it"])
def voc(request, tmp_path):
    """(folder, folder of the training images' XML files)"""
    if request.param == "as Roboflow exports it":
        write_voc(tmp_path / "train", tmp_path / "train", VOC_TRAIN)
        write_voc(tmp_path / "valid", tmp_path / "valid", VOC_VAL)
        return tmp_path, tmp_path / "train"
    names = ("train", "val") if request.param == "as published" else ("trainval", "test")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    for name, contents in zip(names, (VOC_TRAIN, VOC_VAL)):
        write_voc(tmp_path / "Annotations", tmp_path / "JPEGImages", contents)
        (tmp_path / f"ImageSets/Main/{name}.txt").write_text("\n".join(contents) + "\n")
    return tmp_path, tmp_path / "Annotations"


def test_voc_folders_are_read_like_coco(voc, capsys):
    folder, _ = voc
    sets = data.load(folder, size=64, augment="none")
    assert sets["train"].class_names == ["cat", "dog"] and sets["train"].category_ids == [1, 2]
    found = {Path(image.path).stem: image for image in sets["train"].images}
    assert sorted(found) == sorted(VOC_TRAIN)
    assert found["b"].boxes_xyxy.tolist() == [[10, 8, 30, 24]], "VOC's first pixel is 1, its last is included"
    assert found["a.x"].boxes_xyxy.tolist() == [[0, 0, 64, 48], [2, 2, 9, 9]], "1..64 is all; no parts"
    assert found["a.x"].labels.tolist() == [0, 1] and found["a.x"].crowd.tolist() == [False, True]
    assert found["c"].boxes_xyxy.shape == (0, 4)
    assert sets["train"].num_boxes == 2, "difficult ones do not count"
    image, target = sets["train"][sets["train"].images.index(found["b"])]
    assert target["boxes"][0].tolist() == pytest.approx([20 / 64, 16 / 48, 20 / 64, 16 / 48])
    assert image[:, 8:24, 10:30].min() > 1 > image[:, :8].max(), "the box is around the white pixels"
    assert sets["val"].class_names == ["cat", "dog"], "val has no dogs"
    assert sets["val"].images[0].boxes_xyxy.tolist() == [[4, 5, 14, 25]]
    status, text = check(capsys, folder)
    assert status == 0 and "crowd regions (VOC: difficult)" in text and "a.x.xml, object 2)" in text


def test_voc_classes_are_numbered_in_the_order_of_their_names(voc):
    folder, xmls = voc
    names = ("zebra", "Ant", "bee", "owl", "eel")
    (xmls / "c.xml").write_text(voc_text([(name, 1, 1, 9, 9) for name in names]))
    assert data.load(folder)["train"].class_names == ["Ant", "bee", "cat", "dog", "eel", "owl", "zebra"]


def test_a_voc_class_is_the_same_class_in_both_splits_whatever_its_name(voc):
    folder, xmls = voc
    in_val = folder / "valid/d.xml" if xmls.name == "train" else xmls / "d.xml"
    for path in (xmls / "b.xml", in_val):
        path.write_text(voc_text([("do\n\u202eg", 11, 9, 30, 24)], f"{path.stem}.png"), encoding="utf-8")
    sets = data.load(folder)
    assert sets["val"].class_names == sets["train"].class_names == ["cat", "do \\u202eg", "dog"]


def test_voc_val_alone_has_the_classes_of_the_training_set(voc):
    assert data.load(voc[0], splits=("val",))["val"].class_names == ["cat", "dog"], "val holds cats only"


def test_voc_image_size_and_name_may_be_missing(voc):
    folder, xmls = voc
    (xmls / "b.xml").write_text(
        f"<annotation><object><name> dog </name>{voc_box('11.0', 9, 30, 24.5)}</object></annotation>")
    found = next(image for image in data.load(folder)["train"].images if image.path.endswith("b.png"))
    assert (found.height, found.width, found.boxes_xyxy.tolist()) == (48, 64, [[10, 8, 30, 24.5]])


@pytest.mark.parametrize("text, words", [
    (voc_text([("dog", 1, 2, 3, 4)])[:-20], ["XML files that cannot be read: 1", "line 1"]),
    ("", ["XML files that cannot be read: 1"]),
    ("<svg/>", ["XML files without VOC annotations: 1", "<svg>"]),
    (voc_text([("dog", 1, 2, 30, 40), ("dog", 1, 2, "x", 4)]), ["not four numbers: 1", "object 2", "'x'"]),
    (voc_text([("dog", 1, 2, 30, 40)]).replace("<bndbox>", "<bndbox/><bndbox>", 1),
     ["more than once: 1", "object 1: <bndbox>"]),
    (voc_text([("dog", 1, 2, 30, 40)]).replace("<xmin>", "<xmin>5</xmin><xmin>", 1), ["object 1: <xmin>"]),
    (voc_text([("dog", 1, 2, 30, 40)]).replace("<name>", "<name>cat</name><name>", 1), ["object 1: <name>"]),
    (voc_text([]).replace("<width>", "<width>65</width><width>"), ["b.xml: <width>"]),
    (voc_text([]).replace("<filename>", "<filename>c.png</filename><filename>"), ["b.xml: <filename>"]),
    (voc_text([("dog", 0.1, 0.2, 0.5, 0.75)]), ["from 0 to 1", "YOLO", "object 1: [0.1, 0.2, 0.5, 0.75]"]),
    (voc_text([("dog", "\uff11\uff12", 2, 30, 40)]), ["not four numbers: 1", "\uff11\uff12"]),
    (voc_text([("dog", "1_0", 2, 30, 40)]), ["not four numbers: 1", "1_0"]),
    (voc_text([("dog", "nan", 2, 30, 40)]), ["not four numbers: 1", "nan"]),
    (BOMB, ["cannot be read: 1", "it declares entities"]),
    ("<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>", None),
    (voc_text([("", 1, 2, 30, 40)]), ["category_id", "object 1"]),
    (voc_text([], width=64.5), ["width and height", "[64.5, 48]"]),
    (voc_text([]), None),
])
def test_a_broken_voc_file_is_named_with_the_object(voc, capsys, text, words):
    folder, xmls = voc
    (xmls / "b.xml").write_text(text, encoding="utf-8")
    status, printed = check(capsys, folder)
    assert status == (words is not None)
    if words:
        with pytest.raises(UserError) as error:
            data.load(folder)
        assert_one_line(error.value, "b.", *words)
        assert all(word in printed for word in words)


def test_a_voc_class_that_only_val_has_is_refused(voc, capsys):
    folder, xmls = voc
    path = folder / "valid/d.xml" if xmls.name == "train" else xmls / "d.xml"
    path.write_text(voc_text([("ant", 1, 2, 30, 40)]))
    with pytest.raises(UserError, match="id 3 is 'ant', in train it does not exist"):
        data.load(folder)


def test_voc_files_that_do_not_exist_are_named(voc):
    folder, xmls = voc
    next(folder.glob("*/b.png")).unlink()
    with pytest.raises(UserError, match="do not exist: 1 .*b.png"):
        data.load(folder)
    if xmls.name == "Annotations":
        (xmls / "b.xml").unlink()
        with pytest.raises(UserError, match="cannot be read: 1 .*b.xml"):
            data.load(folder)


def notes_and_path(folder, stem):
    """(what is said, the image used) of the XML file stem.xml in the training set of a Roboflow folder."""
    dataset = data.load(folder)["train"]
    index = sorted(path.stem for path in (folder / "train").glob("*.xml")).index(stem)
    return " ".join(dataset.notes), Path(dataset.path_of(index)).name


@pytest.fixture
def beside(tmp_path):
    """Each XML file beside its image."""
    write_voc(tmp_path / "train", tmp_path / "train", VOC_TRAIN)
    write_voc(tmp_path / "valid", tmp_path / "valid", VOC_VAL)
    return tmp_path


def test_the_image_is_the_one_that_filename_names(beside):
    write_image(beside / "train/b.jpg")  # sorts before b.png
    Image.new("L", (64, 48)).save(beside / "train/b.bmp")  # a mask
    np.save(beside / "train/b.npy", np.zeros(3))
    (beside / "train/b").mkdir()
    notes, name = notes_and_path(beside, "b")
    assert name == "b.png" and "filename" not in notes
    for whole_path in ("C:\\data\\b.jpg", "/home/somebody/b.jpg", "pictures/b.jpg"):
        (beside / "train/b.xml").write_text(voc_text([("dog", 11, 9, 30, 24)], whole_path))
        assert notes_and_path(beside, "b")[1] == "b.jpg", "the end of a path of another computer"


def test_a_filename_that_is_not_there_gives_way_to_the_image_called_like_the_xml(beside):
    np.save(beside / "train/b.npy", np.zeros(3))
    (beside / "train/b").mkdir(), (beside / "train/b.gif").mkdir()
    for filename in ("gone.jpg", "", "b", "x" * 300, "b\n.png"):
        (beside / "train/b.xml").write_text(voc_text([("dog", 11, 9, 30, 24)], filename))
        notes, name = notes_and_path(beside, "b")
        assert name == "b.png" and "does not exist: the image called like the XML file is used: 1 (" in notes
    (beside / "train/b.png").unlink()
    with pytest.raises(UserError, match="do not exist: 1 .*b .png"):
        data.load(beside)  # b.npy is no image, b.gif is a folder
    write_image(beside / "train/b.jpg"), write_image(beside / "train/b.webp")
    with pytest.raises(UserError, match="several images are called like them: 1 .*b.jpg, b.webp"):
        data.load(beside)


def test_a_filename_of_another_image_is_followed_and_said(beside):
    (beside / "train/b.xml").write_text(voc_text([("dog", 11, 9, 30, 24)], "c.png"))
    notes, name = notes_and_path(beside, "b")
    assert name == "c.png" and "is not the image called like them: <filename> is used: 1 (" in notes
    assert "images that are in train already, kept: 1 (" in notes


def test_endings_in_capitals_are_read_too(beside):
    (beside / "train/b.xml").rename(beside / "train/b.XML")
    (beside / "train/b.png").rename(beside / "train/b.PNG")
    assert len(data.load(beside)["train"]) == 3


@pytest.mark.parametrize("text, said", [
    ("1", "crowd regions"), ("true", "'true'"), ("2", ": 2)"), ("0", ""), ("", "")])
def test_difficult_is_understood_or_said(beside, text, said):
    objects = voc_text([("dog", 11, 9, 30, 24)]).replace("<difficult>0<", f"<difficult>{text}<")
    (beside / "train/b.xml").write_text(objects)
    (beside / "train/a.x.xml").write_text(voc_text([("cat", 1, 1, 64, 48)], "a.x.png"))
    notes = [note for note in data.load(beside)["train"].notes if "VOC: difficult" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)


def test_val_alone_is_numbered_as_the_model_was_trained(beside):
    val = dict(val_json=beside / "valid", val_images=beside / "valid", splits=("val",))
    assert data.load(**val)["val"].class_names == ["cat"], "all that these files know"
    dataset = data.load(**val, class_names=["ant", "cat", "dog"])["val"]
    assert dataset.class_names == ["ant", "cat", "dog"] and dataset.images[0].labels.tolist() == [1]
    with pytest.raises(UserError, match="'cat', in train it does not exist"):
        data.load(**val, class_names=["dog"])


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", "is empty"), ("binary.txt", b"\xff\xfe\0", "cannot be read"),
    ("gone.txt", None, "cannot be read"), ("nul.txt", b"a\0b", "null"),
    ("long.txt", b"x" * 5000, "File name too long"), ("b.xml", b"", "one VOC file"),
    ("no/xmls", None, "no XML files here")])
def test_a_list_or_folder_that_is_none_is_named(beside, name, content, words):
    path = beside / "a/b" / name
    path.parent.mkdir(parents=True)
    if name == "no/xmls":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        data.load(val_json=path, val_images=beside / "valid", splits=("val",))
    assert_one_line(error.value, name.split("/")[0])
