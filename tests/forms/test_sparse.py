from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelt.core.encoded import Encoded, Form, awaken
from smelt.core.errors import FileError
from smelt.core.method import State
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.sparse import CAPS, Sparse, from_gaps, to_gaps
from smelt.methods.code.huffman import Huffman

from .tools import bits_of, damaged, read, seeds, shapes, survives


@dataclass(frozen=True)
class Twice(Form):
    """A form with a floating aligned part."""

    values: ClassVar[tuple[str, ...]] = ("half",)
    aligned: ClassVar[tuple[str, ...]] = ("half",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts["half"] * 2


def pruned(values: Tensor | Encoded, mask: Tensor) -> Encoded:
    return Encoded(Sparse(), {"mask": mask, "values": values}, mask.shape, values.dtype)


def tree(shape: tuple[int, ...], density: float, kind: str, seed: int, dead: bool = False) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape)
    mask = torch.rand(size, generator=generator) < density
    if dead and len(size) > 1:
        mask &= torch.rand(size[1:], generator=generator) < 0.5
    x = torch.randn(size, generator=generator)
    if kind in ("float16", "float32"):
        return pruned(x.to(getattr(torch, kind)), mask)
    if kind == "sparse":
        return pruned(pruned(x, x > 0), mask)
    if kind == "twice":
        return pruned(Encoded(Twice(), {"half": pruned(x, x > 0)}, size, x.dtype), mask)
    parts: dict[str, Tensor | Encoded]
    if kind == "codebook":
        form: Form = Codebook()
        parts = {"codebook": torch.randn(5), "indices": torch.randint(0, 5, size, generator=generator).to(torch.int16)}
    else:
        form = {"tensor": Affine(), "channel": Affine(0), "group": Affine(0, 4, 4, False)}[kind if size else "tensor"]
        assert isinstance(form, Affine)
        side = form.side_shape(size)
        parts = {
            "codes": torch.randint(0, 9, size, generator=generator).to(torch.int8),
            "scale": torch.rand(side) + 0.1,
        }
        if not form.symmetric:
            parts["zero"] = torch.randint(0, 9, side, generator=generator)
    return pruned(Encoded(form, parts, size, torch.float32), mask)


def code(node: Encoded) -> Encoded:
    """As a writer does: every leaf coded."""
    return node.map(lambda _, leaf: Huffman().encode(leaf, State()))


kinds = st.sampled_from(["float16", "float32", "codebook", "tensor", "channel", "group", "sparse", "twice"])


@settings(max_examples=200)
@given(shapes, st.sampled_from([0, 0.05, 0.5, 0.95, 1]), kinds, st.booleans(), seeds)
def test_round_trip_in_every_packing(shape: tuple[int, ...], density: float, kind: str, dead: bool, seed: int) -> None:
    plain = tree(shape, density, kind, seed, dead)
    kept = plain.where()
    assert kept is not None
    found = plain.form.at_rest(plain)
    assert 1 <= len(found) <= 3
    for rest in (*found, *(code(r) for r in found)):
        awake = awaken(rest)
        assert isinstance(awake, Encoded) and awake.form == Sparse()
        assert torch.equal(read(rest), plain.decode())
        where = awake.where()
        assert where is not None and torch.equal(where, kept)
        if kind in ("sparse", "twice"):
            continue
        before, after = dict(plain.leaves()), dict(awake.leaves())
        assert before.keys() == after.keys()
        for path, leaf in before.items():
            aligned = path in ("values", "values.indices", "values.codes")
            masked = torch.where(kept, leaf, torch.zeros_like(leaf)) if aligned else leaf
            assert after[path].dtype == leaf.dtype and after[path].shape == leaf.shape
            assert bits_of(after[path]) == bits_of(masked) or torch.equal(after[path], masked)


@given(shapes, st.sampled_from([0, 0.01, 0.3, 1]), st.sampled_from(CAPS), st.booleans(), seeds)
def test_every_gap_and_walk(shape: tuple[int, ...], density: float, gap: int, columns: bool, seed: int) -> None:
    plain = tree(shape, density, "float32", seed)
    mask, values = plain.parts["mask"], plain.parts["values"]
    assert isinstance(mask, Tensor) and isinstance(values, Tensor)
    columns = columns and mask.dim() > 1
    walk = (mask.movedim(0, -1) if columns else mask).reshape(-1)
    flat = (values.movedim(0, -1) if columns else values).reshape(-1)[walk]
    parts = {"positions": torch.from_numpy(to_gaps(walk.numpy(), gap)), "values": flat}
    rest = Encoded(Sparse(True, gap, columns), parts, plain.shape, plain.dtype)
    assert torch.equal(read(rest), plain.decode())
    assert mask.numel() < gap * parts["positions"].numel()


def slow_gaps(walk: list[bool], gap: int) -> list[int]:
    symbols, zeros = [], 0
    for kept in [*walk, True]:
        if kept:
            symbols.append(zeros)
            zeros = 0
        else:
            zeros += 1
            if zeros == gap:
                symbols.append(gap)
                zeros = 0
    return symbols


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 20), st.integers(0, 60))
def test_gaps_equal_their_definition(walk: list[bool], gap: int, zeros: int) -> None:
    walk = [*walk, *[False] * zeros, *walk]
    symbols = to_gaps(np.array(walk, bool), gap)
    assert symbols.tolist() == slow_gaps(walk, gap)
    assert from_gaps(symbols, gap, len(walk)).tolist() == walk


def test_by_hand() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask.view(-1)[[2, 18]] = True  # 2 zeros; 15 zeros; 1 zero to the end
    plain = pruned(torch.arange(1.0, 21).reshape(4, 5), mask)
    symbols = torch.tensor([2, 15, 0, 1], dtype=torch.uint8)
    rest = Encoded(
        Sparse(True, 15), {"positions": symbols, "values": torch.tensor([3.0, 19])}, plain.shape, plain.dtype
    )
    assert to_gaps(mask.reshape(-1).numpy(), 15).tolist() == symbols.tolist()
    assert torch.equal(read(rest), plain.decode())
    # by columns: element (0, 2) is the ninth, (3, 3) the sixteenth
    columns = {"positions": torch.tensor([8, 6, 4], dtype=torch.uint8), "values": torch.tensor([3.0, 19])}
    assert torch.equal(read(replace(rest, form=Sparse(True, 15, True), parts=columns)), plain.decode())


def test_gradients() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    values = torch.tensor([[1.0, float("nan")], [3, 4]], requires_grad=True)
    decoded = pruned(values, mask).decode()
    assert decoded.tolist() == [[1, 0], [0, 4]]
    (decoded * torch.tensor([[2.0, 3], [4, 5]])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[2, 0], [0, 5]]
    book = torch.randn(3, requires_grad=True)
    inner = Encoded(
        Codebook(), {"codebook": book, "indices": torch.tensor([[0, 1], [2, 1]]).byte()}, mask.shape, book.dtype
    )
    pruned(inner, mask).decode().sum().backward()
    assert book.grad is not None and book.grad.tolist() == [1, 1, 0]


def test_dead_inputs_are_cheaper_by_columns() -> None:
    mask = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.1).expand(200, 300).contiguous()
    found = pruned(torch.randn(200, 300), mask)
    sizes = {rest.form: code(rest).nbytes() for rest in found.form.at_rest(found)}
    best = min(sizes, key=sizes.__getitem__)
    assert isinstance(best, Sparse) and best.columns


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_best_packing_is_among_the_candidates(density: float) -> None:
    mask = torch.rand(200, 300, generator=torch.Generator().manual_seed(0)) < density
    walk = mask.reshape(-1)
    every = [
        code(Encoded(Sparse(), {"p": torch.from_numpy(to_gaps(walk.numpy(), g))}, mask.shape, torch.bool)) for g in CAPS
    ]
    every.append(code(Encoded(Sparse(), {"p": walk}, mask.shape, torch.bool)))
    found = pruned(torch.zeros(200, 300), mask)
    offered = [Huffman().encode(r.parts["positions"], State()).nbytes() for r in found.form.at_rest(found)]  # type: ignore[arg-type]
    assert min(offered) <= 1.02 * min(e.nbytes() for e in every)
    share = torch.tensor([density, 1 - density]).double()
    assert min(offered) < 1.12 * float(-(share * share.log2()).sum()) * mask.numel() / 8


def test_masks_directly_below_one_another_are_joined() -> None:
    plain = tree((6, 8), 0.5, "sparse", 1)
    for rest in plain.form.at_rest(plain):
        awake = awaken(rest)
        assert isinstance(awake, Encoded) and isinstance(awake.parts["values"], Tensor)
        assert awake.parts["values"].count_nonzero() == plain.decode().count_nonzero()


def packed(symbols: list[int], values: list[float], shape: tuple[int, ...], form: Sparse = Sparse(True, 15)) -> Encoded:  # noqa: B008
    parts = {"positions": torch.tensor(symbols, dtype=torch.uint8), "values": torch.tensor(values)}
    return Encoded(form, parts, torch.Size(shape), torch.float32)


@pytest.mark.parametrize(
    ("symbols", "values", "shape"),
    [
        ([2, 15, 0], [3.0, 19.0], (20,)),  # no last symbol
        ([2, 15, 0, 1], [3.0], (20,)),
        ([2, 15, 0, 1], [3.0, 4.0, 5.0], (20,)),
        ([2, 15, 0, 2], [3.0, 19.0], (20,)),
        ([2, 15, 1, 15], [3.0, 19.0], (34,)),  # ends in a filler
        ([2, 16, 0, 1], [3.0, 19.0], (20,)),  # beyond the cap
        ([], [], (0,)),
        ([1], [], (0,)),
        ([0], [], (10**12,)),
        ([15] * 100, [], (-1,)),
    ],
)
def test_false_gaps(symbols: list[int], values: list[float], shape: tuple[int, ...]) -> None:
    with pytest.raises(FileError):
        read(packed(symbols, values, shape))


@pytest.mark.parametrize(
    "fields",
    [
        {"gap": 16},
        {"gap": "15"},
        {"gap": -15},
        {"gap": True},
        {"gap": 0},
        {"columns": True},
        {"columns": 1},
        {"packed": False},
    ],
)
def test_false_fields(fields: dict[str, Any]) -> None:
    good = packed([2, 15, 0, 1], [3.0, 19.0], (20,))
    assert survives(good)
    assert not survives(replace(good, form=replace(Sparse(True, 15), **fields)))


def test_packed_trees_must_be_awakened() -> None:
    with pytest.raises(FileError, match="awakened"):
        packed([2, 15, 0, 1], [3.0, 19.0], (20,)).decode()


def test_flat_leaves_need_a_mask_above() -> None:
    inner = tree((4, 6), 0.3, "channel", 0)
    (rest, *_) = inner.form.at_rest(inner)
    naked = rest.parts["values"]
    assert isinstance(naked, Encoded)
    with pytest.raises(FileError, match="'codes'"):
        read(naked)
    with pytest.raises(FileError):
        naked.decode()


@settings(max_examples=150)
@given(kinds, seeds, st.booleans())
def test_damage(kind: str, seed: int, coded: bool) -> None:
    plain = tree((5, 3, 4), 0.3, kind, seed)
    for rest in (plain, *plain.form.at_rest(plain)):
        for broken in damaged(code(rest) if coded else rest, seed, 5):
            survives(broken)
