from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.forms.crossed import Crossed

from .tools import damaged, read, seeds, survives


def tree(shape: tuple[int, ...] = (6, 2, 3), groups: int = 2, seed: int = 0, **change: Any) -> Encoded:
    g = torch.Generator().manual_seed(seed)

    def whole(size: tuple[int, ...]) -> Tensor:
        return torch.randint(-20, 20, size, generator=g, dtype=torch.int8)

    columns = whole((groups, max(1, torch.Size(shape[1:]).numel())))
    parts = {"codes": whole(shape), "step": torch.tensor(0.3), "rows": whole(shape[:1]), "columns": columns}
    return Encoded(Crossed(), {**parts, **change}, torch.Size(shape), torch.float32)


def test_by_hand() -> None:
    parts = {
        "codes": torch.tensor([[1, -2], [3, 0]], dtype=torch.int8),
        "step": torch.tensor(0.5),
        "rows": torch.tensor([0, 8], dtype=torch.int8),
        "columns": torch.tensor([[0, -16]], dtype=torch.int8),
    }
    made = Encoded(Crossed(8), parts, torch.Size((2, 2)), torch.float32)
    assert read(made).tolist() == [[0.5, -0.25], [3.0, 0.0]]


def test_each_group_has_its_columns() -> None:
    made = tree()
    found = read(made).reshape(2, 3, 6)
    parts = {k: p for k, p in made.leaves()}
    for group in range(2):
        steps = 2.0 ** ((parts["rows"][3 * group : 3 * group + 3, None] + parts["columns"][group].double()) / 8)
        expected = parts["codes"].reshape(2, 3, 6)[group] * 0.3 * steps
        torch.testing.assert_close(found[group].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(5, dtype=torch.int8)},
        {"columns": torch.zeros(6, dtype=torch.int8)},
        {"columns": torch.zeros(4, 6, dtype=torch.int8)},
        {"columns": torch.zeros(2, 5, dtype=torch.int8)},
        {"columns": torch.zeros(0, 6, dtype=torch.int8)},
        {"step": torch.ones(1)},
        {"codes": torch.zeros(6, 2, 3)},
        {"codes": torch.zeros(6, 6, dtype=torch.int8)},
    ],
    ids=str,
)
def test_parts_that_do_not_fit(change: dict[str, Tensor]) -> None:
    with pytest.raises(FileError):
        read(tree(**change))


def test_steps_that_no_float_holds() -> None:
    big = torch.full((6,), 127, dtype=torch.int8)
    made = Encoded(Crossed(1), {**dict(tree().leaves()), "rows": big}, torch.Size((6, 2, 3)), torch.float32)
    with pytest.raises(FileError, match=r"steps of 2\^"):
        read(made)


@given(seeds)
def test_damaged_trees_are_refused_or_read(seed: int) -> None:
    assert all(survives(made) in (True, False) for made in damaged(tree(seed=seed), seed, 10))
