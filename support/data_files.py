"""What all readers share: files that are found in any spelling, problems, and boxes as they are written."""
import json
import math
import os
import reprlib
import unicodedata
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import unquote

from support import UserError, reason, shorten, visible
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, file_size

JUNK = ("._", ".ipynb_checkpoints", "__MACOSX")  # systems and notebooks make them
MOST_FILES, MOST_BYTES = 3 * 10 ** 6, 10 ** 8  # below a folder; in a text file


class Problems(dict):
    """{kind of problem: [count, first place]}. A kind that speaks for itself has no place."""

    def add(self, kind, where="", count=1):
        self.setdefault(kind, [0, where])[0] += count

    def lines(self):
        return [shorten(visible(f"{kind}: {count} (first: {where})" if where else kind), 500)
                for kind, (count, where) in self.items()]


@dataclass
class Reading:
    """What was read of one split. A problem does not stop the reading: check_data prints all of them."""
    path: str = None
    images: list = field(default_factory=list)  # of AnnotatedImage
    errors: Problems = field(default_factory=Problems)  # need a person: data.load refuses
    notes: Problems = field(default_factory=Problems)  # were dealt with, each says how
    held_out: str | None = None  # of a val that --split made: tells these images from any others


@dataclass
class Source:
    """Where one split is."""
    form: str  # "COCO", "VOC" or "YOLO"
    path: str  # a file of annotations or of classes, or a folder of XML files
    places: list  # folders that images may be in, likely ones first; of YOLO, the folders and lists of images
    avoid: set = frozenset()  # names of folders of the other split, where no lost image is looked for


@dataclass
class Table:
    """One split as it is written. `from_one`: VOC's pixels 1 to 640 are COCO's 0 to 640."""
    names: dict  # {category id: name}
    images: list = field(default_factory=list)  # (id, path, height, width), None for one that cannot be used
    numbers: array = field(default_factory=lambda: array("d"))  # 8 of each box, see add
    places: list = field(default_factory=list)  # of each box
    where: object = str  # turns a place into text
    from_one: bool = False
    from_shares: bool = False  # YOLO's boxes are shares of the image

    def add(self, image, category, box, place, area=None, crowd=None):
        """image, category: positions in `images` and `names`; box: xyxy; area, crowd: as they are written."""
        area = math.inf if area is None else number(area) or -1
        self.numbers.extend((image, category, *box, area, crowd in (1, "1", "true", "True")))
        self.places.append(place)


def key_of(name):
    """The same for all spellings of a path: capitals, and accents in one character or in two."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


class Tree:
    """The files below a folder and linked ones. Any spelling finds them, and images also without ending."""

    def __init__(self, top):
        self.top, self.files, self.folders, self.junk = os.path.abspath(top), {}, {}, []  # {key: path}
        self.called = defaultdict(list)  # {key of a bare name, with or without ending: [images]}
        for folder, folders, names in os.walk(self.top, followlinks=True):
            self.junk += [os.path.join(folder, name) for name in folders + names if name.startswith(JUNK)]
            folders[:] = sorted(name for name in folders if not name.startswith((".", *JUNK)) and not (
                os.path.islink(link := os.path.join(folder, name))  # to a folder that it lies in
                and os.path.join(os.path.realpath(folder), "").startswith(os.path.realpath(link) + os.sep)))
            self.folders[key_of(folder)] = folder
            for path in (os.path.join(folder, name) for name in sorted(names) if not name.startswith(JUNK)):
                key = key_of(path)
                self.files[key] = path
                if key.endswith(IMAGE_SUFFIXES):
                    stem = os.path.splitext(key)[0]
                    self.files[stem] = "" if stem in self.files else path  # "": several are called so
                    for name in (key, stem):
                        self.called[os.path.basename(name)].append(path)
            if len(self.files) > MOST_FILES:
                raise UserError(f"{self.top}: over {MOST_FILES:,} files; is this the folder of the data?")

    def find(self, path):
        """The file at a path, or None. A device or a FIFO is none."""
        path = os.path.normpath(path)
        found = path if os.path.isfile(path) else self.files.get(key_of(path))
        return found if found and os.path.isfile(found) else None

    def match(self, pattern):
        """The files and folders below the top that a pattern in small letters fits, such as train/*.json."""
        pattern = os.path.normpath(os.path.join(key_of(self.top), pattern))
        if "*" not in pattern:
            return [found for found in (self.files.get(pattern), self.folders.get(pattern)) if found]
        ending, depth = os.path.splitext(pattern)[1], pattern.count(os.sep)
        return sorted(path for key, path in self.files.items()
                      if key.endswith(ending) and key.count(os.sep) == depth and fnmatchcase(key, pattern))

    def inside(self, folder, *endings):
        """The paths of the files with one of these endings in a folder and below."""
        start = key_of(os.path.join(folder, ""))
        if not start.startswith(key_of(self.top)):
            return Tree(folder).inside(folder, *endings)
        return sorted(path for key, path in self.files.items()
                      if key.startswith(start) and key.endswith(endings) and os.path.isfile(path))

    def image(self, name, source, reading, where):
        """The path of an image: `name` as written, or its last part anywhere. None, and an error, if lost."""
        plain = unquote(name.split("?d=")[-1]).replace("\\", "/")  # Label Studio's and Windows'
        for spelling in (name, plain):
            for k, place in enumerate(source.places):
                if found := self.find(os.path.join(place, spelling)):
                    source.places.insert(0, source.places.pop(k))  # the next one is probably here, too
                    if not found.startswith(self.top + os.sep):
                        reading.notes.add("image files outside of the data folder", found)
                    return found
        parts = key_of(plain).split("/")[::-1]
        found = [path for path in self.called.get(parts[0], ()) if os.path.isfile(path)
                 and not source.avoid & {*key_of(path[len(self.top):]).split(os.sep)[:-1]}]
        same = [len(os.path.commonprefix([key_of(path).split(os.sep)[::-1], parts])) for path in found]
        found = [path for path, count in zip(found, same) if count == max(same)]  # the most folders in common
        if len(found) == 1:
            kind = "image files in another folder than the annotations say, found by their name"
            reading.notes.add(kind, f"{name} is {found[0]}")
            return found[0]
        kind = "do not exist" if not found else "are lost, with several of that name elsewhere"
        place = ", ".join([os.path.join(source.places[0], name), where, *found[:2]])
        return reading.errors.add(f"image files that {kind}", place)


def read_text(path, most=MOST_BYTES, as_bytes=False):
    """A text file in UTF-8, or in UTF-16 with its mark. UserError, without the path."""
    try:
        if not os.path.isfile(path):
            raise UserError("is not a file" if os.path.exists(path) else "does not exist")
        if os.path.getsize(path) > most:
            raise UserError(f"has {os.path.getsize(path) / 1e9:.1f} GB: too large for such a file")
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(b"version https://git-lfs"):
            raise UserError("is a pointer of Git LFS, not the file itself: run git lfs pull")
        return content if as_bytes else content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        raise UserError("is not in UTF-8: open it in an editor and save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {reason(error)}") from None


def number(value):
    """The float that a number or a text says, otherwise None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def image_row(i, path, height, width, reading):
    """An entry of Table.images; None, and an error, if it is bad. Without a size the file's is taken."""
    sides = [number(side or 0) for side in (height, width)]
    if path.lower().endswith(OTHER_SUFFIXES):
        return reading.errors.add("image files that Pillow does not read: save them as .jpg or .png", path)
    try:
        if 0 in sides:
            sides = file_size(path, i)
    except UserError as error:
        return reading.errors.add("image files that cannot be used", str(error))
    if None in sides or min(sides) < 1 or any(side % 1 for side in sides):
        kind = "images whose width and height are not whole numbers above 0 (may be left out)"
        return reading.errors.add(kind, f"{path}, image id {i}: {reprlib.repr([width, height])}")
    return i, path, int(sides[0]), int(sides[1])
