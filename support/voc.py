"""PASCAL VOC's XML files, in the form of a COCO file."""
import os
from pathlib import Path
from xml.etree import ElementTree

from support.images import DataError


def read_voc(path, folder, known, errors):
    """VOC's XML files in the form of a COCO file. Class ids are 1..C in the order of the names.

    path    list of image names in ImageSets/Main, or a folder of XML files
    folder  of the images; each has the name of its XML file up to the ending
    known   {id: name} of the training set, or empty; names that are not among them get further ids
    """
    try:
        listed = [] if path.is_dir() else path.read_text("utf-8-sig").split("\n")
        files = os.listdir(folder) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # ValueError: not text
        raise DataError(f"cannot be read: {error}") from None
    image_of = {Path(file).stem: file for file in files if not file.endswith((".xml", ".txt", ".json"))}
    below = path.parent.parent.parent / "Annotations"
    xmls = [below / f"{line.strip()}.xml" for line in listed if line.strip()] or sorted(path.glob("*.xml"))
    images, annotations = [], []
    for xml in xmls:
        try:
            root = ElementTree.parse(xml).getroot()
        except (OSError, ValueError, LookupError, SyntaxError) as error:  # SyntaxError: malformed
            errors["XML files that cannot be read"].append(f"{xml}: {error}")
            continue
        if root.tag != "annotation":
            errors["XML files without VOC annotations"].append(f"{xml}: <{root.tag}>")
            continue
        images.append({
            "id": len(images) + 1,
            "file_name": image_of.get(xml.stem) or root.findtext("filename") or f"{xml.stem}.jpg",
            "width": parse_number(root.findtext("size/width")),
            "height": parse_number(root.findtext("size/height")),
        })
        annotations += voc_objects(root, xml, len(images))
    id_of = {name: i for i, name in known.items()}
    for name in sorted({entry["class"] for entry in annotations} - {*id_of, ""}):
        id_of[name] = max(id_of.values(), default=0) + 1
    for entry in annotations:
        entry["category_id"] = id_of.get(entry["class"])
    categories = [{"id": i, "name": name} for name, i in id_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def voc_objects(root, xml, image_id):
    """The objects of one VOC file as COCO's annotations, except that a class is still a name."""
    for k, entry in enumerate(root.findall("object"), 1):
        box = [parse_number(entry.findtext(f"bndbox[1]/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        if all(isinstance(v, (int, float)) for v in box):  # otherwise find_fault complains
            x0, y0, x1, y1 = box  # VOC numbers the pixels from 1 and includes both: 1..640 is COCO's 0 to 640
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
        yield {
            "image_id": image_id,
            "class": (entry.findtext("name") or "").strip(),
            "bbox": box,
            "iscrowd": int(parse_number(entry.findtext("difficult")) == 1),  # nobody has to find these either
            "place": f"{xml}, object {k}",
        }


def parse_number(text):
    """The int or float that a text says. What is no number comes back as it is, to be shown in a message."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return text
    return int(value) if value.is_integer() else value
