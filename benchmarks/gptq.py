"""GPTQ of one matrix beside the loop of the paper, written in torch: time and error.

    python benchmarks/gptq.py [--sizes 2048 4096] [--rounds 3] [--threads 1] [--peer torch] [--json]

The peer is the loop of the paper over columns with blocks of 128, on the inverse Hessian's Cholesky
factor; ``--peer numpy`` runs the same loop without torch. Both round to int4 in groups of 128, by
the same rule for steps, with the same damping, and see the same second moments. Errors are of the
products with inputs that nothing was calibrated on. Compilation is measured apart. Equal codes are
those that the paper's loop finds in float64, with the same inverse factor and in the same order.
Pin the process to as many cores as ``--threads``, which torch is told.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from jaxopt_compress.numerics.formats import format_of
from jaxopt_compress.numerics.solvers.grids import Grid
from jaxopt_compress.numerics.solvers.rows import settle_rows

BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01
TOP = 2 ** (BITS - 1) - 1


def reference(w, h, xp):
    """The values that GPTQ rounds ``w`` ``[k, n]`` to; ``xp`` is `Torch` or `Numpy`.

    References:
        Frantar et al., 2023, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers.
    """
    k = w.shape[0]
    w, out = xp.copy(w), xp.copy(w)
    h = h + DAMPING * xp.mean_diagonal(h) * xp.eye(k)
    factor = xp.upper_factor_of_inverse(h)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, errors = xp.copy(w[start:stop]), xp.copy(w[start:stop])
        for i in range(stop - start):
            at = start + i
            if at % GROUP == 0:
                # The whole group is in this block, and up to date.
                step = xp.absmax(block[i : i + GROUP]) / (TOP + 0.5)
            row = block[i]
            rounded = xp.clip(xp.round(row / step), -TOP - 1, TOP) * step
            out[at] = rounded
            error = (row - rounded) / factor[at, at]
            block[i:] -= xp.outer(factor[at, at:stop], error)
            errors[i] = error
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return out


class Numpy:
    """What `reference` needs, in numpy and scipy."""

    copy, mean_diagonal = staticmethod(np.copy), staticmethod(lambda h: np.mean(np.diag(h)))
    round, clip, outer = staticmethod(np.round), staticmethod(np.clip), staticmethod(np.outer)
    array = staticmethod(lambda x: np.asarray(x, np.float32))
    eye = staticmethod(lambda k: np.eye(k, dtype=np.float32))
    absmax = staticmethod(lambda x: np.maximum(np.abs(x).max(0), 1e-12))

    @staticmethod
    def upper_factor_of_inverse(h):
        """``U`` with ``U^T U = H^-1``."""
        import scipy.linalg

        inverse = scipy.linalg.cho_solve(scipy.linalg.cho_factor(h), np.eye(len(h), dtype=h.dtype))
        return scipy.linalg.cholesky(inverse)


def torch_peer(threads):
    """What `reference` needs, in torch; None with what to install if it is not there."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit(
            "--peer torch needs torch: pip install 'jaxopt-compress[peers]', or take --peer numpy"
        ) from None
    torch.set_num_threads(threads)

    class Torch:
        """The same names as in `Numpy`."""

        copy, mean_diagonal = staticmethod(torch.clone), staticmethod(lambda h: h.diag().mean())
        round, clip, outer = torch.round, torch.clamp, torch.outer
        array = staticmethod(lambda x: torch.from_numpy(np.array(x, np.float32)))
        eye = staticmethod(torch.eye)
        absmax = staticmethod(lambda x: x.abs().amax(0).clamp(min=1e-12))

        @staticmethod
        def upper_factor_of_inverse(h):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
            return torch.linalg.cholesky(inverse, upper=True)

    return Torch


def inputs(size, rows, rng, mixing):
    """Correlated inputs with channels of different sizes."""
    return (rng.normal(size=(rows, size)).astype(np.float32) + mixing(rows)).astype(np.float32)


def equal_codes(w, h):
    """The share of equal codes, both given one inverse factor in float64."""
    k, fmt = len(w), format_of(f"int{BITS}")
    h = h / np.mean(np.diag(h)) + DAMPING * np.eye(k)
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    inverse = np.linalg.inv(upper)
    groups = np.abs(w).reshape(k // GROUP, GROUP, -1).max(1) / (TOP + 0.5)
    step = np.repeat(groups, GROUP, 0).astype(np.float32)
    grid = Grid(jnp.asarray(step))
    settle = jax.jit(
        lambda w, f, g: settle_rows(w, f, g, lambda row, own: own.nearest(row, fmt))[0]
    )
    own = settle(jnp.asarray(w), jnp.asarray(upper, jnp.float32), grid)
    row, codes = w.astype(np.float64), np.zeros(w.shape)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = np.zeros((stop - start, w.shape[1]))
        for at in range(start, stop):
            codes[at] = np.clip(np.round(row[at] / step[at]), -TOP - 1, TOP)
            errors[at - start] = (row[at] - codes[at] * step[at]) / inverse[at, at]
            row[at:stop] -= np.outer(inverse[at, at:stop], errors[at - start])
        row[stop:] -= inverse[start:stop, stop:].T @ errors
    return float(np.mean(np.asarray(grid.levels(own, fmt)) == codes))


def measure(size, rounds, seed, peer):
    """The figures of one size."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(size // 8, size)).astype(np.float32) / 4
    mixing = lambda rows: rng.normal(size=(rows, size // 8)).astype(np.float32) @ basis
    seen, unseen = (inputs(size, rows, rng, mixing) for rows in (2 * size, 1024))
    w = rng.normal(size=(size, size)).astype(np.float32) / size**0.5
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}
    stats = jc.calibrate(fn, params, [jnp.asarray(seen)])
    uses = jc.uses(fn, params, jnp.asarray(seen[:8]))
    c = jc.gptq(f"int{BITS}", group_size=GROUP, bounds=jc.bounds.absmax(), damping=DAMPING)
    h = peer.array(seen.T @ seen / len(seen))

    def ours():
        small = jc.compress(params, c, uses=uses, stats=stats)
        return jax.block_until_ready(small)["w"]

    def clocked(run):
        start = time.perf_counter()
        result = run()
        return result, time.perf_counter() - start

    small, first = clocked(ours)
    theirs, _ = clocked(lambda: reference(peer.array(w), h, peer))
    pairs = [
        (clocked(ours)[1], clocked(lambda: reference(peer.array(w), h, peer))[1])
        for _ in range(rounds)
    ]
    own, other = (float(np.median(x)) for x in zip(*pairs, strict=True))
    error = lambda found: float(np.linalg.norm(unseen @ (np.asarray(found) - w)))
    nearest = jc.compress(params, jc.quantize(f"int{BITS}", group_size=GROUP), uses=uses)["w"]
    return {
        "size": size,
        "seconds": own,
        "peer_seconds": other,
        "time_ratio": float(np.median([a / b for a, b in pairs])),
        "compile_seconds": first - own,
        "error_ratio": error(small.materialize()) / error(theirs),
        "equal_codes": equal_codes(w, np.asarray(h, np.float64)),
        "nearest_error_ratio": error(nearest.materialize()) / error(theirs),
    }


def main():
    """Prints one line per size."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", choices=["torch", "numpy"], default="torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    peer = Numpy if args.peer == "numpy" else torch_peer(args.threads)
    found = [measure(size, args.rounds, args.seed, peer) for size in args.sizes]
    if args.json:
        print(json.dumps({"peer": args.peer, "rows": found}))
        return
    for row in found:
        print(
            f"{row['size']}: equal codes {row['equal_codes']:.5f}; "
            f"{row['seconds']:.2f} s, peer {row['peer_seconds']:.2f} s, ratio "
            f"{row['time_ratio']:.3f}; compile {row['compile_seconds']:.1f} s; held-out error over "
            f"the peer's {row['error_ratio']:.4f}, nearest {row['nearest_error_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
