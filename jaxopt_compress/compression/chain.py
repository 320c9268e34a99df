"""Several compressions of the same parameters, one after the other."""

from typing import Any

from jaxopt_compress.compression.base import (
    ChainState,
    Compression,
    apply_state,
    compress_state,
    describes_itself,
)
from jaxopt_compress.compression.checks import check_init
from jaxopt_compress.compression.compress import Recipe, as_compression
from jaxopt_compress.tree import named_leaves

# What may follow what on one parameter; everything else would break what came before.
_REFUSED = {
    ("prune", "low_rank"): "the factors of a pruned matrix are dense: its zeros would be lost; "
    "factorize first and quantize the factors, or keep one of the two",
    ("low_rank", "prune"): "a product with entries removed is no longer of low rank; "
    "choose a smaller rank, or keep one of the two",
    ("quantize", "low_rank"): "the factors of a quantized matrix are not quantized; "
    "use chain(low_rank(...), quantize(...))",
    ("quantize", "quantize in products"): "the second grid replaces the first; keep one of the two",
    ("quantize", "quantize"): "the second grid replaces the first; keep one of the two",
    ("prune", "prune"): "the second mask replaces the first; keep one of the two",
    **{
        ("quantize in products", kind): "it has to come last, since it wraps what is stored; "
        "move it to the end of the chain"
        for kind in ("prune", "low_rank", "quantize", "quantize in products")
    },
    ("low_rank", "low_rank"): "the second rank replaces the first; keep one of the two",
}


def chain(*compressions: Compression | Recipe) -> Compression:
    """Applies compressions in order, each one to what the ones before it have made.

    Later elements keep what earlier ones established: zeros stay zeros and n:m patterns stay, and
    after `low_rank` the factors are compressed. Elements may choose different parameters.

    Args:
        *compressions: At least one; recipes ``{glob: Compression}`` too.

    Returns:
        A `Compression` with the state of all of them.

    Raises:
        ValueError: In ``init``, for an order that cannot keep what came before, or what an element
            refuses; names the parameter, before anything is computed.

    Example:
        >>> import jax.numpy as jnp, jaxopt_compress as jc
        >>> c = jc.chain(jc.prune(jc.magnitude(), jc.constant(0.5)), jc.quantize("int8"))
        >>> params = {"w": jnp.arange(1.0, 9.0).reshape(4, 2)}
        >>> jc.compress(params, c)["w"].materialize()[:, 0].round(2)
        Array([0.  , 0.  , 5.  , 6.97], dtype=float32)
    """
    if not compressions:
        raise ValueError("chain() needs at least one compression")
    elements = [as_compression(c) for c in compressions]

    def init(params: Any, *, uses: Any = None, stats: Any = None) -> ChainState:
        check_init(decide, params, uses, stats)
        return decide(params, uses=uses, stats=stats)

    def decide(params: Any, *, uses: Any, stats: Any) -> ChainState:
        states: list[Any] = []
        history: dict[str, list[str]] = {}
        for c in elements:
            state = c.init(params, uses=uses, stats=stats)
            _extend(history, state, params)
            params = c.apply(params, state, materialize=False)
            states.append(state)
        return ChainState(tuple(states))

    def update(state: ChainState, params: Any) -> ChainState:
        states = []
        for c, inner in zip(elements, state.states, strict=True):
            inner = c.update(inner, params)
            params = c.apply(params, inner, materialize=False)
            states.append(inner)
        return ChainState(tuple(states))

    def apply(params: Any, state: ChainState, *, materialize: bool = True) -> Any:
        if describes_itself(state):
            return apply_state(params, state, materialize=materialize)
        pairs = list(zip(elements, state.states, strict=True))
        for c, inner in pairs[:-1]:
            params = c.apply(params, inner, materialize=False)
        last, inner = pairs[-1]
        return last.apply(params, inner, materialize=materialize)

    def compress(params: Any, state: ChainState) -> Any:
        if describes_itself(state):
            return compress_state(params, state)
        for c, inner in zip(elements, state.states, strict=True):
            params = c.compress(params, inner)
        return params

    return Compression(init, update, apply, compress)


def _extend(history: dict[str, list[str]], state: Any, params: Any) -> None:
    """Adds what ``state`` does to each parameter, and refuses orders that do not compose."""
    if isinstance(state, ChainState):
        for inner in state.states:
            _extend(history, inner, params)
        return
    kinds, broken = {}, {}
    for path, leaf in getattr(state, "leaves", {}).items():
        # Both factors of a parameter count as that parameter.
        owner = path[:-2] if path.endswith(("/u", "/v")) and path[:-2] in history else path
        kinds[owner] = leaf.kind
        if not leaf.keeps_zeros:
            broken[owner] = leaf
    for path, kind in kinds.items():
        for earlier in history.get(path, []):
            if (earlier, kind) in _REFUSED:
                raise ValueError(
                    f"chain: {kind} cannot follow {earlier} at {path!r}: {_REFUSED[earlier, kind]}"
                )
        if "prune" in history.get(path, []) and path in broken:
            shape = next(tuple(w.shape) for name, w in named_leaves(params) if name == path)
            fmt = getattr(broken[path], "format", None)
            why = f"{fmt.name!r} has no code for 0.0" if fmt else "0.0 does not stay 0.0"
            raise ValueError(
                f"chain: {kind} cannot follow prune at {path!r} of shape {shape}: {why}; choose a "
                "format that has one, such as 'ternary' or 'int2'"
            )
        history.setdefault(path, []).append(kind)
