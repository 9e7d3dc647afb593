"""A loop that is killed, in the middle of an epoch, ends with the bytes of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
import torch
from torch import nn
import smelt
from smelt.core.progress import Progress

torch.set_num_threads(1)

class Dies(Progress):
    def advance(self, done, total, text=""):
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))

g = torch.Generator().manual_seed(1)
x = torch.randn(200, 8, generator=g)
y = x[:, :3].argmax(1)
train = smelt.Batches(x, y, 16, shuffle=True, transform=lambda x, g: x + 0.1 * torch.randn(x.shape, generator=g))
job = smelt.Job(data=smelt.Data(train=train), latency=False, cache=sys.argv[1], checkpoint=0)
pieces = [
    {"prune.weights": {"ratio": {"ramp": [0, 0.5]}, "score": "movement"}},
    {"quantize.affine": {"bits": 4, "learn": True, "range": "lsq", "on": "4"}},
    {"distill.features": {"pairs": {"3": "1"}}},
]
job.teacher = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
with torch.no_grad():
    for p in job.teacher.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
settings = {"epochs": 3, "ema": 0.9, "accumulate": 2, "mixup": 0.2, "renorm": 2, "clip": 1.0, "schedule": "one-cycle"}
smelt.compress(net(), [{"train": {**settings, "with": pieces}}], job, progress=Dies()).save(sys.argv[2])
"""


def run(cache: Path, output: Path, dies: int) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", PROGRAM, str(cache), str(output), str(dies)]
    return subprocess.run(given, env=environment, capture_output=True).returncode


def test_the_bytes_after_a_kill_are_those_without(tmp_path: Path) -> None:
    assert run(tmp_path / "a", tmp_path / "whole.smelt", 0) == 0
    assert run(tmp_path / "b", tmp_path / "killed.smelt", 9) == -signal.SIGKILL
    assert list((tmp_path / "b").glob("*.training")) and not (tmp_path / "killed.smelt").exists()
    assert run(tmp_path / "b", tmp_path / "killed.smelt", 0) == 0
    assert (tmp_path / "killed.smelt").read_bytes() == (tmp_path / "whole.smelt").read_bytes()
