import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.forms.codebooks import Codebooks

from .tools import damaged, read, seeds, survives


def test_by_hand() -> None:
    indices = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)
    books = torch.tensor([[1.0, 10.0], [-3.0, -30.0]], requires_grad=True)  # [values, channels]
    found = Encoded(Codebooks(0, zero=True), {"codebooks": books, "indices": indices}, indices.shape, torch.float32)
    dense = read(found)
    assert dense.tolist() == [[0.0, 1.0, -3.0], [-30.0, 10.0, 0.0]]
    (dense * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert books.grad is not None and books.grad.tolist() == [[1.0, 4.0], [2.0, 3.0]]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(None, 0), (0, 0), (1, 0), (0, 4)]), st.booleans(), seeds)
def test_damage_is_found(side: tuple[int | None, int], zero: bool, seed: int) -> None:
    form, shape, generator = Codebooks(*side, zero=zero), torch.Size((4, 7)), torch.Generator().manual_seed(seed)
    books = torch.randn(3, *form.side_shape(shape), generator=generator)
    indices = torch.randint(0, 3 + zero, shape, generator=generator).to(torch.uint8)
    whole = Encoded(form, {"codebooks": books, "indices": indices}, shape, torch.float32)
    assert survives(whole)
    for broken in damaged(whole, seed, 10):
        survives(broken)
    with pytest.raises(FileError, match="for"):
        read(whole.map(lambda path, leaf: leaf + 4 if path == "indices" else leaf))
