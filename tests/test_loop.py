"""The loop: optimiser, schedule, data order, evaluation, files of a run, divergence."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from support import UserError, data, report
from support.evaluation import METRICS
from support.run import FILES
from tests.command import QUICK, run
from tests.folders import small_coco
from tests.tiny_models import batch, tiny


# ---- Optimiser, schedule, data order -----------------------------------------------------------------------
@pytest.mark.parametrize("lr_backbone", [2e-5, 2e-4])  # a tenth, as slow parameters have, or that of the rest
def test_parameter_groups_are_the_papers(lr_backbone):
    model = tiny("deformable_detr")
    groups = train.make_optimizer(model, 2e-4, lr_backbone, 1e-4).param_groups
    assert [group["part"] for group in groups] == ["rest", "backbone", "slow"]
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        slow = "sampling_offsets" in name or "reference_points" in name
        if not p.requires_grad:
            assert id(p) not in rate, f"{name} is frozen"
        else:
            wanted = lr_backbone if name.startswith("backbone.") else 2e-5 if slow else 2e-4
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


# ---- Evaluation --------------------------------------------------------------------------------------------
def loop_args(**changes):
    defaults = dict(device="cpu", amp=False, clip_norm=1e9, workers=0, eval_batch_size=2)
    return SimpleNamespace(**{**defaults, **changes})


def test_a_step_after_an_evaluation_still_trains():
    """BatchNorm updates its statistics and dropout drops, as before the evaluation."""
    model = tiny("detr", backbone_norm="batch", dropout=0.5).train()
    criterion, shapes = train.SetCriterion(model), data.load(size=48)["val"].subset(range(2))
    optimizer = train.make_optimizer(model, 1e-4, 1e-4, 0)
    train.evaluate(model, criterion, shapes, loop_args())
    before = model.backbone.body.bn1.running_mean.clone()
    train.train_step(model, criterion, optimizer, [data.collate([shapes[0], shapes[1]])], loop_args())
    assert not model.backbone.body.bn1.running_mean.equal(before), "BatchNorm is still that of the evaluation"
    images, mask = batch()
    assert not model(images, mask)["logits"].equal(model(images, mask)["logits"]), "nothing is dropped out"


def test_an_evaluation_neither_drops_out_nor_moves_batchnorm():
    model = tiny("detr", backbone_norm="batch", dropout=0.5).train()
    shapes = data.load(size=48)["val"].subset(range(3))
    before = model.backbone.body.bn1.running_mean.clone()
    criterion = train.SetCriterion(model)
    first, again = (train.evaluate(model, criterion, shapes, loop_args())[1] for _ in range(2))
    assert model.backbone.body.bn1.running_mean.equal(before)
    assert all(first[i]["scores"].equal(again[i]["scores"]) for i in first)


# ---- A run -------------------------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, and no pictures, which take most of the time."""
    monkeypatch.chdir(tmp_path)
    for name in ("draw_predictions", "draw_curves"):
        monkeypatch.setattr(f"support.pictures.{name}", lambda *_: None)
    return tmp_path


def test_the_readmes_command_leaves_what_it_promises_and_evaluates(tmp_path):
    done = run("--model", "detr", "--steps", 6, "--eval-every", 3, "--log-every", 2, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/detr-shapes"
    for name in (*FILES, "detr.py"):
        assert (folder / name).stat().st_size > 0, f"{name} is missing"
    picture = Image.open(folder / "predictions.png").convert("RGB").getcolors(2**24)
    assert len(picture) > 5000, "predictions.png shows no images"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert {"AP", "AP50", "AR100"} <= set(lines[-1]["eval"])
    for words in ("6 steps", "250 images", "classes", "minutes", "no ground truth"):
        assert words in done.stdout, f'the output does not say "{words}"'
    again = run("--eval", "--weights", folder / "best.pt", cwd=tmp_path)
    assert again.returncode == 0 and "AP" in again.stdout, again.stderr
    assert list((tmp_path / "runs").iterdir()) == [folder], "--eval made a run of its own"


def test_two_images_are_overfitted(here, capsys):
    """If this fails, nothing else needs to be looked at."""
    train.main(["--model", "detr", "--overfit", "2", "--steps", "180", "--size", "64", "--workers", "0",
                "--eval-every", "180"])
    last = json.loads((here / "runs/detr-shapes/log.jsonl").read_text().splitlines()[-1])
    assert last["eval"]["AP"] > 0.9, f"AP {last['eval']['AP']:.2f} on the two images it was trained on"
    capsys.readouterr()
    train.main(["--eval", "--weights", "runs/detr-shapes"])
    assert f"AP         {last['eval']['AP']:6.3f}" in capsys.readouterr().out


def test_an_overfit_run_stops_when_there_is_nothing_left_to_learn(here, monkeypatch, capsys):
    results = iter([1, 0.994, 1, 0.995, 1])
    perfect = {**dict.fromkeys(METRICS, 1.0), "spread_images": 1, "spread_queries": 1, "classes_predicted": 1}
    monkeypatch.setattr(train, "evaluate", lambda *_: ({**perfect, "AP": next(results)}, {}))
    train.main(["--overfit", "2", "--steps", "50", "--eval-every", "1", *QUICK, "--size", "32"])
    assert "Stopped at step 5 of 50: AP was 1 in 3 evaluations in a row" in capsys.readouterr().out
    assert torch.load("runs/detr-shapes/last.pt", weights_only=True)["step"] == 5, "it is not saved"


def test_a_folder_with_foreign_category_ids_trains(here, capsys):
    folder = small_coco(here / "set")
    train.main(["--data", str(folder), "--steps", "2", *QUICK, "--accumulate", "2", "--batch-size", "2",
                "--option", "num_queries=2"])
    checkpoint = torch.load("runs/detr-set/last.pt", weights_only=True)
    assert checkpoint["class_names"] == ["thing"] and checkpoint["category_ids"] == [7]
    assert "WARNING  from scratch on 3 images" in capsys.readouterr().out


def test_two_stages_train_on_every_size_that_is_allowed(here):
    """The smallest images have fewer tokens than there are queries."""
    train.main(["--model", "deformable_detr", "--option", "two_stage=true", "--steps", "2", "--overfit", "2",
                "--size", "32", "--batch-size", "1", "--option", "num_queries=30", "--workers", "0",
                "--option", "enc_layers=1", "--option", "dec_layers=1"])
    assert (here / "runs/deformable_detr-shapes/best.pt").exists()


def test_too_many_boxes_are_said(here, capsys):
    box = {"image_id": 1, "category_id": 7, "bbox": [4, 4, 20, 20]}
    folder = small_coco(here / "set", annotations=[{**box, "id": i} for i in range(2000)])
    with pytest.raises(UserError, match=r"1\.png has 2000 boxes, which would need 4000 queries"):
        train.main(["--data", str(folder), "--steps", "1", *QUICK])
    train.main(["--steps", "1", "--overfit", "2", *QUICK, "--option", "num_queries=2"])
    assert "2 queries, but an image has" in capsys.readouterr().out


# ---- Divergence, memory, compiler --------------------------------------------------------------------------
def test_divergence_is_named_and_keeps_what_was_saved(here):
    flags = ["--steps", "40", "--eval-every", "1000", "--lr", "1e30", "--clip-norm", "1e30", *QUICK]
    with pytest.raises(UserError, match=r"diverged at step \d+ \(lr .*first bad layer .*Lower --lr"):
        train.main(flags)
    train.main(["--resume", "runs/detr-shapes", "--lr", "1e-4", "--clip-norm", "1", "--steps", "2"])


def test_the_first_bad_layer_is_named():
    model = tiny("detr").eval()
    with torch.no_grad():
        model.encoder.layers[0].ffn.linear1.weight[0, 0] = float("nan")
    assert report.first_bad_layer(model, *batch()) == "encoder.layers.0.ffn.linear1"
    assert report.first_bad_layer(tiny("detr").eval(), *batch()) == "none"


def test_memory_and_compiler_are_tried_before_a_folder_is_made(here, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as full, pytest.raises(UserError, match="4 images of up to 48 x 48.*--batch"):
        full.setattr(train.SetCriterion, "__call__", no_memory)
        train.main(["--steps", "1", *QUICK])

    def no_compiler(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", lambda _: no_compiler)
    with pytest.raises(UserError, match="fails: --compile needs a C.. compiler"):
        train.main(["--steps", "1", *QUICK, "--overfit", "2", "--compile"])
    assert not (here / "runs").exists()
