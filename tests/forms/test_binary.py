import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.forms.binary import Binary

from .tools import damaged, read, seeds, survives


def tree(axis: int | None, group: int, bases: int, shape: tuple[int, ...] = (4, 3, 5)) -> Encoded:
    form, size = Binary(axis, group, bases), torch.Size(shape)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bases, size, generator=generator).to(torch.uint8)
    scale = torch.rand(bases, *form.side_shape(size), generator=generator)
    return Encoded(form, {"codes": codes, "scale": scale}, size, torch.float32)


def test_by_hand() -> None:
    codes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 10.0], [0.25, 2.0]])  # [bases, channels]
    found = read(Encoded(Binary(0, 0, 2), {"codes": codes, "scale": scale}, codes.shape, torch.float32))
    assert found.tolist() == [[-1.25, 0.75], [-8.0, 12.0]]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(None, 0), (0, 0), (2, 0), (0, 4)]), st.integers(1, 8), seeds)
def test_damage_is_found(side: tuple[int | None, int], bases: int, seed: int) -> None:
    whole = tree(*side, bases)
    assert survives(whole)
    for broken in damaged(whole, seed, 10):
        survives(broken)


def test_codes_beyond_the_bases_are_refused() -> None:
    whole = tree(0, 0, 2)
    with pytest.raises(FileError, match="code 4 for 2 bases"):
        read(whole.map(lambda path, leaf: leaf + 1 if path == "codes" else leaf))
    with pytest.raises(FileError, match="bases is 9"):
        read(Encoded(Binary(0, 0, 9), whole.parts, whole.shape, whole.dtype))
