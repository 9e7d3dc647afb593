import itertools

import pytest
import torch
from torch import fx, nn

from smelt.core.errors import ModelError
from smelt.models import tensor_train

ROWS, COLUMNS, RANKS = (2, 3, 2), (2, 2, 3), (3, 2)


def weight(module: nn.Module, table: bool) -> torch.Tensor:
    """[12, 12] by the definition, entry by entry."""
    around = (1, *RANKS, 1)
    cores = []
    for k, (row, column) in enumerate(zip(ROWS, COLUMNS, strict=True)):
        core = module.get_parameter(f"cores.{k}.weight").detach()
        if table:
            cores.append(core.reshape(row, around[k], column, around[k + 1]).permute(0, 2, 1, 3))
        else:
            cores.append(core.reshape(row, around[k + 1], column, around[k]).permute(0, 2, 3, 1))
    made = torch.zeros(12, 12)
    for a in itertools.product(*map(range, ROWS)):
        for b in itertools.product(*map(range, COLUMNS)):
            value = cores[0][a[0], b[0]] @ cores[1][a[1], b[1]] @ cores[2][a[2], b[2]]
            made[(a[0] * 3 + a[1]) * 2 + a[2], (b[0] * 2 + b[1]) * 3 + b[2]] = value.item()
    return made


@pytest.mark.parametrize("shape", [(12, 12), (11, 10)])
def test_linear(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = tensor_train.build(shape, ROWS, COLUMNS, RANKS, bias=True)
    assert all(type(core) is nn.Linear for core in module.cores)
    with torch.no_grad():
        module.bias.normal_()
    dense = weight(module, False)[: shape[0], : shape[1]]
    for lead in ((), (5,), (2, 3)):
        x = torch.randn(*lead, shape[1])
        torch.testing.assert_close(module(x), nn.functional.linear(x, dense, module.bias))


@pytest.mark.parametrize("shape", [(12, 12), (11, 10)])
def test_embedding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = tensor_train.build(shape, ROWS, COLUMNS, RANKS, embedding=True)
    dense = weight(module, True)[: shape[0], : shape[1]]
    entries = torch.arange(shape[0])
    torch.testing.assert_close(module(entries), dense)
    torch.testing.assert_close(module(entries.flip(0)[None, :4]), dense.flip(0)[None, :4])
    padded = tensor_train.build(shape, ROWS, COLUMNS, RANKS, embedding=True, padding=2)
    assert not padded(torch.tensor(2)).any() and padded(torch.tensor(3)).any()


def test_it_is_ordinary_layers_and_reshapes() -> None:
    traced = fx.symbolic_trace(tensor_train.build((11, 10), ROWS, COLUMNS, RANKS, bias=True))
    kinds = {type(traced.get_submodule(str(n.target))) for n in traced.graph.nodes if n.op == "call_module"}
    methods = {n.target for n in traced.graph.nodes if n.op == "call_method"}
    assert kinds == {nn.Linear} and methods <= {"reshape", "transpose"}
    x = torch.randn(3, 10)
    module = tensor_train.build((11, 10), ROWS, COLUMNS, RANKS)
    torch.testing.assert_close(fx.symbolic_trace(module)(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shape": (13, 12)}, r"hold less than \[13, 12\]"),
        ({"ranks": (3,)}, "need 2 ranks"),
        ({"ranks": (3, 0)}, "whole numbers from 1"),
        ({"rows": (12,)}, "need 0 ranks"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        tensor_train.build(**{"shape": (12, 12), "rows": ROWS, "columns": COLUMNS, "ranks": RANKS} | arguments)
