"""prune.layers: what blocks and branches are, their scores by the formula, and models without them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.store import store_of
from smelt.methods.prune.layers import Layers
from smelt.models import resnet_digits, skip

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(2))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet_digits.build(channels=(6, 8), blocks=(3, 2)).eval()


class Layer(nn.Module):
    """A pre-norm layer called by keyword, which returns a tuple and is asked for its kind."""

    def __init__(self, strength: float):
        super().__init__()
        self.kind, self.strength = "full", strength
        self.norm, self.mix, self.norm2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        x = hidden + self.mix(self.norm(hidden)) * 1.0
        return x + self.strength * self.mlp(self.norm2(x)), None


class Decoder(nn.Module):
    def __init__(self, strengths: tuple[float, ...] = (1.0, 0.1, 1.0, 0.01)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers, self.head = nn.Embedding(20, 8), nn.ModuleList(map(Layer, strengths)), nn.Linear(8, 20)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            assert layer.kind == "full"
            x, _ = layer(hidden=x, mask=None)
        return self.head(x)  # type: ignore[no-any-return]


def job(inputs: Tensor) -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=list(inputs.split(4))), latency=False)


def paths(model: nn.Module) -> list[str]:
    return [e.path for e in store_of(model).edits]  # type: ignore[attr-defined]


@torch.no_grad()
def influence(model: nn.Module, inputs: Tensor, names: list[str], dims: int) -> dict[str, float]:
    """1 - cosine of what each module is given and gives, all at once."""
    found = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x, y = args[0] if args else kwargs["hidden"], out[0] if isinstance(out, tuple) else out
            x, y = x.flatten(0, -1 - dims).flatten(1), y.flatten(0, -1 - dims).flatten(1)
            found[name] = 1 - float(((x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)).mean())

        return see

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


def test_residual_blocks_of_least_influence_go_from_the_file(tmp_path: Any) -> None:
    model = resnet()
    blocks = ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1"]  # stages.1.0 halves the sides
    lowest = sorted((score, name) for name, score in influence(model, IMAGES, blocks, 3).items())
    result = smelt.compress(model, [Layers(count=2)], job(IMAGES))
    assert paths(result.model) == [name for _, name in lowest[:2]]
    assert [e.kind for e in store_of(result.model).edits] == ["remove", "remove"]
    assert f"took out {lowest[0][1]}, {lowest[1][1]} of 4 blocks" in result.report.notes[0]
    for _, name in lowest[:2]:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)[int(child)] = nn.Identity()  # type: ignore[index, operator]
    assert torch.equal(model(IMAGES), result.model(IMAGES))
    result.save(tmp_path / "small.smelt")
    loaded = smelt.load(tmp_path / "small.smelt", into=resnet())
    assert not any(name.startswith(tuple(n for _, n in lowest[:2])) for name in loaded.state_dict())
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))


def test_branches_give_zeros_in_place_of_convolutions() -> None:
    model = resnet()
    result = smelt.compress(
        model, [{"prune.layers": {"of": "branches", "ratio": 1.0, "on": "stages.0.*"}}], job(IMAGES)
    )
    for i in range(3):
        nn.init.zeros_(model.stages[0][i].bn2.weight)  # type: ignore[index, union-attr]
        nn.init.zeros_(model.stages[0][i].bn2.bias)  # type: ignore[index, union-attr]
    torch.testing.assert_close(result.model(IMAGES), model(IMAGES))
    assert not any(n.startswith("stages.0") for n in result.model.state_dict())
    assert "of 3 branches" in result.report.notes[-1]


def test_layers_called_by_keyword_that_return_tuples_and_have_attributes(tmp_path: Any) -> None:
    model = Decoder().eval()
    names = [f"layers.{i}" for i in range(4)]
    scores = influence(model, WORDS, names, 1)
    result = smelt.compress(model, [Layers(ratio=0.5)], job(WORDS))
    assert paths(result.model) == sorted(names, key=scores.__getitem__)[:2]
    first = store_of(result.model).edits[0].to_plain()
    assert first[0] == "replace" and first[2:] == [
        "skip",
        {"returns": ["x", None], "argument": "hidden", "attributes": first[3]["attributes"]},
    ]
    assert first[3]["attributes"]["kind"] == "full"
    x = model.embed(WORDS)
    for i in range(4):
        x = x if f"layers.{i}" in paths(result.model) else model.layers[i](x)[0]
    assert torch.equal(result.model(WORDS), model.head(x))
    result.save(tmp_path / "small.smelt")
    assert torch.equal(smelt.load(tmp_path / "small.smelt", into=Decoder())(WORDS), result.model(WORDS))


def test_branches_are_scored_by_what_they_add() -> None:
    class Plain(Layer):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:  # f(x) is a module's
            x = hidden + self.mix(self.norm(hidden))
            x += self.mlp(self.norm2(x))
            return x, None

    model = Decoder()
    model.layers = nn.ModuleList(Plain(1.0) for _ in range(2))
    with torch.no_grad():
        model.layers[1].mlp[2].weight.mul_(0.01)
        model.layers[1].mlp[2].bias.mul_(0.01)
    result = smelt.compress(model.eval(), [Layers(of="branches", count=1)], job(WORDS))
    assert paths(result.model) == ["layers.1.norm2", "layers.1.mlp"]
    assert "took out layers.1.mlp of 4 branches" in result.report.notes[-1]
    with torch.no_grad():
        model.layers[1].mlp[2].weight.zero_()
        model.layers[1].mlp[2].bias.zero_()
    assert torch.equal(result.model(WORDS), model(WORDS))


def test_consecutive_layers_by_the_angle_between_first_input_and_last_output() -> None:
    model = Decoder((1.0, 0.5, 0.1, 1.0, 0.2)).eval()
    streams = [model.embed(WORDS)]
    with torch.no_grad():
        for layer in model.layers:
            streams.append(layer(streams[-1])[0])
        angles = [
            torch.arccos(nn.functional.cosine_similarity(streams[i], streams[i + 2], dim=-1).clamp(-1, 1)).mean()
            for i in range(4)
        ]
    start = int(torch.stack(angles).argmin())
    method = Layers(count=2, score="angular", consecutive=True)
    result = smelt.compress(model, [method], job(WORDS))
    assert paths(result.model) == [f"layers.{start}", f"layers.{start + 1}"]
    with pytest.raises(RecipeError, match="no 4 blocks that follow one another"):
        smelt.compress(resnet(), [Layers(count=4, consecutive=True)], job(IMAGES))


def test_rounds_score_anew_what_is_left() -> None:
    class Go(nn.Module):
        """To the point at so many degrees, from wherever it is."""

        def __init__(self, degrees: float):
            super().__init__()
            self.step = nn.Linear(2, 2)
            self.step.weight = nn.Parameter(-torch.eye(2))
            self.step.bias = nn.Parameter(point(degrees))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.step(x)

    def point(degrees: float) -> Tensor:
        angle = torch.tensor(degrees).deg2rad()
        return torch.stack([angle.cos(), angle.sin()])

    def net() -> nn.Sequential:  # from 0 degrees by 5, 10 and 12; without the first, the second goes by 15
        return nn.Sequential(Go(5.0), Go(15.0), Go(27.0), nn.Linear(2, 2)).eval()

    data = job(point(0.0).expand(4, 2))
    assert paths(smelt.compress(net(), [Layers(count=2)], data).model) == ["0", "1"]
    assert paths(smelt.compress(net(), [Layers(count=2, rounds=2)], data).model) == ["0", "2"]
    assert paths(smelt.compress(net(), [{"prune.layers": {"count": 1, "on": ["1", "2"]}}], data).model) == ["1"]


def test_what_cannot_go_stays_and_is_named() -> None:
    class Reader(Decoder):
        def forward(self, words: Tensor) -> Tensor:
            return super().forward(words) + self.layers[3].norm.weight.sum()

    result = smelt.compress(Reader().eval(), [Layers(count=1)], job(WORDS))
    assert any("leaves layers.3 as it is: without it the model fails" in n for n in result.report.notes)
    assert len(paths(result.model)) == 1
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    found = smelt.compress(encoder.eval(), [Layers(count=1, of="branches")], job(torch.randn(4, 5, 8)))
    assert any("self_attn as it is: without it the model fails" in n for n in found.report.notes)
    assert len(paths(smelt.compress(encoder, [Layers(count=1)], job(torch.randn(4, 5, 8))).model)) == 1
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert "no blocks that could go" in smelt.compress(plain, [Layers()], job(torch.randn(8, 4))).report.notes[0]
    either = smelt.compress(plain, [Layers(count=2, residual=False)], job(torch.randn(8, 4)))
    assert sorted(paths(either.model)) == ["0", "2"]


def test_bad_requests() -> None:
    with pytest.raises(DataError, match="needs data to find blocks"):
        smelt.compress(resnet(), [Layers()])
    with pytest.raises(RecipeError, match="count is 5; there are 4 blocks"):
        smelt.compress(resnet(), [Layers(count=5)], job(IMAGES))
    with pytest.raises(RecipeError, match="give one of them"):
        Layers(count=1, ratio=0.5)
    with pytest.raises(RecipeError, match="in one round"):
        Layers(consecutive=True, rounds=2)
    for arguments in ({"returns": "y"}, {"returns": []}, {"attributes": {"forward": 1}}, {"attributes": {"a": [1]}}):
        with pytest.raises(ModelError, match="skip: "):
            skip.build(**arguments)
    model = resnet()
    model.stages[0][1].register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    notes = smelt.compress(model, [{"prune.layers": {"ratio": 1.0, "on": "stages.0.1"}}], job(IMAGES)).report.notes
    assert any("a hook acts in it" in n for n in notes)
