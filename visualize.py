"""Pictures: predictions, curves, and what a model looked at.

    python visualize.py --weights runs/detr-shapes/best.pt                  held-out images
    python visualize.py --weights runs/detr-shapes/best.pt photo.jpg DIR    any images
    python visualize.py --weights runs/detr-shapes/best.pt --attention      also what the method's paper shows
    python visualize.py --init detr-r50-e632da11.pth --model detr photo.jpg the official repository's weights

train.py draws predictions and curves at every evaluation. For pictures of your own, look() returns arrays:

    out, seen = visualize.look(model.eval(), images, mask)
    seen["decoder.layers.5.cross_attn"]["weights"]  # [B, M, Q, T]

Legend as in the model files: B images, Q queries, M heads, L levels, K points, T tokens, S stages.
"""
import argparse
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torchvision.ops import box_convert, box_iou, nms

from support import data
from support.evaluation import postprocess
from support.images import IMAGENET_MEAN, IMAGENET_STD, AnnotatedImage, DataError, file_size, one_line

TRUE, PREDICTED, REFERENCE = "#00c853", "#ff1744", "#40c4ff"  # green, red, blue


def to_picture(image):
    """Undo the normalisation: [3, H, W] float -> [H, W, 3] in 0..1, for imshow."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1).numpy()  # [H, W, 3]


def draw_boxes(axes, boxes_xyxy, names, colour, above, fontsize=6):
    """Boxes [n, 4] in pixels of the shown image, each with its name over (or under) it."""
    for (x1, y1, x2, y2), name in zip(boxes_xyxy.tolist(), names):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        axes.text(x1, y1 if above else y2, name, fontsize=fontsize, color="white", clip_on=True,
                  va="bottom" if above else "top", bbox=dict(fc=colour, ec="none", pad=0.6, alpha=0.8))


# ---- Pictures of a run: train.py draws both at every evaluation --------------------------------------------
def draw_predictions(dataset, predictions, path, count=8, threshold=0.3):
    """The first `count` images with objects: true boxes green, predictions scored over the threshold red.

    predictions: {image id: {"boxes" [n, 4] xyxy in pixels of the original, "labels" [n], "scores" [n]}}.
    """
    names = dataset.class_names
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = list(figure.subplots(2, count // 2).flat)
    chosen = (item for item in map(dataset.__getitem__, range(len(dataset))) if len(item[1]["labels"]))
    for axes in panels:
        axes.axis("off")
    for axes, (image, target) in zip(panels, chosen):
        height, width = image.shape[1:]
        axes.imshow(to_picture(image))
        truth = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        draw_boxes(axes, truth, [names[i] for i in target["labels"]], TRUE, above=True)
        found = predictions[target["image_id"]]
        keep = found["scores"] > threshold
        zoom = [width / target["size"][1], height / target["size"][0]] * 2
        shown = found["boxes"][keep] * torch.tensor(zoom)
        labels = [f"{names[i]} {score:.2f}" for i, score in zip(found["labels"][keep], found["scores"][keep])]
        draw_boxes(axes, shown, labels, PREDICTED, above=False)
    figure.suptitle(f"held-out images: truth green, predictions scored over {threshold} red", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_curves(log, path):
    """Losses of the last stage and AP against steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    losses, evals = [line for line in lines if "total" in line], [line for line in lines if "eval" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("class", "l1", "giou"):
        left.plot([line["step"] for line in losses], [line[name] for line in losses], label=name)
    left.set(title="losses of the last stage, un-weighted", xlabel="step", ylabel="loss", yscale="log")
    for name in ("AP", "AP50", "AP75"):
        values = [line["eval"][name] for line in evals]
        right.plot([line["step"] for line in evals], values, "o-", ms=3, label=name)
    right.set(title="held-out images", xlabel="step", ylabel="average precision", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


# ---- What a model looked at, as arrays ---------------------------------------------------------------------
# A reader gets a module, its output and the arguments of its forward; it returns named tensors, see look().
def read_attention(module, output, q, k, v, mask=None, bias=None):
    # [B, T, E] -> [B, T, M, E/M] -> [B, M, T, E/M]
    q, k = (x.unflatten(-1, (module.nheads, -1)).transpose(1, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5  # for halves as well, so that content * spatial is proportional to weights

    def softmax(q, k):
        scores = q @ k.mT * scale  # [B, M, Q, T]
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else scores.masked_fill(mask[:, None, None], -math.inf)
        return scores.softmax(-1)

    found = {"weights": softmax(q, k)}
    if q.shape[-1] * module.nheads == 2 * v.shape[-1]:  # [content | position] inside every head
        (c_q, p_q), (c_k, p_k) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # [B, M, ., D/M]
        found.update(content=softmax(c_q, c_k), spatial=softmax(p_q, p_k))
    return found


def read_sampling(module, output, query, reference, value, spatial_shapes, mask):
    locations, weights = module.locations_and_weights(query, reference, spatial_shapes)
    shapes = torch.tensor([tuple(shape) for shape in spatial_shapes])
    return {"locations": locations, "weights": weights, "reference": reference, "shapes": shapes}


def read_aligner(module, output, tgt, reference, memory, mask):
    _, _, points, scale = output
    return {"points": points, "reference": reference} | ({} if scale is None else {"scale": scale})


def read_reference(module, output, query_pos):
    return {"points": output.sigmoid()}


READERS = {"Attention": read_attention, "MSDeformAttn": read_sampling, "SemanticsAligner": read_aligner,
           "ReferencePoints": read_reference}


def reader_of(module):
    """Its reader or None: the names of the class and of what forward takes must be those of our files."""
    read = READERS.get(type(module).__name__)
    expected = list(inspect.signature(read).parameters)[2:] if read else None
    return read if expected == list(inspect.signature(module.forward).parameters) else None


@torch.no_grad()
def look(model, images, mask):
    """Run the model as it is and keep what its parts looked at: (out, seen), `out` being model(images, mask).

    images [B, 3, H, W], mask [B, H, W] bool, True on padding. seen: {name of the module: {name of the array:
    tensor on the CPU}}, in the order in which modules ran:

    Attention         weights [B, M, Q, T], rows sum to 1, padding gets 0. Where q and k are [content |
                      position] in every head, also content and spatial: what one half alone would give.
    MSDeformAttn      locations [B, Q, M, L, K, 2] as (x, y) and reference [B, Q, L, 2 or 4], in [0, 1] of the
                      padded maps; weights [B, Q, M, L, K], summing to 1 over L and K; shapes [L, 2] as (h, w)
    SemanticsAligner  points [B, Q, M, 2], reference [B, Q, 4] in [0, 1] of the image; scale [B, Q, M, 2]
    ReferencePoints   points [B, Q, 2] in [0, 1] of the image

    In an encoder Q is T. Of a module that runs repeatedly (SQR's recurrent stage) the last run is kept. Other
    modules are left out. Each layer of a global encoder needs 4 B M T^2 bytes.
    """
    seen, hooks = {}, []

    def keep(name, read):
        def hook(module, inputs, kwargs, output):
            seen[name] = {key: value.cpu() for key, value in read(module, output, *inputs, **kwargs).items()}
        return hook

    for name, module in model.named_modules():
        if read := reader_of(module):
            hooks.append(module.register_forward_hook(keep(name, read), with_kwargs=True))
    try:
        return model(images, mask), seen
    finally:
        for hook in hooks:
            hook.remove()


# ---- One image and what the model said of it ---------------------------------------------------------------
class CannotDraw(Exception):
    """The model lacks a part that the picture of its attention needs."""


@dataclass
class Scene:
    """A batch of one image, so without padding. All boxes are xyxy in pixels of the original."""
    image: torch.Tensor  # [3, H, W]
    size: tuple  # (height, width) of the original
    names: list  # of the model's classes
    truth: list  # [(class name, box [4])]; empty if nobody knows
    scores: torch.Tensor  # [S, Q], of the best class
    labels: torch.Tensor  # [S, Q]
    boxes: torch.Tensor  # [S, Q, 4]
    seen: dict  # what look() returns
    threshold: float  # queries with a higher score are detections

    def pixels(self, xy):
        """Points [..., 2] in [0, 1] of the image -> pixels of the original."""
        return xy * torch.tensor([self.size[1], self.size[0]])

    def token_at(self, point, size):
        """Number of the cell, in a map of (h, w) cells, in which a point [2] in pixels lies."""
        (x, y), (h, w) = (point / self.pixels(torch.ones(2))).clamp(0, 0.999).tolist(), size
        return int(y * h) * w + int(x * w)

    def map_size(self, tokens):
        """(h, w) of the feature map with so many tokens: the image at one of the usual strides."""
        for stride in (4, 8, 16, 32, 64):
            h, w = (math.ceil(side / stride) for side in self.image.shape[1:])
            if h * w == tokens:
                return h, w
        raise CannotDraw(f"{tokens} tokens are no feature map of {list(self.image.shape[1:])} pixels")

    def last(self, part, array):
        """What the last module that has `array` saw, of those with `part` in their names: {name: tensor}."""
        found = [arrays for name, arrays in self.seen.items() if part in name and array in arrays]
        if not found:
            raise CannotDraw(f'look() found no {array} in an "{part}"')
        return found[-1]

    def best(self, count):
        """Detected queries, at least one, of different objects as far as boxes tell, by falling score.

        Each is (query, its last box [4], what it says in words).
        """
        queries = nms(self.boxes[-1], self.scores[-1], 0.5)
        detected = (self.scores[-1, queries] > self.threshold).sum().item()
        queries = queries[:max(1, min(count, detected))].tolist()
        return [(query, self.boxes[-1, query], self.title(-1, query)) for query in queries]

    def title(self, stage, query):
        """What a query says at a stage, in words."""
        return f"{self.names[self.labels[stage, query]]} {self.scores[stage, query]:.2f}"

    def fading(self, query):
        """What the last stage finds, and who was better: (true box [4] or None, IoU [S], better [S] bool).

        Found: an object of its class with IoU 0.5 or more. A stage was better with the same class, a higher
        IoU and a higher score: the true positive fades (SQR, section 3).
        """
        label, score = self.labels[:, query], self.scores[:, query]
        for name, box in self.truth:
            iou = box_iou(self.boxes[:, query], box[None])[:, 0]  # [S]
            if name == self.names[label[-1]] and iou[-1] >= 0.5:
                return box, iou, (label == label[-1]) & (iou > iou[-1]) & (score > score[-1])
        return None, torch.zeros_like(score), torch.zeros_like(label, dtype=torch.bool)


def make_scene(dataset, index, names, model, threshold):
    """(Scene of one image of a data set, its scored boxes as postprocess returns them)."""
    images, mask, (target,) = data.collate([dataset[index]])
    out, seen = look(model, images, mask)
    softmax, logits = model.recipe["class_loss"] == "softmax", out["logits"][:, 0]  # [S, Q, .]
    scores, labels = (logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()).max(-1)  # [S, Q]
    pixels = torch.tensor(target["size"]).flip(0).repeat(2)  # (w, h, w, h)
    boxes, true = (box_convert(b, "cxcywh", "xyxy") * pixels for b in (out["boxes"][:, 0], target["boxes"]))
    truth = list(zip([dataset.class_names[i] for i in target["labels"]], true))
    scene = Scene(images[0], target["size"], names, truth, scores, labels, boxes, seen, threshold)
    return scene, postprocess(out["logits"][-1], out["boxes"][-1], [scene.size], softmax)[0]


# ---- A picture for each method: what its paper shows -------------------------------------------------------
def show(axes, scene, title, boxes=(), grey=False):
    """The image as the network got it, in pixels of the original; boxes: [(box [4], colour, line style)]."""
    height, width = scene.size
    picture = to_picture(scene.image)
    axes.imshow(picture.mean(2) if grey else picture, cmap="gray", extent=(0, width, height, 0))
    for (x1, y1, x2, y2), colour, style in boxes:
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=style, lw=1.5))
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def show_map(axes, scene, weights, title, boxes=()):
    """Attention weights [T] over the image; the brightest cell is the largest weight of this map."""
    show(axes, scene, title, boxes, grey=True)
    height, width = scene.size
    axes.imshow(weights.view(scene.map_size(len(weights))).numpy(), cmap="inferno", vmin=0, alpha=0.65,
                extent=(0, width, height, 0))


def show_points(axes, points, colour, size=40):
    """Points [n, 2] in pixels, with a dark edge so that they are seen on any picture."""
    axes.scatter(*points.view(-1, 2).T.numpy(), s=size, color=colour, ec="black", lw=0.6, zorder=3)


def panel_grid(scene, title, rows, large, lines, columns):
    """A figure, and for each of its rows `large` large axes and lines * columns small ones beside them."""
    side = 1.7  # inches, the width of a small panel
    height = lines * (side * scene.size[0] / scene.size[1] + 0.3)  # of a row, with the titles
    figure = Figure(((lines * large + columns) * side, rows * height + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    halves = figure.subfigures(rows, 2, squeeze=False, width_ratios=[lines * large, columns])
    shapes = (1, large), (lines, columns)
    return figure, [[part.subplots(*shape, squeeze=False).flat for part, shape in zip(row, shapes)]
                    for row in halves]


def draw_attention(scene):
    """DETR: encoder attention from a box's centre; decoder attention of the query that predicts this box."""
    encoder, decoder = (scene.last(part, "weights")["weights"][0] for part in ("encoder", "decoder"))
    best, heads = scene.best(3), len(decoder)
    title = "Attention of the last layers: mean of the heads (large), and each head of the decoder"
    figure, rows = panel_grid(scene, title, len(best), large=2, lines=2, columns=math.ceil(heads / 2))
    for (query, box, name), (large, small) in zip(best, rows):
        boxes, centre = [(box, PREDICTED, "-")], box.view(2, 2).mean(0)
        token = scene.token_at(centre, scene.map_size(encoder.shape[-1]))
        show_map(large[0], scene, encoder[:, token].mean(0), "encoder, from this point", boxes)
        show_points(large[0], centre, REFERENCE)
        show_map(large[1], scene, decoder[:, query].mean(0), f"decoder, query of {name}", boxes)
        for m, axes in zip(range(heads), small):
            show_map(axes, scene, decoder[m, query], f"head {m + 1}", boxes)
    return figure


def draw_spatial(scene):
    """Conditional DETR: what position alone attends to in each head, content alone, and both together."""
    seen, reference = scene.last("decoder", "spatial"), scene.last("reference", "points")["points"][0]
    best, heads = scene.best(2), seen["weights"].shape[1]
    title = "Last decoder layer, by head: attention by the spatial product, the content product, their sum"
    figure, rows = panel_grid(scene, title, len(best), large=1, lines=3, columns=heads)
    for (query, box, name), (large, small) in zip(best, rows):
        boxes, point = [(box, PREDICTED, "-")], scene.pixels(reference[query])
        show(large[0], scene, f"{name}, and its reference point", boxes)
        show_points(large[0], point, REFERENCE)
        maps = [(kind, m) for kind in ("spatial", "content", "weights") for m in range(heads)]
        for axes, (kind, m) in zip(small, maps):
            show_map(axes, scene, seen[kind][0, m, query], f"{kind}, head {m + 1}", boxes)
            show_points(axes, point, REFERENCE, size=12)
    return figure


def draw_sampling(scene):
    """Deformable DETR: the sampling points of all heads and levels, of a pixel and of a query."""
    best, (height, width), markers = scene.best(3), scene.size, "os^Dv"
    figure = Figure((4.6 * len(best) + 1, 8.6 * height / width + 1.4), layout="constrained")
    figure.suptitle("Where the last layers of encoder (above) and decoder (below) look", fontsize=11)
    panels = figure.subplots(2, len(best), squeeze=False)
    for part, row in zip(("encoder", "decoder"), panels):
        seen = scene.last(part, "locations")
        shapes = [tuple(shape) for shape in seen["shapes"].tolist()]
        for axes, (query, box, name) in zip(row, best):
            title = f"query of {name}"
            if part == "encoder":  # its queries are the pixels, those of the finest level first
                query = scene.token_at(box.view(2, 2).mean(0), shapes[0])
                title = "pixel of level 1, at the centre of a box"
            show(axes, scene, title, [(box, PREDICTED, "-")], grey=True)
            locations, weights = scene.pixels(seen["locations"][0, query]), seen["weights"][0, query]
            for level in range(len(shapes)):
                (x, y), w = locations[:, level].reshape(-1, 2).T.numpy(), weights[:, level].flatten().numpy()
                dots = axes.scatter(x, y, c=w, s=14 + 100 * w, vmin=0, vmax=1, cmap="plasma",
                                    marker=markers[level % 5], ec="white", lw=0.3)
            show_points(axes, scene.pixels(seen["reference"][0, query, 0, :2]), REFERENCE)
            axes.set(xlim=(-0.1 * width, 1.1 * width), ylim=(1.1 * height, -0.1 * height))  # zeros out there
    figure.colorbar(dots, ax=panels, shrink=0.6, label="weight; those of a head sum to 1")
    keys = [Line2D([], [], ls="", c="grey", marker=markers[i % 5], label=f"level {i + 1}: {h} x {w} cells")
            for i, (h, w) in enumerate(shapes)]
    keys.append(Line2D([], [], ls="", c=REFERENCE, marker="o", label="reference point"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9)
    return figure


def draw_salient_points(scene):
    """SAM-DETR: a query's reference box, the point that each head picks inside it, and their attention."""
    seen, attention = scene.last("decoder", "points"), scene.last("decoder", "weights")["weights"][0]
    best, heads = scene.best(3), len(attention)
    title = "Last decoder layer: reference box (dashed), a salient point for each head, and their attention"
    figure, rows = panel_grid(scene, title, len(best), large=1, lines=2, columns=math.ceil(heads / 2))
    for (query, box, name), (large, small) in zip(best, rows):
        reference = box_convert(seen["reference"][0, query], "cxcywh", "xyxy")
        reference = (scene.pixels(reference.view(2, 2)).flatten(), REFERENCE, "--")
        show(large[0], scene, name, [(box, PREDICTED, "-"), reference])
        for m, axes in zip(range(heads), small):
            show_map(axes, scene, attention[m, query], f"head {m + 1}", [reference])
            for panel in (large[0], axes):
                show_points(panel, scene.pixels(seen["points"][0, query, m]), f"C{m}")
    return figure


def draw_stages(scene):
    """SQR: the same query at every stage, marked where one was better than the last (fading positives)."""
    S, best = len(scene.scores), scene.best(20)
    best.sort(key=lambda item: -scene.fading(item[0])[2].sum())  # stable: by score where nothing fades
    best = best[:4]
    figure = Figure((3 * S, 3.3 * len(best) + 0.6), layout="constrained")
    known = "\ntruth green; orange: better than the last stage in IoU and score" if scene.truth else ""
    figure.suptitle(f"The same query at every stage, one query a row{known}", fontsize=11)
    for row, (query, _, _) in zip(figure.subplots(len(best), S, squeeze=False), best):
        boxes, (true, iou, better) = scene.boxes[:, query], scene.fading(query)
        truth = [] if true is None else [(true, TRUE, "--")]
        (x, y), side = boxes.reshape(-1, 2).mean(0).tolist(), 0.8 * (boxes[:, 2:] - boxes[:, :2]).max().item()
        for stage, axes in enumerate(row):
            overlap = f", IoU {iou[stage]:.2f}" if truth else ", finds nothing" if scene.truth else ""
            title = f"stage {stage + 1}: {scene.title(stage, query)}{overlap}"
            show(axes, scene, title, truth + [(boxes[stage], PREDICTED, "-")])
            axes.title.set_color("#e65100" if better[stage] else "black")
            axes.set(xlim=(x - side, x + side), ylim=(y + side, y - side))
    return figure


# The first of these classes that a model contains decides, so a file of your own may have any name.
PICTURES = {"SQR": draw_stages, "SemanticsAligner": draw_salient_points, "SpatialQuery": draw_spatial,
            "MSDeformAttn": draw_sampling, "Attention": draw_attention}


def draw_looks(model, scene):
    """The picture of PICTURES that fits the model. Raises CannotDraw."""
    classes = {type(module).__name__ for module in model.modules()}
    for name, draw in PICTURES.items():
        if name in classes:
            return draw(scene)
    raise CannotDraw(f"{type(model).__name__} contains none of {', '.join(PICTURES)}")


def draw_detections(scene, found):
    """Predictions {"boxes", "labels", "scores"}, a colour for each class; beside them the truth, if known."""
    height, width = scene.size
    figure = Figure((16 if scene.truth else 8, 8 * height / width + 1), layout="constrained")
    parts = found["labels"], found["boxes"], found["scores"]
    predicted = [(scene.names[label], box, f"{score:.2f}") for label, box, score in zip(*parts)]
    truth = [(name, box, "") for name, box in scene.truth]
    present = {name for name, _, _ in predicted + truth}
    colours = {name: f"C{i}" for i, name in enumerate(scene.names) if name in present}
    panels = figure.subplots(1, 2 if truth else 1, squeeze=False)[0]
    for axes, title, objects in zip(panels, ("predicted", "truth"), (predicted, truth)):
        show(axes, scene, f"{title}: {len(objects)}")
        for name, box, text in objects:
            box, above = box.clamp(min=0)[None], box[1] > 0.04 * height  # else its text were cut off
            draw_boxes(axes, box, [text], colours.get(name, "grey"), above, fontsize=9)
    keys = [Line2D([], [], color=colour, lw=4, label=name) for name, colour in colours.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=8)
    return figure


# ---- Command line ------------------------------------------------------------------------------------------
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # looked for in folders


def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="files and folders; default: held-out images")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="FILE", help="checkpoint of train.py, or a run's folder")
    source.add_argument("--init", metavar="FILE", help="weights of the official repository; needs --model")
    p.add_argument("--model", help="a model's name or a .py file; default: the one in --weights")
    p.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                   help="option of the model as in train.py, e.g. two_stage=true for such official weights")
    p.add_argument("--data", metavar="DIR", help="held-out images of this COCO-format folder instead")
    p.add_argument("--count", type=int, default=4, help="how many held-out images; default 4")
    p.add_argument("--threshold", type=float, default=0.3, help="least score to keep; default 0.3")
    p.add_argument("--attention", action="store_true", help="also draw what the method's paper shows")
    p.add_argument("--out", default="pictures", metavar="DIR", help="folder for pictures; default pictures")
    p.add_argument("--json", metavar="FILE", help="write all kept predictions to this file")
    return p


def load_model(typed):
    """(model, names of its classes, args of its training) from --weights or --init, or SystemExit."""
    import train  # not above: train.py imports this file

    options = {**train.parse_options(make_parser(), typed.option), "pretrained_backbone": False}
    if typed.weights:
        checkpoint = train.load_checkpoint(typed.weights)
        args, names = checkpoint["args"], checkpoint["class_names"]
        module = train.load_model_file(typed.model or args["model"])
        options = {**checkpoint["model_options"], **options}
    else:
        checkpoint, args = train.read_init(typed.init), {"preset": "paper", "size": 800}
        module = train.load_model_file(typed.model)
        names = official_names(checkpoint, module.RECIPE["class_loss"] == "softmax")
    model = train.build_model(module, len(names), options).eval()
    try:
        if typed.weights:
            model.load_state_dict(checkpoint["model"])
        else:
            module.load_official(model, checkpoint)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{typed.weights or typed.init}: of another model, or needs an --option: {reason}")
    return model, names, args


def official_names(checkpoint, softmax):
    """Class names for an official checkpoint, whose class head tells how many there are. Raises SystemExit.

    It has a row for each, and with softmax one more for "no object". 91 are COCO's category ids, as in all
    published weights; torchvision knows their names.
    """
    state = checkpoint.get("model", checkpoint)
    rows = [len(state[name]) for name in ("class_embed.weight", "class_embed.0.weight") if name in state]
    if not rows:
        raise SystemExit("--init: not official weights (no class_embed.weight); for our own use --weights")
    count = rows[0] - softmax
    coco = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return coco if count == len(coco) else [f"class {i}" for i in range(count)]


def trained_size(args):
    """Pixels as make_transform takes them: --size of the training, or what data.load took in its place."""
    if args["size"]:
        return args["size"]
    return data.default_size(args["preset"], data.is_shapes(args["data"], args["train_json"]))


def held_out(args, folder, count):
    """The first held-out images with objects, from `folder` or else from the data that was trained on."""
    names = ("train_json", "train_images", "val_json", "val_images")
    paths = {} if folder else {name: args[name] for name in names}
    sets = data.load(folder or args["data"], **paths, size=trained_size(args), augment=args["preset"], splits=("val",))
    return data.first_with_boxes(sets["val"], count)


def own_images(paths, args):
    """A data set of image files and of folders with such, prepared as in evaluation, without truth."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such image or folder")
        inside = path.iterdir() if path.is_dir() else []
        found = sorted(file for file in inside if file.suffix.lower() in SUFFIXES)
        if path.is_dir() and not found:
            raise DataError(f"{path}: no images in this folder; looked for {' '.join(SUFFIXES)}")
        files += found or [path]
    nothing = np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, bool)
    pictures = [AnnotatedImage(i, str(f), *file_size(f, i), *nothing) for i, f in enumerate(files)]
    return data.CocoFolder("images", pictures, {}, [], False, args["preset"], trained_size(args), seed=0)


def main(argv=None):
    p = make_parser()
    typed = p.parse_args(argv)
    if typed.init and not (typed.model and (typed.images or typed.data)):
        p.error("--init needs --model NAME, and an IMAGE or --data DIR")
    model, names, args = load_model(typed)
    dataset = own_images(typed.images, args) if typed.images else held_out(args, typed.data, typed.count)
    files = [dataset.path_of(index) for index in range(len(dataset))]
    stems, kept, out = [Path(file).stem for file in files], [], Path(typed.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (file, stem) in enumerate(zip(files, stems)):
        scene, found = make_scene(dataset, i, names, model, typed.threshold)
        found = {key: values[found["scores"] > typed.threshold] for key, values in found.items()}
        for box, label, score in zip(found["boxes"].tolist(), found["labels"], found["scores"].tolist()):
            box = [round(x, 2) for x in box]
            kept.append({"file": file, "label": names[label], "score": round(score, 4), "box_xyxy": box})
        name = stem if stems.count(stem) == 1 else f"{stem}-{i}"
        draw_detections(scene, found).savefig(out / f"{name}-predictions.png", dpi=110)
        print(f"{file}: {len(found['scores'])} with a score over {typed.threshold}")
        if typed.attention:
            try:
                draw_looks(model, scene).savefig(out / f"{name}-attention.png", dpi=110)
            except CannotDraw as error:
                typed.attention = False
                print(f"--attention: {error}. Only predictions can be drawn.")
    if typed.json:
        Path(typed.json).write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    print(f"Pictures are in {out}{f', predictions in {typed.json}' if typed.json else ''}.")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        raise SystemExit(f"data: {one_line(error)}")
    except OSError as error:
        raise SystemExit(str(error))
