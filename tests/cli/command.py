"""The command, called in this process, with a recipe and parameters to compress."""

import warnings

import jax.numpy as jnp
import numpy as np

from jaxopt_compress.__main__ import main

RECIPE = """
[[rule]]
where = "**/kernel"
quantize = {format = "int4", group_size = 8}

[[rule]]
where = "embed"
low_rank = {energy = 0.9}
"""


def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "embed": draw(20, 6),
        "layers": [{"kernel": draw(16, 8), "bias": draw(8)}, {"kernel": draw(8, 4), "bias": None}],
        "half": draw(3).astype(jnp.bfloat16),
        "step": jnp.int32(7),
    }


def run(capsys, *argv, code=0):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([str(a) for a in argv]) == code
    done = capsys.readouterr()
    assert "Traceback" not in done.err
    return done.out if code == 0 else done.err
