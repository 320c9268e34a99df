"""Trainings that are interrupted go on from a folder, to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_compress as jc
from jaxopt_compress.post_training import steps

RNG = np.random.default_rng(0)


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


WAYS = {
    "distill": lambda *given, **more: jc.distill(*given, steps=9, **more),
    "distill, sgd": lambda *given, **more: jc.distill(
        *given, steps=9, optimizer=optax.sgd(1e-3, momentum=0.9), **more
    ),
    "learn_rounding": lambda *given, **more: jc.learn_rounding(*given, steps=9, **more),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_where_it_was_interrupted(way, tmp_path, monkeypatch):
    params = {"a": draw(12, 16), "b": 1e3 * draw(16, 4)}
    batches = [draw(32, 12) for _ in range(2)]
    small = jc.compress(params, jc.quantize("int2"), uses=jc.uses(model, params, batches[0]))
    want = WAYS[way](model, params, small, batches)
    saves, save = [], steps.save

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(args)
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_APART", 0.0)
    monkeypatch.setattr(steps, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WAYS[way](model, params, small, batches, resume=tmp_path)
    got = WAYS[way](model, params, small, batches, resume=tmp_path)
    assert len(saves) == 9  # Four before, five after: no step was taken twice.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    # A run that has ended is only read, and another run is refused.
    again = WAYS[way](model, params, small, batches, resume=tmp_path)
    assert len(saves) == 9 and jax.tree.all(jax.tree.map(jnp.array_equal, again, got))
    with pytest.raises(ValueError, match="other parameters, batches"):
        WAYS[way](model, params, small, batches[:1], resume=tmp_path)
