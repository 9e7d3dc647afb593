"""A linear layer or an embedding whose weight is a tensor train: its cores act one after another, never multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.errors import ModelError


def build(
    shape: Sequence[int] = (4, 4),
    rows: Sequence[int] = (2, 2),
    columns: Sequence[int] = (2, 2),
    ranks: Sequence[int] = (2,),
    bias: bool = False,
    embedding: bool = False,
    padding: int | None = None,
) -> nn.Module:
    """What stands for a weight of `shape` [out, in] of a linear layer, or [entries, width] of an embedding.

    The weight, padded with zeros to the products of `rows` and `columns`, is
    W[(a_1, a_2, ...), (b_1, b_2, ...)] = G_1[a_1, b_1] G_2[a_2, b_2] ..., each G_k[a, b] a matrix [ranks_k-1, ranks_k].

    Args:
        rows, columns: factors of the two dimensions, as many of each.
        ranks: between the cores, one fewer.
        padding: the embedding's entry that is zeros.

    Raises:
        ModelError: numbers that do not fit together.
    """
    several = (shape, rows, columns, ranks)
    if any(type(n) is not int or n < 1 for part in several for n in part) or len(shape) != 2:
        raise ModelError(f"tensor_train: shape, rows, columns and ranks are whole numbers from 1, not {several}")
    if not len(rows) == len(columns) == len(ranks) + 1:
        raise ModelError(f"tensor_train: rows {rows} and columns {columns} need {len(rows) - 1} ranks, not {ranks}")
    if math.prod(rows) < shape[0] or math.prod(columns) < shape[1]:
        raise ModelError(f"tensor_train: rows {rows} and columns {columns} hold less than {list(shape)}")
    if embedding:
        return TrainEmbedding(shape, rows, columns, ranks, padding)
    return TrainLinear(shape, rows, columns, ranks, bias)


class TrainLinear(nn.Module):
    """`cores.k` is a linear layer from [column factor, rank before] to [row factor, rank after]."""

    def __init__(
        self, shape: Sequence[int], rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int], bias: bool
    ):
        super().__init__()
        self.out_features, self.in_features = shape
        self.rows, self.columns, self.ranks = tuple(rows), tuple(columns), (1, *ranks, 1)
        self.cores = nn.ModuleList(
            nn.Linear(c * self.ranks[k], r * self.ranks[k + 1], bias=False)
            for k, (r, c) in enumerate(zip(rows, columns, strict=True))
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        x = functional.pad(x, (0, math.prod(self.columns) - self.in_features))
        done, left = 1, math.prod(self.columns)
        for k, (core, row, column) in enumerate(zip(self.cores, self.rows, self.columns, strict=True)):
            rank, after = self.ranks[k], self.ranks[k + 1]
            # [n, rows done, this column factor, columns left, rank] -> the factor beside the rank
            x = x.reshape(-1, done, column, left // column, rank).transpose(2, 3)
            x = core(x.reshape(-1, done, left // column, column * rank))
            x = x.reshape(-1, done, left // column, row, after).transpose(2, 3)  # the row beside those done
            done, left = done * row, left // column
        x = x.reshape(lead + (done,))[..., : self.out_features]  # noqa: RUF005 - torch.fx cannot unpack
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class TrainEmbedding(nn.Module):
    """`cores.k` is an embedding of a digit of the entry's number, as a matrix [rank before, width * rank after]."""

    def __init__(
        self,
        shape: Sequence[int],
        rows: Sequence[int],
        columns: Sequence[int],
        ranks: Sequence[int],
        padding: int | None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding
        self.rows, self.columns, self.ranks = tuple(rows), tuple(columns), (1, *ranks, 1)
        self.cores = nn.ModuleList(
            nn.Embedding(r, self.ranks[k] * c * self.ranks[k + 1])
            for k, (r, c) in enumerate(zip(rows, columns, strict=True))
        )

    def forward(self, entries: Tensor) -> Tensor:
        flat = entries.reshape(-1)
        done, left = 1, math.prod(self.rows)
        found: Tensor | None = None
        for k, (core, row, column) in enumerate(zip(self.cores, self.rows, self.columns, strict=True)):
            rank, after = self.ranks[k], self.ranks[k + 1]
            left //= row
            digit = torch.div(flat, left, rounding_mode="floor") % row
            matrix = core(digit).reshape(-1, rank, column * after)
            found = matrix if found is None else torch.bmm(found, matrix)
            done *= column
            found = found.reshape(-1, done, after)
        assert found is not None
        found = found.reshape(entries.shape + (done,))[..., : self.embedding_dim]  # noqa: RUF005 - torch.fx cannot unpack
        if self.padding_idx is None:
            return found
        return found * (entries != self.padding_idx).unsqueeze(-1).to(found.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def values(cores: Sequence[Tensor], rows: Sequence[int], columns: Sequence[int], embedding: bool) -> dict[str, Tensor]:
    """The state dict of what `build` makes, without the bias, from cores [rank, row factor * column factor, rank]."""
    found = {}
    for k, (core, row, column) in enumerate(zip(cores, rows, columns, strict=True)):
        before, _, after = core.shape
        core = core.reshape(before, row, column, after)
        # linear: [(row, after), (column, before)]; embedding: [row, (before, column, after)]
        core = core.permute(1, 0, 2, 3).flatten(1) if embedding else core.permute(1, 3, 2, 0).flatten(2).flatten(0, 1)
        found[f"cores.{k}.weight"] = core
    return found
