"""Orthogonal matrices at random, Hadamard ones where their size allows it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(n: int, generator: torch.Generator, kind: str = "hadamard") -> Tensor:
    """[n, n] orthogonal, float64.

    'hadamard': a Hadamard matrix / sqrt(n) whose columns have random signs, where `hadamard` knows one; else, and for
    'orthogonal', uniform among all orthogonal matrices (QR of normal numbers, the diagonal of R made positive).
    """
    found = hadamard(n) if kind == "hadamard" else None
    if found is not None:
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        return found * signs / math.sqrt(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    made: Tensor = q * r.diagonal().sign()
    return made


def hadamard(n: int) -> Tensor | None:
    """[n, n] of +-1 with H H^T = n I, float64: a power of two (Sylvester) times 1, or times q + 1 (q = 3 mod 4) or
    2 q + 2 (q = 1 mod 4) for a prime q (Paley 1933, constructions I and II); None where n is no such product."""
    power, odd = 1, n
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    while True:
        if (core := _core(n // power)) is not None:
            for _ in range(power.bit_length() - 1):
                core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
            return core
        if power == 1:
            return None
        power //= 2


def _core(m: int) -> Tensor | None:
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m % 4:
        return None
    if _prime(m - 1):  # m is a multiple of 4, so m - 1 = 3 mod 4
        edge = torch.ones(m - 1, dtype=torch.float64)
        skew = torch.zeros(m, m, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = edge, -edge, _residues(m - 1)
        return skew + torch.eye(m, dtype=torch.float64)
    q = m // 2 - 1
    if q % 4 == 1 and _prime(q):
        c = torch.ones(q + 1, q + 1, dtype=torch.float64)
        c[0, 0], c[1:, 1:] = 0, _residues(q)
        a, b = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
        return torch.kron(c, a) + torch.kron(torch.eye(q + 1, dtype=torch.float64), b)
    return None


def _residues(q: int) -> Tensor:
    """[q, q]: 1 where i - j is a square other than 0 modulo the prime q, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1
    character[0] = 0
    i = torch.arange(q)
    return character[(i[:, None] - i) % q]


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))
