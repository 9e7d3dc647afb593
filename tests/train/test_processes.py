"""Two processes of one recipe give what one process gives with the same batches."""

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

torch.set_num_threads(1)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

g = torch.Generator().manual_seed(1)
x = torch.randn(101, 8, generator=g)
train = smelt.Batches(x, x[:, :3].argmax(1), 20, shuffle=True)  # the last batch has one sample
job = smelt.Job(data=smelt.Data(train=train), latency=False, cache=sys.argv[1], log=sys.argv[1] + "/log.csv")
pieces = [
    {"prune.weights": {"ratio": {"ramp": [0, 0.5]}, "score": "movement", "on": "0"}},
    {"quantize.affine": {"bits": 4, "learn": True, "range": "lsq", "on": "2"}},
    {"distill.features": {"pairs": {"1": "1"}}},
    {"distill.logits": {"kind": "decoupled"}},
]
job.teacher = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
with torch.no_grad():
    for p in job.teacher.parameters():
        p.copy_(torch.randn(p.shape, generator=g))
settings = {"epochs": 3, "hold_out": 0, "keep": "last", "accumulate": 2, "optimizer": "sgd", "lr": 0.1, "ema": 0.9}
result = smelt.compress(net(), [{"train": {**settings, "with": pieces}}, "code.bits"], job)
if os.environ.get("RANK", "0") == "0":
    result.save(sys.argv[2])
"""


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, started in (("one", []), ("two", launch)):
        (tmp_path / name).mkdir()
        given = [sys.executable, *started, str(program), str(tmp_path / name), str(tmp_path / f"{name}.smelt")]
        done = subprocess.run(given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (smelt.load(tmp_path / f"{name}.smelt", into=net()) for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 1 + 3 * 3


def test_without_accelerate_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert Processes("cpu").count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"process 0 of 2.*smelt\[accelerate\]"):
        Processes("cpu")


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
