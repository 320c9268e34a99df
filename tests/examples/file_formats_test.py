"""Trees come back from every kind of file that the example writes."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from examples import file_formats

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", file_formats.KINDS)
def test_what_is_written_comes_back(kind, tmp_path):
    jc.register_flax_serialization()
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    up = {"kernel": draw(32, 8), "bias": draw(8)}
    params = {"words": {"embedding": draw(5, 64)}, "up": up}
    for name, tree in file_formats.models(params).items():
        row = file_formats.measure(kind, tree, tmp_path / name)
        assert row["same"] and row["bytes"] >= 64 * 5 / 2
        # A difference of one entry would be seen.
        assert not file_formats.same(tree | {"up/bias": tree["up/bias"].at[0].add(1)}, tree)
