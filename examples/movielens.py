"""A recommender on MovieLens-100k, from training to a compressed checkpoint.

Vectors of users and films meet in a product and in a small network, which predict ratings, 1 to 5.
The last fifth of each user's ratings, by time, is held out: rmse is over these; precision@10 and
recall@10 are of the ten films with the highest predictions among all that the user has not rated
in the training part, where the user's held-out films of 4 or more are the right ones; ndcg@10 sees
their places, too.
Each variant is trained on through its own view; float32 trains on for as long.

    python -m examples.movielens                                # some minutes on two cores
    python -m examples.movielens --store out --plot out.png     # and checkpoints, reopened
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_compress as jc
from examples import flow
from examples.data import ml100k
from examples.models.common import dense
from examples.models.training import scaled, train

WIDTH, KEEP, TOP, BATCH = 32, 0.8, 10, 256
TABLES, KERNELS = "*/embedding", "mlp/*/kernel"
BOTH = [TABLES, KERNELS]


def init(key, users=944, films=1683, width=WIDTH):
    """Parameters: a vector and a bias of each user and film, and layers of 64, 32 and 1."""
    keys = jax.random.split(key, 5)
    shapes = {"up": (2 * width, 64), "down": (64, 32), "head": (32, 1)}
    return {
        "user": {"embedding": 0.1 * jax.random.normal(keys[0], (users, width))},
        "film": {"embedding": 0.1 * jax.random.normal(keys[1], (films, width))},
        "bias": {"user": jnp.zeros(users), "film": jnp.zeros(films), "all": jnp.float32(3.5)},
        "mlp": {
            name: {"kernel": scaled(k, *shape), "bias": jnp.zeros(shape[1])}
            for k, (name, shape) in zip(keys[2:], shapes.items(), strict=True)
        },
    }


def apply(params, users, films, drop=lambda x: x):
    """Ratings, (n,), of films by users, numbers (n,)."""
    user, film = params["user"]["embedding"][users], params["film"]["embedding"][films]
    bias = params["bias"]
    both = jnp.sum(user * film, -1) + bias["user"][users] + bias["film"][films] + bias["all"]
    x = drop(jnp.concatenate([user, film], -1))
    for name in ("up", "down"):
        x = drop(jax.nn.relu(dense(params["mlp"][name], x)))
    return both + dense(params["mlp"]["head"], x)[..., 0]


def ranking(params, users, candidates):
    """Ratings of all films, (n, films), by users, (n,); minus infinity for no candidates."""
    films = jnp.arange(len(params["bias"]["film"]))
    grid = jnp.broadcast_arrays(users[:, None], films)
    ratings = apply(params, *(x.reshape(-1) for x in grid)).reshape(grid[0].shape)
    return jnp.where(candidates, ratings, -jnp.inf)


def objective(params, key, pairs, ratings, share=0.3):
    """The mean squared error with dropout, and the next key."""
    key, *own = jax.random.split(key, 4)
    keys = iter(own)

    def drop(x):
        kept = jax.random.bernoulli(next(keys), 1 - share, x.shape)
        return jnp.where(kept, x / (1 - share), 0)

    found = apply(params, pairs[:, 0], pairs[:, 1], drop)
    return jnp.mean(jnp.square(found - ratings)), key


def split(ratings):
    """The first four fifths of each user's ratings by time, and the others."""
    ratings = ratings[np.lexsort((ratings[:, 1], ratings[:, 3], ratings[:, 0]))]
    counts = np.bincount(ratings[:, 0])
    position = np.concatenate([np.arange(c) for c in counts])
    early = position < KEEP * counts[ratings[:, 0]]
    return ratings[early], ratings[~early]


def rating_batches(ratings):
    """Batches for `apply`; rows of padding fill up the last one."""
    size = 4096
    rows = np.pad(ratings, ((0, -len(ratings) % size), (0, 0))).reshape(-1, size, 4)
    weights = (np.arange(rows.shape[0] * size) < len(ratings)).astype(np.float32)
    pairs = zip(rows, weights.reshape(-1, size), strict=True)
    return [((r[:, 0], r[:, 1]), r[:, 2].astype(np.float32), w) for r, w in pairs]


def ranking_batches(seen, held_out, size=118):
    """Batches for `ranking`, with 1 for right films; users without one weigh 0."""
    candidates, targets = np.ones((944, 1683), bool), np.zeros((944, 1683), np.int8)
    candidates[:, 0] = False
    candidates[seen[:, 0], seen[:, 1]] = False
    right = held_out[held_out[:, 2] >= 4]
    targets[right[:, 0], right[:, 1]] = 1
    weights, users = (targets > 0).any(1).astype(np.float32), np.arange(len(targets))
    cut = lambda i: [x[i : i + size] for x in (users, candidates, targets, weights)]
    return [((u, c), t, w) for u, c, t, w in map(cut, range(0, len(users), size))]


def variants():
    """How to compress: tables and layers alike, or each in its own way."""
    sparse = functools.partial(flow.sparse, where=BOTH)
    grouped = functools.partial(jc.quantize, group_size=16, scale_dtype="bfloat16")

    def in_stages(steps):
        """Fewer bits from a third of the steps on; without steps the last stage."""
        first, last = grouped("int4", where=BOTH), grouped("int2", where=BOTH)
        return jc.progressive({0: first, steps // 3: last} if steps else {0: last})

    return {
        "int8": lambda steps: jc.quantize("int8", where=BOTH),
        "int4 groups of 16": lambda steps: grouped("int4", where=BOTH),
        "int3 groups of 16": lambda steps: grouped("int3", where=BOTH),
        "int2 groups of 16": lambda steps: grouped("int2", where=BOTH),
        "int2 groups of 16, after int4": in_stages,
        "rank 8": lambda steps: jc.low_rank(rank=8, where=TABLES),
        "rank 8, int8": lambda steps: jc.chain(
            jc.low_rank(rank=8, where=TABLES), jc.quantize("int8", where=BOTH)
        ),
        "16 values": lambda steps: jc.share(16, where=BOTH),
        "products of 256 vectors": lambda steps: jc.share(256, vector=4, where=TABLES),
        "Kronecker sums": lambda steps: jc.kronecker(ratio=4.0, where=TABLES),
        "Kronecker sums, int8": lambda steps: jc.chain(
            jc.kronecker(ratio=4.0, where=TABLES), jc.quantize("int8", where=BOTH)
        ),
        "tensor trains": lambda steps: jc.tensor_train(ratio=4.0, where=TABLES),
        "50% pruned, int8": lambda steps: jc.chain(
            sparse(0.5, steps), jc.quantize("int8", where=BOTH)
        ),
        "80% pruned, int8": lambda steps: jc.chain(
            sparse(0.8, steps), jc.quantize("int8", where=BOTH)
        ),
        "tables int4, layers int8": lambda steps: jc.chain(
            {TABLES: grouped("int4"), KERNELS: jc.quantize("int8")}
        ),
    }


def fit(params, ratings, epochs, rate, compression=None, uses=None, **given):
    """Trains on ratings; what `examples.models.training.train` says."""
    key, ratings = jax.random.key(1), (ratings[:, :2], ratings[:, 2].astype(np.float32))
    return train(
        objective,
        params,
        *ratings,
        epochs,
        key,
        batch=BATCH,
        rate=rate,
        decay=0.3,
        compression=compression,
        uses=uses,
        **given,
    )[0]


def figures(params, ranked):
    """Of the ten films with the highest predictions."""
    m = jc.metrics
    wanted = [m.precision_at(TOP), m.recall_at(TOP), m.ndcg_at(TOP)]
    return jc.evaluate(ranking, params, ranked, wanted)


def main(argv=None):
    """Trains, compresses in several ways, and compares."""
    parser = flow.arguments(__doc__, epochs=10, tune=5)
    args = parser.parse_args(argv)
    seen, held_out = split(ml100k()[0])
    test, ranked = rating_batches(held_out), ranking_batches(seen, held_out)
    more = functools.partial(figures, ranked=ranked)
    if args.checkpoint:
        params = jc.load(args.checkpoint)
        found = jc.evaluate(apply, params, test, ["rmse"]) | more(params)
        print(json.dumps(found))
        return found
    params = fit(init(jax.random.key(0)), seen, args.epochs, 1e-2)
    tune = functools.partial(fit, params, seen, args.tune, 3e-3, **flow.of_training(args))
    steps = args.tune * (len(seen) // BATCH)
    task = flow.Task(apply, params, test, ["rmse"], tune, steps, more)
    made = flow.chosen(parser, variants(), args.variants)
    title = "MovieLens-100k, the last fifth of each user's ratings"
    return flow.finish("examples.movielens", title, task, made, args)


if __name__ == "__main__":
    main()
