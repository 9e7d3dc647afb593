"""The model families against torchvision's and timm's: the same layers, initial weights, names and outputs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks._torchvision import prepare
from safetensors.torch import save_file
from torch import nn

import smelt
from smelt.core import shelf
from smelt.core.errors import ModelError
from tests.models.families import lively

prepare()

import timm  # noqa: E402
from torchvision import models as torchvision  # noqa: E402

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forward_only() -> Iterator[None]:
    with torch.no_grad():
        yield


def ours(spec: str) -> nn.Module:
    return smelt.open_model(spec)[0]


def renamed(spec: str, state: dict[str, Any]) -> dict[str, Any]:
    rename = getattr(shelf.module("models", spec.partition("(")[0]), "renamed", dict)
    return rename(state)  # type: ignore[no-any-return]


def layers(model: nn.Module) -> list[str]:
    """Every layer with weights and its settings, in order."""
    return [repr(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]


ALIKE = [
    *((f"efficientnet_b{i}", f"efficientnet(scale='b{i}')", {}) for i in (1, 4)),
    *((f"efficientnet_b{i}", f"efficientnet(scale='b{i}', eps=1e-3, momentum=0.01)", {}) for i in (5, 7)),
    ("mobilenet_v2", "mobilenet_v2(width=0.75)", {"width_mult": 0.75}),
    ("mobilenet_v3_large", "mobilenet_v3", {}),
    ("mobilenet_v3_large", "mobilenet_v3(width=0.35)", {"width_mult": 0.35}),
    *((f"shufflenet_v2_x{w}_{h}", f"shufflenet_v2(width={w}.{h})", {}) for w, h in ((1, 0), (1, 5), (2, 0))),
    *((f"vgg{n}", f"vgg(depth={n})", {}) for n in (11, 19)),
    *((f"vgg{n}_bn", f"vgg(depth={n}, norm=True)", {}) for n in (13, 16)),
    *((f"resnet{n}", f"resnet(depth={n})", {}) for n in (18, 34, 50, 101)),
]


@pytest.mark.parametrize(("theirs", "spec", "arguments"), ALIKE)
def test_layers_and_names_of_torchvision(theirs: str, spec: str, arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        a, b = torchvision.get_model(theirs, **arguments), ours(spec)
    assert layers(a) == layers(b)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


SAME = [
    ("mobilenet_v2", "mobilenet_v2(width=0.35, classes=5)", {"width_mult": 0.35}, True),
    ("mobilenet_v3_small", "mobilenet_v3(version='small', classes=5)", {}, True),
    ("efficientnet_b0", "efficientnet(classes=5)", {}, True),
    ("shufflenet_v2_x0_5", "shufflenet_v2(width=0.5, classes=5)", {}, False),  # the authors' initial weights here
    ("resnet18", "resnet(classes=5)", {}, True),
]


@pytest.mark.parametrize(("theirs", "spec", "arguments", "initial"), SAME)
def test_weights_and_outputs_of_torchvision(theirs: str, spec: str, arguments: dict[str, Any], initial: bool) -> None:
    torch.manual_seed(0)
    a = torchvision.get_model(theirs, num_classes=5, **arguments)
    torch.manual_seed(0)
    b = ours(spec)
    if initial:
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    b.load_state_dict(lively(a).state_dict())
    assert torch.equal(a(IMAGES), b.eval()(IMAGES)) and float(a(IMAGES).std()) > 0


def test_vgg_of_torchvision() -> None:
    torch.manual_seed(0)
    features = lively(torchvision.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True))
    b = ours("vgg(norm=True, channels=[[8], [16, 16]], hidden=(), pool=1)").eval()
    b.features.load_state_dict(features.state_dict())
    assert torch.equal(features(IMAGES), b.features(IMAGES))


TIMM = [
    ("mobilenetv1_100", "mobilenet_v1"),
    ("mobilenetv2_035", "mobilenet_v2(width=0.35)"),
    ("mobilenetv3_small_100", "mobilenet_v3(version='small', eps=1e-5)"),
    ("mobilenetv3_large_100", "mobilenet_v3(eps=1e-5)"),
    ("efficientnet_b1", "efficientnet(scale='b1')"),
]


@pytest.mark.parametrize(("theirs", "spec"), TIMM)
def test_weights_of_timm(theirs: str, spec: str) -> None:
    torch.manual_seed(0)
    a, b = lively(timm.create_model(theirs)), ours(spec).eval()
    state = a.state_dict()
    b.load_state_dict(renamed(spec, {name: state[name] for name in sorted(state)}))
    torch.testing.assert_close(a(IMAGES), b(IMAGES), rtol=1e-5, atol=1e-6 * float(a(IMAGES).abs().max()))


@pytest.mark.parametrize(
    ("theirs", "spec"), [("vgg11_bn", "vgg(depth=11, norm=True)"), ("resnet50", "resnet(depth=50)")]
)
def test_names_of_timm(theirs: str, spec: str) -> None:
    with torch.device("meta"):
        a, b = renamed(spec, timm.create_model(theirs).state_dict()), ours(spec).state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_from_files(tmp_path: Path) -> None:
    """A file of either library, as it is; another model's is refused by its own names."""
    spec = "mobilenet_v2(width=0.35)"
    torch.manual_seed(0)
    a, b = timm.create_model("mobilenetv2_035").eval(), torchvision.mobilenet_v2(width_mult=0.35).eval()
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    torch.save(b.state_dict(), tmp_path / "b.pt")
    for theirs, path in ((a, "a.safetensors"), (b, "b.pt")):
        assert torch.allclose(smelt.open_model(spec, tmp_path / path)[0].eval()(IMAGES), theirs(IMAGES), atol=1e-6)
    with pytest.raises(ModelError, match=r"missing: features\..* unexpected: features\."):
        smelt.open_model("mobilenet_v3", tmp_path / "a.safetensors")
    names = {"fc.weight": "linear.weight", "fc.bias": "linear.bias"}
    state = {names.get(k, k): v for k, v in ours("resnet_cifar(depth=8)").state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    assert torch.equal(
        smelt.open_model("resnet_cifar(depth=8)", tmp_path / "c.pt")[0].fc.weight, state["linear.weight"]
    )
