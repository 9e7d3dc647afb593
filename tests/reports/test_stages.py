"""Numbers as text."""

import pytest

from smelt.core.report import Row
from smelt.reports import _stages as show
from tests.reports.sample import report


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (812, "812 B"), (999.4, "999 B"), (999.6, "1.00 kB"), (9183, "9.18 kB"), (459632, "460 kB")],
)
def test_size(nbytes: float, text: str) -> None:
    assert show.size(nbytes) == text


def test_prefixes_end() -> None:
    assert show.size(1.2e6) == "1.20 MB" and show.size(1.2e22) == "12000000 PB"


def test_count_is_exact_below_a_million() -> None:
    assert show.count(431080) == "431,080" and show.count(12.34e6) == "12.3 M"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row(0, "a", "accuracy", 98.224, "%"), "98.22%"),
        (Row(0, "a", "latency", 0.8266, "ms"), "0.827 ms"),
        (Row(0, "a", "latency", 1234.5, "ms"), "1234 ms"),
        (Row(0, "a", "loss", 0.04567, "nats"), "0.0457 nats"),
        (Row(0, "a", "loss", 0.0, "nats"), "0.00 nats"),
        (Row(0, "a", "perplexity", float("inf")), "inf"),
        (Row(0, "a", "MACs", 260520, "per sample"), "260,520"),
    ],
)
def test_value(row: Row, text: str) -> None:
    assert show.value(row) == text


def test_change_and_ratio() -> None:
    first, middle, last = show.stages(report().rows)
    assert show.change(last, first, "accuracy") == "−0.11"
    assert show.change(first, first, "accuracy") == "" and show.change(last, first, "loss") == ""
    assert [show.ratio(s, first) for s in (first, middle, last)] == ["1.00×", "9.66×", "50.1×"]


def test_the_footnote_names_measures_and_steps() -> None:
    stages = show.stages(report().rows)
    assert show.simulated(stages) == "simulated: MACs, peak memory, latency (step 1, 2)"
    stages[2].rows["accuracy"] = Row(2, "x", "accuracy", 97.0, "%", simulated=True)
    assert show.simulated(stages).endswith("; accuracy (step 2)")
    assert show.simulated(stages[:1]) == ""


def test_metrics_are_what_is_not_fixed() -> None:
    assert show.metrics(report().rows) == ["accuracy"]
