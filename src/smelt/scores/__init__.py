"""Shelf of scores: how important each weight is, apart from what is cut by it.

One file per score, with one function `score(x, generator) -> Tensor` of the same shape; larger is kept.
"""
