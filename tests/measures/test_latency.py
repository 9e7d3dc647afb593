import time

import pytest
import torch
from torch import nn

from smelt.core.errors import RecipeError
from smelt.measures.latency import Spread, latencies, latency


def test_milliseconds_with_their_quartiles():
    class Slow(nn.Module):
        calls = 0

        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            Slow.calls += 1
            time.sleep(0.01)
            return x

    model = Slow()
    found = latency(model, torch.zeros(1), repeats=6, warmup=2)
    assert Slow.calls == 8 and found.repeats == 6 and model.training
    assert 10 <= found.low <= found.median <= found.high < 200


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    seen = []

    def fails():
        seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        latencies({"a": fails}, threads=before + 1)
    assert seen == [before + 1] and torch.get_num_threads() == before
    assert latency(nn.Identity(), torch.zeros(1), 1, 0, threads=1).threads == 1


def test_sides_take_turns():
    calls = []
    found = latencies({"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.005))}, 4, 2)
    assert "".join(calls) == "abba" * 3
    assert found["b"].low > found["a"].median and list(found) == ["a", "b"]


def test_the_spread_is_the_quartiles(monkeypatch):
    clock = iter([0, 0.001, 1, 1.002, 2, 2.003, 3, 3.004, 4, 4.005])
    monkeypatch.setattr("smelt.core.clock.perf_counter", lambda: next(clock))
    found = latencies({"a": lambda: None}, repeats=5, warmup=0)["a"]
    assert (found.low, found.median, found.high) == pytest.approx((2, 3, 4))
    assert str(Spread(3, 2, 4, 5, 1)) == "3 ms (2..4)"


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}])
def test_refused(wrong):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))} is"):
        latency(nn.Identity(), torch.zeros(1), **wrong)
