"""Accumulation and several processes: the gradient of one large batch, whatever the sizes of the images."""
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from support import data, machine
from tests.command import QUICK, ROOT, run, server
from tests.folders import small_coco
from tests.tiny_models import tiny

MODELS = {"detr": {}, "conditional_detr": {}, "deformable_detr": {"two_stage": True}, "sam_detr": {},
          "sqr": {"box_refine": True}}


def sample(height, width, labels, seed):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(len(labels), 4, generator=g) * 0.3 + 0.3
    target = {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": boxes}
    return torch.randn(3, height, width, generator=g), target


# A wide image, a tall one without objects, a small one: no two of them have one canvas
SAMPLES = [sample(64, 128, [1], 0), sample(128, 64, [], 1),
           sample(64, 64, [0, 2, 1], 2), sample(96, 64, [2], 3)]


class KeepGradients:
    """Stands in for the optimiser: keeps gradients instead of making a step."""

    def __init__(self, model):
        self.model = model
        self.param_groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def zero_grad(self):
        self.model.zero_grad()

    def step(self):
        self.gradients = {k: p.grad.clone() for k, p in self.model.named_parameters() if p.requires_grad}


def gradients(name, parts, forward=lambda model: model, **how):
    """(what is logged, gradient of every parameter) of one training step on parts of the samples."""
    model = tiny(name, **{**MODELS[name], **how.pop("options", {})}).train()
    args = SimpleNamespace(**{**dict(device="cpu", amp=False, clip_norm=1e9), **how})
    keep = KeepGradients(model)
    batches = [data.collate(SAMPLES[part]) for part in parts]
    return train.train_step(forward(model), train.SetCriterion(model), keep, batches, args), keep.gradients


def assert_same(found, wanted, what):
    for key, value in wanted[0].items():
        assert found[0][key] == pytest.approx(value, rel=1e-3), f"{what}: {key}"
    for key, value in wanted[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5, msg=f"{what}: {key}")


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_the_gradient_of_the_whole(name):
    whole = gradients(name, [slice(0, 4)])
    assert_same(gradients(name, [slice(i, i + 1) for i in range(4)]), whole, "four parts")
    assert_same(gradients(name, [slice(0, 2), slice(2, 4)]), whole, "two parts")


def distributed_gradients(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    machine.RANK, machine.WORLD = rank, 2
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    parts = [slice(rank, rank + 1), slice(rank + 2, rank + 3)]  # and accumulation in each process
    found = {name: gradients(name, parts, torch.nn.parallel.DistributedDataParallel) for name in MODELS}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """The second image has no objects. DDP refuses unused parameters by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [server().Process(target=distributed_gradients, args=(rank, port, str(tmp_path)))
                for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        assert child.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in MODELS:
        wanted = gradients(name, [slice(0, 4)])
        for rank in (0, 1):
            assert_same(found[rank][name], wanted, f"{name} on rank {rank}")
        for key in wanted[1]:
            same = found[0][name][1][key].equal(found[1][name][1][key])
            assert same, f"{name}: {key} differs between processes"


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
    alone = run("--resume", "run", "--steps", 3, cwd=tmp_path)  # with one process
    assert alone.returncode == 0, alone.stderr


def test_a_process_shares_batch_and_order_with_the_others(monkeypatch):
    args = SimpleNamespace(batch_size=8, accumulate=2, seed=3, steps=3)
    alone = list(train.Batches(20, args, 0))
    shares = []
    monkeypatch.setattr(machine, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(machine, "RANK", rank)
        shares.append(list(train.Batches(20, args, 0)))
    together = [part for parts in zip(*shares) for part in parts]
    assert sum(together, []) == sum(alone, []), "two processes see other images than one"


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])  # the others: test_contract.py
def test_a_step_in_bfloat16_is_nearly_that_in_float32(name):
    steps = {}
    for amp in (False, True):
        logged, found = gradients(name, [slice(0, 4)], options={"backbone_norm": "batch"}, amp=amp)
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
        steps[amp] = logged["total"]
    assert steps[True] == pytest.approx(steps[False], rel=0.05)
    assert steps[True] != steps[False], "autocast did nothing"
