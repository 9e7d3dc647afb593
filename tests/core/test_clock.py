"""Wall and CPU time of calls that run in turn; the rest is in tests/measures/test_latency.py."""

import time

from smelt.core.clock import latencies, timings


def test_who_sleeps_takes_time_and_does_not_compute() -> None:
    def compute() -> None:
        end = time.process_time() + 0.004
        while time.process_time() < end:
            pass

    found = timings({"sleeps": lambda: time.sleep(0.05), "computes": compute}, repeats=3, warmup=0)
    slept, computed = found["sleeps"], found["computes"]
    assert slept.wall.low >= 50 > 4 * slept.cpu.median
    assert computed.cpu.low >= 4 > slept.cpu.low and computed.wall.low >= computed.cpu.low * 0.99
    assert slept.cpu.repeats == slept.wall.repeats == 3


def test_latencies_are_those_on_the_wall() -> None:
    assert latencies({"sleeps": lambda: time.sleep(0.01)}, repeats=2, warmup=0)["sleeps"].low >= 10
