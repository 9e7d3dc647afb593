"""MobileNet, ShuffleNet, EfficientNet, VGG, ResNet: published sizes, arguments, and what compression does with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smelt
from smelt.core.errors import ModelError
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters
from smelt.models import efficientnet
from smelt.models._blocks import rounded, shuffle
from tests.models.families import lively

CIFAR_VGG = "vgg(norm=True, pool=1, hidden=(), classes=10)"
WIDE = "channels=(64, 128, 256), stem=32, shortcut='B', classes=100"
# spec, a side of the images, parameters, millions of multiply-accumulates (None: too slow for a test).
# mobilenet_v1: arXiv:1704.04861, tables 6, 7 and 8 (4.2, 2.6, 1.3, 0.5 million; 569, 325, 149, 41; 418, 290, 186);
# shufflenet_v1: the authors' PyTorch code (1.9 and 138, 2.4 and 138, 0.7 and 38, 3.4 and 292, 6.5 and 522) and
# arXiv:1707.01083, table 1 (143, 140, 137, 133, 137); resnet_cifar: arXiv:1512.03385, table 6 (0.27, 0.46, 0.66, 0.85,
# 1.7 million) and, with WIDE, arXiv:1910.10699 (1.23, 7.43 million); the others: torchvision's documentation.
SIZES: list[tuple[str, int, int, float | None]] = [
    ("mobilenet_v1", 224, 4_231_976, 568.74),
    ("mobilenet_v1", 192, 4_231_976, 418.12),
    ("mobilenet_v1", 160, 4_231_976, 290.68),
    ("mobilenet_v1", 128, 4_231_976, 186.40),
    ("mobilenet_v1(width=0.75)", 224, 2_585_560, 325.40),
    ("mobilenet_v1(width=0.5)", 224, 1_331_592, 149.50),
    ("mobilenet_v1(width=0.25)", 224, 470_072, 41.03),
    ("mobilenet_v2", 224, 3_504_872, 300.77),
    ("mobilenet_v2(width=1.4)", 224, 6_108_776, 582.20),
    ("mobilenet_v3", 224, 5_483_032, 216.59),
    ("mobilenet_v3(version='small')", 224, 2_542_856, 56.51),
    ("shufflenet_v1", 224, 1_864_728, 137.46),
    ("shufflenet_v1(groups=1)", 224, 1_530_936, 143.08),
    ("shufflenet_v1(groups=2)", 224, 1_732_848, 140.84),
    ("shufflenet_v1(groups=4)", 224, 1_967_344, 134.34),
    ("shufflenet_v1(groups=8)", 224, 2_433_768, 138.37),
    ("shufflenet_v1(width=0.5)", 224, 717_324, 37.59),
    ("shufflenet_v1(width=1.5, stem=16)", 224, 3_441_168, 292.44),
    ("shufflenet_v1(groups=8, width=2)", 224, 6_521_232, 521.94),
    ("shufflenet_v2(width=0.5)", 224, 1_366_792, 40.48),
    ("shufflenet_v2", 224, 2_278_604, 144.91),
    ("shufflenet_v2(width=1.5)", 224, 3_503_624, 295.76),
    ("shufflenet_v2(width=2.0)", 224, 7_393_996, 583.25),
    ("efficientnet", 224, 5_288_548, 385.81),
    ("efficientnet(scale='b1')", 240, 7_794_184, 686.80),
    ("efficientnet(scale='b2')", 288, 9_109_994, 1087.53),
    ("efficientnet(scale='b3')", 300, 12_233_232, 1827.14),
    ("efficientnet(scale='b4')", 380, 19_341_616, None),
    ("efficientnet(scale='b5')", 456, 30_389_784, None),
    ("efficientnet(scale='b6')", 528, 43_040_704, None),
    ("efficientnet(scale='b7')", 600, 66_347_960, None),
    ("vgg(depth=11)", 224, 132_863_336, 7609.09),
    ("vgg(depth=13, norm=True)", 224, 133_053_736, 11308.47),
    ("vgg", 224, 138_357_544, 15470.26),
    ("vgg(norm=True)", 224, 138_365_992, 15470.26),
    ("vgg(depth=19)", 224, 143_667_240, 19632.06),
    (CIFAR_VGG, 32, 14_728_266, 313.20),
    ("resnet", 224, 11_689_512, 1814.07),
    ("resnet(depth=34)", 224, 21_797_672, 3663.76),
    ("resnet(depth=50)", 224, 25_557_032, 4089.18),
    ("resnet_cifar", 32, 269_722, 40.55),
    ("resnet_cifar(depth=32)", 32, 464_154, 68.86),
    ("resnet_cifar(depth=44)", 32, 658_586, 97.17),
    ("resnet_cifar(depth=56)", 32, 853_018, 125.49),
    ("resnet_cifar(depth=110)", 32, 1_727_962, 252.89),
    (f"resnet_cifar(depth=8, {WIDE})", 32, 1_233_540, 177.07),
    (f"resnet_cifar(depth=32, {WIDE})", 32, 7_433_860, 1083.04),
]


@pytest.mark.parametrize(("spec", "side", "count", "millions"), SIZES)
def test_published_sizes(spec: str, side: int, count: int, millions: float | None) -> None:
    with torch.device("meta"):
        model = smelt.open_model(spec)[0].eval()
        assert parameters(model) == count
        if millions is not None:
            assert round(macs(model, torch.zeros(1, 3, side, side)) / 1e6, 2) == pytest.approx(millions)


def test_rounding_of_widths() -> None:
    # By hand: 12 is nearest to 16; 11.2 to 8, which would lose more than a tenth.
    assert [rounded(c) for c in (1, 8, 11.2, 12, 20, 67.2)] == [8, 8, 16, 16, 24, 64]
    assert [rounded(c, 2) for c in (58, 58.4, 59.2)] == [58, 58, 60]


def test_channels_are_shuffled() -> None:
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert shuffle(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(shuffle(shuffle(x, 3), 4), x)


def test_compound_scaling() -> None:
    """Depths are rounded up, widths to multiples of 8, of tables 1 of the paper; B2 is close to phi = 1."""
    assert efficientnet.scaling("b4")[:3] == (1.8, 1.4, 380)
    assert efficientnet.scaling(0)[:3] == (1, 1, 224)
    assert efficientnet.scaling(1)[:3] == pytest.approx((1.2, 1.1, 258))
    assert efficientnet.scaling(7)[:3] == pytest.approx((3.58, 1.95, 596), rel=1e-2)
    with torch.device("meta"):
        model = efficientnet.build(scale=2.0)  # depth 1.44, width 1.21
        stages = model.features[1:-1]
        assert [len(stage) for stage in stages] == [2, 3, 3, 5, 5, 6, 2]
        assert [stage[0].block[-1][0].out_channels for stage in stages] == [24, 32, 48, 96, 136, 232, 384]
        assert parameters(efficientnet.build(scale=1)) == parameters(efficientnet.build(depth=1.2, width=1.1))


def test_whole_blocks_are_left_out_in_training() -> None:
    torch.manual_seed(0)
    model = efficientnet.build(width=0.1, classes=2, channels=(8, 8), depths=2, strides=1, expansions=1, kernels=3)
    block = model.features[2][1]
    assert block._drop == pytest.approx(0.2 * 3 / 4)
    x = torch.ones(400, 8, 2, 2)
    block.block = nn.Identity()
    found = block.train()(x)[:, 0, 0, 0]
    left_out = found == 1
    assert torch.allclose(found[~left_out], torch.tensor(1 + 1 / 0.85)) and 0.1 < float(left_out.float().mean()) < 0.2
    assert bool((block.eval()(x) == 2).all())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mobilenet_v2(strides=(1, 2))", r"strides is \[1, 2\]; it takes one value, or 7 of them"),
        ("mobilenet_v2(kernels=[[3, 5], 3, 3, 3, 3, 3, 3])", "kernels of a stage is .*or 1 of them"),
        ("mobilenet_v1(kernels=4)", "a kernel of 4 cannot keep the size of an image; take 3 or 5"),
        ("mobilenet_v1(act='rellu')", "no activation 'rellu'; did you mean 'relu'"),
        ("mobilenet_v3(version='larg')", "no version 'larg'; did you mean 'large'"),
        ("mobilenet_v3(channels=(8, 16))", "kernels is .*or 2 of them"),
        ("efficientnet(scale='b8')", "no version 'b8'"),
        ("shufflenet_v1(groups=5)", "groups=5 needs channels; without, one of 1, 2, 3, 4, 8"),
        ("shufflenet_v1(channels=(24, 48, 96))", "a stage has 24 channels after 24"),
        ("vgg(depth=12)", "no depth 12; one of 11, 13, 16, 19"),
        ("resnet(depth=20)", "no depth 20"),
        ("resnet(shortcut='C')", "no shortcut 'C'; A or B"),
        ("resnet_cifar(depth=21)", "a depth is 6n \\+ 2, as 20, not 21"),
        ("resnet_cifar(stem=64)", "option A only add channels"),
    ],
)
def test_arguments_that_make_no_model(spec: str, said: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=said):
        smelt.open_model(spec)


def test_a_place_in_a_search_space() -> None:
    """Kernels, expansions and depths of stages and of single blocks, as once-for-all networks vary them."""
    kernels, expansions = [3, [5, 7], 3], [1, [3, 6], 4]
    spec = {"channels": [8, 16, 24], "depths": [1, 2, 3], "strides": [1, 2, 2], "kernels": kernels, "head": 32}
    model = smelt.open_model("mobilenet_v2", None, {**spec, "expansions": expansions, "stem": 8, "classes": 3})[0]
    deep = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.kernel_size[0], m.groups) for m in deep] == [(3, 8), (5, 24), (7, 96), (3, 64), (3, 96), (3, 96)]
    rows: dict[str, Any] = {"kernels": [3, 5], "hidden": [8, 24], "channels": [8, 16], "squeeze": [False, True]}
    small = smelt.open_model("mobilenet_v3", None, {**rows, "acts": "relu", "strides": 1, "classes": 3})[0]
    assert [m.groups for m in small.modules() if isinstance(m, nn.Conv2d) and m.groups > 1] == [8, 24]
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape == small(x).shape == (2, 3)


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = {
    "mobilenet_v1": "width=0.25, channels=(64, 64, 128), strides=(1, 2, 1)",
    "mobilenet_v2": "width=0.5, channels=(16, 24, 32), depths=(1, 2, 2), strides=(1, 2, 1), expansions=2, head=32",
    "mobilenet_v3": "kernels=(3, 5, 3), hidden=(16, 32, 32), channels=(16, 24, 24), squeeze=(True, False, True), "
    "acts=('relu', 'hardswish', 'hardswish'), strides=(1, 2, 1), head=32",
    "shufflenet_v1": "groups=2, channels=(48, 96), depths=2, pool=False",
    "shufflenet_v2": "channels=(32, 64), depths=2, pool=False, head=48",
    "efficientnet": "width=0.5, channels=(16, 24, 32), depths=(1, 2, 1), strides=(1, 2, 1), expansions=2, kernels=3, "
    "head=64",
    "vgg": "norm=True, width=0.25, channels=[[32, 32], [64, 64]], hidden=(24,), pool=2",
    "resnet": "width=0.25, channels=(32, 64), blocks=(1, 1), bottleneck=True, stem_kernel=3, pool=False",
    "resnet_cifar": "depth=8",
}


@pytest.mark.parametrize("name", TINY)
def test_folded_cut_stored_and_loaded(name: str, tmp_path: Path) -> None:
    stem = ", stem_stride=1" if name not in ("vgg", "resnet_cifar") else ""
    torch.manual_seed(0)
    model, builder, given = smelt.open_model(f"{name}({TINY[name]}, classes=4{stem})")
    lively(model)
    before = model(IMAGES).detach()
    job = smelt.Job(data=smelt.Data(train=[(IMAGES, torch.arange(4))]), latency=False)
    folded = smelt.compress(smelt.Source.of(model, builder, given), ["swap.fold_norm"], job)
    torch.testing.assert_close(folded.model(IMAGES), before, atol=1e-4 * float(before.abs().max()), rtol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.model.modules())
    kinds = ["channels", "head dims", "group channels"]  # the last two are what grouped, shuffled channels are
    cut = {"ratio": 0.5, "scope": "local", "score": "magnitude", "repair": "none", "kinds": kinds}
    steps = [{"prune.channels": cut}, {"quantize.affine": {"bits": 8}}]
    result = smelt.compress(smelt.Source.of(model, builder, given), steps, job)
    assert result.report.value("parameters", 1) < 0.6 * result.report.value("parameters", 0)
    result.save(tmp_path / "m.smelt")
    assert torch.equal(smelt.load(tmp_path / "m.smelt")(IMAGES), result.model(IMAGES))
