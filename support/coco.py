"""COCO's JSON files."""
import json
import os
import reprlib

from support import UserError, reason


def read_coco(path, image_folder, known, reading):
    """A COCO file as a dict, its three lists checked to be lists of dicts. UserError, without the path."""
    try:
        text = path.read_bytes()
        if not text.strip():
            raise UserError("is empty")
        contents = json.loads(text, object_pairs_hook=without_repetition)
    except OSError as error:
        raise UserError(f"cannot be read: {reason(error)}") from None
    except RecursionError:
        raise UserError("cannot be read as JSON: nested too deeply") from None
    except ValueError as error:  # it says line and column
        raise UserError(f"cannot be read as JSON: {error}") from None
    if not isinstance(contents, dict):
        raise UserError("should be an object with images, annotations and categories (is this a file of "
                        f"results?), it is {reprlib.repr(contents)}")
    for key in ("images", "annotations", "categories"):
        entries = contents.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f'"{key}" should be a list of objects, it is {reprlib.repr(entries)}')
    return {key: contents[key] for key in ("images", "annotations", "categories")}


def read_coco_beside(path, folder, known, reading):
    """A COCO file of all images, which lie in `folder` or a folder in it, as CVAT and Label Studio do it."""
    contents = read_coco(path, folder, known, reading)
    names = [entry["file_name"] for entry in contents["images"] if isinstance(entry.get("file_name"), str)]
    first = names[0].replace("\\", "/") if names else ""
    places = ["", "images", "images/default", *sorted(os.listdir(folder))]
    place = next((place for place in places if os.path.isfile(os.path.join(folder, place, first))), "")
    for entry in contents["images"]:
        if place and isinstance(entry.get("file_name"), str):
            entry["file_name"] = os.path.join(place, entry["file_name"])
    return contents


def without_repetition(pairs):
    """A JSON object as a dict. If a key stands twice, json would keep the last without a word."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{reprlib.repr(twice)} stands twice in one object, {reprlib.repr(pairs)}")
    return entry
