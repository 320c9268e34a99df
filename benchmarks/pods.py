"""Compiles Llama 3 for whole TPU pods, on a machine that has no accelerator.

    python benchmarks/pods.py [--only decode/8B] [--option NAME=VALUE] [--json]

Parameters are shapes: `jax.eval_shape` makes the compressed tree, `jc.shard` says where it lies,
and libtpu compiles for the described chips. Nothing runs. Per chip: bytes of arguments (weights,
cache, optimizer), bytes of temporaries, and bytes that collectives make, the body of a scan counted
once. A dense weight is a buffer of the size of a chip's share of one, in another type than codes.

    decode   one token for each sequence, int4 weights in groups of 128, cache of 3072 tokens
    train    a quantization-aware step, int8 weights, adam, float32 parameters, 2048 tokens
    gptq     all matrices of one kind solved to int4 in groups of 128, layers on chips of their own
"""

import argparse
import functools
import json
import math
import sys
import tempfile
import time
from typing import Any, NamedTuple

import hlo_tools
import jax
import jax.numpy as jnp
import llama
import optax
import timing
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_compress as jc
from jaxopt_compress.tree import map_named, named_leaves

WEIGHTS = ["layers/*", "head"]
MATRICES = [
    jc.Glob(f"**/{name}", min_ndim=2)
    for name in ("query", "key", "value", "out", "gate", "up", "down", "head")
]
AXES = ("data", "model")
# Eight parts of each weight, one for each head of keys and values.
PODS = {
    "v5e 16x16": functools.partial(hlo_tools.tpu_mesh, "v5e", (32, 8), AXES, "16x16"),
    "v5p 8x8x8": functools.partial(hlo_tools.tpu_mesh, "v5p", (64, 8), AXES, "8x8x8"),
}
HBM = {"v5e 16x16": 16 * 2**30, "v5p 8x8x8": 95 * 2**30}
# No buffer of the cache is as large as a chip's share of a weight.
LENGTH, SEQUENCES, TRAINED_LENGTH = 3072, 2, 2048


class Program(NamedTuple):
    """A function, its arguments with shardings, and what a dense weight would look like.

    Attributes:
        fn: What is compiled.
        args: Trees of `jax.ShapeDtypeStruct` with shardings.
        donated: Numbers of the arguments whose memory the results take.
        shares: Entries of a chip's share of each weight; none where gradients are as large.
        stored: HLO's name of the type of codes.
    """

    fn: Any
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    shares: frozenset[int] = frozenset()
    stored: str = ""


def uses_of(size, params, tokens=16):
    """How the function uses its parameters, found from shapes alone."""
    del size
    return jc.uses(llama.loss, params, jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32))


def decode(name, mesh):
    """One token for each of two sequences per row of chips."""
    size = llama.SIZES[name]
    params, sequences = llama.shapes(size), SEQUENCES * mesh.shape["data"]
    found = uses_of(size, params)
    small = jax.eval_shape(
        lambda p: jc.compress(p, jc.quantize("int4", 128, where=MATRICES), uses=found), params
    )
    shardings = map_named(lambda path, w: NamedSharding(mesh, llama.spec_of(path, w.ndim)), params)
    small = jc.shard(small, shardings)
    cache = jc.shard(llama.cache_of(size, sequences, LENGTH), NamedSharding(mesh, llama.CACHE))
    tokens = jc.shard(jax.ShapeDtypeStruct((sequences,), jnp.int32), NamedSharding(mesh, P("data")))
    position = jc.shard(jax.ShapeDtypeStruct((), jnp.int32), NamedSharding(mesh, P()))
    # In a scan a layer is cut out of the stack.
    shares = {
        math.prod(w.sharding.shard_shape(w.shape)[-2:])
        for w in (
            leaf.codes for _, leaf in named_leaves(small) if isinstance(leaf, jc.QuantizedArray)
        )
    }
    fn = jc.lift(llama.decode, on_fallback="error")
    return Program(fn, (small, cache, tokens, position), (1,), frozenset(shares), "s4")


def train(name, mesh):
    """A step of a sequence per row of chips; parameters and moments split over all chips."""
    size = llama.SIZES[name]
    params = llama.shapes(size, jnp.float32)
    c = jc.quantize("int8", where=MATRICES, backward=jc.backward(residuals="recomputed"))
    tx = jc.compressed_training(optax.adam(1e-4), c, uses=uses_of(size, params))
    shardings = map_named(
        lambda path, w: NamedSharding(mesh, llama.spec_of(path, w.ndim, "data")), params
    )
    state = jax.eval_shape(tx.init, params)
    state = jc.shard(state, jc.state_shardings(state, params, shardings))
    params = jc.shard(params, shardings)
    tokens = jax.ShapeDtypeStruct((mesh.shape["data"], TRAINED_LENGTH + 1), jnp.int32)
    tokens = jc.shard(tokens, NamedSharding(mesh, P("data")))

    # Otherwise the compiler splits activations as the weights are split, and gathers whole stacks.
    placed = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))

    def half(params, tokens):
        params = jax.tree.map(lambda w: w.astype(llama.BFLOAT16), params)
        return llama.loss(params, tokens, placed)

    loss = jc.lift(half, on_fallback="error")

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(c.view(params, state), tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return Program(step, (params, state, tokens), (0, 1))


def gptq(name, mesh, kind):
    """All matrices of one shape: each layer on chips of its own, columns split among these.

    Columns are solved apart, so that chips have nothing to tell each other; a compiler that splits
    the program by itself would gather the second moments for their factorization.
    """
    size = llama.SIZES[name]
    whole = llama.shapes(size)["layers"][kind]
    mesh = jax.sharding.Mesh(mesh.devices.reshape(size.layers, -1), AXES)
    weights, rows = {kind: whole}, jax.ShapeDtypeStruct((1, whole.shape[1]), whole.dtype)
    fn = lambda params, x: jax.lax.scan(lambda x, w: (x, x @ w), x, params[kind])[1]
    found = jc.uses(fn, weights, rows)
    stats = jax.eval_shape(lambda p, x: jc.calibrate(fn, p, [x]), weights, rows)
    solve = lambda weights, stats: jc.compress(
        weights, jc.gptq("int4", 128), uses=found, stats=stats
    )
    columns, layers = P("data", None, "model"), P("data")
    on_parts = jax.shard_map(solve, mesh=mesh, in_specs=(columns, layers), out_specs=columns)
    weights = jc.shard(weights, NamedSharding(mesh, columns))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, layers))
    return Program(on_parts, (weights, jax.tree.map(place, stats)))


BUILDERS = {"decode": decode, "train": train}
# One of each shape in a layer.
KINDS = ("query", "key", "gate", "down")


def plan():
    """Cases: name -> ``(build, model, pod)``, where ``build(model, mesh)`` makes the program."""
    cases = {
        f"{what}/{name}/{pod}": (build, name, pod)
        for what, build in BUILDERS.items()
        for name in llama.SIZES
        for pod in PODS
    }
    return cases | {
        f"gptq {kind}/8B/{pod}": (functools.partial(gptq, kind=kind), "8B", pod)
        for kind in KINDS
        for pod in PODS
    }


def measure(what, build, size, pod, options=None):
    """Compiles one case, with options of the compiler; one row of figures."""
    mesh = PODS[pod]()
    program, begin = build(size, mesh), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled = hlo_tools.compile_for(
            program.fn,
            program.args,
            "tpu",
            donate_argnums=program.donated,
            compiler_options={**(options or {}), **hlo_tools.dumped(folder)},
        )
        memory, text = compiled.memory_analysis(), hlo_tools.text_of(compiled, folder)
    row = {"program": what, "model": size, "pod": pod, "chips": mesh.devices.size}
    row["compile_s"] = round(time.perf_counter() - begin, 1)
    row["argument_bytes"] = memory.argument_size_in_bytes
    row["temporary_bytes"] = memory.temp_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    row["fits"] = used <= HBM[pod]
    row["used_bytes"] = used
    row["collectives"] = hlo_tools.collectives(text)
    if program.shares:
        buffers = hlo_tools.weight_copies(text, min(program.shares), program.stored)
        dense = [b for b in buffers if math.prod(b.shape) in program.shares]
        row["dense_weights"] = [f"{b.dtype}{list(b.shape)} {b.space}" for b in dense]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of program/model/pod")
    parser.add_argument("--option", nargs="*", default=[], help="NAME=VALUE, of the compiler")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    cases = {name: case for name, case in plan().items() if (args.only or "") in name}
    if not cases:
        sys.exit(f"--only {args.only} matches none of:\n" + "\n".join(plan()))
    options = dict(option.split("=", 1) for option in args.option)
    rows = []
    for name, case in cases.items():
        print(f"compiling {name}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(name.split("/")[0], *case, options))
        except jax.errors.JaxRuntimeError as error:
            first = " ".join(str(error).split())[:400]
            rows.append(dict(zip(("program", "model", "pod"), name.split("/"), strict=True)))
            rows[-1]["not_compiled"] = first
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.json:
        return timing.emit({"rows": rows})


if __name__ == "__main__":
    main()
