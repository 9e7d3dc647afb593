"""Which tensors a selector reaches; identity of tied tensors."""

import pytest
import torch
from torch import nn

from smelt.core.errors import ModelError, RecipeError
from smelt.core.target import check_finite, select, targets


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.again = self.body
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def names(found: list) -> list[str]:
    return [t.name for t in found]


def test_tied_and_shared_tensors_are_one_target() -> None:
    found = {t.name: t for t in targets(Tied())}
    assert found["embed.weight"].places == (("embed", "weight"), ("head", "weight"))
    assert found["body.0.weight"].places == (("body.0", "weight"), ("again.0", "weight"))
    assert "head.weight" not in found


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("*", ["embed.weight", "body.0.weight"]),
        ("body.*", ["body.0.weight"]),
        ("body", ["body.0.weight"]),
        ("head", ["embed.weight"]),
        ("*.bias", ["body.0.bias", "body.1.bias"]),
        ("body.0.bias", ["body.0.bias"]),
        (("*", "!embed"), ["body.0.weight"]),
        (("!body.0.weight",), ["embed.weight"]),
    ],
)
def test_selectors(on: object, expected: list[str]) -> None:
    assert names(select(targets(Tied()), on)) == expected  # type: ignore[arg-type]


def test_lossless_codecs_reach_everything() -> None:
    assert len(select(targets(Tied()), "*", all_kinds=True)) == len(targets(Tied()))


def test_a_selector_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"'bodi' matches no tensor.*did you mean 'body"):
        select(targets(Tied()), "bodi")


def test_not_finite_names_the_tensor() -> None:
    model = Tied()
    with torch.no_grad():
        model.body[0].weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"body\.0\.weight \[4, 4\] holds 1 NaN"):
        check_finite(targets(model))


def test_a_mask_of_minus_infinity_is_finite_enough() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    check_finite(targets(model))
