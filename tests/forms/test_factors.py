import pytest
import torch
from hypothesis import given, settings

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.forms.affine import Affine
from smelt.forms.factors import Factors

from .tools import damaged, read, seeds, survives


def tree() -> Encoded:
    codes = torch.tensor([[1, -2], [0, 3], [2, 2]], dtype=torch.int8)
    left = Encoded(Affine(1), {"codes": codes, "scale": torch.tensor([0.5, 2.0])}, codes.shape, torch.float32)
    right = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.5, 1.0, 0.0, 0.25]], dtype=torch.float16)
    return Encoded(Factors(), {"left": left, "right": right}, torch.Size((3, 2, 2)), torch.float32)


def test_by_hand() -> None:
    assert read(tree()).tolist() == [[[-1.5, -4.0], [1.0, -1.5]], [[3.0, 6.0], [0.0, 1.5]], [[3.0, 4.0], [2.0, 0.0]]]


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_damage_is_found(seed: int) -> None:
    for broken in damaged(tree(), seed):
        survives(broken)


def test_small_factors_may_not_claim_a_huge_tensor() -> None:
    parts = {"left": torch.zeros(1 << 13, 1), "right": torch.zeros(1, 1 << 13)}
    with pytest.raises(FileError, match="too few numbers"):
        read(Encoded(Factors(), parts, torch.Size((1 << 13, 1 << 13)), torch.float32))
