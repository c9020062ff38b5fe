"""PASCAL VOC's XML files."""
import os
import re
from collections import defaultdict
from xml.etree import ElementTree

from support import UserError, reason, visible
from support.annotations import SHARES, is_shares
from support.images import images_in

# float() also takes 1_0, nan, other digits
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read_voc(path, image_folder, known, reading):
    """VOC's XML files in COCO's form. Class ids are 1..C in the order of the names.

    path    list of image names in ImageSets/Main, or a folder of XML files
    known   {id: name} of the training set, or empty; names that are not among them get further ids
    """
    images, annotations, places = [], [], []
    images_of = image_files(image_folder)
    for xml in xml_files(path):
        root = read_xml(xml, reading.errors)
        if root is None:
            continue
        images.append({
            "id": len(images) + 1,
            "file_name": image_of(root, xml, image_folder, images_of, reading),
            **read_numbers(root, "size", ("width", "height"), xml, reading.errors),
        })
        for k, element in enumerate(root.findall("object"), 1):
            places.append(f"{xml}, object {k}")
            annotations.append(read_object(element, len(images), places[-1], reading.errors))
    id_of = {name: i for i, name in known.items()}
    for name in sorted({entry["class"] for entry in annotations} - {*id_of, ""}):
        id_of[name] = max(id_of.values(), default=0) + 1
    for entry in annotations:
        entry["category_id"] = id_of.get(entry["class"])
    categories = [{"id": i, "name": name} for name, i in id_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories, "places": places}


def xml_files(path):
    """The files that a list names, or those in a folder."""
    try:
        if os.path.isdir(path):
            files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".xml")
        else:
            names = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
            files = [path.parent.parent.parent / f"Annotations/{name}.xml" for name in names if name]
    except (OSError, ValueError) as error:  # ValueError: not text
        raise UserError(f"cannot be read: {reason(error)}") from None
    if not files:
        raise UserError("no XML files here" if os.path.isdir(path) else "is empty")
    return files


def read_xml(xml, errors):
    """The root of a VOC file, None if it is none."""
    try:
        text = xml.read_bytes()
        if b"<!ENTITY" in text:  # nobody annotates with them, but a few lines of them fill any memory
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(text)
    except (OSError, ValueError, LookupError, SyntaxError) as error:  # SyntaxError: malformed
        errors["XML files that cannot be read"].append(f"{xml}: {reason(error)}")
        return None
    if root.tag != "annotation":
        errors["XML files without VOC annotations"].append(f"{xml}: <{root.tag}>")
        return None
    return root


def image_files(folder):
    """{name without ending: [image files]} of a folder."""
    found = defaultdict(list)
    for path in images_in(folder) if os.path.isdir(folder) else []:
        found[path.stem].append(path.name)
    return found


def image_of(root, xml, folder, images_of, reading):
    """The image of a VOC file: its <filename>, or where there is none, the image called like the XML file."""
    named = read_text(root, "filename", xml, reading.errors)
    called_alike = images_of[xml.stem]
    for name in (named, re.split(r"[\\/]", named)[-1]):  # some tools write the whole path
        if name and not os.path.isabs(name) and os.path.isfile(os.path.join(folder, name)):
            if called_alike and name not in called_alike:
                kind = "XML files whose <filename> is not the image called like them: <filename> is used"
                reading.notes[kind].append(f"{xml}: {name}")
            return name
    if len(called_alike) > 1:
        kind = "XML files whose <filename> does not exist, and several images are called like them"
        reading.errors[kind].append(f"{xml}: {', '.join(called_alike)}")
    if called_alike:
        kind = "XML files whose <filename> does not exist: the image called like the XML file is used"
        reading.notes[kind].append(f"{xml}: {named or 'no <filename>'}")
        return called_alike[0]
    return named or f"{xml.stem}.jpg"


def read_object(element, image_id, where, errors):
    """One object as COCO's annotation, except that the class is still a name."""
    corners = read_numbers(element, "bndbox", ("xmin", "ymin", "xmax", "ymax"), where, errors)
    box = list(corners.values())
    if all(isinstance(v, (int, float)) for v in box):  # otherwise find_fault complains
        if is_shares(box):
            errors[SHARES].append(f"{where}: {box}")
        x0, y0, x1, y1 = box  # VOC numbers the pixels from 1 and includes both: 1..640 is COCO's 0 to 640
        box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
    return {
        "image_id": image_id,
        "class": visible(read_text(element, "name", where, errors)),
        "bbox": box,
        "iscrowd": parse_number(read_text(element, "difficult", where, errors)),  # nobody has to find it
    }


def read_numbers(element, tag, keys, where, errors):
    """{key: number} below the only <tag>, for example <size>, of an element."""
    found = find_only(element, tag, where, errors)
    if found is None:
        return dict.fromkeys(keys)
    return {key: parse_number(read_text(found, key, where, errors)) for key in keys}


def read_text(element, tag, where, errors):
    """The text of the only <tag> of an element, "" without one."""
    found = find_only(element, tag, where, errors)
    return "" if found is None else (found.text or "").strip()


def find_only(element, tag, where, errors):
    """The only <tag> directly in an element, or None. An error if there are several: which one is meant?"""
    found = element.findall(tag)
    if len(found) > 1:
        errors["XML elements that stand more than once"].append(f"{where}: <{tag}>")
    return found[0] if found else None


def parse_number(text):
    """The int or float that a text says. What is no number comes back as it is, to be shown in a message."""
    if not NUMBER.fullmatch(text):
        return text
    value = float(text)
    return int(value) if value.is_integer() else value
