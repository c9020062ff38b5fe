"""Runs that are killed, distributed, started from other weights or in bfloat16; and what is said when one diverges."""
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from golden import Case
from test_golden import CASES, options_of
from test_models import TARGETS, TINY, batch, tiny
from test_train import QUICK, ROOT, run, small_coco

import train


# ---- Killed runs -----------------------------------------------------------------------------------------------------
def train_in_child(flags):
    os.chdir(flags[0])
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.pictures.draw_predictions = train.pictures.draw_curves = lambda *_: None  # most of the time otherwise
    train.main(flags[1:])


def test_twenty_kills_lose_nothing(tmp_path):
    """kill -9 at random moments, loading, training and saving: at the end the same weights and the same log."""
    small_coco(tmp_path / "set", images=6)
    flags = ["--data", "set", *QUICK, "--batch-size", "2", "--steps", "40", "--eval-every", "1", "--log-every", "3",
             "--option", "dropout=0.1"]
    server = multiprocessing.get_context("forkserver")  # each child is a process of its own, but torch is loaded once
    server.set_forkserver_preload(["torch", "torchvision", "support.data", "train"])

    def start(*words):
        child = server.Process(target=train_in_child, args=([str(tmp_path), *words],))
        child.start()
        return child

    straight = start(*flags, "--out", "straight")
    straight.join(150)
    assert straight.exitcode == 0
    killed, last, moments, kills = tmp_path / "killed", tmp_path / "killed/last.pt", random.Random(0), 0
    while kills < 20:
        words = ["--resume", "killed", "--workers", "0"] if last.exists() else [*flags, "--out", "killed"]
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = start(*words)
        # Somewhere between the start of the process and a few saved steps later
        if moments.random() < 0.8:
            while child.is_alive() and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.002)
        time.sleep(moments.random() * 0.3)
        if not child.is_alive():
            break  # finished before all kills were spent
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills >= 10, "the run is too short for this test"
    child = start("--resume", "killed", "--workers", "0")
    child.join(150)
    weights = [torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "straight", killed)]
    assert weights[0]["step"] == weights[1]["step"] == 40 and weights[0]["best"] == weights[1]["best"]
    for name, value in weights[0]["model"].items():
        assert value.equal(weights[1]["model"][name]), f"{name} differs after {kills} kills"
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "straight", killed)]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    assert logs[0] == logs[1]


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_taken(tmp_path):
    done = run("--steps", 4, "--eval-every", 2, *QUICK, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    done = run("--resume", "run", "--steps", 5, "--workers", 0, cwd=tmp_path)
    assert done.returncode == 0 and "Taking run/previous.pt" in done.stderr, done.stderr
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 5
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 5 and steps.count(4) <= 2


# ---- Starting from other weights -------------------------------------------------------------------------------------
def test_init_copies_all_but_the_classes_and_the_queries_that_are_new(capsys):
    module = train.load_model_file("deformable_detr")
    old, new = tiny("deformable_detr"), module.build(5, **{**TINY, "num_queries": 8})
    head = new.class_head[0].weight.clone()
    checkpoint = {"model": {k: v + 1 for k, v in old.state_dict().items()}, "model_options": {}, "class_names": ["a"]}
    train.initialise(new, module, checkpoint, list("abcde"))
    assert new.class_head[0].weight.equal(head), "the class head was for other classes"
    assert new.encoder.layers[0].norm1.weight.equal(old.encoder.layers[0].norm1.weight + 1)
    queries = new.queries.query_embed.weight
    assert queries[:5].equal(old.queries.query_embed.weight + 1) and queries.shape[0] == 8
    said = capsys.readouterr().out
    assert "class_head.0.weight: for other classes" in said and "the first 5 of the file's 5 queries" in said


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr_two_stage", "sam_detr_multiscale"])
def test_init_takes_official_checkpoints(name, capsys):
    """As they are published, with the arguments of their training; ours has fewer classes."""
    (file, extra), case = CASES[name], Case(name)
    module = train.load_model_file(file)
    official = {"model": case.state_dict(), "args": SimpleNamespace(lr=1), "epoch": 49}
    model = module.build(5, **options_of(case.json["case"]["args"], extra), pretrained_backbone=False)
    train.initialise(model, module, official, list("abcde"))
    left = capsys.readouterr().out.splitlines()[1:]
    assert left and all("class_head" in line for line in left), left
    wanted = train.in_our_names(module, official)
    for key, value in model.state_dict().items():
        assert "class_head" in key or value.equal(wanted[key]), f"{key} was not copied"


def test_an_official_file_with_its_namespace_is_read(tmp_path):
    import argparse
    torch.save({"model": {"x": torch.zeros(2)}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    assert train.read_init(tmp_path / "official.pth")["args"].lr == 1e-4


def test_weights_of_another_model_are_refused(tmp_path):
    module = train.load_model_file("detr")
    with pytest.raises(SystemExit, match="does not fit"):
        train.initialise(tiny("detr"), module, {"model": {"x": torch.zeros(2)}}, ["a"])


def test_fine_tuning_from_a_run_by_the_command_line(tmp_path):
    folder = small_coco(tmp_path / "set")
    flags = ["--model", "conditional_detr", "--steps", 1, *QUICK]
    assert run(*flags, "--out", "first", cwd=tmp_path).returncode == 0
    done = run("--data", folder, "--init", "first", "--steps", 2, "--workers", 0, "--size", 48, "--batch-size", 2,
               "--out", "second", cwd=tmp_path)
    assert done.returncode == 0 and "class_head.weight: for other classes" in done.stdout, done.stderr
    second = torch.load(tmp_path / "second/last.pt", weights_only=True)
    assert second["args"]["model"] == "conditional_detr" and second["model_options"]["enc_layers"] == 1
    both = run("--init", "first", "--resume", "first", cwd=tmp_path)
    assert both.returncode == 2 and "only one of them" in both.stderr


# ---- Several processes -----------------------------------------------------------------------------------------------
MODELS = {"detr": {}, "conditional_detr": {}, "deformable_detr": {"two_stage": True}, "sam_detr": {"multiscale": True},
          "sqr": {"box_refine": True}}


class Keep:
    """Stands in for the optimiser: keeps gradients instead of making a step."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def zero_grad(self):
        self.model.zero_grad()

    def step(self):
        self.gradients = {k: p.grad.clone() for k, p in self.model.named_parameters() if p.requires_grad}


def gradients(name, part, forward=lambda model: model):
    """(what is logged, gradient of every parameter) of one training step on a part of the batch of two images."""
    images, mask = batch()
    model = tiny(name, **MODELS[name]).train()
    args = SimpleNamespace(device="cpu", amp=False, clip_norm=1e9)
    keep = Keep(model)
    parts = [(images[part], mask[part], TARGETS[part])]
    return train.train_step(forward(model), train.SetCriterion(model), keep, parts, args), keep.gradients


def distributed_gradients(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    train.RANK, train.WORLD = rank, 2
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {name: gradients(name, slice(rank, rank + 1), torch.nn.parallel.DistributedDataParallel)
             for name in MODELS}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The second image has no objects, so one process sees none at all. DDP refuses unused parameters by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(distributed_gradients, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in MODELS:
        logged, wanted = gradients(name, slice(0, 2))
        for key, value in logged.items():
            for rank in (0, 1):
                assert found[rank][name][0][key] == pytest.approx(value, rel=1e-4), f"{name}: {key} on rank {rank}"
        for key, value in wanted.items():
            assert found[0][name][1][key].equal(found[1][name][1][key]), f"{name}: {key} differs between processes"
            torch.testing.assert_close(found[0][name][1][key], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


def test_torchrun_trains_evaluates_every_image_once_and_goes_on(tmp_path):
    folder = small_coco(tmp_path / "set", images=5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                str(ROOT / "train.py")]
    flags = ["--data", str(folder), "--steps", "2", *QUICK, "--eval-every", "1", "--out", "run"]
    done = subprocess.run([*torchrun, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("classes  1: thing") == 1, "more than one process talks"
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [1, 2]
    alone = run("--resume", "run", "--steps", 3, "--workers", 0, cwd=tmp_path)  # with one process
    assert alone.returncode == 0, alone.stderr


def test_a_process_shares_batch_and_order_with_the_others(monkeypatch):
    args = SimpleNamespace(batch_size=8, accumulate=2, seed=3, steps=3)
    alone = list(train.Batches(20, args, 0))
    shares = []
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(list(train.Batches(20, args, 0)))
    together = [part for parts in zip(*shares) for part in parts]
    assert sum(together, []) == sum(alone, []), "two processes see other images than one"


# ---- Mixed precision, divergence -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_trains_every_model(name):
    images, mask = batch()
    steps = {}
    for amp in (False, True):
        model = tiny(name, backbone_norm="batch", **MODELS[name]).train()
        keep, args = Keep(model), SimpleNamespace(device="cpu", amp=amp, clip_norm=1e9)
        steps[amp] = train.train_step(model, train.SetCriterion(model), keep, [(images, mask, TARGETS)], args)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in keep.gradients.values())
    assert steps[True]["total"] == pytest.approx(steps[False]["total"], rel=0.05)
    assert steps[True]["total"] != steps[False]["total"], "autocast did nothing"


def test_the_first_bad_layer_is_named():
    model = tiny("detr").eval()
    with torch.no_grad():
        model.encoder.layers[0].ffn.linear1.weight[0, 0] = float("nan")
    assert train.where_it_went_bad(model, *batch()) == "first bad layer encoder.layers.0.ffn.linear1"
    model = tiny("detr").eval()
    for name in ("input_proj.weight", "decoder.layers.1.norm1.weight"):
        p = model.get_parameter(name)
        p.grad = torch.full_like(p, float("nan"))
    assert train.where_it_went_bad(model, *batch()) == "first bad gradient decoder.layers.1.norm1.weight"


def test_out_of_memory_says_what_to_lower(monkeypatch, tmp_path, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.SetCriterion, "__call__", no_memory)
    with pytest.raises(SystemExit, match=r"parts of 4 images of up to 48 x 48 pixels.*--batch-size"):
        train.main(["--steps", "1", *QUICK])
