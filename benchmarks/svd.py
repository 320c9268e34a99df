"""A truncated SVD by random projections, beside the whole one and those of other packages.

    python benchmarks/svd.py [--size 4096] [--rank 128] [--rounds 3] [--json]

Rounds are interleaved; the whole decomposition is timed once per kind of matrix. Errors are over
the least one of that rank, from the singular values of the whole decomposition.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.utils.extmath import randomized_svd

from jaxopt_compress.numerics.svd import balanced_factors

try:
    import torch
except ImportError:
    torch = None


def matrix(kind, size, seed):
    """Gaussian entries, or singular values that fall as a power."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((size, size)).astype(np.float32)
    if kind == "gaussian":
        return w
    # By random rotations on both sides, of the exact singular values.
    left = np.linalg.qr(w)[0]
    right = np.linalg.qr(rng.standard_normal((size, size)).astype(np.float32))[0]
    return (left * np.arange(1, size + 1, dtype=np.float32) ** -0.7) @ right


def contenders(w, rank):
    """Name -> a run that returns two factors."""
    x = jnp.asarray(w)

    def ours():
        return [np.asarray(f) for f in balanced_factors(x, rank)]

    def sklearn():
        u, s, v = randomized_svd(w, rank, random_state=0)
        return u * s, v

    found = {"jaxopt-compress": ours, "scikit-learn": sklearn}
    if torch is not None:
        t = torch.from_numpy(w)

        def of_torch(rounds):
            u, s, v = torch.svd_lowrank(t, q=rank + 10, niter=rounds)
            return (u[:, :rank] * s[:rank]).numpy(), v[:, :rank].T.numpy()

        found["torch niter=2"] = lambda: of_torch(2)
        found["torch niter=4"] = lambda: of_torch(4)
    return found


def timed(run):
    """``(seconds, result)``."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(kind, size, rank, rounds, seed):
    """All figures of one kind of matrix, by name."""
    w = matrix(kind, size, seed)
    runs = contenders(w, rank)
    errors = {}
    for name, run in runs.items():
        u, v = run()  # And compiles.
        errors[name] = float(np.linalg.norm(w - u @ v))
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run)[0])
    whole = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False)).lower(w).compile()
    full, (_, s, _) = timed(lambda: jax.block_until_ready(whole(w)))
    least = float(np.sqrt(np.sum(np.asarray(s, np.float64)[rank:] ** 2)))
    found = {f"{kind}/whole/seconds": full}
    for name, own in seconds.items():
        middle = float(np.median(own))
        found[f"{kind}/{name}/seconds"] = middle
        found[f"{kind}/{name}/times_faster"] = full / middle
        found[f"{kind}/{name}/error_over_least"] = errors[name] / least
    return found


def main():
    """Prints a line per figure, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=["gaussian", "power"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    for kind in args.kinds:
        found |= measure(kind, args.size, args.rank, args.rounds, args.seed)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:44} {value:10.4f}")


if __name__ == "__main__":
    main()
