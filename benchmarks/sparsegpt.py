"""SparseGPT of one matrix beside the loop of the paper, written in torch: time and error.

    python benchmarks/sparsegpt.py [--sizes 2048 4096] [--patterns 50% 2:4] [--peer torch] [--json]

The peer is the loop of the paper over columns with blocks of 128, on the inverse Hessian's Cholesky
factor: zeros are chosen when a block begins, for 2:4 when a group does. ``--peer numpy`` runs the
same loop without torch. Both prune one half with the same damping, and see the same second moments.
Errors are of the products with inputs that nothing was calibrated on. Compilation is measured
apart.
"""

import argparse
import json
import time

import gptq
import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc

BLOCK, DAMPING = 128, 0.01


def reference(w, h, xp, group):
    """``w`` ``[k, n]`` with one half of its entries 0; ``group`` is 4 for 2:4, and 0 for none.

    References:
        Frantar and Alistarh, 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot.
    """
    k = w.shape[0]
    w, out = xp.copy(w), xp.copy(w)
    h = h + DAMPING * xp.mean_diagonal(h) * xp.eye(k)
    factor = xp.upper_factor_of_inverse(h)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, errors = xp.copy(w[start:stop]), xp.copy(w[start:stop])
        diagonal = factor.diagonal()[start:stop, None]
        zero = [] if group else lowest(block / diagonal)
        for i in range(stop - start):
            at = start + i
            if group and i % group == 0:
                own = slice(i, i + group)
                ranks = (block[own] / diagonal[own]).__abs__().argsort(0).argsort(0)
                within = ranks < group // 2
            row = block[i]
            gone = within[i % group] if group else zero[i]
            kept = row * ~gone
            out[at] = kept
            error = (row - kept) / factor[at, at]
            block[i:] -= xp.outer(factor[at, at:stop], error)
            errors[i] = error
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return out


def lowest(scores):
    """The half of the entries with the lowest magnitudes."""
    flat = scores.__abs__().reshape(-1)
    threshold = np.partition(np.asarray(flat), len(flat) // 2)[len(flat) // 2]
    return scores.__abs__() < float(threshold)


def measure(size, pattern, rounds, seed, peer):
    """The figures of one size."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(size // 8, size)).astype(np.float32) / 4
    mixing = lambda rows: rng.normal(size=(rows, size // 8)).astype(np.float32) @ basis
    seen, unseen = (gptq.inputs(size, rows, rng, mixing) for rows in (2 * size, 1024))
    w = rng.normal(size=(size, size)).astype(np.float32) / size**0.5
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}
    stats = jc.calibrate(fn, params, [jnp.asarray(seen)])
    uses = jc.uses(fn, params, jnp.asarray(seen[:8]))
    asked = None if pattern == "50%" else pattern
    c = jc.sparse_gpt(0.5, asked, damping=DAMPING)
    h, group = peer.array(seen.T @ seen / len(seen)), 4 if asked else 0

    def ours():
        # What is decided, as what the peer returns; storing is no part of the algorithm.
        state = c.init(params, uses=uses, stats=stats)
        return jax.block_until_ready(jc.materialize(c.apply(params, state)))["w"]

    def clocked(run):
        start = time.perf_counter()
        result = run()
        return result, time.perf_counter() - start

    theirs_of = lambda: reference(peer.array(w), h, peer, group)
    (own, first), (theirs, _) = clocked(ours), clocked(theirs_of)
    pairs = [(clocked(ours)[1], clocked(theirs_of)[1]) for _ in range(rounds)]
    seconds, other = (float(np.median(x)) for x in zip(*pairs, strict=True))
    error = lambda found: float(np.linalg.norm(unseen @ (np.asarray(found) - w)))
    half = jc.schedules.constant(0.5)
    magnitude = jc.compress(params, jc.prune(jc.scores.magnitude(), half, asked), uses=uses)
    return {
        "size": size,
        "pattern": pattern,
        "seconds": seconds,
        "peer_seconds": other,
        "time_ratio": float(np.median([a / b for a, b in pairs])),
        "compile_seconds": first - seconds,
        "error_ratio": error(own) / error(theirs),
        "zeros": float(np.mean(np.asarray(own) == 0)),
        "peer_zeros": float(np.mean(np.asarray(theirs) == 0)),
        "magnitude_error_ratio": error(jc.materialize(magnitude)["w"]) / error(theirs),
    }


def main():
    """Prints one line per size and pattern."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--patterns", nargs="*", default=["50%", "2:4"], choices=["50%", "2:4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=["torch", "numpy"], default="torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    peer = gptq.Numpy if args.peer == "numpy" else gptq.torch_peer(1)
    asked = [(size, pattern) for size in args.sizes for pattern in args.patterns]
    found = [measure(*each, args.rounds, args.seed, peer) for each in asked]
    if args.json:
        print(json.dumps({"peer": args.peer, "rows": found}))
        return
    for row in found:
        print(
            f"{row['size']} {row['pattern']}: {row['seconds']:.2f} s, peer "
            f"{row['peer_seconds']:.2f} s, ratio {row['time_ratio']:.3f}; compile "
            f"{row['compile_seconds']:.1f} s; zeros {row['zeros']:.4f}, {row['peer_zeros']:.4f}; "
            f"held-out error over the peer's {row['error_ratio']:.4f}, magnitude "
            f"{row['magnitude_error_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
