"""Shelf of scores: how important each weight is, apart from what is cut by it.

One file per score, with

    NEEDS = ("fisher",)                  the statistics it reads, names on the shelf `statistics/` (see `of_weights`)
    score(x, seen, generator) -> Tensor  of the shape of the weight `x`; larger is kept

where `seen` maps each name in NEEDS to what was found, of a shape that broadcasts to `x`.
"""
