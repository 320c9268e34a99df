"""Products and training steps on an NVIDIA GPU: correct first, then how fast against bfloat16.

python benchmarks/on_gpu.py [--interpret] [--only checks products step] [--budget 420] [--json]

First every form that a GPU may take is compared with a float64 oracle. Then products are timed with
1 to 2048 rows, for weights of 4096 x 4096 and 8192 x 8192, one after the other and as a scanned
stack of 8; then a training step. "of peak" is achieved bytes or operations per second, whichever is
nearer to the chip's, over the chip's. What fails is a row that says so, the others go on, and the
script ends with 1. `--interpret` runs the same on a CPU: kernels step by step, and tiny shapes,
whose times mean nothing. Takes jax 0.11 or newer on a GPU.
"""

import argparse
import functools
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import products
import timing

import jaxopt_compress as jc
from jaxopt_compress.kernels import FORMS
from jaxopt_compress.kernels.matmul import run

# Bytes per second, and operations per second in bfloat16 and in 8 bits.
CHIPS = {
    "H100": (3.35e12, 989e12, 1979e12),
    "H200": (4.8e12, 989e12, 1979e12),
    "A100": (2.04e12, 312e12, 624e12),
    "L4": (0.3e12, 121e12, 242e12),
}
GROUP, LAYERS = 128, 8
WEIGHTS = {
    "bfloat16": None,
    "int8": jc.quantize("int8"),
    "int4 g128": jc.quantize("int4", GROUP),
    "nf4 g128": jc.quantize("nf4", GROUP),
    "fp8": jc.quantize("float8_e4m3fn"),
    "w8a8": jc.quantize("int8", activations="int8"),
    "2:4": jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5), pattern="2:4"),
    "rank 1/8": lambda n: jc.low_rank(rank=n // 8),
}
STEPS = {
    "bfloat16": None,
    "int8": jc.quantize("int8"),
    "w8a8": jc.quantize("int8", activations="int8"),
    "w8a8g8": jc.quantize("int8", activations="int8", backward="int8"),
}


def attempt(row, fn):
    """``row`` with what ``fn`` measures, or with how it fails."""
    try:
        return row | fn() | {"failed": None}
    except Exception as error:  # Whatever fails on a new device is a result.
        traceback.print_exc(limit=3)
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def checks(interpret):
    """For each form that a GPU may take and each product, the error over its bound."""
    rows = []
    for form in FORMS:
        if form.platforms and not {"cuda", "rocm"} & set(form.platforms):
            continue
        specs = products.taken_by(form, interpret=interpret)
        if not specs:
            rows.append({"form": form.name, "kind": form.kind, "failed": "no product fits"})
        for spec in specs:
            name = f"{spec.format}/{spec.group} x {spec.x}, {spec.rows} rows {spec.held}".strip()
            row = {"form": form.name, "kind": form.kind, "product": name}
            rows.append(attempt(row, functools.partial(check, form, spec, interpret)))
    return rows


def check(form, spec, interpret):
    """The error of one product over what rounding explains."""
    x, w, own, want, sizes = products.made(spec)
    product = functools.partial(run, form, how=products.how_of(spec, interpret))
    got = np.asarray(jax.jit(product)(x, w, own), np.float64)
    error = float(np.max(np.abs(got - want) / products.bound(spec, sizes)))
    if not error <= 1:
        raise AssertionError(f"error is {error:.3g} of its bound")
    return {"error": error}


def weight_of(name, size, key):
    """A compressed weight ``[size, size]``, or a stack of them, in bfloat16."""
    how = WEIGHTS[name]
    dense = jax.random.normal(key, (size, size), jnp.bfloat16) / size**0.5
    if how is None:
        return dense
    how = how if isinstance(how, jc.Compression) else how(size)
    return jc.compress({"w": dense}, how, layout="in,out")["w"]


def product_rows(sizes, counts, calls, deadline):
    """Times of products, one after the other and as a scanned stack."""
    rows = []
    for size in sizes:
        for name in WEIGHTS:
            keys = jax.random.split(jax.random.key(0), LAYERS)
            weights = None
            for count in counts:
                row = {"weights": name, "size": size, "rows": count}
                if time.monotonic() > deadline:
                    rows.append(row | {"failed": "not measured: out of time, see --budget"})
                    continue
                if weights is None:
                    made = lambda: {"made": [weight_of(name, size, k) for k in keys]}  # noqa: B023
                    weights = attempt({}, made)
                if weights["failed"]:
                    rows.append(row | {"failed": weights["failed"]})
                    continue
                x = jax.random.normal(jax.random.key(1), (count, size), jnp.bfloat16)
                measure = functools.partial(time_products, weights["made"], x, calls)
                rows.append(attempt(row, measure))
    return rows


def time_products(weights, x, calls):
    """Seconds of one product, by calls one after the other and within a scan over a stack."""
    one = jax.jit(jc.lift(lambda w, x: x @ w, on_fallback="error", pallas=True))
    layer = lambda x, w: ((x @ w).astype(x.dtype), None)
    scanned = jax.jit(
        jc.lift(lambda stack, x: jax.lax.scan(layer, x, stack)[0], on_fallback="error", pallas=True)
    )
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    # Other weights in each call, so that none is read from the cache.
    runs = {
        "call": lambda: [one(w, x) for _ in range(calls) for w in weights],
        "layer": lambda: [scanned(stack, x) for _ in range(calls)],
    }
    samples = timing.interleave(runs, 5, warmup=2, seed=0)
    count = calls * len(weights)
    return {f"{name}_us": 1e6 * float(np.median(samples[name].wall)) / count for name in runs} | {
        "bytes": jc.nbytes(weights[0]) + 2 * x.nbytes,
        "flops": 2 * x.size * x.shape[1],
    }


def of_peak(row, chip):
    """The nearer limit's share: of bytes or operations per second."""
    if chip is None or row.get("layer_us") is None:
        return None
    speed, flops, short = chip
    top = short if row["weights"] in ("w8a8", "fp8") else flops
    seconds = row["layer_us"] * 1e-6
    return max(row["bytes"] / speed, row["flops"] / top) / seconds


def step_rows(width, batch, rounds, deadline):
    """Training steps of an MLP with adam, over those in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = [jax.random.normal(k, (width, width), jnp.bfloat16) / width**0.5 for k in keys[:4]]
    x = jax.random.normal(keys[4], (batch, width), jnp.bfloat16)

    def model(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    def run_of(how):
        tx = optax.adam(1e-3)
        if how is not None:
            tx = jc.compressed_training(tx, how, uses=jc.uses(model, params, x))
        fn = jc.lift(model)

        def step(state, x):
            params, opt_state = state
            view = params if how is None else how.view(params, opt_state)
            loss = lambda view: jnp.mean(jnp.square(fn(view, x).astype(jnp.float32)))
            grads = jax.grad(loss)(view)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        state = jax.tree.map(jnp.copy, (params, tx.init(params)))
        return timing.training(timing.compiled_step(step, state, x), state, x, steps=3)

    base, rows = run_of(None), []
    for name, how in STEPS.items():
        if time.monotonic() > deadline:
            rows.append({"weights": name, "failed": "not measured: out of time, see --budget"})
            continue

        def measure(how=how):
            samples = timing.interleave({"base": base, "own": run_of(how)}, rounds, warmup=1)
            ratio = timing.ratios(samples["own"].wall, samples["base"].wall)
            seconds = float(np.median(samples["own"].wall)) / 3
            return {"step_ms": 1e3 * seconds, "ratio": list(ratio)}

        rows.append(attempt({"weights": name}, measure))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="on a CPU, small")
    every = ("checks", "products", "step")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--budget", type=float, default=420, help="seconds for all timings")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    args = parser.parse_args()
    device = jax.devices()[0]
    if not args.interpret and device.platform != "gpu":
        parser.error(f"this is a {device.platform}; --interpret runs small shapes without a GPU")
    deadline = time.monotonic() + args.budget
    chip = next((c for name, c in CHIPS.items() if name in device.device_kind), None)
    found = {"device": device.device_kind, "jax": jax.__version__}
    if "checks" in args.only:
        found["checks"] = checks(args.interpret)
    if "products" in args.only:
        shape = ((256,), (1, 16), 1) if args.interpret else ((4096, 8192), (1, 16, 128, 2048), 4)
        rows = product_rows(*shape, deadline)
        base = {
            (r["size"], r["rows"]): r.get("layer_us") for r in rows if r["weights"] == "bfloat16"
        }
        for row in rows:
            plain = base[row["size"], row["rows"]]
            if plain and row.get("layer_us"):
                row["layer_ratio"] = row["layer_us"] / plain
            row["of_peak"] = of_peak(row, chip)
        found["products"] = rows
    if "step" in args.only:
        shape = (64, 8, 1) if args.interpret else (4096, 2048, 5)
        found["step"] = step_rows(*shape, deadline)
    if args.json:
        timing.emit(found)
    else:
        report(found)
    failed = [r for name in every for r in found.get(name, ()) if r.get("failed")]
    for row in failed:
        print(f"FAILED: {row}", file=sys.stderr)
    return int(bool(failed))


def report(found):
    """Tables for people."""
    columns = {
        "checks": ("kind", "form", "product", "error", "failed"),
        "products": ("weights", "size", "rows", "call_us", "layer_us", "layer_ratio", "of_peak"),
        "step": ("weights", "step_ms", "ratio", "failed"),
    }
    for name, keys in columns.items():
        if name in found:
            rows = [[cell(row.get(key)) for key in keys] for row in found[name]]
            timing.show(f"{name}: {found['device']}, jax {found['jax']}", keys, rows)


def cell(value):
    """A figure as it is shown."""
    if isinstance(value, list):
        return " ".join(f"{x:.2f}" for x in value)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
