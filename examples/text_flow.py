"""Text classification on BBC news, from training to a compressed checkpoint.

A recurrent network (GRU) and a small transformer, plain functions both, tell the five classes of
2,127 articles (of the 2,225, those whose text is not there twice) by their first 128 words; each
word is a row of a table, found by a hash. Every fifth article of each class is held out. Each
variant is trained on through its own view; float32 trains on for as long.

    python -m examples.text_flow                        # the GRU, some minutes on two cores
    python -m examples.text_flow --model transformer

References:
    Cho et al., 2014, Learning Phrase Representations using RNN Encoder-Decoder.
    Vaswani et al., 2017, Attention Is All You Need.
"""

import functools
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxopt_compress as jc
from examples import flow
from examples.data import bbcnews
from examples.models.common import attention, dense, layer_norm
from examples.models.training import batches, scaled, train

ROWS, LENGTH, WIDTH, HEADS, BATCH = 4096, 128, 64, 4, 32
WEIGHTS = ["**/kernel", "words/embedding"]


def _dense(key, n, m):
    return {"kernel": scaled(key, n, m, gain=1.0), "bias": jnp.zeros(m)}


def _words(key):
    return {"embedding": 0.1 * jax.random.normal(key, (ROWS, WIDTH))}


def init_gru(key):
    """Parameters of the recurrent network, 287,429 in all."""
    keys = jax.random.split(key, 4)
    # Gates of update, reset and candidate side by side.
    return {
        "words": _words(keys[0]),
        "input": _dense(keys[1], WIDTH, 3 * WIDTH),
        "state": _dense(keys[2], WIDTH, 3 * WIDTH),
        "head": _dense(keys[3], WIDTH, 5),
    }


def gru(params, ids, drop=lambda x: x):
    """Logits, (n, 5), of articles: rows of the table, (n, length), padded with 0."""
    x = drop(params["words"]["embedding"][ids])
    given = dense(params["input"], x)

    def step(h, now):
        given, inside = now
        own = dense(params["state"], h)
        gates = jax.nn.sigmoid(given[:, : 2 * WIDTH] + own[:, : 2 * WIDTH])
        renew, reset = jnp.split(gates, 2, -1)
        new = jnp.tanh(given[:, 2 * WIDTH :] + reset * own[:, 2 * WIDTH :])
        h = jnp.where(inside[:, None], renew * h + (1 - renew) * new, h)
        return h, h

    inside = ids > 0
    h = jnp.zeros((ids.shape[0], WIDTH))
    _, states = lax.scan(step, h, (given.swapaxes(0, 1), inside.T))
    # The mean of all states: far easier to learn than the last one.
    return dense(params["head"], drop(mean_inside(states.swapaxes(0, 1), inside)))


def init_transformer(key):
    """Parameters of the transformer, two layers of 64, 370,757 in all."""
    keys = iter(jax.random.split(key, 16))
    norm = lambda: {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    square = lambda: _dense(next(keys), WIDTH, WIDTH)

    def layer():
        projections = {name: square() for name in ("query", "key", "value", "output")}
        up, down = _dense(next(keys), WIDTH, 4 * WIDTH), _dense(next(keys), 4 * WIDTH, WIDTH)
        return {
            "attention": projections,
            "mlp": {"up": up, "down": down},
            "norms": {"attention": norm(), "mlp": norm()},
        }

    return {
        "words": _words(next(keys)),
        "positions": 0.02 * jax.random.normal(next(keys), (LENGTH, WIDTH)),
        "layers": [layer(), layer()],
        "norm": norm(),
        "head": _dense(next(keys), WIDTH, 5),
    }


def transformer(params, ids, drop=lambda x: x):
    """As `gru`, with norms before each sum."""
    inside = ids > 0
    x = drop(params["words"]["embedding"][ids] + params["positions"][: ids.shape[1]])
    for layer in params["layers"]:
        norm = lambda name, x, own=layer["norms"]: layer_norm(own[name], x, 1e-5)
        seen = attention(layer["attention"], norm("attention", x), HEADS, inside[:, None, None, :])
        x = x + drop(seen)
        hidden = jax.nn.gelu(dense(layer["mlp"]["up"], norm("mlp", x)))
        x = x + drop(dense(layer["mlp"]["down"], hidden))
    return dense(params["head"], mean_inside(layer_norm(params["norm"], x, 1e-5), inside))


def mean_inside(x, inside):
    """The mean, (n, width), over what is no padding; x is (n, length, width)."""
    kept = jnp.where(inside[..., None], x, 0)
    return kept.sum(1) / jnp.maximum(inside.sum(1), 1)[:, None]


MODELS = {"gru": (init_gru, gru), "transformer": (init_transformer, transformer)}


def tokens(text, length=LENGTH):
    """Rows of the table, (length,): a hash of each of the first words; 0 is padding."""
    words = re.findall(r"[a-z0-9']+", text.lower())[:length]
    # Python's own hash of strings differs from process to process.
    rows = [1 + zlib.crc32(word.encode()) % (ROWS - 1) for word in words]
    return np.pad(np.array(rows, np.int32), (0, length - len(rows)))


def split(articles):
    """Ids and labels to train with, and every fifth article of each class, held out."""
    names = sorted({name for name, _ in articles})
    once = {text: names.index(name) for name, text in articles}
    ids, labels = np.stack([tokens(text) for text in once]), np.array(list(once.values()))
    held_out = np.zeros(len(labels), bool)
    for label in range(len(names)):
        held_out[np.flatnonzero(labels == label)[::5]] = True
    return (ids[~held_out], labels[~held_out]), (ids[held_out], labels[held_out])


def objective(fn, params, key, ids, labels, share=0.2):
    """The mean cross-entropy with dropout, and the next key."""
    key, own = jax.random.split(key)
    count = iter(range(100))

    def drop(x):
        kept = jax.random.bernoulli(jax.random.fold_in(own, next(count)), 1 - share, x.shape)
        return jnp.where(kept, x / (1 - share), 0)

    losses = optax.softmax_cross_entropy_with_integer_labels(fn(params, ids, drop), labels)
    return losses.mean(), key


def fit(fn, params, examples, epochs, rate, compression=None, uses=None, **given):
    """Trains a model of `MODELS`; returns its parameters, or what `compression` stores of them."""
    return train(
        functools.partial(objective, fn),
        params,
        *examples,
        epochs,
        jax.random.key(1),
        batch=BATCH,
        rate=rate,
        compression=compression,
        uses=uses,
        **given,
    )[0]


def variants():
    """How to compress: weights by rounding in training, pruning, and both."""
    sparse = functools.partial(flow.sparse, where=WEIGHTS)
    int8 = lambda: jc.quantize("int8", where=WEIGHTS)
    grouped = lambda name: jc.quantize(name, 32, where=WEIGHTS, scale_dtype="bfloat16")
    return {
        "int8": lambda steps: int8(),
        "int4 groups of 32": lambda steps: grouped("int4"),
        "int2 groups of 32": lambda steps: grouped("int2"),
        "80% pruned": lambda steps: sparse(0.8, steps),
        "80% pruned, int8": lambda steps: jc.chain(sparse(0.8, steps), int8()),
        "95% pruned, int8": lambda steps: jc.chain(sparse(0.95, steps), int8()),
        "rank 8, int8": lambda steps: jc.chain(jc.low_rank(rank=8, where=WEIGHTS[1:]), int8()),
    }


def main(argv=None):
    """Trains, compresses in several ways, and compares."""
    parser = flow.arguments(__doc__, epochs=6, tune=2)
    parser.add_argument("--model", default="gru", choices=list(MODELS))
    args = parser.parse_args(argv)
    init, fn = MODELS[args.model]
    training, held_out = split(bbcnews())
    test, metrics = batches(*held_out), ["accuracy", "f1_macro"]
    if args.checkpoint:
        found = jc.evaluate(fn, jc.load(args.checkpoint), test, metrics)
        print(json.dumps(found))
        return found

    params = fit(fn, init(jax.random.key(0)), training, args.epochs, 3e-3)
    tune = functools.partial(fit, fn, params, training, args.tune, 1e-3, **flow.of_training(args))
    task = flow.Task(fn, params, test, metrics, tune, args.tune * (len(training[1]) // BATCH))
    made = flow.chosen(parser, variants(), args.variants)
    title = f"BBC news, {args.model}, {len(held_out[1])} held-out articles"
    return flow.finish("examples.text_flow", title, task, made, args, "--model", args.model)


if __name__ == "__main__":
    main()
