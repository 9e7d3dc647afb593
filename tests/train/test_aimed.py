from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smelt.core.errors import DataError
from smelt.core.method import Known
from smelt.core.target import Target, targets
from smelt.statistics.gram import unfolded
from smelt.train.aimed import by_weight, in_order


@torch.no_grad()
def test_each_layer_is_aimed_at_what_it_gave_on_what_it_gets_now() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)).eval()
    x, before = torch.randn(8, 3, 9, 9), model.state_dict()["0.weight"].clone()
    seen: dict[str, Any] = {}

    def fit(target: Target, w: Tensor, metric: Tensor) -> Tensor:
        seen[target.name] = (w, metric)
        return 0.5 * w + 0.1

    in_order(model, [t for t in targets(model) if t.is_weight], Known([(x, None)]), 1e-9, fit)
    assert torch.equal(model[0].weight, before)  # it was only looked at
    assert torch.allclose(seen["0.weight"][0], before.flatten(1).double(), atol=1e-5)
    hidden = model[1](nn.functional.conv2d(x, (0.5 * before + 0.1)))
    rows = torch.cat(list(unfolded(model[2], hidden)), 1)[0].double()  # type: ignore[arg-type]
    wanted = model(x).movedim(1, -1).flatten(0, -2).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    w, metric = seen["2.weight"]
    assert torch.allclose(w, expected, atol=1e-3)
    assert torch.allclose(metric, rows.T @ rows / len(rows), atol=1e-4)


def test_without_data() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2))
    members = [t for t in targets(model) if t.is_weight]
    with pytest.raises(DataError, match="weigh errors by the inputs"):
        in_order(model, members, Known(), 0.01, lambda target, w, metric: w)
    by_weight(members, lambda target, w, metric: (w - model[0].weight.flatten(1)) * (metric - torch.eye(4)).sum())
