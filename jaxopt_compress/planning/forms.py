"""The stored form of each parameter, from shapes: kinds that are alike are traced once."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_compress.arrays import describe
from jaxopt_compress.arrays.base import stored_bytes
from jaxopt_compress.compression import Compression, NeedsStats, NeedsValues
from jaxopt_compress.compression.leaf_states import compress_leaves, factor_owner
from jaxopt_compress.compression.states import Asked, describes_itself, method_states
from jaxopt_compress.lift import Stats, Uses
from jaxopt_compress.planning.live_bytes import peak_bytes
from jaxopt_compress.tree import Part, named_leaves
from jaxopt_compress.typing import Leaf, PyTree

# Small copies have at most so many entries along an axis; groups of up to 256 fit.
_SMALL = 256
NOT_FROM_SHAPES = (NeedsValues, TypeError, jax.errors.JAXTypeError)


class Form(NamedTuple):
    """What becomes of one parameter.

    Attributes:
        method: In a few words; None if it is not known.
        bytes: The bytes of the stored form; None if values decide.
        estimated: Whether they are scaled up from a small copy.
        working: Bytes that compressing it needs besides, if nothing is fused.
        leaf: The stored form, abstract; None where values decide on its arrays.
    """

    method: str | None
    bytes: int | None
    estimated: bool
    working: int
    leaf: Leaf


class Forms:
    """Finds forms, each kind of parameter once.

    Args:
        compression: The compression of the whole tree.
        shapes: The parameters, abstract.
        uses: What `uses` found.
        stats: What `calibrate` found, or None.

    Raises:
        ValueError: What `init` refuses.
    """

    def __init__(self, compression: Compression, shapes: PyTree, uses: Uses, stats: Stats | None):
        self._compression, self._uses, self._stats = compression, uses, stats
        self._known: dict[Any, Form] = {}
        init = lambda params, stats: compression.init(params, uses=uses, stats=stats)
        try:
            self._state = jax.eval_shape(init, shapes, stats)
        except (NeedsValues, jax.errors.JAXTypeError):
            self._state = None
        paths = {path for path, _ in named_leaves(shapes)}
        states = () if self._state is None else method_states(self._state)
        self.asked: dict[str, str] = {}
        for state in states:
            for path in state.leaves:
                owner = factor_owner(path, paths)
                before = self.asked.get(owner, "")
                again = before.endswith(state.asked.method)
                parts = [x for x in (before, "" if again else state.asked.method) if x]
                self.asked[owner] = ", ".join(parts)

    @property
    def known(self) -> bool:
        """Whether shapes say which parameters are taken."""
        return self._state is not None and describes_itself(self._state)

    def of(self, path: str, w: Leaf) -> Form:
        """The form of the parameter at a path; the state has to know it."""
        own = self._own_state(path)
        key = (
            jax.tree.structure((w, own)),
            *((x.shape, x.dtype) for x in jax.tree.leaves((w, own)) if hasattr(x, "shape")),
        )
        if key not in self._known:
            self._known[key] = self._find(path, w, own)
        return self._known[key]

    def _own_state(self, path: str) -> PyTree:
        """The state with this parameter alone, under a path of its own."""
        short = lambda p: "w" + p[len(path) :]
        mine = lambda p: p == path or p.startswith(f"{path}/")

        def restrict(state: PyTree) -> PyTree:
            if hasattr(state, "states"):
                return type(state)(tuple(map(restrict, state.states)))
            parts = (state.learned, state.leaves, state.layouts)
            own = [{short(p): x for p, x in part.items() if mine(p)} for part in parts]
            return type(state)(state.count, *own, Asked(state.asked.method))

        return restrict(self._state)

    def _find(self, path: str, w: Leaf, state: PyTree) -> Form:
        store = lambda w, state: compress_leaves({"w": w}, state)["w"]
        working = max(peak_bytes(self._init, Part({path: w}), self._stats) - stored_bytes(w), 0)
        try:
            small = jax.eval_shape(store, w, state)
            working = max(working, peak_bytes(store, w, state) - stored_bytes(w))
        except NOT_FROM_SHAPES:
            method, share = self._of_small_copy(path, w)
            size = None if share is None else round(share * math.prod(w.shape))
            return Form(method, size, True, working, None)
        return Form(describe(small), stored_bytes(small), False, working, small)

    def _init(self, part: Part, stats: Stats | None) -> PyTree:
        uses = {path: self._uses.get(path, []) for path in part}
        return self._compression.init(part, uses=uses, stats=stats)

    def _of_small_copy(self, path: str, w: Leaf) -> tuple[str | None, float | None]:
        """The method, and bytes per entry, of a random matrix of the same layout."""
        shape = [min(n, _SMALL) for n in w.shape]
        values = np.random.default_rng(0).normal(size=shape).astype(w.dtype)
        part = Part({path: jax.numpy.asarray(values)})
        try:
            small = self._compression.compress(part, self._init(part, None))[path]
        except (NeedsStats, ValueError):
            return None, None
        return describe(small), stored_bytes(small) / math.prod(shape)
