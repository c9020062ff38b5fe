"""Notes on the differences between two files, for the pages of side_by_side.py.

Entries are (definition, text that must occur in the lines that differ or "", note). The first that fits is
taken, from NOTES of the two files, then from GENERAL. "*" is the model's own class, whose name differs.
A difference without an entry gets the first line of its docstring, so that a new file needs none.
"""
GENERAL = [
    ("docstring", "Diff me against",
     "Title, authors, the idea in three sentences, and the file to compare with."),
    ("docstring", "", "Where this file departs from the official code, and what is left out."),
    ("imports", "", "Imports."),
    ("RECIPE", "", "How the paper trains it."),
    ("LAPTOP", "", "Changes of the laptop preset for this file."),
    ("*", "", "The class is named after the method."),
    ("build", "", "The name of the class."),
    ("OFFICIAL_NAMES", "", "Names in the official checkpoints and ours; nothing is computed here."),
]
NOTES = {
    ("detr", "conditional_detr"): [
        ("RECIPE", "epochs=", "A tenth of the epochs. The batch is 16 images, the learning rate stays."),
        ("RECIPE", "class_loss",
         "Focal loss instead of softmax, weight 2 instead of 1. It came with the paper but is "
         "not its idea: focal loss and box offsets together add 2 AP, the spatial query 4 more "
         "(table 4)."),
        ("DecoderLayer.__init__", "sa_q_content",
         "Self-attention: own maps for content and position of queries and keys. The paper "
         "presents only cross-attention; the official code also does this."),
        ("DecoderLayer.__init__", "ca_q_sine",
         "Cross-attention: own maps for c_q, p_q, c_k, p_k and v. The map ca_q_pos exists in "
         "the first layer only."),
        ("DecoderLayer.__init__", "def __init__", "A layer has to know whether it is the first."),
        ("DecoderLayer.__init__", "self.first",
         "Kept for forward: in how many heads to concatenate, and whether this is layer 1."),
        ("DecoderLayer.forward", "concat_heads",
         "Eq. (2) instead of (c_q + p_q)·(c_k + p_k). In layer 1 lambda is 1 and positions are "
         "added to the content as well (section 3.5)."),
        ("*.__init__", "xavier_uniform(self.reference_head)",
         "The reference points' matrices are initialised like the rest."),
        ("*.__init__", "log(99)",
         "Start of the focal loss (every class at p = 0.01) and of boxes (at their reference "
         "point)."),
        ("*.forward", "C+1", "C logits and not C + 1."),
        ("*.forward", "Eq. (1)",
         "Eq. (1): box = sigmoid(FFN(f) + [s, 0, 0]). Only the centre is relative to s."),
        ("Decoder.__init__", "first=(i == 0)", "Layers know whether they are the first."),
        ("Decoder.__init__", "query_scale",
         "The FFN that makes lambda of what a layer returns: one for all layers."),
        ("DecoderLayer.forward", "def forward", "The layer is given p_q, the spatial part of its query."),
        ("DecoderLayer.forward", "sa_q_content",
         "Self-attention: content and position are mapped each, then added."),
        ("Decoder.forward", "query_scale",
         "The heart of the paper, Eq. (3) and (4): p_q = T p_s, T = FFN(f). T is diagonal, "
         "lambda_q; f is what the layer before returned, not normalised. In layer 1, T is 1."),
        ("*.__init__", "num_queries=", "300 queries."),
        ("*.__init__", "self.reference_head =",
         "s, the reference point before the sigmoid, is predicted from the query's position."),
        ("*.__init__", "class_head = nn.Linear",
         "No logit for \"no object\": the focal loss wants C independent sigmoids."),
        ("sine_xy", "",
         "p_s, the sine encoding of a reference point: the same encoding as that of the keys, "
         "so that the two can be compared by a dot product."),
        ("concat_heads", "",
         "Eq. (2): content and position are concatenated inside every head, so that their dot "
         "products add up, c_q·c_k + p_q·p_k, and do not mix."),
        ("Decoder.forward", "", "The decoder is given p_s, the encoding of the reference points."),
    ],
    ("detr", "deformable_detr"): [
        ("RECIPE", "epochs=",
         "A tenth of the epochs, batch 32, twice the learning rate, and a tenth of it for the "
         "maps that make offsets and reference points."),
        ("RECIPE", "class_loss", "Focal loss instead of softmax, weight 2 instead of 1."),
        ("DecoderLayer.forward", "def forward",
         "The layer is given reference points and the maps' shapes instead of positions of "
         "keys."),
        ("*.__init__", "dim_feedforward=", "FFN width 1024, as in the official code."),
        ("*.__init__", "num_queries=", "300 queries."),
        ("*.__init__", "num_feature_levels=", "Levels, points and the two variants."),
        ("*.__init__", "self.decoder = Decoder(dec_layers",
         "The decoder gets levels, points and refinement; heads are made below."),
        ("*.forward", "C+1", "C logits and not C + 1; proposals with two_stage."),
        ("Decoder.__init__", "self.box_refine",
         "No final norm; the decoder makes the boxes, since refinement needs them."),
        ("*.__init__", "self.input_proj",
         "Projections, heads and initialisation are methods of their own, below."),
        ("LAPTOP", "", "The laptop preset: refinement, three levels of features."),
        ("deformable_sampling", "",
         "The inner sums of Eq. (3): bilinear samples at K points of each of L levels, weighted "
         "and added up. Replaces the official CUDA operator."),
        ("MSDeformAttn", "",
         "Eq. (3), the heart of the paper: offsets and weights are linear maps of the query; no "
         "key is looked at. Starts as a star of points around the reference. Points and boxes "
         "as references scale offsets differently (A.4)."),
        ("valid_ratio", "",
         "How much of a padded map is image. Reference points are relative to the image, "
         "samples to the map."),
        ("pixel_centres", "", "Reference points of the encoder: every pixel's own centre."),
        ("EncoderLayer.__init__", "", "Deformable attention instead of attention."),
        ("EncoderLayer.forward", "",
         "Every pixel looks at L x K points per head and not at all T pixels: the cost grows "
         "with T and no longer with its square (section 4.1)."),
        ("Encoder.__init__", "", "The same stack; one argument per line, since there are more of them."),
        ("Encoder.forward", "",
         "Reference points are computed once and handed to all layers: a pixel's own centre, as "
         "seen from each level."),
        ("Queries", "",
         "One stage: content and position are both learned (DETR's content starts at zero), and "
         "a linear map of the position is the reference point."),
        ("Proposals", "",
         "The two-stage variant (A.4): every encoder token proposes a box, the best become the "
         "queries."),
        ("DecoderLayer.__init__", "", "Cross-attention is deformable; self-attention between queries stays."),
        ("Decoder.__init__", "", "Levels, points and refinement are passed on."),
        ("Decoder.forward", "",
         "Boxes are relative to the reference, in logit space (A.3). With refinement a layer's "
         "box is the next layer's reference, detached (A.4)."),
        ("*.forward", "", "All levels become one row of T tokens; a level embedding tells them apart."),
        ("EncoderLayer", "", "The encoder layer, with deformable attention."),
        ("Decoder", "", "Inputs and outputs of the decoder; it makes the boxes."),
        ("DecoderLayer.forward", "",
         "Eq. (3) instead of a comparison with every key. The first layer needs no special "
         "case: its content is learned."),
        ("*.make_projections", "",
         "L levels, each through its own convolution and GroupNorm; C6 by a convolution of "
         "stride 2."),
        ("*.make_heads", "",
         "Heads are shared by all layers, or with refinement one for each; biases for the focal "
         "loss (every class starts at p = 0.01) and for the first boxes."),
        ("*.reset_parameters", "",
         "Xavier for encoder, decoder and projections, but not for the queries; the sampling "
         "offsets start as a star."),
    ],
    ("conditional_detr", "sam_detr"): [
        ("DecoderLayer.__init__", "self.aligner",
         "The aligner stands between self-attention and cross-attention."),
        ("DecoderLayer.__init__", "self.cross_attn", "All heads have the same key."),
        ("DecoderLayer.__init__", "ca_q_sine", "Positions go through a 2-layer MLP; no special first layer."),
        ("DecoderLayer.__init__", "ca_k_pos", "Positions of keys also go through a 2-layer MLP."),
        ("DecoderLayer.__init__", "smca", "Passed on to the aligner."),
        ("DecoderLayer.__init__", "self.first", "No special first layer."),
        ("DecoderLayer.forward", "self.aligner",
         "Cross-attention: a query of its own for each head, D wide and made of features, "
         "against one key for all heads."),
        ("DecoderLayer.forward", "query_pos, reference",
         "The layer is given reference boxes; there is no lambda."),
        ("*.__init__", "smca=False",
         "The smca variant; and input_norm, which the official code makes depend on the number "
         "of epochs."),
        ("*.__init__", "self.input_proj =", "An optional GroupNorm after the convolution."),
        ("*.__init__", "xavier_uniform(self.reference_head)",
         "The queries are boxes and need no map to a reference point."),
        ("*.__init__", "centre_points", "Salient points start at the centre of the box."),
        ("*.__init__", "copy.deepcopy(self.class_head)", "Layers refine boxes, so each has heads of its own."),
        ("*.__init__", "self.query_embed", "Queries are 4 numbers, a box."),
        ("RECIPE", "", "The same recipe. The paper also trains for 12 epochs."),
        ("sine_xy", "", "Another section begins here; the function is the same."),
        ("concat_heads", "", "Removed: content and position are added again."),
        ("valid_size", "", "Boxes are relative to the image, RoIAlign counts in cells of the padded map."),
        ("SemanticsAligner", "",
         "The heart of the paper (section 3): F_R = rows F columns^T; R_SP = MLP(ConvNet(F_R)), "
         "one point per head; the new query is F_R sampled there, times Sigmoid(Linear(Q))."),
        ("linear_weights", "", "Weights of the cells next to a place, with the gradient of grid_sample."),
        ("bin_weights", "", "RoIAlign along one axis as a matrix: see Why no RoIAlign in docs/sam_detr.md."),
        ("SharedKeyAttention", "", "All heads have the same key, so that one product gives all scores."),
        ("gaussian_bias", "",
         "The smca option, from SMCA-DETR: attention scores fall off with the distance from the "
         "point."),
        ("*.forward", "",
         "Feature maps, positions with half a pixel of offset, learned boxes as the first "
         "references."),
        ("Decoder", "", "Inputs and outputs of the decoder; it makes the boxes."),
        ("Decoder.__init__", "", "No special first layer, no lambda, no shared norm."),
        ("Decoder.forward", "",
         "Layers refine reference boxes, detached in between (as in Deformable DETR). The "
         "position of self-attention is the sine of the box centre."),
    ],
    ("deformable_detr", "sqr"): [
        ("*.__init__", "recollect=",
         "The options: whose outputs are recollected, and the recurrent last stage."),
        ("*.__init__", "SOURCES", "Wrong values are refused; a recurrent model is trained densely."),
        ("*.forward", "32 for 6 stages", "How many supervised groups there are."),
        ("*.forward", "self.plan()",
         "The plan is handed over, and heads, since every group takes those of its own stage."),
        ("Decoder.forward", "def forward", "The plan lists which group of queries goes through which layer."),
        ("Decoder.forward", "for stage, group in plan",
         "Where the parent walks its layers, SQR walks the plan: groups do not see each other."),
        ("Decoder.forward", "groups.append", "The new group is kept, because later stages may be fed it."),
        ("*.forward", "self.class_head[stage]", "Every group is read by the head of its own stage."),
        ("SOURCES", "",
         "Whose outputs a stage is fed: the whole difference between the plain decoder, SQR and "
         "DQR."),
        ("*.plan", "",
         "Training recollects, inference does not: it is Deformable DETR. DQRR runs its last "
         "stage N times."),
        ("prune", "", "DQRR at inference needs the last stage only: what can be thrown away."),
        ("recollection_plan", "",
         "The heart of the paper: which group of queries is fed to which stage. Every entry of the "
         "plan makes a group, and every group is supervised."),
    ],
    ("dab_detr", "dn_detr"): [
        ("draw_noise", "",
         "All random numbers of a training step in one place, so that a test can replace them."),
        ("object_places", "", "The copies of the objects stand in blocks: one block is a group."),
        ("group_bias", "",
         "Half of the idea: who sees whom. Without this mask the noisy queries would tell the "
         "matching ones where the objects are."),
        ("Denoising", "",
         "The other half: labels and boxes with noise become queries, and each has one known "
         "object to give back."),
        ("DecoderLayer.forward", "def forward",
         "The mask is one more argument. The comment goes: queries have a content in layer 1."),
        ("DecoderLayer.forward", "bias=bias", "The mask is added to the scores of self-attention only."),
        ("Decoder.forward", "", "The mask is handed to every layer."),
        ("*.__init__", "dn_groups=", "How many noisy copies, and how much noise."),
        ("*.__init__", "self.denoising", "It has the table of labels, with a row for \"no label\"."),
        ("*.forward", "def forward", "The targets come in, in training only."),
        ("*.forward", "no_label",
         "The content of matching queries is not zero any more: it says \"no label\"."),
        ("*.forward", "self.denoising(",
         "N noisy queries go before the Q matching ones, through the same decoder and heads, and "
         "are taken apart again. At inference N is 0."),
    ],
    ("hdetr", "dino"): [
        ("Queries", "", "Gone: DINO always has two stages."),
        ("Proposals", "", "The parent's proposals; QuerySelection takes their place."),
        ("hybrid_bias", "", "Gone: the additional queries of H-DETR have another purpose."),
        ("MixedSelection", "", "Gone: it is an option of QuerySelection."),
        ("move_box", "", "Gone: boxes move as in DAB-DETR, by inverse_sigmoid."),
        ("inverse_sigmoid", "", "DAB-DETR's, with its larger eps."),
        ("QuerySelection", "",
         "Mixed query selection: tokens are ranked by their best class and give the boxes; "
         "the content is a learned row for each rank."),
        ("draw_noise", "", "As in dn_detr.py, and a sign for each number of a box."),
        ("object_places", "", "The same text as in dn_detr.py."),
        ("group_bias", "", "The same text as in dn_detr.py."),
        ("Denoising", "",
         "Contrastive denoising: positives have less noise and give their object back, negatives "
         "have more and say \"no object\"."),
        ("Decoder", "", "References are always boxes."),
        ("Decoder.__init__", "self.norm", "One norm before the heads, and the map from box to position."),
        ("Decoder.__init__", "def __init__", "Refinement and look forward twice are no options here."),
        ("Decoder.forward", "def forward", "No query_pos: every layer makes it from the box."),
        ("Decoder.forward", "self.query_pos(",
         "DAB-DETR's position of a query, from the box that this layer gets."),
        ("Decoder.forward", "inverse_sigmoid(",
         "The box head runs twice, as in DAB-DETR: with the norm to report, without to refine. The "
         "reported box is relative to the previous one with its gradient: look forward twice."),
        ("*.__init__", "num_queries=", "900 queries; temperature 20 for image positions."),
        ("*.__init__", "num_one2many", "Options of H-DETR go."),
        ("*.__init__", "dn_number=", "Options of the noise come."),
        ("*.__init__", "box_refine, levels", "Nothing depends on two_stage any more."),
        ("*.__init__", "self.denoising", "Selection and denoising; one pair of heads for all layers."),
        ("*.make_heads", "", "One pair for all layers, and a copy of its own for the proposals."),
        ("*.forward", "def forward", "The targets come in, in training only."),
        ("*.forward", "With two_stage", "Proposals are the chosen ones; noisy queries in training."),
        ("*.forward", "sine_positions", "No half pixel."),
        ("*.forward", "self.queries(",
         "N noisy queries go before the Q matching ones where H-DETR had additional queries after them."),
        ("*.forward", "", "One class head for all layers; the two parts of the answer."),
    ],
}
