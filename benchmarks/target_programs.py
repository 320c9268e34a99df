"""Programs to compile for described accelerators, from the shapes of parameters alone."""

import functools
import math
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
        packed: Whether one stored entry holds several of the weight's.
    """

    fn: Callable[..., Any]
    state: Any
    batch: jax.ShapeDtypeStruct
    spec_of: Callable[[str, int], P]
    sizes: tuple[int, ...]
    stored: str
    packed: bool = False


KERNELS = "**/kernel"
# Names are: a format, the size of its groups, the format of the activations, the type of the steps.
FORMATS = ("bfloat16", "int8", "int4 g128", "int2")
# Further number formats, and products with activations of 8 bits, for the stack only.
MORE = (
    *("nf4 g128", "mxfp4", "nvfp4", "mxfp6", "mxfp8", "float8_e4m3fn", "int3", "binary"),
    *("int8 x int8", "int4 x int8", "int4 g128 x int8"),
)
GROUPED = tuple(f"{name} g{group}" for name in ("int4", "nf4") for group in (32, 64, 256))
# All others, one step per channel and in groups.
PLAIN = (
    *("int7", "int6", "int5", "int4", "int1", "uint8", "uint7", "uint6", "uint5", "uint4"),
    *("uint3", "uint2", "uint1", "ternary", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn"),
    *("float4_e2m1fn", "pot5", "pot4", "pot3", "nf4"),
)
REST = (
    *(f"{name}{group}" for name in PLAIN for group in ("", " g128")),
    *(f"{name} g128" for name in ("int8", "int3", "int2", "binary", "float8_e4m3fn")),
    *("mxfp8_e5m2", "mxfp6_e3m2", "int8 g128 x int8", "nf4 g128 x int8", "mxfp4 x int8"),
    *("float8_e4m3fn x float8_e4m3fn", "int2 x int8", "int3 x int8", "binary x int8"),
)
TRAINED = {
    "float32": None,
    "QAT int8": jc.quantize("int8", where=KERNELS),
    "QAT int8 recomputed": jc.quantize(
        "int8", where=KERNELS, backward=jc.backward(residuals="recomputed")
    ),
    "QAT int8 unrounded": jc.quantize(
        "int8", where=KERNELS, backward=jc.backward(residuals="unrounded")
    ),
    "QAT int8 x int8": jc.quantize("int8", where=KERNELS, activations="int8"),
    # Masks change at every step.
    "pruned": jc.prune(
        jc.scores.magnitude(), jc.schedules.polynomial(0.9, begin=0, end=1000), where=KERNELS
    ),
}


def stack(weights: str, rows: int, transposed: bool = False) -> Program:
    """Four matrices, scanned: larger than any on-chip memory; transposed ones are [out, in]."""
    (depth, columns), x = sizes_for(rows)
    turned = (lambda w: w.T) if transposed else (lambda w: w)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=BFLOAT16)
    if depth == columns:
        params = {"kernel": shape((4, depth, columns))}
        step = lambda x, layer: (x @ turned(layer["kernel"]), None)
    else:
        params = {
            "up": {"kernel": shape((2, depth, columns))},
            "down": {"kernel": shape((2, columns, depth))},
        }
        step = lambda x, layer: (x @ layer["up"]["kernel"] @ layer["down"]["kernel"], None)

    def run(params, x):
        return lax.scan(step, x, params)[0]

    return lifted(run, params, x, weights, _column, (depth * columns,), pallas=True)


def sizes_for(rows: int) -> tuple[tuple[int, int], jax.ShapeDtypeStruct]:
    """The shape of a layer, and its input.

    With many rows an activation would be as large as half of 8192 x 8192 weights.
    """
    shape = (8192, 8192) if rows < 4096 else (10240, 12288)
    return shape, jax.ShapeDtypeStruct((rows, shape[0]), BFLOAT16)


def mlp_stack(
    weights: str, rows: int, width: int, hidden: int, layers: int = 4, pallas: bool = False
) -> Program:
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
    return lifted(run, params, x, weights, _megatron, (width * hidden,), pallas)


def mlp_stack_in_kernels(
    weights: str, rows: int, width: int, hidden: int, make_mesh: Callable[[], jax.sharding.Mesh]
) -> Program:
    """As `mlp_stack`, each device multiplying its parts of the weights in kernels."""
    program = mlp_stack(weights, rows, width, hidden)
    specs = paths.map_named(lambda path, w: w.specs(_megatron(path, w.ndim)), program.state)

    def step(x, layer):
        y = jax.nn.relu(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
        return x + lax.psum(y, "model"), None

    def run(params, x):
        return lax.scan(step, x, params)[0]

    on_parts = jax.shard_map(
        jc.lift(run, on_fallback="error", pallas=True),
        mesh=make_mesh(),
        in_specs=(specs, P("data")),
        out_specs=P("data"),
    )
    return program._replace(fn=on_parts)


def blocks(weights: str, width: int = 2048, layers: int = 4, pallas: bool = False) -> Program:
    """Scanned transformer blocks, on 4 sequences of 32 tokens."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), layers))
    stacked = jax.eval_shape(jax.vmap(lambda key: models.block_init(key, width)), keys)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, BFLOAT16), stacked)
    x = jax.ShapeDtypeStruct((4, 32, width), BFLOAT16)

    def run(params, x):
        return lax.scan(lambda x, layer: (models.block(layer, x), None), x, params)[0]

    sizes = (width * width, 4 * width * width)
    return lifted(run, params, x, weights, _megatron, sizes, pallas)


def training(weights: str, layers: int = 4, width: int = 2048, vocabulary: int = 1024) -> Program:
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

    # Which leaves it as it is where the view is of arrays alone.
    loss = jc.lift(loss, on_fallback="error")
    step = models.train_step(loss, tx, compression)
    state = (params, jax.eval_shape(tx.init, params))
    return Program(step, state, tokens, _megatron, (), "")


def lifted(fn, params, x, weights, spec_of, sizes, pallas=False):
    """A program on weights that are stored as a name says."""
    compression = _compression(weights)
    if compression is None:
        return Program(fn, params, x, spec_of, sizes, hlo_name(BFLOAT16))
    uses = jc.uses(fn, params, x)
    compress = functools.partial(jc.compress, recipe=compression, uses=uses)
    params = jax.eval_shape(compress, params)
    fn = jc.lift(fn, on_fallback="error", pallas=pallas)
    if weights.startswith("rank "):
        return Program(fn, params, x, spec_of, sizes, "")
    leaf = next(leaf for _, leaf in paths.named_leaves(params) if is_compressed(leaf))
    codes = max(jax.tree.leaves(leaf), key=lambda part: part.size)
    packed = codes.size < math.prod(leaf.shape)
    return Program(fn, params, x, spec_of, sizes, hlo_name(codes.dtype), packed)


def _compression(weights):
    """What a name such as `int4 g128 x int8, bfloat16 steps` or `rank 256` stands for."""
    if weights == "bfloat16":
        return None
    if weights.startswith("rank "):
        return jc.low_rank(rank=int(weights.removeprefix("rank ")), where=KERNELS)
    named, _, steps = weights.partition(", ")
    named, _, inputs = named.partition(" x ")
    name, _, group = named.partition(" g")
    scale = steps.removesuffix(" steps") or None
    group = int(group) if group else None
    # The only two codes of int1 are 0 and a negative one.
    symmetric = name != "int1" and not name.startswith("uint")
    return jc.quantize(
        name, group, symmetric, where=KERNELS, scale_dtype=scale, activations=inputs or None
    )


def hlo_name(dtype) -> str:
    """What HLO calls a dtype.

    Example:
        >>> hlo_name(jnp.int4), hlo_name(jnp.bfloat16), hlo_name(jnp.float8_e4m3fn)
        ('s4', 'bf16', 'f8e4m3fn')
    """
    name = jnp.dtype(dtype).name
    for ours, theirs in {"bfloat": "bf", "float": "f", "uint": "u", "int": "s"}.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours).replace("_", "")
    raise ValueError(f"no number format: {name}")


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
