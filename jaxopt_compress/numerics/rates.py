"""Bits that an entropy coder needs for codes, as a smooth function of the unrounded values."""

import jax
import jax.numpy as jnp

# By trial: how soon a value counts as not 0, the bits of a sign and of ending a size, and those of
# a doubled size.
_ROUNDING, _SIGN, _SIZE = 0.7, 1.5, 1.2
# By trial: how much a row or a column says beside the whole, as many codes as the share of the
# whole counts in it, and the most bits of a code that is not 0, beside its sign.
_OWN, _PRIOR, _MOST = 0.8, 4.0, 12.0


def code_costs(there: jax.Array) -> jax.Array:
    r"""What a code that is not 0 costs more than a zero, at each place of matrices of codes.

    With the shares of codes that are not 0 among all (:math:`p`), among the others of its row
    (:math:`p_r`) and of its column (:math:`p_c`), and the log-odds of a share :math:`z`:

    .. math:: \tfrac32 - z(p) - 0.8 \, (z(p_r) - z(p)) - 0.8 \, (z(p_c) - z(p))

    as in coders that learn from rows and columns. So whole rows and columns become 0.

    Args:
        there: Booleans ``[..., k, n]``, true where a code is not 0; each matrix by itself.

    Returns:
        Float32 bits of that shape, from those of a sign to 12 more.

    Example:
        >>> import jax.numpy as jnp
        >>> there = jnp.zeros((8, 16), bool).at[3, :6].set(True)
        >>> code_costs(there)[3, 8].round(1) < code_costs(there)[4, 8].round(1)
        Array(True, dtype=bool)
    """
    seen = there.astype(jnp.float32)
    rows, columns = jnp.sum(seen, -1, keepdims=True), jnp.sum(seen, -2, keepdims=True)
    total = jnp.sum(rows, -2, keepdims=True)
    # Rows and columns of zeros cost a coder next to nothing; of a vector there is only one of each.
    high = _held(rows, -2, vector=there.shape[-1] == 1)
    wide = _held(columns, -1, vector=there.shape[-2] == 1)
    share = (total + 0.5) / (high * wide + 1)
    whole = _log_odds(share)

    def own(counts: jax.Array, length: jax.Array, whole_axis: int) -> jax.Array | float:
        """The log-odds beyond those of the whole: one for a place that is 0, one for others."""
        if there.shape[whole_axis] == 1:  # There is one row or column only, the whole.
            return 0.0
        odds = lambda k, n: _log_odds((k + _PRIOR * share) / (n + _PRIOR)) - whole
        empty = odds(counts, length)
        left_out = odds(jnp.maximum(counts - 1, 0), jnp.maximum(length - 1, 0))
        return jnp.where(there, left_out, empty)

    beyond = own(rows, wide, -2) + own(columns, high, -1)
    cost = jnp.clip(-whole - _OWN * beyond, 0, _MOST) + _SIGN
    return jnp.broadcast_to(cost, there.shape)


def _held(counts: jax.Array, axis: int, vector: bool) -> jax.Array:
    """How many rows or columns hold anything, at least 1; all of a vector."""
    if vector:
        return jnp.float32(max(counts.shape[axis], 1))
    return jnp.maximum(jnp.sum(counts > 0, axis, keepdims=True, dtype=jnp.float32), 1)


def _log_odds(share: jax.Array) -> jax.Array:
    share = jnp.clip(share, 1e-4, 0.98)
    return jnp.log2(share / (1 - share))


def expected_bits(ratio: jax.Array, cost: jax.Array) -> jax.Array:
    """Bits of each entry.

    Args:
        ratio: Magnitudes over steps, any shape.
        cost: What `code_costs` found; broadcasts against ``ratio``.

    Returns:
        Float32, of the shape of ``ratio``: 0 costs what its share among codes says.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.array([[3.0] + [0.0] * 63])
        >>> bits = expected_bits(codes, code_costs(codes != 0))[0]
        >>> [round(float(b), 1) for b in (bits[0], bits[1:].sum())]
        [9.2, 1.8]
    """
    # The cost says the share of codes that are not 0.
    base = jnp.log2(1 + jnp.exp2(_SIGN - cost))
    return cost * (1 - jnp.exp(-ratio / _ROUNDING)) + _SIZE * jnp.log2(1 + ratio) + base
