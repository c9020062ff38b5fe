"""The figure of each method's paper: draw_look() chooses it by arrays and outputs, not by a model's name."""
import math
from functools import partial
from itertools import product

import torch
from torchvision.ops import box_iou

from support import UserError
from support.evaluation import boxes_to_pixels
from support.pictures import PREDICTED, REFERENCE, TRUE, Figure, draw_box, drawable, show
from support.predict import best_class, look

MOST_GROUPS = 6  # panels side by side
SAMPLES = dict(cmap="plasma", ec="white", lw=0.3, zorder=1)  # sampling points, coloured by a number


# ---- Panels ------------------------------------------------------------------------------------------------
def show_scene(axes, scene, title, grey=False, window=None, true=None, predicted=None, reference=None):
    """The photo with up to three boxes [4]. window: arguments of zoom."""
    show(axes, scene.photo, scene.size, drawable(title), grey)
    if window:
        zoom(axes, scene, *window)
    for box, colour, style in ((true, TRUE, "--"), (predicted, PREDICTED, "-"), (reference, REFERENCE, "--")):
        if box is not None:
            draw_box(axes, box, colour, style)


def show_map(axes, scene, weights, title, **boxes):
    """Attention weights [T] over the photo; the brightest cell is the largest weight of this map."""
    show_scene(axes, scene, title, grey=True, **boxes)
    axes.imshow(weights.view(scene.map_size(len(weights))).numpy(), cmap="inferno", vmin=0, alpha=0.65,
                extent=axes.axis())


def show_points(axes, points, colour, size=40, **style):
    """Points [..., 2] in pixels, with an edge so that they are seen on any photo."""
    x, y = points.reshape(-1, 2).T.numpy()
    return axes.scatter(x, y, size, colour, **{"ec": "black", "lw": 0.6, "zorder": 3, **style})


def zoom(axes, scene, boxes, factor):
    """Show only a square around boxes [..., 4], `factor` times as long as they reach, inside of the photo."""
    corners, end = boxes.reshape(-1, 2), torch.tensor(scene.size[::-1])
    low, high = corners.amin(0), corners.amax(0)
    half = factor / 2 * (high - low).max().clamp(min=2)
    low = torch.minimum((low + high) / 2 - half, end - 2 * half).clamp(min=0)
    (left, top), (right, bottom) = low.tolist(), torch.minimum(low + 2 * half, end).tolist()
    axes.axis("on")
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])


def square_panels(rows, columns, title, side=3.0):
    """A figure with rows * columns square panels, and these: an array of axes."""
    figure = Figure((columns * side, rows * (side + 0.3) + 0.4), layout="compressed")
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel_grid(scene, title, rows, large, lines, columns):
    """A figure, and for each of its rows `large` large axes and lines * columns small ones next to them."""
    height = lines * (1.7 * scene.size[0] / scene.size[1] + 0.3)  # of a row; small panels are 1.7 inches wide
    figure = Figure(((lines * large + columns) * 1.7, rows * height + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    halves = figure.subfigures(rows, 2, squeeze=False, width_ratios=[lines * large, columns])
    return figure, [(left.subplots(1, large, squeeze=False).flat, right.subplots(lines, columns).flat)
                    for left, right in halves]


# ---- Where the decoder looks -------------------------------------------------------------------------------
def draw_attention(scene):
    """DETR: encoder attention from a box's centre; decoder attention of the query that predicts this box."""
    encoder, decoder = (scene.last_with(part, "weights")["weights"][0] for part in ("encoder", "decoder"))
    best, columns = scene.detected_queries(1), math.ceil(len(decoder) / 2)
    title = "Attention of the last layers: mean of the heads (large), and each head of the decoder"
    figure, rows = panel_grid(scene, title, len(best), large=2, lines=2, columns=columns)
    for (query, box, name), (large, small) in zip(best, rows):
        centre = box.view(2, 2).mean(0)
        token = scene.token_at(centre, scene.map_size(encoder.shape[-1]))
        show_map(large[0], scene, encoder[:, token].mean(0), "encoder, from this point", predicted=box)
        show_points(large[0], centre, REFERENCE)
        show_map(large[1], scene, decoder[:, query].mean(0), f"decoder, query of {name}", predicted=box)
        for m, (axes, weights) in enumerate(zip(small, decoder[:, query]), start=1):
            show_map(axes, scene, weights, f"head {m}", predicted=box)
    return figure


def draw_heads(scenes):
    """Conditional DETR, figure 1: where each head looks for one object, a row for each model.

    scenes: [(name of the model, Scene of the same photo)]. A row has the query that finds the object best.
    """
    _, scene = scenes[0]
    true = scene.truth[0][1] if scene.truth else scene.detected_queries(1)[0][1]
    maps = [scene.last_with("decoder", "weights")["weights"][0] for _, scene in scenes]
    if other := [name for (name, _), weights in zip(scenes, maps) if weights.ndim != 3]:  # not [M, Q, T]
        raise UserError(f"{other[0]}: its heads sample points, so they have no attention map")
    title = "Cross-attention of the last layer for one object (dashed), by head"
    figure, rows = square_panels(len(scenes), 1 + max(map(len, maps)), title, side=2.0)
    for row, (name, scene), heads in zip(rows, scenes, maps):
        iou = box_iou(scene.boxes[-1], true[None])[:, 0]  # [Q]
        query = int((iou * scene.scores[-1]).argmax())
        show_scene(row[0], scene, name, true=true, predicted=scene.boxes[-1, query])
        for m, (axes, weights) in enumerate(zip(row[1:], heads[:, query])):
            show_map(axes, scene, weights, f"head {m + 1}", true=true)
    return figure


def draw_factors(first, title, scene):
    """Three rows of maps, a column for each of four heads: `first`, content, weights of the last layer."""
    seen, best = scene.last_with("decoder", first), scene.detected_queries(1)
    heads = min(4, seen["weights"].shape[1])  # more would be too small to read
    references = [arrays["reference"] for arrays in scene.seen.values() if "reference" in arrays]
    figure, rows = panel_grid(scene, f"Last decoder layer, {heads} heads: {title}", len(best), 1, 3, heads)
    for (query, box, name), (large, small) in zip(best, rows):
        boxes, points = {"predicted": box}, torch.zeros(0, 2)
        if references:
            reference = references[-1][0, query]  # [2] or [4]
            points, name = scene.to_pixels(reference[:2]), f"{name}, and its reference"
            if len(reference) == 4:
                boxes["reference"] = boxes_to_pixels(reference, scene.size)
        show_scene(large[0], scene, name, **boxes)
        show_points(large[0], points, REFERENCE)
        for axes, (kind, m) in zip(small, product((first, "content", "weights"), range(heads))):
            show_map(axes, scene, seen[kind][0, m, query], f"{kind}, head {m + 1}", **boxes)
            show_points(axes, points, REFERENCE, size=12)
    return figure


def draw_sampling(scene):
    """Deformable DETR: the sampling points of all heads and levels, of a pixel and of a query."""
    best, markers = scene.detected_queries(3), "os^Dv<>P*X"  # a marker for each level
    title = "Where the last layers of encoder (above) and decoder (below) look"
    figure, panels = square_panels(2, len(best), title, side=4.0)
    for part, row in zip(("encoder", "decoder"), panels):
        seen = scene.last_with(part, "locations")
        shapes = seen["shapes"].tolist()
        for axes, (query, box, name) in zip(row, best):
            title = f"query of {name}" if part == "decoder" else "pixel of level 1, at the centre of a box"
            if part == "encoder":  # its queries are the pixels, those of the finest level first
                query = scene.token_at(box.view(2, 2).mean(0), shapes[0])
            show_scene(axes, scene, title, grey=True, window=(box, 2.5), predicted=box)
            xy = scene.to_pixels(seen["locations"][0, query]).unbind(1)  # of each level [M, K, 2]
            for points, weights, marker in zip(xy, seen["weights"][0, query].unbind(1), markers):
                w, style = weights.flatten().numpy(), dict(SAMPLES, vmin=0, vmax=1, marker=marker)
                dots = show_points(axes, points, w, 14 + 100 * w, **style)
            show_points(axes, scene.to_pixels(seen["reference"][0, query, 0, :2]), REFERENCE)
    figure.colorbar(dots, ax=panels, shrink=0.6, label="weight; those of a head sum to 1")
    for i, ((h, w), marker) in enumerate(zip(shapes, markers)):
        axes.scatter([], [], c="grey", marker=marker, label=f"level {i + 1}: {h} x {w} cells")
    axes.scatter([], [], c=REFERENCE, ec="black", label="reference point")
    figure.legend(loc="outside lower center", ncols=2 * len(best), fontsize=9)
    return figure


def draw_samples(scene):
    """AdaMixer: the sampling points of all groups in x, y (position) and scale (colour)."""
    best = scene.detected_queries(3)
    samples = scene.last_with("decoder", "samples")["samples"][0, [query for query, _, _ in best]]
    xy, scales = scene.to_pixels(samples[..., :2]), samples[..., 2].flatten(1).numpy()  # of each query
    title = "Last decoder layer: where, and at which scale, a query samples the feature maps"
    figure, panels = square_panels(1, len(best), title, side=4.0)
    for axes, (_, box, name), points, colours in zip(panels[0], best, xy, scales):
        show_scene(axes, scene, name, grey=True, window=(box, 2.5), predicted=box)
        dots = show_points(axes, points, colours, 24, vmin=scales.min(), vmax=scales.max(), **SAMPLES)
    figure.colorbar(dots, ax=panels, shrink=0.8, label="log2 of the stride that is read")
    return figure


def draw_salient_points(scene):
    """SAM-DETR: a query's reference box, the point that each head picks inside it, and their attention."""
    seen, best = scene.last_with("decoder", "points"), scene.detected_queries(2)
    attention = scene.last_with("decoder", "weights")["weights"][0]
    title = "Last decoder layer: reference box (dashed), a salient point for each head, and their attention"
    figure, rows = panel_grid(scene, title, len(best), 1, lines=2, columns=math.ceil(len(attention) / 2))
    for (query, box, name), (large, small) in zip(best, rows):
        reference = boxes_to_pixels(seen["reference"][0, query], scene.size)
        show_scene(large[0], scene, name, predicted=box, reference=reference)
        for m, (axes, weights) in enumerate(zip(small, attention[:, query])):
            show_map(axes, scene, weights, f"head {m + 1}", reference=reference)
            axes.title.set_color(f"C{m}")
            for panel in (large[0], axes):
                show_points(panel, scene.to_pixels(seen["points"][0, query, m]), f"C{m}")
    return figure


# ---- Additional stages and queries of training -------------------------------------------------------------
def draw_stages(scene):
    """SQR: the same query at every stage, marked where one was better than the last (fading positives)."""
    S = len(scene.scores)
    best = sorted(scene.detected_queries(20), key=lambda item: -scene.fading_positives(item[0])[2].sum())[:4]
    known = "\ntruth green; orange: better than the last stage in IoU and score" if scene.truth else ""
    figure, panels = square_panels(len(best), S, f"The same query at every stage, one query a row{known}")
    for row, (query, _, _) in zip(panels, best):
        boxes, (true, iou, better) = scene.boxes[:, query], scene.fading_positives(query)
        for stage, axes in enumerate(row):
            title = f"stage {stage + 1}: {scene.in_words(stage, query)}"
            if scene.truth:
                title += ", finds nothing" if true is None else f", IoU {iou[stage]:.2f}"
            show_scene(axes, scene, title, window=(boxes, 1.3), true=true, predicted=boxes[stage])
            axes.title.set_color("#e65100" if better[stage] else "black")
    return figure


def draw_parts(model, scene, parts):
    """Group DETR, H-DETR: all queries that claim an object. parts: [(name, outputs of training, stage)]."""
    best = scene.detected_queries(3)
    title = "Which queries claim an object, in each part of the queries; the paler, the lower the score"
    figure, panels = square_panels(len(best), len(parts), title)
    for row, (query, box, name) in zip(panels, best):
        for axes, (part, out, stage) in zip(row, parts):
            scores, labels = best_class(model, out["logits"][stage, 0], len(scene.class_names))
            boxes = boxes_to_pixels(out["boxes"][stage, 0], scene.size)
            claims = (labels == scene.labels[-1, query]) & (scores > scene.threshold)
            claims &= box_iou(boxes, box[None])[:, 0] >= 0.5
            show_scene(axes, scene, f"{part}: {claims.sum()} x {name.rsplit(' ', 1)[0]}", window=(box, 2))
            for claimed, score in zip(boxes[claims], scores[claims].tolist()):
                draw_box(axes, claimed, PREDICTED, alpha=0.2 + 0.8 * score)
    return figure


def draw_denoising(scene, noisy, out):
    """DN-DETR and DINO: boxes with noise, and what the first and the last layer make of them."""
    objects, target = scene.objects(), out["target"][0]
    n, S, N = len(objects["labels"]), len(out["boxes"]), len(target)
    boxes = boxes_to_pixels(torch.cat([noisy, out["boxes"][:, 0]]), scene.size)  # [1 + S, N, 4]
    blue = ', blue must say "no object"' if (target == -1).any() else ""
    title = ("Boxes with noise, and what layers make of them; the paler, the lower the score of the class"
             f"\ntruth green; red queries must give it back{blue}")
    figure, panels = square_panels(min(n, 3), 3, title)
    for k, (row, label, true) in enumerate(zip(panels, objects["labels"], objects["boxes"])):
        true, name = boxes_to_pixels(true, scene.size), scene.class_names[label]
        scores = torch.cat([torch.ones(1, N), out["logits"][:, 0, :, label].sigmoid()])  # [1 + S, N]
        for axes, stage, step in zip(row, (0, 1, S), ("with noise", "after layer 1", f"after layer {S}")):
            title = f"{name} {step}: mean IoU {box_iou(boxes[stage, target == k], true[None]).mean():.2f}"
            show_scene(axes, scene, title, window=(true, 2.5), true=true)
            for query in range(k, N, n)[:2 * MOST_GROUPS]:  # copy c of object k has place c * n + k
                colour = PREDICTED if target[query] == k else REFERENCE
                draw_box(axes, boxes[stage, query], colour, alpha=0.2 + 0.8 * scores[stage, query].item())
    return figure


def outputs_of_training(model, scene):
    """The result of look() in training mode, but without dropout and with the batch norm of inference."""
    for module in model.modules():
        rate = getattr(module, "dropout", getattr(module, "p", None))  # of our Attention, of torch's Dropout
        module.training = not isinstance(rate, float) and not hasattr(module, "running_mean")
    targets = [[scene.objects()]] if model.recipe.get("denoising") else []
    torch.manual_seed(0)  # the same noise for every run with the same image
    found = look(model, scene.image[None], torch.zeros_like(scene.image[:1], dtype=torch.bool), *targets)
    model.eval()
    return found


PICTURES = {  # draw_look takes the first entry whose array a module of the decoder has
    "samples": draw_samples,
    "points": draw_salient_points,
    "prior": partial(draw_factors, "prior", "the Gaussian, attention by content without it, both together"),
    "spatial": partial(draw_factors, "spatial", "attention by the spatial and content product, by their sum"),
    "locations": draw_sampling,
    "weights": draw_attention,
}


def draw_look(model, scene):
    """The picture that fits the model. Raises UserError if there is none."""
    trained, seen = outputs_of_training(model, scene)
    noisy = [arrays["noisy"] for arrays in seen.values() if "noisy" in arrays]
    count = trained.get("groups", 1)  # the last stages are the groups of the last layer
    parts = [(f"group {k + 1}", trained, k - count) for k in range(min(count, MOST_GROUPS))]
    if "one2many" in trained:
        parts = [("one-to-one", trained, -1), ("one-to-many", trained["one2many"], -1)]
    if len(parts) > 1:
        return draw_parts(model, scene, parts)
    if noisy and noisy[-1].numel():
        return draw_denoising(scene, noisy[-1], trained["denoising"])
    if len(trained["logits"]) > len(scene.scores):
        return draw_stages(scene)
    found = {array for name, arrays in scene.seen.items() if "decoder" in name for array in arrays}
    for array, draw in PICTURES.items():
        if array in found:
            return draw(scene)
    raise UserError(f"{type(model).__name__} has no decoder that shows any of {', '.join(PICTURES)}")
