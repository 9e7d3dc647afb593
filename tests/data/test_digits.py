import pytest
import torch

from smelt.core.data import check
from smelt.core.errors import DataError
from smelt.data import digits

pytest.importorskip("sklearn")


def test_shapes_scale_and_split():
    data = digits.load()
    check(data, labels=True, needs=("train", "test"))
    assert (data.train.samples, data.test.samples) == (898, 899)
    assert data.train.inputs.shape == (898, 1, 8, 8) and data.train.inputs.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64 and data.classes == tuple("0123456789")
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1
    train, test = data.train.labels.bincount(), data.test.labels.bincount()
    assert (train - test).abs().max() <= 2 and (train + test).tolist()[:2] == [178, 182]
    assert data.train.shuffle and not data.test.shuffle


def test_the_seed_decides():
    one, same, other = digits.load(), digits.load(), digits.load(seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(one.test.inputs, same.test.inputs) and not torch.equal(one.test.inputs, other.test.inputs)
    assert digits.load(held_out=0.2).test.samples == 359


def test_a_share_that_leaves_nothing():
    with pytest.raises(DataError, match="cannot hold out 1"):
        digits.load(held_out=1)
