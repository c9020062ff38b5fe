"""A picture for each method: the figure of its paper.

draw_look(model, scene) chooses it by the arrays that look() finds in the model, and by the outputs of the
model in training. The model's name does not matter, so that the file of another method needs no entry here.
"""
import math
from functools import partial

import torch
from torchvision.ops import box_iou

from support.evaluation import boxes_to_pixels
from support.look import CannotDraw, best_class, outputs_of_training
from support.pictures import PREDICTED, REFERENCE, TRUE, Figure, draw_box, drawable, show
from support.predict import is_softmax

MOST_GROUPS = 6  # panels side by side


# ---- Panels ------------------------------------------------------------------------------------------------
def show_scene(axes, scene, title, boxes=(), grey=False):
    """The photo with boxes: [(box [4], colour, line style)]."""
    show(axes, scene.photo, scene.size, drawable(title), grey)
    for box, colour, style in boxes:
        draw_box(axes, box, colour, style)


def show_map(axes, scene, weights, title, boxes=()):
    """Attention weights [T] over the photo; the brightest cell is the largest weight of this map."""
    show_scene(axes, scene, title, boxes, grey=True)
    height, width = scene.size
    axes.imshow(weights.view(scene.map_size(len(weights))).numpy(), cmap="inferno", vmin=0, alpha=0.65,
                extent=(0, width, height, 0))


def show_points(axes, points, colour, size=40):
    """Points [n, 2] in pixels, with a dark edge so that they are seen on any photo."""
    axes.scatter(*points.view(-1, 2).T.numpy(), s=size, color=colour, ec="black", lw=0.6, zorder=3)


def zoom(axes, scene, box, factor):
    """Show only a square around a box [4], its side `factor` times the longer one, inside of the photo."""
    half = factor / 2 * (box[2:] - box[:2]).max().clamp(min=2).item()
    middle, end = box.view(2, 2).mean(0), torch.tensor(scene.size[::-1])
    low = torch.minimum(middle - half, end - 2 * half).clamp(min=0)
    (left, top), (right, bottom) = low.tolist(), torch.minimum(low + 2 * half, end).tolist()
    axes.axis("on")
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])


def panel_figure(width, height, title, layout="constrained"):
    figure = Figure((width, height + 0.4), layout=layout)
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def square_panels(rows, columns, title, side=3.0):
    """A figure with rows * columns square panels, and these: an array of axes."""
    figure = panel_figure(columns * side, rows * (side + 0.3), title, "compressed")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel_grid(scene, title, rows, large, lines, columns):
    """A figure, and for each of its rows `large` large axes and lines * columns small ones next to them."""
    side = 1.7  # inches, the width of a small panel
    height = lines * (side * scene.size[0] / scene.size[1] + 0.3)  # of a row, with the titles
    figure = panel_figure((lines * large + columns) * side, rows * height, title)
    halves = figure.subfigures(rows, 2, squeeze=False, width_ratios=[lines * large, columns])
    shapes = (1, large), (lines, columns)
    return figure, [[part.subplots(*shape, squeeze=False).flat for part, shape in zip(row, shapes)]
                    for row in halves]


# ---- Where the decoder looks -------------------------------------------------------------------------------
def draw_attention(scene):
    """DETR: encoder attention from a box's centre; decoder attention of the query that predicts this box."""
    encoder, decoder = (scene.last_with(part, "weights")["weights"][0] for part in ("encoder", "decoder"))
    best, heads = scene.detected_queries(3), len(decoder)
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


FACTORS = {
    "spatial": "attention by the spatial and the content product, by their sum",  # Conditional DETR, DAB-DETR
    "prior": "the Gaussian, attention by content without it, both together",  # SMCA-DETR
}


def draw_factors(scene, first):
    """Three rows of maps, a column for each head: `first`, content and weights of the last decoder layer."""
    seen, best = scene.last_with("decoder", first), scene.detected_queries(2)
    heads = seen["weights"].shape[1]
    figure, rows = panel_grid(scene, f"Last decoder layer, by head: {FACTORS[first]}", len(best), 1, 3, heads)
    for (query, box, name), (large, small) in zip(best, rows):
        boxes, points = [(box, PREDICTED, "-")], torch.zeros(0, 2)
        if references := scene.arrays_with("", "reference"):
            reference = references[-1]["reference"][0, query]  # [2] or [4]
            points, name = scene.to_pixels(reference[None, :2]), f"{name}, and its reference"
            if len(reference) == 4:
                boxes.append((boxes_to_pixels(reference, scene.size), REFERENCE, "--"))
        show_scene(large[0], scene, name, boxes)
        show_points(large[0], points, REFERENCE)
        maps = [(kind, m) for kind in (first, "content", "weights") for m in range(heads)]
        for axes, (kind, m) in zip(small, maps):
            show_map(axes, scene, seen[kind][0, m, query], f"{kind}, head {m + 1}", boxes)
            show_points(axes, points, REFERENCE, size=12)
    return figure


def draw_sampling(scene):
    """Deformable DETR: the sampling points of all heads and levels, of a pixel and of a query."""
    best, markers = scene.detected_queries(3), "os^Dv"
    title = "Where the last layers of encoder (above) and decoder (below) look"
    figure, panels = square_panels(2, len(best), title, side=4.0)
    for part, row in zip(("encoder", "decoder"), panels):
        seen = scene.last_with(part, "locations")
        shapes = [tuple(shape) for shape in seen["shapes"].tolist()]
        for axes, (query, box, name) in zip(row, best):
            title = f"query of {name}"
            if part == "encoder":  # its queries are the pixels, those of the finest level first
                query = scene.token_at(box.view(2, 2).mean(0), shapes[0])
                title = "pixel of level 1, at the centre of a box"
            show_scene(axes, scene, title, [(box, PREDICTED, "-")], grey=True)
            locations, weights = scene.to_pixels(seen["locations"][0, query]), seen["weights"][0, query]
            for level in range(len(shapes)):
                (x, y), w = locations[:, level].reshape(-1, 2).T.numpy(), weights[:, level].flatten().numpy()
                dots = axes.scatter(x, y, c=w, s=14 + 100 * w, vmin=0, vmax=1, cmap="plasma",
                                    marker=markers[level % 5], ec="white", lw=0.3)
            show_points(axes, scene.to_pixels(seen["reference"][0, query, 0, :2]), REFERENCE)
            zoom(axes, scene, box, 2.5)
    figure.colorbar(dots, ax=panels, shrink=0.6, label="weight; those of a head sum to 1")
    keys = [axes.scatter([], [], c="grey", marker=markers[i % 5], label=f"level {i + 1}: {h} x {w} cells")
            for i, (h, w) in enumerate(shapes)]
    keys.append(axes.scatter([], [], c=REFERENCE, ec="black", label="reference point"))
    figure.legend(handles=keys, loc="outside lower center", ncols=2 * len(best), fontsize=9)
    return figure


def draw_samples(scene):
    """AdaMixer: the sampling points of all groups in x, y (position) and scale (colour)."""
    samples, best = scene.last_with("decoder", "samples")["samples"][0], scene.detected_queries(3)
    title = "Last decoder layer: where, and at which scale, a query samples the feature maps"
    figure, panels = square_panels(1, len(best), title, side=4.0)
    chosen = samples[[query for query, _, _ in best]][..., 2]
    least, most = chosen.min().item(), chosen.max().item()
    for axes, (query, box, name) in zip(panels[0], best):
        show_scene(axes, scene, name, [(box, PREDICTED, "-")], grey=True)
        points = samples[query].reshape(-1, 3)
        x, y = scene.to_pixels(points[:, :2]).T.numpy()
        dots = axes.scatter(x, y, c=points[:, 2].numpy(), s=24, vmin=least, vmax=most, cmap="plasma",
                            ec="white", lw=0.3)
        zoom(axes, scene, box, 2.5)
    figure.colorbar(dots, ax=panels, shrink=0.8, label="log2 of the stride that is read")
    return figure


def draw_salient_points(scene):
    """SAM-DETR: a query's reference box, the point that each head picks inside it, and their attention."""
    seen = scene.last_with("decoder", "points")
    attention = scene.last_with("decoder", "weights")["weights"][0]
    best, heads = scene.detected_queries(3), len(attention)
    title = "Last decoder layer: reference box (dashed), a salient point for each head, and their attention"
    figure, rows = panel_grid(scene, title, len(best), large=1, lines=2, columns=math.ceil(heads / 2))
    for (query, box, name), (large, small) in zip(best, rows):
        reference = (boxes_to_pixels(seen["reference"][0, query], scene.size), REFERENCE, "--")
        show_scene(large[0], scene, name, [(box, PREDICTED, "-"), reference])
        for m, axes in zip(range(heads), small):
            show_map(axes, scene, attention[m, query], f"head {m + 1}", [reference])
            for panel in (large[0], axes):
                show_points(panel, scene.to_pixels(seen["points"][0, query, m]), f"C{m}")
    return figure


# ---- Additional stages and queries of training -------------------------------------------------------------
def draw_stages(scene):
    """SQR: the same query at every stage, marked where one was better than the last (fading positives)."""
    S, best = len(scene.scores), scene.detected_queries(20)
    # Sorting is stable: by score where nothing fades
    best = sorted(best, key=lambda item: -scene.fading_positives(item[0])[2].sum())[:4]
    known = "\ntruth green; orange: better than the last stage in IoU and score" if scene.truth else ""
    figure, panels = square_panels(len(best), S, f"The same query at every stage, one query a row{known}")
    for row, (query, _, _) in zip(panels, best):
        boxes, (true, iou, better) = scene.boxes[:, query], scene.fading_positives(query)
        truth = [] if true is None else [(true, TRUE, "--")]
        for stage, axes in enumerate(row):
            overlap = f", IoU {iou[stage]:.2f}" if truth else ", finds nothing" if scene.truth else ""
            title = f"stage {stage + 1}: {scene.in_words(stage, query)}{overlap}"
            show_scene(axes, scene, title, truth + [(boxes[stage], PREDICTED, "-")])
            axes.title.set_color("#e65100" if better[stage] else "black")
            zoom(axes, scene, torch.cat([boxes.reshape(-1, 2).amin(0), boxes.reshape(-1, 2).amax(0)]), 1.3)
    return figure


def draw_parts(scene, parts):
    """Group DETR and H-DETR: for an object, in every part of the queries, all those that claim it.

    parts: [(name, scores [Q], labels [Q], boxes [Q, 4])] of the last stage.
    """
    best = scene.detected_queries(3)
    title = "Which queries claim an object, in each part of the queries; the paler, the lower the score"
    figure, panels = square_panels(len(best), len(parts), title)
    for row, (query, box, name) in zip(panels, best):
        for axes, (part, scores, labels, boxes) in zip(row, parts):
            claims = (box_iou(boxes, box[None])[:, 0] >= 0.5) & (labels == scene.labels[-1, query])
            claims = claims & (scores > scene.threshold)
            show_scene(axes, scene, f"{part}: {claims.sum()} x {name.rsplit(' ', 1)[0]}")
            for claimed, score in zip(boxes[claims], scores[claims].tolist()):
                draw_box(axes, claimed, PREDICTED, alpha=0.2 + 0.8 * score)
            zoom(axes, scene, box, 2)
    return figure


def draw_denoising(scene, out):
    """DN-DETR and DINO: boxes with noise, and the boxes after the first and the last layer."""
    objects, target, S = scene.objects(), out["target"][0], len(out["boxes"])
    boxes = boxes_to_pixels(torch.cat([out["noisy"], out["boxes"][:, 0]]), scene.size)  # [1 + S, N, 4]
    steps = {0: "with noise", 1: "after layer 1", S: f"after layer {S}"}
    title = "Boxes with noise, and what layers make of them; the paler, the lower the score of the class\n"
    title += "truth green; red queries must give it back" + ', blue must say "no object"' * (-1 in target)
    n = len(objects["labels"])
    figure, panels = square_panels(min(n, 3), len(steps), title)
    for k, (row, label) in enumerate(zip(panels, objects["labels"])):
        true = boxes_to_pixels(objects["boxes"][k], scene.size)
        scores = torch.cat([boxes.new_ones(1, len(target)), out["logits"][:, 0, :, label].sigmoid()])
        for axes, (stage, step) in zip(row, steps.items()):
            iou = box_iou(boxes[stage, target == k], true[None]).mean()
            title = f"{scene.class_names[label]} {step}: mean IoU {iou:.2f}"
            show_scene(axes, scene, title, [(true, TRUE, "--")])
            for query in range(k, len(target), n)[:2 * MOST_GROUPS]:  # copy c of object k: place c * n + k
                colour, alpha = PREDICTED if target[query] == k else REFERENCE, scores[stage, query].item()
                draw_box(axes, boxes[stage, query], colour, alpha=0.2 + 0.8 * alpha)
            zoom(axes, scene, true, 2.5)
    return figure


def training_parts(trained, scene, softmax):
    """The parts of the queries in training, for draw_parts; [] if there is one. trained: the outputs."""
    def part(name, logits, boxes):
        scores, labels = best_class(logits[0], softmax, len(scene.class_names))
        return name, scores, labels, boxes_to_pixels(boxes[0], scene.size)

    if "one2many" in trained:
        many = trained["one2many"]
        return [("one-to-one", scene.scores[-1], scene.labels[-1], scene.boxes[-1]),
                part("one-to-many", many["logits"][-1], many["boxes"][-1])]
    count = trained.get("groups", 1)
    if count > 1:
        last = list(zip(trained["logits"][-count:], trained["boxes"][-count:]))  # of the last layer
        return [part(f"group {k + 1}", *pair) for k, pair in enumerate(last[:MOST_GROUPS])]
    return []


# ---- The choice --------------------------------------------------------------------------------------------
PICTURES = {  # draw_look takes the first entry whose array a module of the decoder has
    "samples": draw_samples,
    "points": draw_salient_points,
    "prior": partial(draw_factors, first="prior"),
    "spatial": partial(draw_factors, first="spatial"),
    "locations": draw_sampling,
    "weights": draw_attention,
}


def draw_look(model, scene):
    """The picture that fits the model. Raises CannotDraw."""
    trained = outputs_of_training(model, scene)
    if parts := training_parts(trained, scene, is_softmax(model)):
        return draw_parts(scene, parts)
    if "noisy" in trained.get("denoising", {}):
        return draw_denoising(scene, trained["denoising"])
    if len(trained["logits"]) > len(scene.scores):
        return draw_stages(scene)
    for array, draw in PICTURES.items():
        found = scene.arrays_with("decoder", array)
        # A bias of self-attention, which has as many keys as queries, is no map of the image
        if found and not (array == "prior" and found[-1]["prior"].shape[-1] == found[-1]["prior"].shape[-2]):
            return draw(scene)
    known = ", ".join(PICTURES)
    raise CannotDraw(f"{type(model).__name__} has no decoder that shows any of {known}; see look()")
