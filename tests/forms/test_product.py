from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded, awaken
from smelt.core.errors import FileError
from smelt.forms.product import Product, cut, joined

from .tools import damaged, read, seeds, shapes, survives


def tree(**change: Any) -> Encoded:
    """[2, 5] of vectors of 2: the last one of each line is cut."""
    parts = {
        "codebook": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "indices": torch.tensor([[0, 1, 2], [2, 2, 0]], dtype=torch.uint8),
    }
    return Encoded(Product(), {**parts, **change}, torch.Size((2, 5)), torch.float32)


def test_by_hand() -> None:
    whole = tree()
    assert read(whole).tolist() == [[1, 2, 3, 4, 5], [5, 6, 5, 6, 1]]
    book = whole.parts["codebook"]
    assert isinstance(book, torch.Tensor)
    book.requires_grad_()
    (whole.decode() * torch.arange(10.0).reshape(2, 5)).sum().backward()
    assert book.grad is not None and book.grad.tolist() == [[9, 1], [2, 3], [4 + 5 + 7, 6 + 8]]


def test_along_another_dimension_and_in_another_order() -> None:
    parts = {"codebook": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "indices": torch.tensor([[0], [1], [1], [0]]).byte()}
    along = Encoded(Product(1), parts, torch.Size((2, 2, 2)), torch.float32)
    assert read(along).tolist() == [[[1, 3], [2, 4]], [[3, 1], [4, 2]]]
    place = torch.tensor([2, 0, 4, 1, 3], dtype=torch.int16)
    assert read(tree(place=place)).tolist() == [[3, 1, 5, 2, 4], [5, 5, 1, 6, 6]]


@given(shapes, st.sampled_from([None, 0, 1, 2]), st.integers(1, 9))
def test_cut_and_joined(shape: tuple[int, ...], axis: int | None, length: int) -> None:
    if not shape or 0 in shape or (axis is not None and axis >= len(shape)):
        return
    x = torch.arange(1, torch.Size(shape).numel() + 1.0).reshape(shape)
    assert torch.equal(joined(cut(x, axis, length), x.shape, axis), x)
    kernel = cut(x, None, length)
    n = x[0].numel() if x.dim() > 1 else x.numel()
    assert kernel.shape == (x.numel() // n, -(-n // length), length)


@pytest.mark.parametrize(
    "change",
    [
        {"codebook": torch.ones(2)},
        {"codebook": torch.ones(0, 2)},
        {"codebook": torch.ones(3, 6)},
        {"codebook": torch.ones(3, 2, dtype=torch.int32)},
        {"indices": torch.zeros(2, 2, dtype=torch.uint8)},
        {"indices": torch.zeros(6, dtype=torch.uint8)},
        {"indices": torch.zeros(2, 3)},
        {"indices": torch.full((2, 3), 3, dtype=torch.uint8)},
        {"indices": torch.full((2, 3), -1, dtype=torch.int16)},
        {"place": torch.zeros(5, dtype=torch.int16)},
        {"place": torch.arange(4, dtype=torch.int16)},
        {"place": torch.arange(1, 6, dtype=torch.int16)},
        {"place": torch.arange(5.0)},
        {"more": torch.ones(1)},
    ],
    ids=str,
)
def test_parts_that_do_not_fit(change: dict[str, torch.Tensor]) -> None:
    assert survives(tree()) and not survives(tree(**change))


def test_false_claims() -> None:
    for form in (Product(2), Product(-1), Product(True)):
        assert not survives(replace(tree(), form=form))
    for shape in ([], [0], [2, 10**9], [-1, -2]):
        assert not survives(replace(tree(), shape=torch.Size(shape)))
    assert not survives(replace(tree(), dtype=torch.int32))
    long = tree(codebook=torch.ones(1, 5000), indices=torch.zeros(10**4, 1, dtype=torch.uint8))
    assert not survives(replace(long, shape=torch.Size((10**4, 5000))))
    with pytest.raises(FileError, match="an index is not in the codebook"):
        tree(indices=torch.full((2, 3), 3, dtype=torch.uint8)).decode()
    with pytest.raises(FileError, match=r"indices 0\.\.3 for 3 vectors"):
        awaken(tree(indices=torch.tensor([[0, 1, 3], [0, 0, 0]], dtype=torch.uint8)))


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_damage(seed: int) -> None:
    for broken in damaged(tree(place=torch.tensor([2, 0, 4, 1, 3], dtype=torch.int16)), seed, 10):
        survives(broken)
