"""Pictures: predictions on photos, and what a model looked at.

    python visualize.py --weights runs/detr-shapes/best.pt                  held-out images
    python visualize.py --weights runs/detr-shapes/best.pt photo.jpg DIR    any images
    python visualize.py --weights runs/detr-shapes/best.pt --attention      also what the method's paper shows
    python visualize.py --init detr-r50-e632da11.pth --model detr photo.jpg the official repository's weights

train.py draws predictions and curves at every evaluation. What a model looked at comes as arrays from
support/look.py, pictures of it are drawn by support/attention_pictures.py, all others by support/pictures.py.
From Python, predictions come without pictures: support/predict.py.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from support import UserError, data, one_line
from support.attention_pictures import draw_look
from support.checkpoints import load_checkpoint, read_init
from support.look import CannotDraw, make_scene
from support.options import parse_model_options
from support.pictures import DPI, draw_detections
from support.predict import PATHS, of_official, of_run, trained_size

LONGEST_STEM = 60  # characters; file systems allow 255 bytes, of which a character may need four


def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="files and folders; default: held-out images")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="FILE", help="checkpoint of train.py, or a run's folder")
    source.add_argument("--init", metavar="FILE", help="weights of the official repository; needs --model")
    p.add_argument("--model", help="a model's name or a .py file; default: the one in --weights")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                   help="option of the model as in train.py, e.g. two_stage=true for such official weights")
    p.add_argument("--data", metavar="DIR", help="held-out images of this folder instead")
    p.add_argument("--count", type=int, default=4, help="how many held-out images; default 4")
    p.add_argument("--threshold", type=float, default=0.3, help="least score to keep; default 0.3")
    p.add_argument("--attention", action="store_true", help="also draw what the method's paper shows")
    p.add_argument("--out", default="pictures", metavar="DIR", help="folder for pictures; default pictures")
    p.add_argument("--json", metavar="FILE", help="write all kept predictions to this file")
    return p


def parse(argv):
    """The command line, checked as far as that is possible without reading a file."""
    p = make_parser()
    args = p.parse_args(argv)
    for name in ("weights", "init", "model", "data", "out", "json"):
        if getattr(args, name) == "":
            p.error(f"--{name} is empty")
    if args.init and not (args.model and (args.images or args.data)):
        p.error("--init needs --model NAME, and an IMAGE or --data DIR")
    if args.images and args.data:
        p.error("give IMAGEs or --data DIR, not both")
    if args.count < 1:
        p.error(f"--count {args.count}: it must be at least 1")
    if args.json and Path(args.json).suffix != ".json":
        p.error(f"--json {args.json}: its name must end in .json, lest a photo be overwritten")
    if not 0 <= args.threshold < 1:  # also catches nan
        p.error(f"--threshold {args.threshold}: it must be at least 0 and less than 1")
    args.option = parse_model_options(args.option)
    return args


# ---- The images --------------------------------------------------------------------------------------------
def held_out(trained, folder, count, class_names=()):
    """The first held-out images with objects, from `folder` or from the data that it was trained on."""
    paths = {} if folder else {name: trained.get(name) for name in PATHS}
    how = dict(size=trained_size(trained), augment=trained["preset"], class_names=class_names)
    if trained.get("split") and not folder:
        how |= dict(split=trained["split"], seed=trained.get("seed") or 0)
    sets = data.load(folder or trained["data"], **paths, **how, splits=("val",))
    chosen = data.first_with_boxes(sets["val"], count)
    if not len(chosen):
        raise UserError(f"{sets['val'].name}: no image has a box")
    return chosen


def picture_names(files):
    """A name for the pictures of each file; files of one name in several folders get different ones."""
    names, taken = [], set()
    stems = [Path(file).stem[:LONGEST_STEM] for file in files]
    lower = [stem.lower() for stem in stems]  # some file systems take a.png and A.png for one
    for i, stem in enumerate(stems):
        name = stem if lower.count(stem.lower()) == 1 else f"{stem}-{i}"
        while name.lower() in taken:
            name += "-"
        taken.add(name.lower())
        names.append(name)
    return names


def make_folder(path):
    """Makes the folder for pictures. SystemExit if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SystemExit(f"--out {path}: {error.strerror}")


def check_writable(path):
    """SystemExit if the file of --json cannot be written: better now than when everything is computed."""
    try:
        path.open("a").close()
    except OSError as error:
        raise SystemExit(f"--json {path}: {error.strerror}")


def load_detector(args):
    """The Detector of --weights or --init, or SystemExit."""
    if args.weights:
        return of_run(load_checkpoint(args.weights), args.model, args.option)
    return of_official(read_init(args.init), args.init, args.model, args.option)


def draw_all(args):
    """Draws every picture that the command line asks for, and says where they are."""
    detector = load_detector(args)
    if args.images:
        dataset = detector.dataset(args.images)
    else:
        dataset = held_out(detector.trained, args.data, args.count, detector.class_names)
    out = Path(args.out)
    make_folder(out)
    if args.json:
        check_writable(Path(args.json))
    files = [dataset.path_of(index) for index in range(len(dataset))]
    kept = []
    for index, (file, name) in enumerate(zip(files, picture_names(files))):
        scene, found = make_scene(dataset, index, detector.class_names, detector.model, args.threshold)
        for box, label, score in zip(found["boxes"].tolist(), found["labels"], found["scores"].tolist()):
            kept.append({"file": file, "label": scene.name_of(label), "score": round(score, 4),
                         "box_xyxy": [round(x, 2) for x in box]})
        draw_detections(scene, found).savefig(out / f"{name}-predictions.png", dpi=DPI)
        print(f"{file}: {len(found['scores'])} with a score over {args.threshold}")
        if args.attention:
            try:
                draw_look(detector.model, scene).savefig(out / f"{name}-attention.png", dpi=DPI)
            except CannotDraw as error:
                args.attention = False
                print(f"--attention: {error}. Only predictions can be drawn.")
    if args.json:
        Path(args.json).write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    print(f"Pictures are in {out}{f', predictions in {args.json}' if args.json else ''}.")


def main(argv=None):
    args = parse(argv)
    try:
        draw_all(args)
    except UserError as error:
        raise SystemExit(f"data: {one_line(error)}")
    except OSError as error:
        raise SystemExit(f"{str(error.filename)[-100:]}: {error.strerror}" if error.strerror else str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    main()
