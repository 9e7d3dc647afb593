"""From labels that met to classes of labels that are cut together.

A class is free, fixed (with a reason), or a product: cut where one of its two factors is cut.  Where the model takes
one dimension apart in two ways, only the factor that leaves most freedom may be cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smelt.graph.labels import Ids, Labels, Product

_FREE = np.iinfo(np.int64).max
OTHERWISE = "the model takes its dimension apart in more than one way"


class Classes:
    """What became of the labels.

    root: label -> class.
    factors: [2, class] the two factors of a class that is a product, else -1.
    teams, sets: class -> its team, and its set in there, or -1; the sets of a team must keep equally many.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self.root: Ids = np.arange(labels.n)
        self.reasons = [reason for _, reason in labels.fixed]
        self._why: Ids = np.full(labels.n, _FREE)
        for i, (ids, _) in enumerate(labels.fixed):
            np.minimum.at(self._why, ids, i)
        grids = labels.products
        self._x = _joined([p.x.ravel() for p in grids])
        self._a = _joined([np.repeat(p.a, len(p.b)) for p in grids])
        self._b = _joined([np.tile(p.b, len(p.a)) for p in grids])
        self._of = _joined([np.full(p.x.size, i) for i, p in enumerate(grids)])
        self.factors: Ids = np.full((2, labels.n), -1)
        self.sets, self.teams = np.full((2, labels.n), -1)
        self._unite(_joined([a for a, _ in labels.pairs]), _joined([b for _, b in labels.pairs]))
        self._simplify()
        self._tie()
        self._orient()
        while self._even():
            self._simplify()
            self._orient()

    def fixed(self, ids: Ids) -> NDArray[np.bool_]:
        return np.not_equal(self._why[self.root[ids]], _FREE)

    def reason(self, label: int) -> str:
        return str(self.reasons[self._why[self.root[label]]])

    def leaves(self, ids: Ids) -> tuple[Ids, Ids]:
        """(place in ids, class) of every free class that the labels depend on."""
        place, classes = np.arange(len(ids)), self.root[ids]
        for _ in range(8):
            composed = self.factors[0, classes] >= 0
            if not composed.any():
                break
            place = np.concatenate([place[~composed], place[composed], place[composed]])
            parts = self.factors[:, classes[composed]]
            classes = np.concatenate([classes[~composed], parts[0], parts[1]])
        free = (self._why[classes] == _FREE) & (self.factors[0, classes] < 0)
        return place[free], classes[free]

    def cut(self, classes: Ids) -> NDArray[np.bool_]:
        """For every label, whether it goes when these classes go."""
        gone = np.zeros(len(self.root), dtype=bool)
        gone[classes] = True
        made = np.flatnonzero(self.factors[0] >= 0)
        for _ in range(8):
            gone[made] |= gone[self.factors[0, made]] | gone[self.factors[1, made]]
        return gone[self.root]

    def _unite(self, a: Ids, b: Ids) -> bool:
        changed = unite(self.root, a, b)
        if changed:
            least = np.full_like(self._why, _FREE)
            np.minimum.at(least, self.root, self._why)
            self._why = least[self.root]
        return changed

    def _fix(self, ids: Ids, why: Ids) -> bool:
        before = self._why[self.root[ids]]
        np.minimum.at(self._why, self.root[ids], why)
        self._why = self._why[self.root]
        return not np.array_equal(before, self._why[self.root[ids]])

    def _simplify(self) -> None:
        """What follows from products: until nothing more does."""
        changed = True
        while changed and len(self._x):
            x, a, b = self.root[self._x], self.root[self._a], self.root[self._b]
            fx, fa, fb = (self._why[v] != _FREE for v in (x, a, b))
            rest_a, rest_b = fx & ~fa, fx & ~fb
            changed = bool(rest_a.any() or rest_b.any())
            if changed:
                self._fix(
                    np.concatenate([a[rest_a], b[rest_b]]),
                    np.concatenate([self._why[x[rest_a]], self._why[x[rest_b]]]),
                )
            both, fa, fb = fa & fb, fa & ~fb, fb & ~fa
            if (both & ~fx).any():
                self._fix(x[both], np.maximum(self._why[a[both]], self._why[b[both]]))
                changed = True
            first, second = [x[fa], x[fb], x[a == b]], [b[fa], a[fb], a[a == b]]
            low, high = np.minimum(a, b), np.maximum(a, b)
            order = np.lexsort((high, low))
            same = (low[order][1:] == low[order][:-1]) & (high[order][1:] == high[order][:-1])
            first.append(x[order][1:][same])
            second.append(x[order][:-1][same])
            known: dict[tuple[bytes, int], int] = {}
            for i, p in enumerate(self.labels.products):
                j = known.setdefault((self.root[p.x].tobytes(), len(p.a)), i)
                if j != i:
                    twin = self.labels.products[j]
                    first += [p.a, p.b]
                    second += [twin.a, twin.b]
            changed |= self._unite(np.concatenate(first), np.concatenate(second))

    def _tie(self) -> None:
        """Axes that must be equally long become one, but where they hold the same classes anyway, in any order."""
        for a, b in self.labels.ties:
            if not np.array_equal(np.sort(self.root[a]), np.sort(self.root[b])):
                self._unite(a, b)
                self._simplify()

    def _live(self) -> NDArray[np.bool_]:
        x, a, b = self.root[self._x], self.root[self._a], self.root[self._b]
        free = (self._why[x] == _FREE) & (self._why[a] == _FREE) & (self._why[b] == _FREE)
        live: NDArray[np.bool_] = free & (a != b)
        return live

    def _torn(self) -> list[int]:
        """Products that share a class with another product, or with another place of their own."""
        live = np.flatnonzero(self._live())
        if not len(live):
            return []
        x, a, b = self.root[self._x[live]], self.root[self._a[live]], self.root[self._b[live]]
        low, high = np.minimum(a, b), np.maximum(a, b)
        order = np.lexsort((high, low, x))
        x, low, high = x[order], low[order], high[order]
        torn = (x[1:] == x[:-1]) & ((low[1:] != low[:-1]) | (high[1:] != high[:-1]))
        deep = np.isin(x, self._inner_cycles())
        bad = np.unique(np.concatenate([x[1:][torn], x[deep]]))
        return np.unique(self._of[live[order]][np.isin(x, bad)]).tolist()  # type: ignore[no-any-return]

    def _inner_cycles(self) -> Ids:
        """Classes that are a factor of themselves."""
        x, a, b = self.root[self._x], self.root[self._a], self.root[self._b]
        return np.unique(x[((x == a) | (x == b)) & self._live()])

    def _orient(self) -> None:
        """Choose, for products that cannot all be, whether the first or the second factors may be cut."""
        while torn := self._torn():
            products = [self.labels.products[i] for i in torn]
            own = self.root[products[0].x]
            near = [p for p in products if np.isin(self.root[p.x], own).any()]
            seen = np.unique(np.concatenate([p.x.ravel() for p in near]))
            self.reasons.append(OTHERWISE)
            tried = [self._tried(near, seen, first) for first in (True, False)]
            _, self.root, self._why = max(tried, key=lambda state: state[0])

    def _tried(self, products: list[Product], seen: Ids, first: bool) -> tuple[int, Ids, Ids]:
        """(free classes among the labels `seen`, and the state), where only one of the factors may be cut."""
        state = self.root.copy(), self._why.copy()
        for p in products:
            keep = np.repeat(p.a, len(p.b)) if first else np.tile(p.b, len(p.a))
            drop = p.b if first else p.a
            self._unite(p.x.ravel(), keep)
            self._fix(drop, np.full(len(drop), len(self.reasons) - 1))
        self._simplify()
        roots = np.unique(self.root[seen])
        made = int((self._why[roots] == _FREE).sum()), self.root, self._why
        self.root, self._why = state
        return made

    def _even(self) -> bool:
        """Give the pieces that must keep equally many their sets; tie them where sets cannot say that.  Whether any
        were tied."""
        self._prepare()
        self.sets, self.teams = np.full((2, self.labels.n), -1)
        for equal in self.labels.equal:
            if not self._settle(equal.ids, equal.count):
                rows = equal.ids.reshape(equal.count, -1)
                if self._unite(np.tile(rows[0], equal.count - 1), rows[1:].ravel()):
                    return True
        return False

    def _prepare(self) -> None:
        self.factors = np.full((2, self.labels.n), -1)
        live = self._live()
        for row, ids in ((0, self._a), (1, self._b)):
            self.factors[row, self.root[self._x[live]]] = self.root[ids[live]]

    def spread(self, ids: Ids, count: int) -> tuple[Ids, Ids]:
        """(free classes, [class, piece] how many of their coordinates lie in each of `count` equal pieces)."""
        place, classes = self.leaves(ids)
        found, number = np.unique(classes, return_inverse=True)
        table = np.zeros((len(found), count), dtype=np.int64)
        np.add.at(table, (number, place // (len(ids) // count)), 1)
        return found, table

    def _settle(self, ids: Ids, count: int) -> bool:
        """Divide the classes that lie in single pieces into sets by piece, within the sets they are in; whether that
        says all: sets of one size, and units of one weight."""
        classes, table = self.spread(ids, count)
        loose = (table != table[:, :1]).any(1)
        if not loose.any():
            return True
        classes, table = classes[loose], table[loose]
        old, teams = self.sets[classes], self.teams[classes]
        mixed = (old < 0).any() and (old >= 0).any()
        partial = not np.isin(np.flatnonzero(np.isin(self.teams, teams[teams >= 0])), classes).all()
        if mixed or partial or (table > 0).sum(1).max() > 1 or len(np.unique(table[table > 0])) > 1:
            return False
        piece = table.argmax(1)
        _, sets, sizes = np.unique(np.stack([old, piece]), axis=1, return_inverse=True, return_counts=True)
        if len(np.unique(sizes)) > 1 or len(np.unique(piece)) < count:
            return False
        self.sets[classes], self.teams[classes] = sets.reshape(-1), self.teams.max() + 1
        return True


def unite(root: Ids, a: Ids, b: Ids) -> bool:
    """Join classes in place (each label points at the least of its class); whether anything changed."""
    changed = False
    while True:
        ra, rb = root[a], root[b]
        apart = ra != rb
        if not apart.any():
            return changed
        a, b, ra, rb = a[apart], b[apart], ra[apart], rb[apart]
        np.minimum.at(root, np.maximum(ra, rb), np.minimum(ra, rb))
        while not np.array_equal(up := root[root], root):
            root[:] = up
        changed = True


def components(n: int, pairs: list[tuple[Ids, Ids]]) -> Ids:
    """The class of each of n labels."""
    root = np.arange(n)
    unite(root, _joined([a for a, _ in pairs]), _joined([b for _, b in pairs]))
    return root


def _joined(arrays: list[Ids]) -> Ids:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
