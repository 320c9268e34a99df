"""Coupled indices as components, which of them may go, and what goes with them."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from jaxopt_compress.rewriting.coupling.components import connected_components
from jaxopt_compress.rewriting.coupling.graph import Axis, Graph

_WITH_PRODUCT = "it is reshaped together with an axis that stays whole"
_WITHOUT_FACTOR = "it is reshaped to axes that all stay whole"
_ONLY = "it is the only index of an axis"


class NotRemovable(ValueError):
    """Indices that cannot be removed, or not without a change of the results."""


class _Cells:
    """A product in terms of components: a grid of cells, one axis of the grid per factor."""

    def __init__(self, whole: np.ndarray, factors: list[np.ndarray]):
        self.whole, self.factors = whole, factors
        self.shape = tuple(map(len, factors))

    def grid(self, flags: np.ndarray) -> np.ndarray:
        """Flags of components, for the cells."""
        return flags[self.whole].reshape(self.shape)

    def along(self, flags: np.ndarray, k: int) -> np.ndarray:
        """Flags of components, for the indices of factor ``k``, to be broadcast over cells."""
        return flags[self.factors[k]].reshape([-1 if i == k else 1 for i in range(len(self.shape))])

    def over(self, k: int) -> tuple[int, ...]:
        """The axes of the grid but that of factor ``k``."""
        return tuple(i for i in range(len(self.shape)) if i != k)

    def covered(self, flags: np.ndarray) -> np.ndarray:
        """The cells of which a factor's index has the flag."""
        out = np.zeros(self.shape, bool)
        for k in range(len(self.factors)):
            out |= self.along(flags, k)
        return out


class Coupling:
    """The solved graph.

    Attributes:
        component: The component of each atom.
        count: How many components there are.
        kept: Per component, whether it has to stay.
    """

    def __init__(self, graph: Graph, every: Iterable[Axis] = ()):
        """Solves a graph; ``every`` are axes of which at least one index has to stay."""
        ends = [np.concatenate(x) for x in zip(*graph.ties, strict=True)] or [np.zeros(0, int)] * 2
        self.component = connected_components(graph.size, *ends)
        self.count = int(self.component.max(initial=-1)) + 1
        self.kept = np.zeros(self.count, bool)
        self._why = np.full(self.count, -1)
        self._reasons: list[str] = []
        for axis, why in graph.protected:
            self._keep(self.component[axis], why)
        for axis in every:
            own = self.component[axis]
            if len(own) and (own[0] == own).all():
                self._keep(own[:1], _ONLY)
        self.products = [
            _Cells(self.component[p.whole], [self.component[f] for f in p.factors])
            for p in graph.products
        ]
        self._keep_products()
        self._connect()

    def why(self, components: np.ndarray) -> list[str]:
        """Why some of the components stay, each reason once."""
        reasons = self._why[components]
        return [self._reasons[i] for i in np.unique(reasons[reasons >= 0])]

    def seeds(self) -> np.ndarray:
        """Components from which each set that can go follows: all but cells of products."""
        cells = np.zeros(self.count, bool)
        for p in self.products:
            cells[p.whole] = True
        for p in self.products:
            for f in p.factors:
                cells[f] = False
        return np.flatnonzero(~cells & ~self.kept)

    def in_product(self, component: int) -> bool:
        """Whether a component is part of a product, so that more may go with it."""
        return component in self._owner

    def close(self, components: Iterable[int]) -> np.ndarray:
        """All that goes with some components, as flags; cells widen to slices of a factor.

        Raises:
            NotRemovable: Something that has to stay would go too.
        """
        gone = np.zeros(self.count, bool)
        gone[list(components)] = True
        clusters = {self._owner[x] for x in np.flatnonzero(gone).tolist() if x in self._owner}
        products = [p for c in clusters for p in self._cluster[c]]
        while any([self._spread(p, gone) for p in products]) or self._widen(products, gone):
            pass
        stay = np.flatnonzero(gone & self.kept)
        if len(stay):
            raise NotRemovable(f"cannot be removed: {'; '.join(self.why(stay))}")
        return gone

    def _keep(self, components: np.ndarray, why: str) -> bool:
        new = components[~self.kept[components]]
        if len(new):
            self.kept[new] = True
            self._why[new] = len(self._reasons)
            self._reasons.append(why)
        return len(new) > 0

    def _keep_products(self) -> None:
        """A cell that stays keeps the indices of its factors; factors that stay keep their cell."""
        changed = True
        while changed:
            changed = False
            for p in self.products:
                cells = p.grid(self.kept)
                whole = np.ones(p.shape, bool)
                for k, f in enumerate(p.factors):
                    changed |= self._keep(f[cells.any(p.over(k))], _WITH_PRODUCT)
                    whole &= p.along(self.kept, k)
                changed |= self._keep(p.whole[whole.reshape(-1)], _WITHOUT_FACTOR)

    def _connect(self) -> None:
        """Clusters of products with components in common, so that `close` looks at few."""
        owner: dict[int, int] = {}
        root = list(range(len(self.products)))

        def find(i: int) -> int:
            while root[i] != i:
                i = root[i]
            return i

        for i, p in enumerate(self.products):
            for x in np.unique(np.concatenate([p.whole, *p.factors])).tolist():
                if x in owner:
                    root[find(i)] = find(owner[x])
                else:
                    owner[x] = i
        self._cluster: dict[int, list[_Cells]] = defaultdict(list)
        for i, p in enumerate(self.products):
            self._cluster[find(i)].append(p)
        self._owner = {x: find(i) for x, i in owner.items()}

    def _spread(self, p: _Cells, gone: np.ndarray) -> bool:
        """Cells go with their factors' indices, and an index goes with all of its cells."""
        before = int(gone.sum())
        cells = p.grid(gone) | p.covered(gone)
        gone[p.whole[cells.reshape(-1)]] = True
        for k, f in enumerate(p.factors):
            gone[f[cells.all(p.over(k))]] = True
        return int(gone.sum()) > before

    def _widen(self, products: list[_Cells], gone: np.ndarray) -> bool:
        """Removes an index of a factor, the first that may go, for a cell that none explains."""
        for p in products:
            bare = np.argwhere(p.grid(gone) & ~p.covered(gone))
            if len(bare):
                own = [int(f[i]) for f, i in zip(p.factors, bare[0], strict=True)]
                free = [x for x in own if not self.kept[x]]
                if not free:
                    raise NotRemovable(f"cannot be removed: {'; '.join(self.why(np.array(own)))}")
                gone[free[0]] = True
                return True
        return False
