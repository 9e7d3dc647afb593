"""A residual network in torchvision's style, your own loaders, your own metric.

python examples/own_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import smelt


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


def build() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [BasicBlock(16, 16), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def top2(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    """A metric is a function of outputs and labels."""
    return 100 * (outputs.topk(2, 1).indices == labels[:, None]).any(1).float().mean().item()


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
whole = TensorDataset(images, torch.tensor(digits.target))
train, valid, test = random_split(whole, [1000, 300, 497], torch.Generator().manual_seed(0))
data = smelt.Data(
    DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(0)),
    DataLoader(valid, 500),
    DataLoader(test, 500),
    name="my digits",
)

recipe = """
steps:
  - train: {epochs: 6, lr: 3e-3}
  - lowrank.svd: {ratio: 0.5, on: "*conv2"}       # convolutions become chains of two
  - train:
      epochs: 4
      with:
        - quantize.affine: {bits: 4}              # quantization-aware; stored in 4 bits at the end
  - code.huffman
"""
result = smelt.compress(build(), recipe, smelt.Job(data=data, metric=top2))
size = result.save("my_model.smelt", force=True)
print(f"{result.report.value('file', 0):,.0f} -> {size:,} bytes ({result.report.ratio():.1f}x), {result.report.notes}")
for step, name in result.report.steps():
    print(f"{name:15} {result.report.value('file', step):9,.0f} bytes  top-2 {result.report.value('top2', step):.2f} %")

again = smelt.load("my_model.smelt", into=build())  # the file holds no code: it is filled into what you build
assert torch.equal(again(images[:8]), result.model(images[:8]))
