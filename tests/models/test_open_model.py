import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from smelt.core.errors import ModelError
from smelt.models._open import open_model, read_weights

SMALL = {"inputs": 4, "hidden": (3,), "classes": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


@pytest.fixture
def state():
    torch.manual_seed(1)
    return open_model("lenet300", arguments=SMALL)[0].state_dict()


def small(weights):
    return open_model("lenet300", weights, SMALL)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_built_in_names_and_arguments():
    model, name, arguments = open_model("lenet300(inputs=64)", arguments={"classes": 3})
    assert (name, arguments) == ("lenet300", {"inputs": 64, "classes": 3})
    assert model.fc1.in_features == 64 and model.fc3.out_features == 3
    for spec, said in [
        ("lenet30", "no model 'lenet30'; did you mean 'lenet300'"),
        ("lenet300(hiden=3)", "no argument 'hiden'; did you mean 'hidden'"),
        ("lenet300(3)", "cannot read"),
        ("lenet300(inputs='a')", "TypeError"),
        ("lenet(size=3)", "nothing is left"),
    ]:
        with pytest.raises(ModelError, match=said):
            open_model(spec)
    with pytest.raises(ModelError, match="'inputs' is given twice"):
        open_model("lenet300(inputs=3)", arguments={"inputs": 4})


def test_functions(here):
    text = "from torch import nn\ndef net(width): return nn.Linear(width, 2)\ndef number(): return 3\n"
    (here / "my_nets.py").write_text(text + "def fails(): raise OSError('no disk')\n")
    model, name, arguments = open_model("my_nets:net(width=5)")
    assert model.in_features == 5 and (name, arguments) == ("my_nets:net", {"width": 5})
    for spec, said in [
        ("net", "needs the argument 'width'"),
        ("nett", "did you mean 'net'"),
        ("number", "returns a int; it must return an nn.Module"),
        ("fails", "OSError: no disk"),
    ]:
        with pytest.raises(ModelError, match=said):
            open_model(f"my_nets:{spec}")
    with pytest.raises(ModelError, match="no module 'nowhere_at_all'"):
        open_model("nowhere_at_all:net")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model_state_dict": s, "optimizer": {}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
def test_weights_in_pickles(here, state, wrap, suffix):
    torch.save(wrap(state), "w" + suffix)
    assert same(small("w" + suffix), state)


def test_weights_in_safetensors(here, state):
    save_file(state, "w.safetensors")
    assert same(small(here / "w.safetensors"), state)
    save_file({k: v.half() for k, v in state.items()}, "w.safetensors")
    assert small("w.safetensors")["fc1.weight"].dtype == torch.float32


def test_tied_weights_are_enough_once(here):
    (here / "tied_net.py").write_text(
        "from torch import nn\n"
        "def build():\n    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )
    model, _, _ = open_model("tied_net:build")
    save_model(model, "w.safetensors")
    assert len(read_weights("w.safetensors")) == 3
    again, _, _ = open_model("tied_net:build", "w.safetensors")
    assert again[1].weight is again[0].weight and same(again.state_dict(), model.state_dict())


def test_counters_of_batch_norm_may_lack(here):
    layers = {"layers": [["BatchNorm1d", {"num_features": 3}]]}
    state = open_model("chain", arguments=layers)[0].state_dict()
    state["0.running_mean"] += 1
    save_file({k: v for k, v in state.items() if "tracked" not in k}, "w.safetensors")
    assert same(open_model("chain", "w.safetensors", layers)[0].state_dict(), state)


def test_weights_that_do_not_fit(here, state):
    cases = [
        ({k: v for k, v in state.items() if "fc1" not in k}, "2 missing: fc1.weight, fc1.bias"),
        (state | {f"extra{i}": torch.zeros(1) for i in range(5)}, "5 unexpected: extra0, extra1, extra2, ..."),
        (state | {"fc1.weight": torch.zeros(3, 5)}, r"1 of another shape: fc1.weight \[3, 5\] for \[3, 4\]"),
        (state | {"fc1.weight": torch.zeros(3, 4, dtype=torch.int8)}, "1 not floating: fc1.weight torch.int8"),
        (state | {"fc1.weight": 5}, "1 no tensor: fc1.weight is int"),
        ({"epoch": 3}, "holds epoch and no state dict"),
        ({}, "holds nothing"),
        ([1, 2], "a list"),
    ]
    for wrong, said in cases:
        torch.save(wrong, "w.pt")
        with pytest.raises(ModelError, match=said) as caught:
            small("w.pt")
        assert "w.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(here, state):
    torch.save(state, "cut.pt")
    (here / "cut.pt").write_bytes((here / "cut.pt").read_bytes()[:200])
    torch.save(nn.Linear(2, 2), "code.pt")
    (here / "text.pt").write_text("hello")
    (here / "other.pt").write_bytes(pickle.dumps({"w": 1.0}))
    (here / "void.pt").write_bytes(b"")
    (here / "text.safetensors").write_text("hello")
    (here / "w.onnx").write_bytes(b"x")
    for name, said in [
        ("none.pt", "no such file of weights"),
        ("cut.pt", "cannot be read"),
        ("code.pt", "a pickled torch.nn.modules.linear.Linear, .* save model.state_dict"),
        ("text.pt", "cannot be read"),
        ("void.pt", "cannot be read"),
        ("other.pt", "cannot be read"),
        ("text.safetensors", "cannot be read as safetensors"),
        ("w.onnx", r"\.pt, \.pth, \.th or \.safetensors"),
    ]:
        with pytest.raises(ModelError, match=said) as caught:
            small(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
