"""Two processes of one recipe give what one process gives with the same batches, with copies and with shares."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import smelt
from smelt.core.errors import ModelError
from smelt.train.processes import Processes

PROGRAM = """
import os, sys
import torch
from torch import nn
import smelt
from smelt.core.progress import Progress
from smelt.train import processes
from smelt.train.shards import Shards, local

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.by * x

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3), Scaled())

class Stop(Progress):
    def advance(self, done, total, text=""):
        if done == 7:
            raise RuntimeError("stopped")

sizes = []

class Told(Shards):
    def hold(self, optimizer):
        super().hold(optimizer)
        sizes.append(sum(local(p).numel() for group in optimizer.param_groups for p in group["params"]))

def run(folder, name, stop=False):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(101, 8, generator=g)
    train = smelt.Batches(x, x[:, :3].argmax(1), 20, shuffle=True)  # the last batch has one sample
    job = smelt.Job(data=smelt.Data(train=train), latency=False, cache=f"{folder}/{name}", log=f"{folder}/{name}.csv")
    pieces = [
        {"prune.weights": {"ratio": {"ramp": [0, 0.5]}, "score": "movement", "on": "0"}},
        {"prune.weights": {"ratio": 0.5, "regrow": 0.3, "every": 2, "on": "2"}},
        {"quantize.affine": {"bits": 4, "learn": True, "range": "lsq", "on": "2"}},
        {"distill.features": {"pairs": {"1": "1"}}},
        {"distill.logits": {"kind": "decoupled"}},
    ]
    job.teacher = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        for p in job.teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    loop = {"epochs": 3, "hold_out": 0, "keep": "last", "accumulate": 2, "optimizer": "sgd", "lr": 0.1, "ema": 0.9}
    again = {"epochs": 2, "hold_out": 0.2, "lr": 0.01, "clip": 0.1, "with": ["regularize.l1"]}  # of what is stored
    steps = [{"train": {**loop, "with": pieces}}, {"train": again}, "code.bits"]
    if stop:
        model = net()
        try:
            smelt.compress(model, steps, job, progress=Stop())
        except RuntimeError as error:
            assert str(error) == "stopped"
    result = smelt.compress(net(), steps, job)
    if os.environ.get("RANK", "0") == "0":
        result.save(f"{folder}/{name}.smelt")

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    torch.set_num_threads(1)
    processes.Shards = Told
    run(sys.argv[1], "shares", stop=True)
    rank = int(os.environ["RANK"])
    learning = 8 * 12 + 12 + 12 * 3 + 3 + 1 + 3 + 12 * 20  # weights, biases, scales, and the projection of features
    assert len(sizes) == 3 and sizes[0] < 0.6 * learning, sizes
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    run(sys.argv[1], "copies")
    assert len(sizes) == 3
"""


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    given = [sys.executable, *launch, str(program), str(tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    alone = runpy.run_path(str(program))
    alone["run"](str(tmp_path), "one")
    one, *others = (smelt.load(tmp_path / f"{name}.smelt", into=alone["net"]()) for name in ("one", "copies", "shares"))
    for other in others:
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logs = [(tmp_path / f"{name}.csv").read_text().splitlines() for name in ("one", "copies", "shares")]
    assert len({len(log) for log in logs}) == 1 and sum(line.startswith("1,") for line in logs[0]) == 3 * 3


def test_without_accelerate_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert Processes("cpu").count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"process 0 of 2.*smelt\[accelerate\]"):
        Processes("cpu")
    assert Processes(None).count == 1


def test_shares_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Processes("cpu")
    one._accelerator, one.count = object(), 3
    x = {"a": torch.arange(7), "b": torch.tensor(3)}
    shares, weights = [], []
    for one.rank in range(3):
        share, weight = one.share(x, x)
        shares.append(share["a"].tolist())
        weights.append(weight)
    assert shares == [[0, 1], [2, 3], [4, 5, 6]] and weights == pytest.approx([6 / 7, 6 / 7, 9 / 7])
    one.rank = 0
    share, weight = one.share(torch.arange(2), torch.arange(2))
    assert share.tolist() == [0] and weight == 0
