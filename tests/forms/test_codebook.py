from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.core.encoded import Encoded, awaken
from smelt.core.errors import FileError
from smelt.core.method import State, Stats
from smelt.core.target import Target
from smelt.forms.codebook import Codebook
from smelt.methods.code.huffman import Huffman
from smelt.methods.share.kmeans import KMeans

from .tools import damaged, read, seeds, shapes, survives


def tree(book: list[float], indices: list[list[int]], dtype: torch.dtype = torch.uint8) -> Encoded:
    leaf = torch.tensor(indices, dtype=dtype)
    return Encoded(Codebook(), {"codebook": torch.tensor(book), "indices": leaf}, leaf.shape, torch.float32)


@given(
    shapes,
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from([1, 2, 16, 300, 40_000]),
    st.sampled_from(["exact", "quantiles", "line", "density"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.floats(0, 1),
    seeds,
)
def test_nearest_shared_value(
    shape: tuple[int, ...], dtype: torch.dtype, clusters: int, start: str, book: str, density: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    where = torch.rand(shape, generator=generator) < density
    codec = KMeans(clusters, start, book)
    encoded = codec.encode(x, codec.fit(x, Stats(where=where)))
    shared, indices = (encoded.parts[k] for k in ("codebook", "indices"))
    assert isinstance(shared, torch.Tensor) and isinstance(indices, torch.Tensor)
    assert shared.dtype is getattr(torch, book) and 1 <= len(shared) <= clusters
    assert not indices[~where].any()
    nearest = shared[(x.double()[..., None] - shared.double()).abs().argmin(-1)] if x.numel() else x
    gap = (x.double() - read(encoded).double()).abs() - (x.double() - nearest.to(dtype).double()).abs()
    assert (gap[where] <= 1e-6 * (1 + x.double().abs()[where])).all()


def test_few_distinct_values_are_kept() -> None:
    x = torch.tensor([[0.5, -1.25], [3.0, 0.5]])
    for start in ("exact", "line"):
        codec = KMeans(16, start)
        encoded = codec.encode(x, codec.fit(x, Stats()))
        assert torch.equal(encoded.decode(), x)
        assert encoded.parts["codebook"].tolist() == [-1.25, 0.5, 3.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(("clusters", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_indices_are_as_narrow_as_they_can_be(clusters: int, dtype: torch.dtype) -> None:
    x = torch.arange(50_000.0)
    codec = KMeans(clusters, "line")
    encoded = codec.encode(x, codec.fit(x, Stats()))
    assert encoded.parts["indices"].dtype is dtype and len(encoded.parts["codebook"]) == clusters  # type: ignore[arg-type]
    assert (encoded.decode() - x).abs().max() <= 50_000 / clusters / 2 + 1


def test_an_unordered_codebook_is_ordered() -> None:
    x = torch.tensor([1.1, -0.9, 0.2])
    encoded = KMeans().encode(x, State(codebook=torch.tensor([1.0, -1.0, 0.0]), where=None))
    assert encoded.decode().tolist() == [1, -1, 0]


def test_refusal() -> None:
    layer = torch.nn.BatchNorm1d(300)
    for name, refused in (("num_batches_tracked", True), ("weight", False)):
        tensor = getattr(layer, name)
        assert bool(KMeans().refuses(Target(name, (("", name),), tensor, layer, True))) is refused


def test_by_hand() -> None:
    encoded = tree([0.5, -2.0], [[0, 1, 1], [1, 0, 0]])
    assert read(encoded).tolist() == [[0.5, -2, -2], [-2, 0.5, 0.5]]
    book = encoded.parts["codebook"]
    assert isinstance(book, torch.Tensor)
    book.requires_grad_()
    (encoded.decode() * torch.tensor([[1.0, 2, 3], [4, 5, 6]])).sum().backward()
    assert book.grad is not None and book.grad.tolist() == [12, 9]


def test_gradients_and_what_is_kept_for_them() -> None:
    book = torch.randn(5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, 4, (3, 7), dtype=torch.int16)

    def decode(b: torch.Tensor) -> torch.Tensor:
        return Codebook().decode({"codebook": b, "indices": indices}, indices.shape, b.dtype)

    assert torch.autograd.gradcheck(decode, book) and torch.autograd.gradgradcheck(decode, book)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        decode(book)
    assert kept == [21 * 2]
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    Codebook().decode(
        {"codebook": half, "indices": torch.zeros(5000).byte()}, torch.Size([5000]), half.dtype
    ).sum().backward()
    assert half.grad is not None and half.grad.tolist() == [5000, 0]


@pytest.mark.parametrize("bad", [2, 7, -1])
def test_an_index_beyond_the_codebook(bad: int) -> None:
    encoded = tree([0.5, -2.0], [[0, bad]], torch.int16)
    for act in (encoded.decode, lambda: awaken(encoded)):
        with pytest.raises(FileError, match=r"index|indices"):
            act()


def test_false_claims() -> None:
    good = tree([0.5, -2.0], [[0, 1]])
    for parts in (
        {"codebook": torch.tensor([])},
        {"codebook": torch.tensor(1.0)},
        {"codebook": torch.tensor([1, 2])},
        {"indices": torch.tensor([[0, 1]])},
        {"indices": torch.tensor([[0.0, 1.0]])},
        {"indices": torch.tensor([[0], [1]], dtype=torch.uint8)},
        {"indices": torch.tensor([0], dtype=torch.uint8)},
        {"more": torch.tensor([1.0])},
    ):
        assert not survives(replace(good, parts={**good.parts, **parts}))
    assert not survives(replace(good, parts={"indices": good.parts["indices"]}))
    assert not survives(replace(good, shape=torch.Size([10**12])))
    assert not survives(replace(good, shape=torch.Size([-1, -2])))
    assert not survives(replace(good, dtype=torch.int32))


@given(seeds)
def test_damage(seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 7, (9, 8)).tolist()
    plain = tree([1.0, 2, 3, 4, 5, 6, 7], indices)
    coded = plain.map(lambda _, leaf: Huffman().encode(leaf, State()))
    for whole in (plain, coded):
        assert torch.equal(read(whole), plain.decode())
        for broken in damaged(whole, seed, 8):
            survives(broken)
