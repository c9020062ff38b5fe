"""Matching, losses and the loop; and the command line as somebody types it, mistakes included."""
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_models import tiny
from torchvision.ops import box_convert, generalized_box_iou

import train
from support.images import DataError

ROOT = Path(__file__).parents[1]
SOFTMAX = SimpleNamespace(recipe=dict(class_loss="softmax", w_class=1, w_l1=5, w_giou=2))
FOCAL = SimpleNamespace(recipe=dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2))
EMPTY = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}


def predictions(S=2, B=3, Q=4, C=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"logits": torch.randn(S, B, Q, C, generator=g),
            "boxes": torch.rand(S, B, Q, 4, generator=g) * 0.4 + 0.2}


def targets(counts, classes=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(classes, (n,), generator=g), "boxes": torch.rand(n, 4, generator=g) * 0.4 + 0.2}
            for n in counts]


# ---- Matching --------------------------------------------------------------------------------------------------------
def cost_by_hand(logits, boxes, label, box, softmax):
    """One query against one object, from the papers' formulas, in plain Python floats."""
    if softmax:
        cost_class = -logits.softmax(0)[label].item()
    else:
        p = logits[label].sigmoid().item()
        cost_class = 2 * (0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p))
    giou = generalized_box_iou(*(box_convert(b[None], "cxcywh", "xyxy") for b in (boxes, box))).item()
    return cost_class + 5 * (boxes - box).abs().sum().item() - 2 * giou


@pytest.mark.parametrize("model", [SOFTMAX, FOCAL])
@pytest.mark.parametrize("objects", [1, 3, 4, 6])
def test_matching_is_the_cheapest_of_all_assignments(model, objects):
    criterion, out, target = train.SetCriterion(model), predictions(1, 1), targets([objects])[0]
    logits, boxes = out["logits"][0, 0], out["boxes"][0, 0]  # [4, 3], [4, 4]
    cost = [[cost_by_hand(logits[q], boxes[q], target["labels"][g], target["boxes"][g], criterion.softmax)
             for g in range(objects)] for q in range(4)]
    pairs = min(4, objects)
    best = min(sum(cost[q][g] for q, g in zip(qs, gs)) for qs in itertools.permutations(range(4), pairs)
               for gs in itertools.combinations(range(objects), pairs))
    query, index = criterion.match(logits[None], boxes[None], [target])[0]
    assert query.dtype == index.dtype == torch.int64 and len(set(query.tolist())) == len(query) == pairs
    assert sum(cost[q][g] for q, g in zip(query, index)) == pytest.approx(best, abs=1e-4)


def test_every_stage_is_matched_by_itself():
    criterion, out, wanted = train.SetCriterion(FOCAL), predictions(S=5), targets([2, 0, 3])
    together = criterion.match_stages(out["logits"], out["boxes"], wanted)
    for stage in range(5):
        alone = criterion.match(out["logits"][stage], out["boxes"][stage], wanted)
        assert [[a.tolist() for a in p] for p in together[stage]] == [[a.tolist() for a in p] for p in alone]


def test_predictions_that_are_not_finite_say_so():
    out = predictions()
    out["boxes"][1, 0, 2, 3] = math.nan
    with pytest.raises(train.Diverged, match="not finite"):
        train.SetCriterion(FOCAL)(out, targets([1, 1, 1]))


# ---- Losses ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [SOFTMAX, FOCAL])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [6, 1, 4]])
def test_losses_by_hand(model, counts):
    """Query by query, in plain Python: no objects, some, and more than queries."""
    criterion, out, wanted = train.SetCriterion(model), predictions(), targets(counts)
    losses, total = criterion(out, wanted), 0
    for stage in range(2):
        matches = criterion.match(out["logits"][stage], out["boxes"][stage], wanted)
        loss_class = weights = l1 = giou = 0
        for b in range(3):
            object_of = dict(zip(*(index.tolist() for index in matches[b])))
            for q in range(4):
                logits, g = out["logits"][stage, b, q], object_of.get(q)
                if criterion.softmax:
                    label = 2 if g is None else wanted[b]["labels"][g]
                    weight = 0.1 if g is None else 1
                    loss_class += -weight * logits.log_softmax(0)[label].item()
                    weights += weight
                for c in range(3) if not criterion.softmax else ():
                    p = logits[c].sigmoid().item()
                    positive = g is not None and wanted[b]["labels"][g] == c
                    loss_class += -0.25 * (1 - p) ** 2 * math.log(p) if positive else \
                        -0.75 * p ** 2 * math.log(1 - p)
                if g is not None:
                    mine, true = out["boxes"][stage, b, q], wanted[b]["boxes"][g]
                    l1 += (mine - true).abs().sum().item()
                    xyxy = (box_convert(x[None], "cxcywh", "xyxy") for x in (mine, true))
                    giou += 1 - generalized_box_iou(*xyxy).item()
        n = max(sum(counts), 1)
        expected = {"class": loss_class / (weights if criterion.softmax else n), "l1": l1 / n, "giou": giou / n}
        for name, value in expected.items():
            assert losses[name][stage].item() == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} of stage {stage}"
            total += {"class": model.recipe["w_class"], "l1": 5, "giou": 2}[name] * value
    assert losses["total"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("model", [SOFTMAX, FOCAL])
def test_parts_of_a_batch_add_up_to_the_whole(model):
    """What --accumulate and several processes rely on; [0] is a part without any object."""
    criterion, out, wanted = train.SetCriterion(model), predictions(), targets([2, 0, 3])
    whole = criterion(out, wanted)
    parts = [criterion({k: v[:, i:i + 1] for k, v in out.items()}, wanted[i:i + 1], box_counts=[2, 0, 3])
             for i in range(3)]
    for name in whole:
        torch.testing.assert_close(sum(p[name] for p in parts), whole[name])


def test_an_all_empty_batch_trains_the_classes_and_leaves_the_boxes_alone():
    out = {k: v.requires_grad_() for k, v in predictions().items()}
    train.SetCriterion(FOCAL)(out, [EMPTY] * 3)["total"].backward()
    assert out["logits"].grad.abs().sum() > 0
    assert out["boxes"].grad is None or not out["boxes"].grad.any()


# ---- Optimiser, schedule, data order ---------------------------------------------------------------------------------
def test_parameter_groups_are_the_papers():
    import deformable_detr
    model = tiny("deformable_detr")
    groups = train.make_optimizer(model, deformable_detr, 2e-4, 2e-5, 1e-4).param_groups
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        slow = "sampling_offsets" in name or "reference_points" in name
        if not p.requires_grad:
            assert id(p) not in rate, f"{name} is frozen"
        else:
            wanted = 2e-5 if name.startswith("backbone.") or slow else 2e-4
            assert rate[id(p)] == pytest.approx(wanted), f"{name} learns at {rate[id(p)]}"


def test_schedules():
    args = SimpleNamespace(warmup=10, steps=110, schedule="cosine", lr_drop=4)
    factors = [train.lr_factor(step, args, steps_per_epoch=20) for step in range(110)]
    assert factors[0] == 0.1 and factors[9] == 1 and factors[60] == pytest.approx(0.5) and factors[-1] < 0.001
    args.schedule = "step"
    assert train.lr_factor(79, args, 20) == 1 and train.lr_factor(80, args, 20) == 0.1


def test_data_order_is_a_function_of_seed_and_step():
    def order(start, **how):
        return list(train.Batches(10, SimpleNamespace(**{
            **dict(batch_size=4, accumulate=1, seed=3, steps=6), **how}), start))
    assert order(0)[3:] == order(3), "resuming at step 3 sees other images"
    assert order(0, seed=4) != order(0)
    flat = [key for batch in order(0, accumulate=2) for key in batch]
    assert flat == [key for batch in order(0) for key in batch], "--accumulate changes the images"
    first_epoch = [index for batch in order(0)[:2] for _, index in batch]
    assert len(set(first_epoch)) == 8, "an image comes twice in an epoch"


# ---- The command line ------------------------------------------------------------------------------------------------
QUICK = ["--workers", "0", "--size", "48", "--batch-size", "4", "--option", "enc_layers=1", "--option", "dec_layers=1"]


def train_py(flags, cwd, out, err):
    """In a process of its own: python train.py with these flags."""
    os.chdir(cwd)
    sys.stdout, sys.stderr = open(out, "w"), open(err, "w")
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def run(*flags, cwd):
    """What train.py answers to these flags. Each call is a new process, but they all share one start of torch."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torchvision", "support.data", "train"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = server.Process(target=train_py, args=(list(map(str, flags)), cwd, out, err))
        process.start()
        process.join(170)
        assert process.exitcode is not None, "train.py does not end"
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text())


def small_coco(folder, images=3, bbox=(4, 4, 20, 20), **changes):
    """A COCO-format folder of noise images with one box each; train and val are the same."""
    from PIL import Image
    content = {"categories": [{"id": 7, "name": "thing"}],
               "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 40} for i in range(images)],
               "annotations": [{"id": i, "image_id": i, "category_id": 7, "bbox": list(bbox)} for i in range(images)]}
    content.update(changes)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        for i in range(images):
            Image.effect_noise((48, 40), 50).convert("RGB").save(folder / split / f"{i}.png")
    return folder


def test_the_readmes_command_leaves_what_it_promises_and_evaluates(tmp_path):
    done = run("--model", "detr", "--steps", 6, "--eval-every", 3, "--log-every", 2, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/detr-shapes"
    for name in ("log.jsonl", "curves.png", "predictions.png", "last.pt", "best.pt", "args.json", "detr.py"):
        assert (folder / name).stat().st_size > 0, f"{name} is missing"
    from PIL import Image
    picture = Image.open(folder / "predictions.png").convert("RGB").getcolors(2**24)
    assert len(picture) > 5000, "predictions.png shows no images"
    assert any(colour == (0, 200, 83) for _, colour in picture), "no true box is drawn"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert {"AP", "AP50", "AR100"} <= set(lines[-1]["eval"])
    for words in ("6 steps", "250 images", "classes", "minutes", "no ground truth"):
        assert words in done.stdout, f'the output does not say "{words}"'
    again = run("--eval", "--weights", folder / "best.pt", "--workers", 0, cwd=tmp_path)
    assert again.returncode == 0 and "AP" in again.stdout, again.stderr
    assert list((tmp_path / "runs").iterdir()) == [folder], "--eval made a run of its own"
    second = run("--model", "detr", "--steps", 1, *QUICK, cwd=tmp_path)
    assert second.returncode == 0 and (tmp_path / "runs/detr-shapes-2").exists(), "the second run has its own folder"
    finished = run("--resume", folder, cwd=tmp_path)
    assert finished.returncode == 1 and "already finished" in finished.stderr


def test_ctrl_c_saves_and_resume_gives_the_very_same_weights(tmp_path):
    """Straight through, against interrupted and resumed: bit-equal (CPU)."""
    flags = ["--model", "detr", "--steps", "12", "--eval-every", "12", *QUICK, "--option", "dropout=0.1"]
    assert run(*flags, "--out", "straight", cwd=tmp_path).returncode == 0
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, "--out", "stopped", "--log-every", "1"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume stopped" in stderr and "Traceback" not in stderr, stderr
    done = run("--resume", "stopped", "--workers", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    straight, resumed = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("straight", "stopped"))
    assert straight["step"] == resumed["step"] == 12
    for name, value in straight["model"].items():
        assert value.equal(resumed["model"][name]), f"{name} differs after resuming"


def test_two_images_are_overfitted(tmp_path):
    """If this fails, nothing else needs to be looked at."""
    done = run("--model", "detr", "--overfit", 2, "--steps", 300, "--size", 64, "--workers", 0, "--eval-every", 300,
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "runs/detr-shapes/log.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["AP"] > 0.9, f"AP {last['eval']['AP']:.2f} on the two images it was trained on"
    again = run("--eval", "--weights", "runs/detr-shapes", "--workers", 0, cwd=tmp_path)
    assert again.returncode == 0 and f"AP         {last['eval']['AP']:6.3f}" in again.stdout, again.stderr


def test_a_folder_with_foreign_category_ids_trains(tmp_path):
    folder = small_coco(tmp_path / "set")
    done = run("--data", folder, "--steps", 2, *QUICK, "--accumulate", 2, "--batch-size", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / "runs/detr-set/last.pt", weights_only=True)
    assert checkpoint["class_names"] == ["thing"] and checkpoint["category_ids"] == [7]
    assert "WARNING" in done.stdout, "three images from scratch deserve a warning"


def test_the_four_paths_can_be_given_one_by_one(tmp_path):
    folder = small_coco(tmp_path / "set")
    paths = [f"--{split}-{kind}" for split in ("train", "val") for kind in ("json", "images")]
    places = [folder / p for s in ("train", "val") for p in (f"annotations/instances_{s}.json", s)]
    done = run(*itertools.chain(*zip(paths, places)), "--steps", 1, *QUICK, "--batch-size", 2, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "runs/detr-train/last.pt").exists(), done.stderr


def test_somebody_elses_model_file_trains(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "detr.py").read_text())
    done = run("--model", "mine.py", "--steps", 1, *QUICK, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "runs/mine-shapes/last.pt").exists(), done.stderr


def test_more_boxes_than_queries_is_said(tmp_path):
    done = run("--steps", 1, *QUICK, "--option", "num_queries=2", cwd=tmp_path)
    assert done.returncode == 0 and "2 queries" in done.stdout, done.stdout


WRONG = {
    "unknown model": (["--model", "yolo"], "yolo.*detr"),
    "unknown preset": (["--preset", "huge"], "laptop"),
    "unknown option": (["--option", "num_querys=3"], "num_querys"),
    "option without a value": (["--option", "smca"], "NAME=VALUE"),
    "bad option value": (["--option", "backbone=vgg16"], "resnet50"),
    "missing folder": (["--data", "nowhere"], "nowhere"),
    "missing checkpoint": (["--resume", "nowhere"], "nowhere"),
    "eval without weights": (["--eval"], "--weights"),
    "negative steps": (["--steps", "-1"], "--steps"),
    "rate that is no number": (["--lr", "nan"], "--lr nan"),
    "batch not a multiple": (["--batch-size", "5", "--accumulate", "2"], "multiple"),
    "cuda on a machine without": (["--device", "cuda"], "CUDA"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_flags_get_one_clear_line(what, tmp_path, monkeypatch, capsys):
    flags, message = WRONG[what]
    if what.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    check_refused(flags, message, capsys)


def check_refused(flags, message, capsys):
    """main() ends with SystemExit or DataError whose single line says what is wrong, and no run is left behind."""
    with pytest.raises((SystemExit, DataError)) as stopped:
        train.main(flags)
    text = capsys.readouterr().err.strip().splitlines()[-1:] if stopped.value.args == (2,) else [str(stopped.value)]
    assert re.search(message, text[0], re.S), text
    assert not Path("runs").exists(), "a run folder was made for nothing"


def test_a_file_that_is_no_checkpoint_is_recognised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    check_refused(["--eval", "--weights", "noise.pt"], "noise.pt: not a readable checkpoint", capsys)
    check_refused(["--resume", "other.pt"], "not a checkpoint of train.py", capsys)


def test_bad_data_ends_in_one_line_even_from_a_worker(tmp_path):
    folder = small_coco(tmp_path / "set")
    (folder / "train/1.png").write_bytes((folder / "train/1.png").read_bytes()[:200])  # cut off
    done = run("--data", folder, "--steps", 5, *QUICK, "--workers", 1, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "1.png (image id 1)" in done.stderr.strip().splitlines()[-1]


def test_divergence_is_named_and_keeps_what_was_saved(tmp_path):
    done = run("--steps", 40, "--eval-every", 1000, "--lr", 1e30, "--clip-norm", 1e30, *QUICK, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"diverged at step \d+ .*Lower --lr", done.stderr, re.S)
