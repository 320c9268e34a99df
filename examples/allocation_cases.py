"""Models, losses and data for `examples.allocation`: each with a metric that no choice has seen."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_compress as jc
from examples import data
from examples.fetching import fetch
from examples.models import efficientnet, minilm, smollm2

KERNELS, WEIGHTS = "**/kernel", efficientnet.WEIGHTS
SIZE, LENGTH = 32, 48
CLOTHES = 10


class Case(NamedTuple):
    """What is compressed, and by what it is judged.

    Attributes:
        fn: The function that is measured; ``uses`` are those of it.
        params: Its parameters.
        candidates: Name -> compression.
        loss: ``loss(params, *batch)``.
        batches: For gradients.
        held_out: For measurements.
        metric: The name of the metric on ``test``.
        test: Batches of inputs and targets.
        where: What candidates take; None for all.
    """

    fn: Callable[..., Any]
    params: Any
    candidates: dict[str, jc.Compression]
    loss: Callable[..., jax.Array]
    batches: Sequence[Any]
    held_out: Sequence[Any]
    metric: str
    test: Sequence[Any]
    where: Any = None


def bits(group_size=None, where=None, method=jc.quantize):
    """Name -> 2, 3, 4 and 8 bits, to the nearest level by default."""
    return {f"int{b}": method(f"int{b}", group_size, where=where) for b in (2, 3, 4, 8)}


def moved(apply, params):
    """A loss: the mean squared distance of vectors from those of ``params``, and its batches."""

    def loss(changed, ids, reference):
        return jnp.mean(jnp.sum(jnp.square(apply(changed, ids) - reference), -1))

    run = jax.jit(apply)
    return loss, lambda ids: (ids, run(params, ids))


def related(apply, params):
    """A loss: 1 less the correlation of pair similarities with those of ``params``.

    The pairs are all those of a sentence in the first half of a batch with one in the second.
    """

    def similarities(params, ids):
        vectors = apply(params, ids)
        first, second = jnp.split(vectors, 2)
        centred = (first @ second.T).ravel()
        return centred - centred.mean()

    def loss(changed, ids, reference):
        own = similarities(changed, ids)
        return 1 - own @ reference / (jnp.linalg.norm(own) * jnp.linalg.norm(reference))

    run = jax.jit(similarities)
    return loss, lambda ids: (ids, run(params, ids))


LOSSES = {"moved": moved, "pairs": related}


def sentences(tokenize, count):
    """Token ids of sentences of the training part, (count / size, size, length)."""
    texts = sorted({text for pair in data.stsb("train") for text in pair[:2]})
    chosen = np.random.default_rng(0).choice(texts, count, replace=False)
    ids = np.zeros((count, LENGTH), np.int32)
    for row, tokens in enumerate(tokenize(list(chosen))):
        ids[row, : len(tokens)] = tokens[:LENGTH]
    return ids.reshape(-1, SIZE, LENGTH)


def of_minilm(count, method=jc.quantize, loss="moved"):
    """Sentences' vectors, by rank correlation on the STS Benchmark's test part."""
    folder = fetch("minilm")
    tokenize, params = minilm.tokenizer(folder), minilm.load(folder)
    loss, made = LOSSES[loss](minilm.apply, params)
    batches = list(map(made, sentences(tokenize, count)))
    half = len(batches) // 2
    test = minilm.pairs(tokenize)
    chosen, parts = bits(64, method=method), (batches[:half], batches[half:])
    return Case(minilm.similarity, params, chosen, loss, *parts, "spearman", test)


def of_smollm2(count, method=jc.quantize, length=128):
    """Next tokens, by perplexity on fiction; chosen on romances."""
    folder = fetch("smollm2")
    params, tokenize = smollm2.load(folder), smollm2.tokenizer(folder)

    def loss(params, ids, following):
        logits = smollm2.apply(params, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    batches = smollm2.windows(tokenize, "romance", count, length, size=2)
    half = len(batches) // 2
    test = smollm2.windows(tokenize, "fiction", 8, 256, size=1)
    chosen = bits(64, KERNELS, method)
    parts = batches[:half], batches[half:]
    return Case(smollm2.apply, params, chosen, loss, *parts, "perplexity", test, KERNELS)


def of_efficientnet(count, method=jc.quantize):
    """Clothes of ten kinds, by accuracy, through a linear layer in the place of the last one."""
    (images, labels), test = data.fashion_mnist()
    params = efficientnet.load(fetch("efficientnet_lite0"))
    fitted = efficientnet.probe(params, efficientnet.batches(images, labels, 3000))
    folded = jc.fold_norms(efficientnet.apply, fitted, efficientnet.resized(images[:1]))
    fn = folded.function(efficientnet.apply)

    def loss(params, images, labels):
        wrong = fn(params, images) - jax.nn.one_hot(labels, CLOTHES)
        return jnp.mean(jnp.sum(jnp.square(wrong), -1))

    # Pictures to which the linear layer was not fitted.
    own = efficientnet.batches(images[3000:], labels[3000:], count, SIZE)
    half, chosen = len(own) // 2, bits(where=WEIGHTS, method=method)
    tests = efficientnet.batches(*test, 500)
    return Case(fn, folded.params, chosen, loss, own[:half], own[half:], "accuracy", tests, WEIGHTS)


CASES = {"minilm": of_minilm, "smollm2": of_smollm2, "efficientnet": of_efficientnet}
