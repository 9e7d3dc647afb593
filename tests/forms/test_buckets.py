import torch
from hypothesis import given, settings

from smelt.core.encoded import Encoded
from smelt.forms.buckets import Buckets

from .tools import damaged, read, seeds, survives


def tree(codes: list[int]) -> Encoded:
    sides = {"start": torch.tensor([-1.0, 0.0, 5.0]), "step": torch.tensor([0.25, 0.5, 2.0])}
    leaf = torch.tensor(codes, dtype=torch.uint8)
    return Encoded(Buckets(2), {"codes": leaf, **sides}, leaf.shape, torch.float32)


def test_by_hand() -> None:
    assert read(tree([0, 3, 4, 6, 11])).tolist() == [-1.0, -0.25, 0.0, 1.0, 11.0]
    assert not survives(tree([12]))


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_damage_is_found(seed: int) -> None:
    for broken in damaged(tree([0, 3, 4, 6, 11]), seed):
        survives(broken)
