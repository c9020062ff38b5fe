"""The model files next to each other as web pages: what differs, what it is, and which equation it carries.

    python docs/side_by_side.py            writes docs/index.html and docs/side_by_side/*.html
    python docs/side_by_side.py --check    writes nothing, names the pages that are out of date

The pages are made from the files alone, with plain HTML and CSS; tests/test_docs.py keeps them up to date. Two files
are compared definition by definition (class, function, or method of a class that both have), which their common order
makes possible; what differs inside one is found by difflib. NOTES says what each difference is.
"""
import ast
import difflib
import functools
import html
import itertools
import keyword
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
MODELS = {
    "detr": "DETR",
    "conditional_detr": "Conditional DETR",
    "deformable_detr": "Deformable DETR",
    "sam_detr": "SAM-DETR",
    "sqr": "SQR",
}
PAIRS = list(itertools.combinations(MODELS, 2))
MAIN_PAIRS = [
    ("detr", "conditional_detr"),
    ("detr", "deformable_detr"),
    ("conditional_detr", "sam_detr"),
    ("deformable_detr", "sqr"),
]
CONTEXT, COLLAPSE = 3, 12  # unchanged lines shown around a change; how many it takes to fold the rest

# What a difference is: (definition, text that must occur in its lines or "", note). The first that fits is taken. For
# the four pairs that are meant to be read, then for all; a difference without a note takes the first line of the
# definition's docstring. A "*" stands for the model's own class, whose name differs.
GENERAL = [
    ("docstring", "Diff me against", "Title, authors, the idea in three sentences, and the file to compare with."),
    ("docstring", "", "Where this file departs from the official code, and what is left out."),
    ("imports", "", "Imports."),
    ("RECIPE", "", "How the paper trains it."),
    ("LAPTOP", "", "What the small preset changes for this file."),
    ("*", "", "The class is named after the method."),
    ("build", "", "The name of the class."),
    ("OFFICIAL_NAMES", "", "Names in the official checkpoints and ours; nothing is computed here."),
]
NOTES = {
    ("detr", "conditional_detr"): [
        ("RECIPE", "# How", "Which sections of the paper say so."),
        ("RECIPE", "epochs=", "A tenth of the epochs. The batch is 16 images, the learning rate stays."),
        ("RECIPE", "class_loss",
         "Focal loss in place of softmax, weight 2 in place of 1. It came with the paper but is not its idea: "
         "focal loss and box offsets together add 2 AP, the spatial query 4 more (table 4)."),
        ("sine_xy", "",
         "p_s, the sine encoding of a reference point: the same encoding as that of the keys, so that the two can "
         "be compared by a dot product."),
        ("concat_heads", "",
         "Eq. (2): content and position are concatenated inside every head, so that their dot products add up, "
         "c_q·c_k + p_q·p_k, and do not mix."),
        ("SpatialQuery", "",
         "Eq. (3) and (4), the heart of the paper: p_q = T p_s with T = FFN(f). T is diagonal, lambda_q; the other "
         "forms are the ablations of table 3 and figure 5, about 45 lines with the options below."),
        ("ReferencePoints", "",
         "s, before the sigmoid: predicted from the query's position. The two other kinds are ablations."),
        ("DecoderLayer.__init__", "sa_q_content",
         "Self-attention: own maps for content and position of queries and keys. The paper presents "
         "cross-attention only; the official code does this, too."),
        ("DecoderLayer.__init__", "ca_q_sine",
         "Cross-attention: own maps for c_q, p_q, c_k, p_k and v. The map ca_q_pos exists in the first layer "
         "alone."),
        ("DecoderLayer.__init__", "def __init__", "A layer has to know whether it is the first."),
        ("DecoderLayer.__init__", "self.first",
         "Kept for forward: in how many heads to concatenate, and whether this is layer 1."),
        ("DecoderLayer.forward", "def forward", "The layer is given p_s and the module that makes p_q of it."),
        ("DecoderLayer.forward", "sa_q_content",
         "Self-attention: content and position are mapped each, then added. f is kept for lambda: it is this "
         "layer's input, which is the previous layer's output before the norm."),
        ("DecoderLayer.forward", "concat_heads",
         "Eq. (2) in place of (c_q + p_q)·(c_k + p_k). In layer 1 lambda is 1 and positions are added to the "
         "content as well (section 3.5)."),
        ("Decoder.__init__", "first=i == 0", "Layers know whether they are the first."),
        ("Decoder.__init__", "", "One spatial query module for all layers."),
        ("Decoder.forward", "",
         "Layers are fed the output before the shared norm, heads the output after it; lambda comes from the "
         "former."),
        ("*.__init__", "num_queries=", "300 queries, and the options of the ablations."),
        ("*.__init__", "self.reference =",
         "Reference points and the spatial query are made. No logit for \"no object\": focal loss wants C "
         "independent sigmoids."),
        ("*.__init__", "xavier_uniform(self.reference)",
         "The reference points' matrices are initialised like the rest."),
        ("*.__init__", "log(99)",
         "Start of the focal loss (every class at p = 0.01) and of boxes (at their reference point)."),
        ("*.forward", "C+1", "C logits and not C + 1."),
        ("*.forward", "Eq. (1)", "Eq. (1): box = sigmoid(FFN(f) + [s, 0, 0]). Only the centre is relative to s."),
    ],
    ("detr", "deformable_detr"): [
        ("RECIPE", "# How", "Which sections of the paper say so."),
        ("RECIPE", "epochs=",
         "A tenth of the epochs, batch 32, twice the learning rate, and a tenth of it for the maps that make "
         "offsets and reference points."),
        ("RECIPE", "class_loss", "Focal loss in place of softmax, weight 2 in place of 1."),
        ("LAPTOP", "", "The small preset: refinement, three levels of features."),
        ("deformable_sampling", "",
         "The inner sums of Eq. (3): bilinear samples at K points of each of L levels, weighted and added up. "
         "Replaces the official CUDA operator."),
        ("MSDeformAttn", "",
         "Eq. (3), the heart of the paper: offsets and weights are linear maps of the query; no key is looked at. "
         "Starts as a star of points around the reference. Points and boxes as references scale offsets "
         "differently (A.4)."),
        ("valid_ratio", "",
         "How much of a padded map is image. Reference points are relative to the image, samples to the map."),
        ("pixel_centres", "", "Reference points of the encoder: every pixel's own centre."),
        ("EncoderLayer.__init__", "", "Deformable attention in place of attention."),
        ("EncoderLayer.forward", "",
         "Every pixel looks at L x K points per head and not at all T pixels: the cost grows with T and no longer "
         "with its square (section 4.1)."),
        ("EncoderLayer", "",
         "The encoder layer, with deformable attention; another name, since it is another block."),
        ("Encoder.__init__", "", "The same stack; one argument per line, since there are more of them."),
        ("Encoder.forward", "",
         "Reference points are computed once and handed to all layers: a pixel's own centre, as seen from each "
         "level."),
        ("Encoder", "", "The same stack, another name."),
        ("Queries", "",
         "One stage: content and position are both learned (DETR's content starts at zero), and a linear map of "
         "the position is the reference point."),
        ("Proposals", "",
         "The two-stage variant (A.4): every encoder token proposes a box, the best become the queries."),
        ("DecoderLayer.__init__", "", "Cross-attention is deformable; self-attention between queries stays."),
        ("DecoderLayer.forward", "def forward",
         "The layer is given reference points and the maps' shapes in place of positions of keys."),
        ("DecoderLayer.forward", "",
         "Eq. (3) in place of a comparison with every key. The quirk of the first layer is gone: its content is "
         "learned."),
        ("DecoderLayer", "", "The paper's section on the decoder."),
        ("Decoder.__init__", "self.box_refine",
         "No final norm; the decoder makes the boxes, since refinement needs them."),
        ("Decoder.__init__", "", "Levels, points and refinement are passed on."),
        ("Decoder.forward", "",
         "Boxes are relative to the reference, in logit space (A.3). With refinement a layer's box is the next "
         "layer's reference, detached (A.4)."),
        ("*.__init__", "dim_feedforward=", "FFN width 1024, as in the official code."),
        ("*.__init__", "num_queries=", "300 queries; levels, points and the two variants."),
        ("*.__init__", "self.input_proj",
         "L levels, each through its own convolution and GroupNorm; heads shared by all layers or, with "
         "refinement, one for each; biases for the focal loss and the first boxes; the star."),
        ("*.feature_maps", "", "C3, C4, C5, and C6 as a stride 2 convolution of C5 (A.2)."),
        ("*.forward", "C+1", "C logits and not C + 1; proposals with two_stage."),
        ("*.forward", "", "All levels become one row of T tokens; a level embedding tells them apart."),
    ],
    ("conditional_detr", "sam_detr"): [
        ("RECIPE", "", "The same recipe. The paper also trains for 12 epochs."),
        ("EncoderLayer", "", "The same encoder; only the reference to the paper differs."),
        ("deformable_sampling", "",
         "For multiscale only, from deformable_detr.py word for word: the inner sums of that paper's Eq. (3)."),
        ("MSDeformAttn", "", "For multiscale only, from deformable_detr.py word for word: that paper's Eq. (3)."),
        ("valid_ratio", "", "For multiscale only, from deformable_detr.py word for word."),
        ("pixel_centres", "", "For multiscale only, from deformable_detr.py word for word."),
        ("DeformableEncoderLayer", "", "For multiscale only, from deformable_detr.py word for word."),
        ("DeformableEncoder", "", "For multiscale only, from deformable_detr.py word for word."),
        ("sine_xy", "", "Another section begins here; the function is the same."),
        ("concat_heads", "", "Gone: content and position are added again."),
        ("SpatialQuery", "", "Gone: no lambda. The position of a query is that of the point which it sampled."),
        ("ReferencePoints", "", "Gone: queries own reference boxes, 4 learned numbers each."),
        ("valid_size", "", "Boxes are relative to the image, RoIAlign counts in cells of the padded map."),
        ("SemanticsAligner", "",
         "The heart of the paper (section 3): F_R = RoIAlign(F, box); R_SP = MLP(ConvNet(F_R)), one point per "
         "head; the new query is F_R sampled there, times Sigmoid(Linear(Q))."),
        ("gaussian_bias", "",
         "The smca option, from SMCA-DETR: attention scores fall off with the distance from the point."),
        ("DecoderLayer", "", "The paper's section on the decoder."),
        ("DecoderLayer.__init__", "self.aligner", "The aligner stands between self-attention and cross-attention."),
        ("DecoderLayer.__init__", "ca_q_sine", "Positions go through a 2-layer MLP; no special first layer."),
        ("DecoderLayer.__init__", "ca_k_pos", "Positions of keys go through a 2-layer MLP, too."),
        ("DecoderLayer.__init__", "smca", "Passed on to the aligner."),
        ("DecoderLayer.__init__", "self.first", "No special first layer."),
        ("DecoderLayer.forward", "query_pos, reference",
         "The layer is given reference boxes; lambda and its input f are gone."),
        ("DecoderLayer.forward", "f = tgt", "Lambda's input is gone."),
        ("DecoderLayer.forward", "self.aligner",
         "Cross-attention: a query of its own for each head, D wide and made of features, against one key for all "
         "heads."),
        ("Decoder.__init__", "", "No shared norm, no lambda."),
        ("Decoder.forward", "",
         "Layers refine reference boxes, detached in between (as in Deformable DETR). The position of "
         "self-attention is the sine of the box centre. With multiscale a layer attends to one level."),
        ("*.__init__", "smca=False",
         "The variants; and input_norm, which the official code makes depend on the number of epochs."),
        ("*.__init__", "self.multiscale", "One level or three; queries are 4 numbers, a box; heads are per layer."),
        ("*.__init__", "xavier_uniform(self.reference)", "Gone with the reference points' head."),
        ("*.__init__", "", "Initialisation of the deformable encoder and of the input convolutions."),
        ("*.encode", "", "Single scale or multiscale: the encoder's outputs, level by level."),
        ("*.forward", "",
         "Feature maps, positions with half a pixel of offset, learned boxes as the first references."),
    ],
    ("deformable_detr", "sqr"): [
        ("SOURCES", "", "Whose outputs a stage is fed: the whole difference between the plain decoder, SQR and DQR."),
        ("query_recollection", "",
         "The heart of the paper: a stage runs on the groups of queries that its plan names. Groups are folded "
         "into the batch, so that they do not attend to each other."),
        ("Decoder.forward", "query_recollection",
         "One layer with its heads becomes a function that runs on all groups of a stage; every output of every "
         "group is returned, and so supervised."),
        ("Decoder.forward", "def run",
         "One layer with its heads becomes a function of a stage; the plan says who is fed what."),
        ("Decoder.forward", "outputs.append", "Outputs are collected by query_recollection."),
        ("Decoder.forward", "boxes", "The same box as before, of a group."),
        ("*.__init__", "recollect=", "The options: whose outputs are recollected, and the recurrent last stage."),
        ("*.__init__", "SOURCES", "Wrong values are refused; a recurrent model is trained densely."),
        ("*.plan", "",
         "Training recollects, inference does not: it is Deformable DETR. DQRR runs its last stage N times."),
        ("*.forward", "32 for 6 stages", "How many supervised groups there are."),
        ("*.forward", "self.plan()",
         "The plan is handed over, and heads, since every group takes those of its own stage."),
        ("prune", "", "DQRR at inference needs the last stage only: what can be thrown away."),
    ],
}


# ---- A file as sections --------------------------------------------------------------------------------------------
@dataclass
class Section:
    """Some lines of a file: a definition with the comments above it and the blank lines below."""
    key: str  # the same in two files where sections belong together
    name: str
    summary: str  # what it is, see summary()
    start: int  # number of the first line
    lines: list
    node: ast.AST = None  # of a class


def cut(lines, start, pieces):
    """Sections from pieces (key, name, summary, number of the last line, node), given in order."""
    sections, first, stop = [], start, start + len(lines)
    for key, name, summary, end, node in pieces:
        while end + 1 < stop and not lines[end + 1 - start].strip():
            end += 1
        sections.append(Section(key, name, summary, first, lines[first - start:end + 1 - start], node))
        first = end + 1
    return sections


def summary(node, otherwise):
    """The first line of a definition's docstring."""
    return (ast.get_docstring(node) or otherwise).split("\n")[0]


def heading(model, node):
    """The text of the line `# ---- text ----` under which a definition stands."""
    above = "\n".join(lines_of(model)[:node.lineno])
    return (re.findall(r"^# ---- (.*?) -+$", above, re.M) or [""])[-1]


@functools.cache
def sections(model):
    """A model file in pieces: docstring, imports, every definition, what runs as a script."""
    pieces = []
    for node in ast.parse(source(model)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if pieces[-1][0] == "imports":
                pieces.pop()
            pieces.append(("imports", "imports", "", node.end_lineno, None))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            own = isinstance(node, ast.ClassDef) and ast.unparse(node.body[0]) == "recipe = RECIPE"
            pieces.append(("*" if own else node.name, node.name,
                           summary(node, heading(model, node)), node.end_lineno, node))
        else:
            name = {ast.Expr: "docstring", ast.If: "main"}.get(type(node)) or node.targets[0].id
            pieces.append((name, name, heading(model, node), node.end_lineno, None))
    return cut(lines_of(model), 1, pieces)


def methods(section):
    """A class in pieces: what is above its first method, then every method."""
    own = [node for node in section.node.body if isinstance(node, ast.FunctionDef)]
    above = [node.end_lineno for node in section.node.body if node.lineno < own[0].lineno]
    pieces = [(section.key, section.name, section.summary, max(above, default=section.node.lineno), None)]
    for node in own:
        pieces.append((f"{section.key}.{node.name}", "", summary(node, section.summary), node.end_lineno, None))
    return cut(section.lines, section.start, pieces)


@functools.cache
def source(model):
    return (DOCS.parent / f"{model}.py").read_text(encoding="utf-8")


@functools.cache
def lines_of(model):
    return source(model).splitlines()


# ---- Two files, aligned --------------------------------------------------------------------------------------------
@dataclass
class Run:
    """Consecutive lines that are equal, or a hunk. rows: pairs of line numbers, left and right; None is no line."""
    equal: bool
    rows: list
    key: str = ""
    summary: str = ""


def merged(left, right):
    """Two lists of sections as one of pairs, (section or None, section or None), by their keys."""
    keys = [s.key for s in left], [s.key for s in right]
    common = [key for key in keys[0] if key in keys[1]]
    if common != [key for key in keys[1] if key in keys[0]]:
        raise ValueError(f"the same definitions come in another order: {common}")
    left, right, pairs = list(left), list(right), []
    for key in [*common, None]:
        while left and left[0].key != key:
            pairs.append((left.pop(0), None))
        while right and right[0].key != key:
            pairs.append((None, right.pop(0)))
        if key:
            pairs.append((left.pop(0), right.pop(0)))
    return pairs


def aligned(a, b):
    """The definitions of two files in pairs. "X" and "DeformableX" are a pair where no file has both."""
    left, right = sections(a), sections(b)
    names = {s.key for s in left}, {s.key for s in right}

    def renamed(own, key):
        plain = key.removeprefix("Deformable")
        return plain if plain != key and plain not in own and key not in names[own is names[0]] else key

    def keyed(found, own):
        return [Section(renamed(own, s.key), *list(vars(s).values())[1:]) for s in found]

    return merged(keyed(left, names[0]), keyed(right, names[1]))


def runs(left, right):
    """Two sections that belong together (one of them may be None) as a list of Runs."""
    if left and right and isinstance(left.node, ast.ClassDef) and left.lines != right.lines:
        return [run for pair in merged(methods(left), methods(right)) for run in runs(*pair)]
    one = right or left
    (a, first_a), (b, first_b) = ((s.lines, s.start) if s else ([], 0) for s in (left, right))
    found = []
    for equal, i1, i2, j1, j2 in opcodes(a, b):
        numbers = range(first_a + i1, first_a + i2), range(first_b + j1, first_b + j2)
        rows = list(zip(*numbers)) if equal else align_lines(*numbers, a[i1:i2], b[j1:j2])
        found.append(Run(equal, rows, one.key, one.summary))
    return found


def opcodes(a, b):
    """Of two lists of lines the parts that are equal and those that are not: (equal, i1, i2, j1, j2)."""
    # Blank lines are junk: a change is not torn into two because both files have one somewhere in it
    matcher, found = difflib.SequenceMatcher(lambda line: not line.strip(), a, b, autojunk=False), []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        tail = 0  # blank lines at the end, which are equal after all
        while tag == "replace" and tail < min(i2 - i1, j2 - j1) and a[i2 - tail - 1] == b[j2 - tail - 1]:
            tail += 1
        found.append((tag == "equal", i1, i2 - tail, j1, j2 - tail))
        if tail:
            found.append((True, i2 - tail, i2, j2 - tail, j2))
    joined = found[:1]
    for now in found[1:]:
        if now[0] and joined[-1][0]:
            joined[-1] = (True, joined[-1][1], now[2], joined[-1][3], now[4])
        else:
            joined.append(now)
    return joined


def align_lines(left, right, a, b):
    """Rows of a hunk: lines that resemble each other stand next to each other."""
    bags = [[Counter(words(line)) for line in lines] for lines in (a, b)]

    @functools.cache
    def like(i, j):
        return similar(bags[0][i], bags[1][j])

    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # of the first i and j lines
    for i, j in itertools.product(range(len(a)), range(len(b))):
        pair = best[i][j] + like(i, j) if like(i, j) else 0
        best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], pair)
    i, j, anchors = len(a), len(b), [(len(a), len(b))]
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            anchors.append((i, j))
    rows, i, j = [], 0, 0
    for x, y in reversed(anchors):
        rows += itertools.zip_longest(left[i:x], right[j:y])
        if x < len(a):
            rows.append((left[x], right[y]))
        i, j = x + 1, y + 1
    return rows


def similar(bag, other):
    """The share of words that two lines have in common; 0 if it is too small to compare them."""
    common, total = (bag & other).total(), bag.total() + other.total()
    return 2 * common / total if 2 * common > 0.5 * total else 0


def words(line):
    return re.findall(r"\w+|[^\w\s]", line)


@functools.cache
def compared(a, b):
    """Two files as a list of (left section or None, right section or None, [Run])."""
    return [(left, right, runs(left, right)) for left, right in aligned(a, b)]


def hunks(a, b):
    """All hunks of a pair of files, in order, as Runs."""
    return [run for _, _, found in compared(a, b) for run in found if not run.equal]


def size(a, b):
    """(lines only in a, lines only in b, hunks)."""
    found = hunks(a, b)
    return sum(bool(l) for h in found for l, _ in h.rows), sum(bool(r) for h in found for _, r in h.rows), len(found)


def entry(a, b, run):
    """The entry of NOTES or GENERAL that belongs to a hunk, or None."""
    lines = lines_of(a), lines_of(b)
    text = "\n".join(lines[side][number - 1] for row in run.rows for side, number in enumerate(row) if number)
    for key, fragment, note in NOTES.get((a, b), []) + GENERAL:
        if key == run.key and fragment in text:
            return key, fragment, note
    return None


# ---- HTML ----------------------------------------------------------------------------------------------------------
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; --link: #0969da;
  --out: #ffebe9; --out2: #ffc1bc; --in: #dafbe1; --in2: #97e8a8; --none: #f6f8fa; --note: #fff8c5; --noteline: #d4a72c;
  --comment: #57606a; --string: #0a3069; --word: #a40e26 }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --link: #4493f8; --out: #3a1a1d; --out2: #7d2a2c; --in: #12301d; --in2: #1f6b37; --none: #151b23; --note: #2b2611;
  --noteline: #9e7a1c; --comment: #9aa4af; --string: #a5d6ff; --word: #ff9492 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 110rem; padding: 0 .8rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
a { color: var(--link) }
h1 { font-size: 1.5rem; margin: 1rem 0 .3rem } h2 { font: bold 1rem ui-monospace, monospace;
  margin: 2rem 0 .4rem; scroll-margin-top: 2.5rem }
h2 small, .dim { color: var(--dim); font-weight: normal }
nav, .toc { font-size: .9rem; margin: .3rem 0 } .toc { columns: 24rem; padding: 0; list-style: none }
.toc code, td + td { white-space: nowrap }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left }
.bar { position: sticky; top: 0; z-index: 1; background: var(--back); border-bottom: 1px solid var(--line);
  display: grid; grid-template-columns: 1fr 1fr; font: bold .85rem ui-monospace, monospace; padding: .3rem 0 }
.note { background: var(--note); border-left: 3px solid var(--noteline); margin: .5rem 0 .3rem; padding: .3rem .6rem;
  font-size: .95rem }
.g { display: grid; grid-template-columns: 1fr 1fr; column-gap: 4px }
.g > code { position: relative; min-width: 0; min-height: 1.45em; 
  font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding-left: calc(6ch + 2ch); text-indent: -2ch }
.g > code::before { content: attr(data-n); position: absolute; left: 0; width: 5ch; text-indent: 0; text-align: right;
  color: var(--dim); user-select: none }
INDENTS
.d { background: var(--out) } .a { background: var(--in) } .f { background: var(--none) }
.d::before { content: attr(data-n) "-" !important } .a::before { content: attr(data-n) "+" !important }
.d b { background: var(--out2) } .a b { background: var(--in2) } .g b { font-weight: normal; border-radius: 2px }
.c { color: var(--comment) } .s { color: var(--string) } .k { color: var(--word) }
details { margin: .3rem 0; border: 1px dashed var(--line); border-radius: 4px }
summary { cursor: pointer; color: var(--dim); font-size: .85rem; padding: .15rem .6rem; overflow-wrap: anywhere }
@media (max-width: 60rem) {
  .g { display: flex; flex-direction: column } .r { order: 1 } .f, .same > .l { display: none }
  .g > code { font-size: 11px }
}
""".replace("INDENTS", "\n".join(
    f".g > .i{n} {{ padding-left: calc(6ch + {4 * n + 2}ch); text-indent: -{4 * n + 2}ch }}" for n in range(1, 10)))

CODE = re.compile(r"(?P<s>\"\"\"[\s\S]*?\"\"\"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')|(?P<c>#[^\n]*)"
                  rf"|(?P<k>\b(?:{'|'.join(sorted(set(keyword.kwlist) - {'True', 'False', 'None'}))})\b)")


@functools.cache
def colours(model):
    """For every line of a file the class of every character: c comment, s string, k keyword, or nothing."""
    classes = [""] * len(source(model))
    for match in CODE.finditer(source(model)):
        classes[match.start():match.end()] = [match.lastgroup] * len(match[0])
    lines, at = [], 0
    for line in lines_of(model):
        lines.append(classes[at:at + len(line)])
        at += len(line) + 1
    return lines


@functools.cache
def paint(model, number, marked=()):
    """One line as HTML; marked: (start, end) of characters that the other file does not have."""
    line, classes = lines_of(model)[number - 1], colours(model)[number - 1]
    marks = [any(start <= i < end for start, end in marked) for i in range(len(line))]
    out, i = [], 0
    for (name, mark), group in itertools.groupby(zip(classes, marks)):
        n = len(list(group))
        piece = html.escape(line[i:i + n], quote=False)
        piece = f"<span class={name}>{piece}</span>" if name and piece.strip() else piece
        out.append(f"<b>{piece}</b>" if mark else piece)
        i += n
    return "".join(out)


def different(a, b):
    """The ranges of characters of two similar lines that the other does not have; nothing if they are not similar."""
    split = [re.findall(r"\w+|\s+|[^\w\s]", line) for line in (a, b)]
    matcher = difflib.SequenceMatcher(None, *split, autojunk=False)
    if not similar(Counter(words(a)), Counter(words(b))):
        return (), ()
    starts = [list(itertools.accumulate(map(len, parts), initial=0)) for parts in split]
    changed = [op for op in matcher.get_opcodes() if op[0] != "equal"]
    return (tuple((starts[0][i1], starts[0][i2]) for _, i1, i2, _, _ in changed),
            tuple((starts[1][j1], starts[1][j2]) for _, _, _, j1, j2 in changed))


def grid(a, b, rows, equal):
    """Lines next to each other."""
    lines, out = (lines_of(a), lines_of(b)), []
    for left, right in rows:
        marks = (), ()
        if left and right and not equal:
            marks = different(lines[0][left - 1], lines[1][right - 1])
        for side, model, number in ((0, a, left), (1, b, right)):
            names = ["lr"[side]]
            if not number:
                out.append(f'<code class="{names[0]} f"></code>')
                continue
            line = lines[side][number - 1]
            indent = (len(line) - len(line.lstrip())) // 4
            names += [f"i{indent}"] * (indent > 0) + ["da"[side]] * (not equal)
            out.append(f'<code class="{" ".join(names)}" data-n={number}>{paint(model, number, marks[side])}</code>')
    return f'<div class="g{" same" * equal}">{"".join(out)}</div>\n'


def folded(a, b, rows, before, after):
    """Equal lines: CONTEXT next to a change, the rest behind a click if it is long."""
    start, end = CONTEXT * before, len(rows) - CONTEXT * after
    if end - start < COLLAPSE:
        return grid(a, b, rows, True) if rows else ""
    inner = f"<details><summary>{end - start} equal lines</summary>{grid(a, b, rows[start:end], True)}</details>\n"
    parts = grid(a, b, rows[:start], True) if before else "", inner, grid(a, b, rows[end:], True) if after else ""
    return "".join(parts)


def page(a, b):
    """One pair of files as a page of HTML."""
    body, toc, same = [], [], []

    def flush():
        """What is equal from one difference to the next: whole definitions."""
        if same:
            rows = [row for _, found in same for row in found]
            names = ", ".join(name for name, _ in same)
            body.append(f"<details><summary>{len(rows)} equal lines: {names}</summary>"
                        f"{grid(a, b, rows, True)}</details>\n")
            same.clear()

    for left, right, found in compared(a, b):
        one = right or left
        if all(run.equal for run in found):
            same.append((one.name, [row for run in found for row in run.rows]))
            continue
        flush()
        removed = sum(bool(l) for run in found for l, _ in run.rows if not run.equal)
        added = sum(bool(r) for run in found for _, r in run.rows if not run.equal)
        kind = "changed" if left and right else f"only in {b if right else a}.py"
        if left and right and left.name != right.name:
            kind = f"{left.name} in {a}.py"
        counts = f"-{removed} +{added}" if removed and added else f"-{removed}" if removed else f"+{added}"
        body.append(f'<h2 id="{one.name}">{one.name} <small>{kind}, {counts}</small></h2>\n')
        toc.append(f'<li><a href="#{one.name}"><code>{one.name}</code></a> '
                   f'<span class=dim>{kind}, {counts}</span></li>')
        said = None
        for i, run in enumerate(found):
            if run.equal:
                body.append(folded(a, b, run.rows, i > 0, i + 1 < len(found)))
                continue
            note = entry(a, b, run)
            text = note[2] if note else run.summary
            if text and text != said:
                body.append(f"<p class=note>{html.escape(text, quote=False)}</p>\n")
                said = text
            body.append(grid(a, b, run.rows, False))
    flush()
    out, new, count = size(a, b)
    others = [", ".join(link(*pair, f"{pair[0]} | {pair[1]}") for pair in PAIRS if model in pair and pair != (a, b))
              for model in (a, b)]
    hint = "Numbers of equations, tables and sections are those of the right file's paper."
    if (a, b) not in MAIN_PAIRS:
        parent = next(parent for parent, child in MAIN_PAIRS if child == b)
        hint = (f"These two are not parent and child, so most notes are first lines of docstrings. {b}.py is meant "
                f"to be read {link(parent, b, f'next to {parent}.py')}.")
    return document(f"{MODELS[b]} next to {MODELS[a]}", f"""
<h1>{MODELS[b]} next to {MODELS[a]}</h1>
<p>Left <a href="../../{a}.py">{a}.py</a> (<a href="../{a}.md">about it</a>), right <a href="../../{b}.py">{b}.py</a>
(<a href="../{b}.md">about it</a>): {out} lines only left, {new} only right, in {count} hunks, compared definition by
definition. Equal definitions are folded. {hint}</p>
<nav><a href="../index.html">All pairs</a>. Other pairs with {a}.py: {others[0]}<br>
Other pairs with {b}.py: {others[1]}</nav>
<ul class=toc>{"".join(toc)}</ul>
<div class=bar><span>- {a}.py</span><span>+ {b}.py</span></div>
{"".join(body)}""")


def link(a, b, text):
    return f'<a href="{a}--{b}.html">{text.replace(" ", "&nbsp;")}</a>'


def document(title, body):
    return (f'<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>{title}</title>\n'
            f'<meta name=viewport content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
            f'{body}</html>\n')


def index():
    """The page that links all others."""
    rows = []
    for a, b in MAIN_PAIRS + [pair for pair in PAIRS if pair not in MAIN_PAIRS]:
        out, new, count = size(a, b)
        text = f'<a href="side_by_side/{a}--{b}.html">{MODELS[a]} and {MODELS[b]}</a>'
        text = f"<b>{text}</b>" if (a, b) in MAIN_PAIRS else text
        rows.append(f"<tr><td>{text}<td>-{out}<td>+{new}<td>{count}</tr>")
    files = "".join(f'<li><a href="../{m}.py">{m}.py</a>, {name}: <a href="{m}.md">what it is, line by line</a></li>'
                    for m, name in MODELS.items())
    return document("DETR, side by side", f"""
<h1>DETR, side by side</h1>
<p>Any two of the five files next to each other, aligned, with a note at every difference. The pairs in bold are parent
and child: what stands there is what the paper changed.</p>
<table><tr><th>left and right<th>lines<th>lines<th>hunks</tr>{"".join(rows)}</table>
<ul>{files}</ul>
<p class=dim>-n: lines only in the left file, +m: only in the right one. Definitions are compared one by one, so the
numbers are not quite those of <code>git diff --no-index</code>. Made by <code>python docs/side_by_side.py</code>.</p>
""")


def pages():
    """{path: content} of everything that is generated."""
    return {DOCS / "index.html": index(),
            **{DOCS / "side_by_side" / f"{a}--{b}.html": page(a, b) for a, b in PAIRS}}


def main(flags):
    stale = {path: content for path, content in pages().items()
             if not path.exists() or path.read_text(encoding="utf-8") != content}
    for path, content in stale.items():
        print(f"{path.relative_to(DOCS.parent)}: {'out of date' if '--check' in flags else 'written'}")
        if "--check" not in flags:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8", newline="\n")
    return bool(stale and "--check" in flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
