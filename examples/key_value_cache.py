"""Keys and values of attention in few bits: what a cache of them takes, and what it costs.

A language model that writes keeps the keys and values of all tokens before, which for long texts
are more than its weights. Here those of SmolLM2 are rounded before attention meets them, as they
would lie in a cache: per token and head, in groups of 32 along a head, or keys per channel in
groups of 32 tokens, since their channels differ more than their tokens do. Rotated ones are
multiplied by a Hadamard matrix along a head, keys and queries alike, which changes no product.
Attention is a plain function; lifted, it runs on what `quantize_array` returns. Printed are the
perplexity of 4096 tokens of fiction of the Brown corpus, and the bytes of a token.

    python -m examples.key_value_cache
    python -m examples.key_value_cache --only "int4*" --tokens 2048

References:
    Liu et al., 2024, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache.
    Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.
"""

import argparse
import fnmatch
import json

import jax
import jax.numpy as jnp
import scipy.linalg

import jaxopt_compress as jc
from examples import smollm2 as language
from examples.fetching import fetch
from examples.models import smollm2
from examples.models.common import stack
from examples.results import show

# (n, length, heads, size).
TOKENS, CHANNELS = 1, 3


def attention(query, key, value):
    """Causal attention whose queries have more heads than its keys, written out."""
    count, length, heads, size = query.shape
    query = query.reshape(count, length, key.shape[2], -1, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key) * size**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", shares, value).reshape(count, length, heads, size)


def rounded(format, key_axis=CHANNELS, group_size=None, symmetric=True):
    """Key, value -> their stored forms, scales in bfloat16."""
    given = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": "bfloat16"}

    def store(key, value):
        keys = jc.quantize_array(key, format, axis=key_axis, **given)
        return keys, jc.quantize_array(value, format, axis=CHANNELS, **given)

    return store


def turned(store):
    """The same for keys that are rotated along each head."""
    return lambda key, value: store(key @ hadamard(key.shape[-1]), value)


def hadamard(size):
    """An orthogonal matrix of entries of one magnitude."""
    return jnp.asarray(scipy.linalg.hadamard(size) * size**-0.5, jnp.float32)


def variants():
    """Name -> how keys and values are stored."""
    found = {"float32": lambda key, value: (key, value)}
    bfloat16 = lambda x: x.astype(jnp.bfloat16)
    found["bfloat16"] = lambda key, value: (bfloat16(key), bfloat16(value))
    found["int8"] = rounded("int8")
    for bits in ("int4", "int3", "int2"):
        found[f"{bits}, groups"] = rounded(bits, group_size=32)
        found[f"{bits}, groups, zero points"] = rounded(bits, group_size=32, symmetric=False)
        found[f"{bits}, groups, keys rotated"] = turned(rounded(bits, group_size=32))
        by_channel = {"key_axis": TOKENS, "group_size": 32, "symmetric": False}
        found[f"{bits}, groups, keys by channel, zero points"] = rounded(bits, **by_channel)
    found["float4, groups of 32"] = rounded("mxfp4")
    return found


def attend_on(store, rotate):
    """Attention on stored keys and values."""
    run = jc.lift(attention)

    def attend(query, key, value):
        query = query @ hadamard(query.shape[-1]) if rotate else query
        return run(query, *store(key, value)).astype(query.dtype)

    return attend


def main(argv=None):
    """Prints a line per variant."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="globs of variants")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print one JSON line, not a table")
    args = parser.parse_args(argv)
    folder = fetch("smollm2")
    params, tokenize = stack(smollm2.load(folder)), smollm2.tokenizer(folder)
    test = language.texts(tokenize, ["fiction"], args.tokens)
    layers = len(params["layers"]["attention"]["query"]["kernel"])
    size = params["layers"]["attention"]["key"]["kernel"].shape[-1] // smollm2.KEY_HEADS
    one = jax.ShapeDtypeStruct((1, language.LENGTH, smollm2.KEY_HEADS, size), jnp.float32)
    found, made = {}, variants()
    for name in (n for n in made if any(fnmatch.fnmatch(n, glob) for glob in args.only)):
        attend = attend_on(made[name], "rotated" in name)
        fn = lambda p, ids, attend=attend: smollm2.apply(p, ids, attend)
        held = layers * jc.nbytes(jax.eval_shape(made[name], one, one)) / language.LENGTH
        found[name] = {"bytes": held} | jc.evaluate(fn, params, test, ["perplexity"])
    if args.json:
        print(json.dumps(found))
        return found
    lines = {n: [f"{r['bytes']:,.0f}", f"{r['perplexity']:.2f}"] for n, r in found.items()}
    show("SmolLM2, keys and values", ["bytes of a token", "perplexity"], lines)
    return found


if __name__ == "__main__":
    main()
