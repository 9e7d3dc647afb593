"""All rows of one model."""

import json

import pytest
import torch
from torch import nn

from smelt.core.data import Data
from smelt.core.errors import DataError, ModelError
from smelt.core.report import Report
from smelt.measure import conditions, examples, measure
from tests.conftest import mlp


def batches(features: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(3, features), torch.zeros(3, dtype=torch.int64))]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_data_is_one_line(split: str) -> None:
    with pytest.raises(DataError, match=f"data, split '{split}' is empty"):
        examples(Data(**{split: []}))
    with pytest.raises(DataError, match=f"data, split '{split}' is empty"):
        measure(mlp(), Data(**{split: []}))


def test_loaders_must_be_wrapped() -> None:
    with pytest.raises(DataError, match=r"smelt\.Data"):
        measure(mlp(), batches())  # type: ignore[arg-type]


def test_a_model_that_fails_is_one_line_and_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 2)).train()
    with pytest.raises(ModelError, match=r"the model fails on the first batch, given float32 \[3, 2\]: mat1 and mat2"):
        measure(model, Data(train=batches()))
    assert model.training


def test_latency_says_its_threads_and_what_else_matters() -> None:
    data = Data(test=batches())
    rows = measure(mlp(), data, threads=1)
    assert {row.measure: row.threads for row in rows if row.threads is not None} == {"latency": 1}
    report = Report.from_plain(json.loads(Report(rows).to_json()))
    assert report.rows == rows
    known = {"device": "cpu", "batch size": "3", "torch": torch.__version__}
    assert conditions(rows, data, "cpu") == {**known, "threads": "1"}
    assert conditions(measure(mlp(), data, latency=False), data, "cpu") == known
    assert "batch size" not in conditions([], None, "cpu")


def test_rows_of_older_reports_have_no_threads() -> None:
    old = Report(measure(mlp())).to_plain()
    for row in old["rows"]:
        del row["threads"]
    assert all(row.threads is None for row in Report.from_plain(old))
