"""What the models share: layers that repeat, and the comparison that each of them prints."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxopt_compress as jc
from jaxopt_compress.tree import named_leaves


def run_layers(block: Callable[[Any, jax.Array], jax.Array], layers: Any, x: jax.Array):
    """Runs ``x = block(layer, x)`` over layers, a list of trees or one tree of stacked arrays."""
    if isinstance(layers, list):
        for layer in layers:
            x = block(layer, x)
        return x
    return lax.scan(lambda x, layer: (block(layer, x), None), x, layers)[0]


def stack(params: Any) -> Any:
    """The same parameters with one array for all layers, run by `lax.scan`.

    It compiles one layer instead of all, which accelerators want of deep models. A list is the
    default: its paths name single layers, ``layers/3/mlp/up/kernel``, so that recipes can treat
    them differently, and the models here compile in seconds either way.
    """
    return params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])}


def dense(params: Any, x: jax.Array) -> jax.Array:
    """``x @ kernel + bias``, without a bias if there is none."""
    x = x @ params["kernel"]
    return x + params["bias"] if "bias" in params else x


def attention(params: Any, x: jax.Array, heads: int, mask: jax.Array | None = None) -> jax.Array:
    """Self-attention of (n, length, width); mask (n, 1, 1, length) says what may be seen."""
    split = lambda name: dense(params[name], x).reshape(*x.shape[:2], heads, -1)
    out = jax.nn.dot_product_attention(split("query"), split("key"), split("value"), mask=mask)
    return dense(params["output"], out.reshape(x.shape))


def layer_norm(params: Any, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalization over the last axis (Ba et al., 2016)."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + epsilon) * params["scale"] + params["bias"]


def int8(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], where: Any) -> Any:
    """Parameters with 8-bit weights, one step per channel; every weight has to meet a product.

    Raises:
        ValueError: `jaxopt_compress.uses` does not see a weight in the function.
    """
    uses = jc.uses(fn, params, *inputs)
    compression = jc.quantize("int8", where=where)
    small = jc.compress(params, compression, uses=uses)
    for path, leaf in named_leaves(small):
        if isinstance(leaf, jc.QuantizedArray) and not uses[path]:
            raise ValueError(f"{path} meets no product or lookup in the function")
    return small


def show(
    title: str,
    fn: Callable[..., Any],
    params: Any,
    batches: list[Any],
    metrics: Any,
    where: Any,
    rounds: int = 5,
) -> dict[str, dict[str, Any]]:
    """Prints and returns the figures of float32 and int8 weights; no weight is materialized.

    Args:
        title: Of the table.
        fn: Called as ``fn(params, *inputs)``.
        params: In float32.
        batches: As `jaxopt_compress.compare` takes them.
        metrics: Likewise.
        where: The weights to compress.
        rounds: Likewise.
    """
    inputs = batches[0][0]
    small = int8(fn, params, inputs if isinstance(inputs, tuple) else (inputs,), where)
    variants = {"float32": params, "int8": small}
    found = jc.compare(fn, variants, batches, metrics, rounds=rounds, on_fallback="error")
    print(f"{title}\n{found}")
    return found
