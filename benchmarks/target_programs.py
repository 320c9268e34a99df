"""Programs to compile for described accelerators, from the shapes of parameters alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.arrays import is_compressed
from jaxopt_compress.tree import paths

BFLOAT16 = jnp.bfloat16


class Program(NamedTuple):
    """A function and the types of its arguments.

    Attributes:
        fn: ``(state, batch) -> Any``; ``state`` holds the weights.
        state: A tree of `jax.ShapeDtypeStruct`.
        batch: Likewise, one array, split along its first axis.
        spec_of: The `PartitionSpec` of a weight, by its path and rank.
        sizes: Entries of one layer's weight matrices, each size once; none if training, where
            gradients are as large.
        stored: HLO's name of the dtype in which the weights are stored; empty for factors.
    """

    fn: Callable[..., Any]
    state: Any
    batch: jax.ShapeDtypeStruct
    spec_of: Callable[[str, int], P]
    sizes: tuple[int, ...]
    stored: str


# How weights are stored: a compression, and HLO's name of what a weight's codes are held in.
FORMATS = {
    "bfloat16": (None, "bf16"),
    "int8": (jc.quantize("int8", where="**/kernel"), "s8"),
    "int4 g128": (jc.quantize("int4", group=128, where="**/kernel"), "s4"),
    "int2": (jc.quantize("int2", where="**/kernel"), "u8"),
}
# Further number formats, and products with activations of 8 bits, for the stack only.
KERNELS = "**/kernel"
MORE = {
    "nf4 g128": (jc.quantize("nf4", group=128, where=KERNELS), "u4"),
    "mxfp4": (jc.quantize("mxfp4", where=KERNELS), "u4"),
    "nvfp4": (jc.quantize("nvfp4", where=KERNELS), "u4"),
    "mxfp6": (jc.quantize("mxfp6", where=KERNELS), "u8"),
    "mxfp8": (jc.quantize("mxfp8", where=KERNELS), "f8e4m3fn"),
    "float8": (jc.quantize("float8_e4m3fn", where=KERNELS), "f8e4m3fn"),
    "int3": (jc.quantize("int3", where=KERNELS), "u8"),
    "binary": (jc.quantize("binary", where=KERNELS), "u8"),
    "int8 x int8": (jc.quantize("int8", inputs="int8", where=KERNELS), "s8"),
    "int4 x int8": (jc.quantize("int4", inputs="int8", where=KERNELS), "s4"),
    "int4 g128 x int8": (jc.quantize("int4", group=128, inputs="int8", where=KERNELS), "s4"),
}
TRAINED = {
    "float32": None,
    "QAT int8": jc.quantize("int8", where="**/kernel"),
    # Masks change at every step.
    "pruned": jc.prune(jc.magnitude(), jc.polynomial(0.9, begin=0, end=1000), where="**/kernel"),
}


def stack(weights: str, rows: int, width: int = 8192, layers: int = 4) -> Program:
    """``layers`` square matrices, scanned: larger than any on-chip memory."""
    kernel = jax.ShapeDtypeStruct((layers, width, width), BFLOAT16)
    x = jax.ShapeDtypeStruct((rows, width), BFLOAT16)

    def run(params, x):
        return lax.scan(lambda x, layer: (x @ layer["kernel"], None), x, params)[0]

    return _lifted(run, {"kernel": kernel}, x, weights, _column, (width * width,), pallas=True)


def mlp_stack(weights: str, rows: int, width: int, hidden: int, layers: int = 4) -> Program:
    """Scanned MLPs, the first matrix of each split by columns and the second one by rows."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=BFLOAT16)
    params = {
        "up": {"kernel": shape((layers, width, hidden))},
        "down": {"kernel": shape((layers, hidden, width))},
    }

    def step(x, layer):
        return x + jax.nn.relu(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

    def run(params, x):
        return lax.scan(step, x, params)[0]

    x = shape((rows, width))
    return _lifted(run, params, x, weights, _megatron, (width * hidden,))


def blocks(weights: str, width: int = 2048, layers: int = 4) -> Program:
    """Scanned transformer blocks, on 4 sequences of 32 tokens."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers))
    stacked = jax.eval_shape(jax.vmap(lambda key: models.block_init(key, width)), keys)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, BFLOAT16), stacked)
    x = jax.ShapeDtypeStruct((4, 32, width), BFLOAT16)

    def run(params, x):
        return lax.scan(lambda x, layer: (models.block(layer, x), None), x, params)[0]

    sizes = (width * width, 4 * width * width)
    return _lifted(run, params, x, weights, _megatron, sizes)


def training(weights: str, layers: int = 2, width: int = 512, vocabulary: int = 1024) -> Program:
    """A training step of a transformer in bfloat16, with adam and float32 parameters."""
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.int32)
    init = lambda: models.transformer_init(jax.random.key(0), layers, width, vocabulary)
    params = jax.eval_shape(init)
    compression, inner = TRAINED[weights], optax.adam(1e-3)
    tx = inner if compression is None else jc.compressed_training(inner, compression)

    def loss(params, tokens):
        half = jax.tree.map(lambda w: w.astype(BFLOAT16), params)
        logits = models.transformer(half, tokens[:, :-1]).astype(jnp.float32)
        return models.cross_entropy(logits, tokens[:, 1:])

    step = models.train_step(loss, tx, compression)
    state = (params, jax.eval_shape(tx.init, params))
    return Program(step, state, tokens, _megatron, (), "")


def _lifted(fn, params, x, weights, spec_of, sizes, pallas=False):
    known = FORMATS | MORE
    compression, stored = known[weights] if weights in known else _low_rank(weights)
    if compression is not None:
        uses = jc.uses(fn, params, x)
        compress = functools.partial(jc.compress, recipe=compression, uses=uses)
        params = jax.eval_shape(compress, params)
        fn = jc.lift(fn, on_fallback="error", pallas=pallas)
    return Program(fn, params, x, spec_of, sizes, stored)


def _low_rank(weights):
    """Weights such as ``"rank 256"``."""
    return jc.low_rank(rank=int(weights.removeprefix("rank ")), where="**/kernel"), ""


def _column(path, ndim):
    del path
    return P(*(None,) * (ndim - 1), "model")


def _megatron(path, ndim):
    """Projections into heads and hidden units are split by columns, those out of them by rows."""
    if path.endswith(("out/kernel", "down/kernel")):
        return P(*(None,) * (ndim - 2), "model", None)
    into = ("query/kernel", "key/kernel", "value/kernel", "up/kernel", "up/bias", "head/kernel")
    return _column(path, ndim) if path.endswith(into) else P()


def place(program: Program, mesh: jax.sharding.Mesh) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The arguments of a program, with shardings on a mesh of axes "data" and "model".

    Weights are split over "model", each field of a compressed one as `specs` says; what an
    optimizer keeps of a weight is split like that weight; the batch is split over "data".
    """
    params = program.state[0] if isinstance(program.state, tuple) else program.state
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.named_leaves(params)}

    def put(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def named(path, leaf):
        if is_compressed(leaf):
            return jax.tree.map(put, leaf, leaf.specs(program.spec_of(path, leaf.ndim)))
        owner = next((p for p in shapes if f"/{p}/" in f"/{path}/"), None)
        return put(leaf, P() if owner is None else like(owner, tuple(leaf.shape)))

    def like(owner, shape):
        if len(shape) != len(shapes[owner]):
            return P()
        spec = program.spec_of(owner, len(shape))
        same = [a == b for a, b in zip(shape, shapes[owner], strict=True)]
        return P(*(part if keep else None for part, keep in zip(spec, same, strict=False)))

    batch = put(program.batch, P("data"))
    return paths.map_named(named, program.state), batch
