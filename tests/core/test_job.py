"""What a job refuses before anything runs."""

import pytest
import torch

from smelt.core.data import Data
from smelt.core.errors import DataError, ModelError
from smelt.core.job import Job


def test_data_must_be_wrapped() -> None:
    for wrong in ([(torch.zeros(1), torch.zeros(1))], {"train": []}, "digits"):
        with pytest.raises(DataError, match=r"data is a .*wrap your loaders: smelt\.Data"):
            Job(data=wrong)  # type: ignore[arg-type]
    assert Job(Data()).data == Data()


def test_a_metric_is_a_name_or_a_function() -> None:
    with pytest.raises(DataError, match="metric is 3; give a name"):
        Job(metric=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["nowhere", "cuda:77", "meta"])
def test_a_device_that_cannot_be_used(device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used here: ") as caught:
        Job(device=device)
    assert "\n" not in str(caught.value)


def test_a_device_of_torch_is_its_name() -> None:
    assert Job(device=torch.device("cpu")).device == "cpu"  # type: ignore[arg-type]
