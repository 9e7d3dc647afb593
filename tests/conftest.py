"""Small models and data that many tests share."""

import pytest
import torch
from torch import nn

import smelt
from smelt.core.data import Batches, Data, fingerprint

torch.set_num_threads(1)


def two_moons(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two interleaved half circles with noise: learnt by a small MLP in a second."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(n, generator=generator) * torch.pi
    label = torch.randint(0, 2, (n,), generator=generator)
    x = torch.stack([angle.cos() + label, (1 - 2 * label) * angle.sin() + 0.5 * label], 1)
    return x + 0.1 * torch.randn(x.shape, generator=generator), label


@pytest.fixture
def data() -> Data:
    splits = {"train": Batches(*two_moons(512, 1), batch_size=64, shuffle=True), "test": Batches(*two_moons(512, 2))}
    return Data(**splits, name="moons", fingerprint=fingerprint(splits))


def mlp(seed: int = 0, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture(scope="session")
def trained_state() -> dict[str, torch.Tensor]:
    model = mlp()
    x, y = two_moons(512, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture
def model(trained_state: dict[str, torch.Tensor]) -> nn.Sequential:
    """A trained MLP: linear layers at 0, 2 and 4."""
    made = mlp()
    made.load_state_dict(trained_state)
    return made.eval()


@pytest.fixture
def job(data: Data) -> smelt.Job:
    return smelt.Job(data=data, latency=False)
