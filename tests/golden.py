"""The numbers that the official code produced (tests/golden/README.md), and its weights and inputs again."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
TOLERANCES = json.loads((FOLDER / "tolerances.json").read_text())["fields"]
# case -> our file, and options that the golden README describes and case.args does not spell out as ours
CASES = {
    "detr": ("detr", {}),
    "detr_dc5": ("detr", {}),
    "conditional_detr": ("conditional_detr", {}),
    "deformable_detr": ("deformable_detr", {}),
    "deformable_detr_single_scale": ("deformable_detr", {}),
    "deformable_detr_refine": ("deformable_detr", {}),
    "deformable_detr_two_stage": ("deformable_detr", {}),
    "sam_detr": ("sam_detr", {"input_norm": True}),
    "sam_detr_smca": ("sam_detr", {"input_norm": True}),
    "sam_detr_unpadded": ("sam_detr", {"input_norm": True}),
    "sam_detr_smca_unpadded": ("sam_detr", {"input_norm": True}),
    "sam_detr_multiscale": ("sam_detr_multiscale", {}),
    "sqr": ("sqr", {"recollect": "selective"}),
    "dqr": ("sqr", {"recollect": "dense"}),
    "group_detr": ("group_detr", {}),
    "dab_detr": ("dab_detr", {}),
    "dab_detr_patterns": ("dab_detr", {}),
    "smca_detr": ("smca_detr", {}),
    "smca_detr_type1": ("smca_detr", {}),
    "hdetr": ("hdetr", {}),
    "hdetr_plain": ("hdetr", {"two_stage": False, "box_refine": False, "mixed_selection": False,
                              "look_forward_twice": False}),
    "adamixer": ("adamixer", {}),
    "dn_detr": ("dn_detr", {}),
    "dn_detr_patterns": ("dn_detr", {}),
    "dino": ("dino", {}),
    "dino_pure": ("dino", {}),
}
# Parameter counts: our file, and defaults of the official parser where our defaults are those of its scripts
SIZES = {
    "params_detr": ("detr", {}),
    "params_conditional_detr": ("conditional_detr", {}),
    "params_deformable_detr": ("deformable_detr", {}),
    "params_sam_detr": ("sam_detr", {}),
    "params_group_detr": ("group_detr", {"num_groups": 1}),
    "params_dab_detr": ("dab_detr", {}),
    "params_smca_detr": ("smca_detr", {}),
    "params_hdetr": ("hdetr", {"two_stage": False, "box_refine": False, "mixed_selection": False,
                               "look_forward_twice": False, "num_one2many": 0}),
    "params_adamixer": ("adamixer", {}),
    "params_dn_detr": ("dn_detr", {}),
    "params_dino": ("dino", {}),
}
# Parts on their own
ALONE = ("matcher_softmax", "matcher_focal", "criterion_detr", "criterion_conditional",
         "criterion_deformable", "criterion_sam", "ms_deform_attn")
OUR_OPTION = {"with_box_refine": "box_refine", "enc_n_points": "enc_points", "dec_n_points": "dec_points",
              "group_detr": "num_groups", "dynamic_scale": "scale_type", "num_queries_one2one": "num_queries",
              "num_queries_one2many": "num_one2many", "num_stages": "dec_layers", "num_query": "num_queries",
              "feedforward_channels": "dim_feedforward", "embed_init_tgt": "mixed_selection"}
OUR_VALUE = {"type1": "none", "type2": "isotropic", "type3": "xy", "type4": "xy_product"}  # SMCA-DETR


class Case:
    """One stored case: .json (dict) and .npz arrays as tensors."""

    def __init__(self, name):
        self.name = name
        self.json = json.loads((FOLDER / f"{name}.json").read_text())
        npz = FOLDER / f"{name}.npz"
        self.arrays = {k: torch.from_numpy(v) for k, v in np.load(npz).items()} if npz.exists() else {}

    def targets(self):
        return [{"labels": torch.tensor(t["labels"], dtype=torch.int64),
                 "boxes": torch.tensor(t["boxes_cxcywh"], dtype=torch.float32).reshape(-1, 4)}
                for t in self.json["targets"]]

    def batch(self):
        """(images, mask), README section 3: normal noise, padded at the bottom right."""
        rng = np.random.RandomState(self.json["case"]["seed"])
        images = [rng.standard_normal(shape).astype(np.float32) for shape in self.json["case"]["images"]]
        H, W = (max(i.shape[d] for i in images) for d in (1, 2))
        batch, mask = torch.zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
        for b, image in enumerate(images):
            _, h, w = image.shape
            batch[b, :, :h, :w] = torch.from_numpy(image)
            mask[b, :h, :w] = False
        return batch, mask

    def noise(self):
        """The recorded random numbers of denoising, in the form of draw_noise, README section 11."""
        noise = {key[6:]: value for key, value in self.arrays.items() if key.startswith("noise_")}
        return {key: value if key == "label" else value.float() for key, value in noise.items()}

    def state_dict(self):
        """The official state_dict, every entry drawn by README section 2."""
        seed = self.json["case"]["seed"]
        return {name: fill(shape, kind, used, seed) for name, shape, kind, used, _ in self.json["state"]}


def fill(shape, kind, name, seed):
    x = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    x = x.astype(np.float32)
    fan_in = x.size / shape[0]
    if kind == "dense_centred":
        mean = x.astype(np.float64).reshape(shape[0], -1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        x = x - mean.astype(np.float32)
    if kind == "dense_packed":  # [3D, D]: queries and keys three times as large as values
        rows = shape[0] * 2 // 3
        return torch.from_numpy(np.concatenate([x[:rows] * np.float32(3 / np.sqrt(fan_in)),
                                                x[rows:] * np.float32(1 / np.sqrt(fan_in))]))
    if kind == "offset_3d":  # AdaMixer: x, y and scale of every point
        x = x.reshape(-1, 3) * np.array([0.3, 0.3, 1], np.float32) + np.array([0, 0, -1.5], np.float32)
    if kind == "proposal_box":
        centre, size = 0.5 + np.float32(0.15) * x[:, :2], 0.3 + np.float32(0.2) * np.abs(x[:, 2:])
        x = np.concatenate([centre, size], axis=1)
    scaled = {
        "conv": lambda: x * np.float32(np.sqrt(2 / fan_in)),
        "bn3_weight": lambda: np.float32(0.25) * (1 + np.float32(0.1) * x),
        "norm_weight": lambda: 1 + np.float32(0.1) * x,
        "bias": lambda: np.float32(0.1) * x,
        "bn_var": lambda: 1 + np.float32(0.1) * np.abs(x),
        "offset_bias": lambda: np.float32(2) * x,
        "embedding": lambda: x,
        "dense_weak": lambda: x * np.float32(0.3 / np.sqrt(fan_in)),
        "dense_sharp": lambda: x * np.float32(3 / np.sqrt(fan_in)),
        "dense": lambda: x * np.float32(1 / np.sqrt(fan_in)),
        "anchor": lambda: x * np.array([3, 3, 1, 1], np.float32),
        "prelu": lambda: np.float32(0.25) + np.float32(0.1) * x,
        "scale_bias": lambda: 1 + np.float32(0.1) * x,
        "class_bias": lambda: np.float32(-3) + np.float32(0.1) * x,
        "tau": lambda: 2 * np.abs(x),
        "offset_3d": lambda: x.reshape(shape),
        "proposal_box": lambda: x,
        "dense_centred": lambda: x * np.float32(1 / np.sqrt(fan_in)),
    }
    return torch.from_numpy(scaled[kind]())


def options_of(args, extra):
    """Our options for those of a case."""
    ours = {OUR_OPTION.get(name, name): value for name, value in args.items()
            if name not in ("epochs", "multiscale", "train_batch_norm")}
    return {**{name: OUR_VALUE.get(value, value) for name, value in ours.items()}, **extra}


def our_name(module, name):
    """The parameter of ours that an official name stands for."""
    (ours,) = module.rename_official({name: None})
    return ours


def assert_close(what, ours, stored, field):
    """|ours - stored| <= abs + rel |stored|, with the tolerances of the golden set."""
    absolute, relative = TOLERANCES[field]
    ours = torch.as_tensor(ours, dtype=torch.float64)
    stored = torch.as_tensor(stored, dtype=torch.float64)
    shapes = list(ours.shape), list(stored.shape)
    assert shapes[0] == shapes[1], f"{what}: shape {shapes[0]}, the official code has {shapes[1]}"
    error = (ours - stored).abs()
    worst = (error - relative * stored.abs()).max().item() if error.numel() else 0
    allowed = f"allowed is {absolute} + {relative} * value"
    assert worst <= absolute, f"{what}: off by {error.max().item():.2e}, {allowed}"


def agreement(name):
    """The largest differences of a case: logits, boxes, loss (relative), gradient norms (relative)."""
    import train
    from tests.tiny_models import module_named
    (file, extra), case = CASES[name], Case(name)
    module, stored = module_named(file), case.json
    model = module.build(stored["case"]["num_classes"], pretrained_backbone=False,
                         **options_of(stored["case"]["args"], extra))
    module.load_official(model, {"model": case.state_dict()})
    with torch.no_grad():
        out = model.eval()(*case.batch())
    criterion = train.SetCriterion(model)
    inputs = (*case.batch(), case.targets()) if criterion.denoising else case.batch()
    module.draw_noise = lambda *how: case.noise()  # only denoising calls it
    loss = criterion(model.train()(*inputs), case.targets())["total"]
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = [(parameters[our_name(module, key)].grad.double().norm().item(), norm)
             for key, norm in stored["grad_l2"].items() if (norm or 0) > 1e-4 * stored["grad_l2_total"]]
    largest = [(out[key] - case.arrays[key]).abs().max().item() for key in ("logits", "boxes")]
    return [*largest, abs(loss.item() / stored["loss_total"] - 1), max(abs(a / b - 1) for a, b in norms)]


if __name__ == "__main__":  # the table of docs/agreement.md
    for name in CASES:
        print(f"| {name} | {' | '.join(f'{x:.0e}' for x in agreement(name))} |", flush=True)
