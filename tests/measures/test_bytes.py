import json
import struct

import pytest
import torch
from torch import nn

from smelt.core.errors import FileError, ModelError
from smelt.measures.bytes import checkpoint_bytes, file_bytes


def expected(model: nn.Module, names: list[str]) -> int:
    """What the format asks for, by hand: eight bytes, a padded JSON header, the data."""
    state, start, header = model.state_dict(), 0, {}
    for name in names:
        tensor = state[name]
        kind, width = ("F32", 4) if tensor.is_floating_point() else ("I64", 8)
        end = start + tensor.numel() * width
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"))
    return len(struct.pack("<Q", 0)) + -(-len(text) // 8) * 8 + start


def test_a_plain_model():
    model = nn.Linear(3, 5)
    assert checkpoint_bytes(model) == expected(model, ["weight", "bias"])
    assert checkpoint_bytes(model.half()) == checkpoint_bytes(model.double()) == expected(model, ["weight", "bias"])


def test_buffers_count_and_tied_tensors_count_once():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.BatchNorm1d(40))
    untied = checkpoint_bytes(model)
    model[1].weight = model[0].weight
    names = [n for n in model.state_dict() if n != "1.weight"]
    names.sort(key=lambda n: "tracked" not in n)
    assert checkpoint_bytes(model) == expected(model, names)
    assert untied - checkpoint_bytes(model) >= 40 * 40 * 4


def test_views_of_one_storage_are_tensors_of_their_own():
    model = nn.Module()
    whole = torch.zeros(1000)
    model.register_buffer("a", whole[:500])
    model.register_buffer("b", whole[500:].view(20, 25).t())
    assert 4000 < checkpoint_bytes(model) < 4200


def test_errors(tmp_path):
    (tmp_path / "a").write_bytes(bytes(123))
    assert file_bytes(tmp_path / "a") == 123
    with pytest.raises(FileError, match="no such file"):
        file_bytes(tmp_path / "b")
    with pytest.raises(ModelError, match="weight is on the meta device"):
        checkpoint_bytes(nn.Linear(2, 2, device="meta"))
