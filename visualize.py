"""Draws predictions on photos, and where a model looks.

    python visualize.py --weights runs/detr-shapes/best.pt                  held-out images
    python visualize.py --weights runs/detr-shapes/best.pt photo.jpg DIR    any images
    python visualize.py --weights runs/detr-shapes/best.pt --attention      also the paper's figure
    python visualize.py --init detr-r50-e632da11.pth --model detr photo.jpg the official repository's weights

train.py draws predictions and curves at every evaluation. support/predict.py returns predictions and where a
model looks, both as arrays. support/attention_pictures.py draws where it looks, support/pictures.py the rest.
"""
import argparse
import json
from pathlib import Path
from types import SimpleNamespace

from support import UserError, data
from support.attention_pictures import draw_heads, draw_look
from support.options import parse_model_options
from support.pictures import draw_detections, make_scene, save
from support.predict import load
from support.report import one_line_errors


def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="files and folders; default: held-out images")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="FILE", help="checkpoint of a run, or its folder: its last.pt")
    source.add_argument("--init", metavar="FILE", help="weights of the official repository; needs --model")
    p.add_argument("--model", help="a model's name or a .py file; default: the one in --weights")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                   help="option of the model as in train.py, e.g. two_stage=true for such official weights")
    p.add_argument("--data", metavar="DIR", help="held-out images of this folder instead")
    p.add_argument("--count", type=int, default=4, help="how many held-out images; default 4")
    p.add_argument("--threshold", type=float, default=0.3, help="least score to keep; default 0.3")
    p.add_argument("--attention", action="store_true", help="also draw the figure of the method's paper")
    p.add_argument("--beside", nargs="+", default=[], metavar="RUN",
                   help="also draw where the heads of this run and of others look, for one object")
    p.add_argument("--out", default="pictures", metavar="DIR", help="folder for pictures; default pictures")
    p.add_argument("--json", metavar="FILE", help="write all kept predictions to this file")
    return p


def parse(argv):
    """The command line, checked as far as that is possible without reading a file."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.init and not (args.model and (args.images or args.data)):
        p.error("--init needs --model NAME, and an IMAGE or --data DIR")
    if args.images and args.data:
        p.error("IMAGEs and --data DIR were both given; give only one of them")
    if args.count < 1:
        p.error(f"--count {args.count}: it must be at least 1")
    if args.json and Path(args.json).suffix != ".json":
        p.error(f"--json {args.json}: its name must end in .json, so that no photo is overwritten")
    if not 0 <= args.threshold < 1:  # also catches nan
        p.error(f"--threshold {args.threshold}: it must be at least 0 and less than 1")
    args.option = parse_model_options(args.option)
    return args


def held_out(trained, folder, count):
    """The first held-out images with objects, from `folder` or from the data that it was trained on."""
    if folder:
        sets = data.load(folder, size=trained["size"], augment=trained["preset"], splits=("val",))
    else:
        sets = data.load_datasets(SimpleNamespace(**trained), ("val",))
    chosen = data.first_with_boxes(sets["val"], count)
    if not len(chosen):
        raise UserError(f"{sets['val'].name}: no image has a box; give IMAGEs or another --data DIR")
    return chosen


def picture_names(files):
    """The names of files without endings; if two would be equal (A.png and a.jpg), all get a number."""
    stems = [Path(file).stem[:60] for file in files]  # file systems allow 255 bytes, a character may need 4
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{i}-{stem}" for i, stem in enumerate(stems)]


def main(argv=None):
    args = parse(argv)
    detector = load(args.weights or args.init, args.model, **args.option)
    if args.images:
        dataset = detector.dataset(args.images)
    else:
        dataset = held_out(detector.trained, args.data, args.count)
    compared = [detector, *map(load, args.beside)]
    out, kept = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    if args.json:
        Path(args.json).open("a").close()  # it fails here if the file cannot be written, before the work
    files = [dataset.path_of(index) for index in range(len(dataset))]
    for index, (file, name) in enumerate(zip(files, picture_names(files))):
        scene, found = make_scene(dataset, index, detector.class_names, detector.model, args.threshold)
        for label, score, box in found:
            kept.append({"file": file, "label": label, "score": round(score, 4),
                         "box_xyxy": [round(x, 2) for x in box]})
        save(draw_detections(scene, found), out / f"{name}-predictions.png")
        print(f"{file}: {len(found)} with a score over {args.threshold}")
        if args.beside:
            scenes = [(one.title, make_scene(dataset, index, one.class_names, one.model, 0)[0])
                      for one in compared]
            save(draw_heads(scenes), out / f"{name}-heads.png")
        if args.attention:
            try:
                save(draw_look(detector.model, scene), out / f"{name}-attention.png", detector.title)
            except UserError as error:
                args.attention = False
                print(f"--attention: {error}. Only predictions can be drawn.")
    if args.json:
        Path(args.json).write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    print(f"Pictures are in {out}{f', predictions in {args.json}' if args.json else ''}.")


if __name__ == "__main__":
    with one_line_errors():
        main()
