"""share.product and share.kernels, and the k-means of vectors below them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, RecipeError
from smelt.core.statistic import of_weights
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.grids import order, vectors
from smelt.methods.share.kernels import Kernels
from smelt.methods.share.product import Product


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(codec: smelt.core.method.Codec, x: Tensor, **stats: object) -> float:
    decoded = codec.encode(x, codec.fit(x, smelt.Stats(**stats))).decode()  # type: ignore[arg-type]
    return float((decoded - x).norm() / x.norm())


def test_kmeans_is_as_good_as_another() -> None:
    x = noise(1, 600, 4)
    centers = vectors.kmeans(vectors.Vectors(x), 20, 0)
    cost = vectors.Vectors(x).nearest(centers)[2].sum()
    other = KMeans(20, n_init=1, random_state=0).fit(x[0].numpy())
    assert float(cost) < 1.05 * other.inertia_
    squares = (x[0][:, None] - centers).square().sum(2)
    index, factor, costs = vectors.Vectors(x).nearest(centers)
    assert torch.equal(index[0], squares.argmin(1)) and bool((factor == 1).all())
    torch.testing.assert_close(costs[0], squares.min(1).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["weight", "moments"])
@pytest.mark.parametrize("factor", ["none", "positive", "signed"])
def test_nearest_and_means_are_the_best(kind: str, factor: str) -> None:
    """Against the formula for every vector, and against small changes of the centers."""
    x, d = noise(3, 40, 4), 4
    root = noise(3, d, d, seed=2)
    weight = torch.rand(3, 40, d, generator=torch.Generator().manual_seed(3))
    of = {"weight": {"weight": weight}, "moments": {"moments": root @ root.mT + 0.1 * torch.eye(d)}}[kind]
    seen = vectors.Vectors(x, **of, factor=factor)  # type: ignore[arg-type]
    centers = noise(5, d, seed=4)
    index, scale, cost = seen.nearest(centers)
    for s, n in [(0, 0), (1, 17), (2, 39)]:
        m = weight[s, n].diag() if kind == "weight" else of["moments"][s]
        each = []
        for c in centers:
            f = torch.tensor(1.0) if factor == "none" else (x[s, n] @ m @ c) / (c @ m @ c)
            f = f.clamp_min(0) if factor == "positive" else f
            each.append(((e := x[s, n] - f * c) @ m @ e, f))
        costs = torch.stack([c for c, _ in each])
        assert costs[index[s, n]] == pytest.approx(float(costs.min()), rel=1e-4)
        assert float(cost[s, n]) == pytest.approx(float(costs.min()), rel=1e-3, abs=1e-5)
        assert float(scale[s, n]) == pytest.approx(float(each[index[s, n]][1]), rel=1e-3, abs=1e-5)
    if factor == "none":
        found = seen.means(index, scale, centers).requires_grad_()
        e = x - found[index]
        paid = (e * e * weight).sum() if kind == "weight" else torch.einsum("snd,sde,sne->", e, of["moments"], e)
        assert float(torch.autograd.grad(paid, found)[0].abs().max()) < 1e-2
    again = seen.nearest(seen.means(index, scale, centers))[2]
    assert float(again.sum()) < float(cost.sum())


def test_few_vectors_are_kept() -> None:
    x = torch.cat([noise(6, 4)] * 5)[None]
    assert float(vectors.Vectors(x).nearest(vectors.kmeans(vectors.Vectors(x), 6, 1))[2].sum()) < 1e-5
    assert len(vectors.kmeans(vectors.Vectors(x), 100, 1)) == 30
    assert float(vectors.Vectors(x * 0).nearest(vectors.kmeans(vectors.Vectors(x * 0), 6, 1))[2].sum()) == 0


@pytest.mark.parametrize(
    ("shape", "settings", "book", "indices"),
    [
        ((300, 40), {}, (256, 4), (300, 10)),
        ((300, 42), {"length": 8}, (256, 8), (300, 6)),
        ((64, 32, 3, 3), {"length": "kernel", "clusters": 64}, (64, 9), (64, 32)),
        ((64, 32, 3, 3), {"along": "inputs", "length": 8}, (256, 8), (64 * 9, 4)),
        ((2000,), {"clusters": 16}, (16, 4), (1, 500)),
    ],
)
def test_layouts(shape: tuple[int, ...], settings: dict[str, object], book: object, indices: object) -> None:
    codec = Product(**settings)  # type: ignore[arg-type]
    encoded = codec.encode(noise(*shape), codec.fit(noise(*shape), smelt.Stats()))
    assert (tuple(encoded.parts["codebook"].shape), tuple(encoded.parts["indices"].shape)) == (book, indices)
    decoded = encoded.decode()
    assert decoded.shape == shape and float((decoded - noise(*shape)).norm() / noise(*shape).norm()) < 0.9


def known(layer: nn.Module, names: tuple[str, ...], inputs: Tensor) -> dict[str, object]:
    target = targets(layer)[0]
    return of_weights(layer, [target], names, [(inputs, torch.zeros(len(inputs)))])[target.name]


@pytest.mark.parametrize("along", ["rest", "inputs"])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_moments_make_the_error_at_the_output_smaller(kind: str, along: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        layer: nn.Module = nn.Linear(32, 64, bias=False)
        inputs = noise(500, 32) @ noise(32, 32, seed=1) * torch.logspace(-1, 1, 32)
    else:
        layer = nn.Conv2d(8, 48, 3, bias=False, groups=2 if kind == "grouped" else 1)
        inputs = torch.einsum("nchw,cd->ndhw", noise(20, 8, 9, 9), noise(8, 8, seed=1))
        inputs = nn.functional.avg_pool2d(inputs, 2, 1) * torch.logspace(-1, 1, 8)[:, None, None]
    x = layer.weight.detach().clone()
    lost = {}
    for name, needs in {"weights": (), "diagonal": ("second_moment",), "moments": ("gram",)}.items():
        codec = Product(clusters=16, error=name, along=along)
        assert codec.needs_at("weight") == needs
        stats = smelt.Stats(gathered=known(layer, needs, inputs), seed=1)
        decoded = codec.encode(x, codec.fit(x, stats)).decode()
        layer.weight.data = x
        wanted = layer(inputs)
        layer.weight.data = decoded
        lost[name] = float((layer(inputs) - wanted).detach().square().mean())
        layer.weight.data = x
    assert lost["moments"] < lost["diagonal"] < 0.95 * lost["weights"]


def test_moments_of_pruned_tensors_and_of_none() -> None:
    layer = nn.Linear(32, 64, bias=False)
    x, where = layer.weight.detach(), noise(64, 32) > 0
    codec = Product(clusters=16, error="moments")
    gathered = known(layer, ("gram",), noise(100, 32))
    loud = codec.encode(x.where(where, 1e6), codec.fit(x.where(where, 1e6), smelt.Stats(where, gathered))).decode()
    quiet = codec.encode(x.where(where, 0), codec.fit(x.where(where, 0), smelt.Stats(where, gathered))).decode()
    assert torch.equal(loud[where], quiet[where])
    with pytest.raises(DataError, match="give the job data"):
        smelt.compress(nn.Sequential(nn.Linear(64, 64)), [codec])
    reason = codec.refuses(targets(nn.ConvTranspose2d(32, 64, 3))[0])
    assert reason is not None and "not transposed" in reason
    assert "linear layers" in str(codec.refuses(targets(nn.Embedding(400, 64))[0]))


def test_an_order_of_channels() -> None:
    """Channels in pairs that are the same up to a factor: the order puts them into one vector."""
    base = noise(8, 200)
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    channels = torch.cat((base, 3 * base + 0.01 * noise(8, 200, seed=2)))[shuffled]
    found = order.found(channels[:, None], 2, 0)
    pairs = {frozenset((shuffled[found] % 8)[i : i + 2].tolist()) for i in range(0, 16, 2)}
    assert sorted(found.tolist()) == list(range(16)) and all(len(pair) == 1 for pair in pairs)
    x = channels.T.contiguous()
    plain, better = (error(Product(clusters=16, length=2, permute=p), x) for p in (False, True))
    assert better < 0.7 * plain
    conv = channels.reshape(16, 20, 10).permute(1, 0, 2).reshape(20, 16, 10, 1).contiguous()
    assert error(Product(clusters=16, length=2, along="inputs", permute=True), conv) == pytest.approx(better, rel=0.05)
    codec = Product(clusters=64, length=20, permute=True)
    encoded = codec.encode(conv, codec.fit(conv, smelt.Stats()))
    assert encoded.parts["place"].dtype is torch.int16 and encoded.parts["codebook"].shape == (64, 20)
    reason = Product(length="kernel", permute=True).refuses(targets(nn.Conv2d(64, 64, 3))[0])
    assert reason is not None and "hold no whole channels, or one each" in reason


def test_refusals() -> None:
    assert "has no dimension" in str(Product().refuses(targets(Scalar())[0]))
    assert "36 vectors with 36 indices need" in str(Product().refuses(targets(nn.Linear(10, 12))[0]))
    assert "8 entries for 8 need" in str(Kernels(share=1.0).refuses(targets(nn.Linear(10, 8))[0]))
    assert "neither kernels nor rows" in str(Kernels().refuses(targets(nn.Linear(400, 400))[1]))
    for cls, settings, message in (
        (Product, {"length": "row"}, "'row'; it takes a whole number, or 'kernel'"),
        (Product, {"length": 0}, "length"),
        (Kernels, {"clusters": 4, "share": 0.5}, "clusters and share each"),
    ):
        with pytest.raises(RecipeError, match=message):
            cls(**settings)  # type: ignore[operator]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("scale", ["none", "positive", "signed"])
def test_kernels_that_are_there_are_found(scale: str) -> None:
    entries = noise(5, 9) / noise(5, 9).norm(dim=1, keepdim=True)
    which = torch.randint(0, 5, (20, 6), generator=torch.Generator().manual_seed(0))
    factor = noise(20, 6, seed=3)
    factor = {"none": torch.ones_like(factor), "positive": factor.abs() + 0.1, "signed": factor}[scale]
    x = (factor[..., None] * entries[which]).reshape(20, 6, 3, 3)
    assert error(Kernels(clusters=5, scale=scale, scales="float32"), x) < 1e-3
    if scale == "signed":
        assert error(Kernels(clusters=5, scale="none"), x) > 0.2


def test_kernels_and_rows_of_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 24), nn.Unflatten(1, (4, 6)), nn.Conv1d(4, 64, 3), nn.ReLU(),
                          nn.ConvTranspose1d(64, 8, 3), nn.Flatten(), nn.Linear(48, 90))  # fmt: skip
    result = smelt.compress(model, [{"prune.weights": {"ratio": 0.4, "on": "2"}}, "share.kernels"])
    trees = {n: str(e.encoded) for n, e in store_of(result.model).entries.items()}
    inner = "scaled(values: product)"
    assert trees == {"0.weight": inner, "2.weight": f"sparse(values: {inner})", "4.weight": inner, "6.weight": inner}
    assert int((result.model[2].weight == 0).sum()) == 307
    scale = {n: tuple(dict(e.encoded.leaves()).get("scale", torch.ones(1)).shape)
             for n, e in store_of(result.model).entries.items()}  # fmt: skip
    assert scale["0.weight"] == (200,) and scale["4.weight"] == (64, 8) and scale["6.weight"] == (90,)
    result.save(tmp_path / "k.smelt")
    loaded = smelt.load(tmp_path / "k.smelt", into=model)
    words = torch.arange(9)
    assert torch.equal(loaded(words), result.model(words))


@pytest.mark.parametrize("settings", [{"share.product": {"clusters": 8}}, {"share.kernels": {}}], ids=str)
def test_gradients_are_sums_over_places(settings: dict[str, object]) -> None:
    model = smelt.compress(nn.Sequential(nn.Linear(20, 80)), [settings]).model
    tree = store_of(model).entries["0.weight"].encoded
    leaves = dict(tree.leaves())
    slope, name = noise(80, 20, seed=5), next(n for n in leaves if n.endswith("codebook"))
    index, length = leaves[name.replace("codebook", "indices")].long(), leaves[name].shape[1]
    with smelt.training(model) as t:
        t.parameters()
        (model[0].weight * slope).sum().backward()
        named = dict(t.named_parameters())
    found = named[f"0.weight/{name}"].grad
    each = slope.reshape(80, -1, length)
    if "scale" in leaves:
        each = each * leaves["scale"].float().reshape(80, -1, 1)
    expected = torch.zeros_like(leaves[name])
    for k in range(len(expected)):
        expected[k] = each[index.reshape(80, -1) == k].sum(0)
    torch.testing.assert_close(found, expected)


def test_repeats_and_follows_the_seed() -> None:
    x, codec = noise(100, 64), Product(clusters=32)
    first, again, other = (codec.fit(x, smelt.Stats(seed=s)).codebook for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert np.isfinite(first.numpy()).all()
