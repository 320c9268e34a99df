"""Layer after layer: runs that were interrupted, and what tells a run from another."""

import functools
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_compress as jc
from jaxopt_compress.post_training.fingerprint import fingerprint
from tests.compression.laws import assert_same_bits
from tests.post_training.layers import BATCHES, CASES, RECIPES, D, in_order, normal


@pytest.mark.fast("int3-layers", "pruned-scanned")
@pytest.mark.parametrize("name", ["layers", "scanned"])
@pytest.mark.parametrize("recipe", ["int3", "pruned"])
def test_a_run_goes_on_where_it_was_interrupted(name, recipe, tmp_path, monkeypatch):
    from jaxopt_compress.post_training import decided

    whole = in_order(name, RECIPES[recipe])
    keep, left = decided._keep, [2]

    def interrupted(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        keep(*args)

    monkeypatch.setattr(decided, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_order(name, RECIPES[recipe], resume=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("0*"))) == 2
    monkeypatch.setattr(decided, "_keep", keep)
    again = in_order(name, RECIPES[recipe], resume=tmp_path / "run")
    assert_same_bits(again, whole)
    assert len(list((tmp_path / "run").glob("0*"))) == 5
    fn, params = CASES[name]
    other = jc.quantize("int3", group_size=2)
    more = jax.tree.map(lambda w: w + 1, params)
    twice = lambda p, x: 2 * fn(p, x)
    for given in (
        (fn, params, RECIPES[recipe], BATCHES[:2]),
        (fn, params, other, BATCHES),
        (fn, more, RECIPES[recipe], BATCHES),
        (twice, params, RECIPES[recipe], BATCHES),
    ):
        with pytest.raises(ValueError, match="another function or recipe, or other parameters"):
            jc.compress_in_order(*given, resume=tmp_path / "run", progress=False)


def test_recipes_are_told_apart_by_all_their_arguments():
    """Also by what scores close over, and by candidates and ranks that are chosen by values."""
    constant = jc.schedules.constant(0.5)

    def scored(seed):
        default = normal(seed, D, D)
        return jc.prune(lambda p, *, a=default: jnp.abs(a), constant)

    def closed(seed):
        a = normal(seed, D, D)
        return jc.prune(lambda p: jnp.abs(a), constant)

    recipes = [
        jc.quantize("int4"),
        jc.quantize("int4", bounds=jc.bounds.mse()),
        jc.quantize("int4", bounds=jc.bounds.percentile(99.0)),
        jc.quantize("int4", bounds=jc.bounds.percentile(99.9)),
        {"*": jc.quantize("int4")},
        jc.low_rank(energy=0.5),
        jc.low_rank(energy=0.99),
        jc.best_of(jc.quantize("int4"), jc.low_rank(rank=1)),
        jc.best_of(jc.quantize("int8"), jc.low_rank(rank=2)),
        scored(1),
        scored(2),
        closed(1),
        closed(2),
        jc.prune(jc.scores.magnitude(), constant),
        jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.4)),
        jc.gptq("int4"),
        jc.gptq("int4", damping=1.0),
        jc.gptq("int4", act_order=False),
        jc.auto_round("int4", steps=5),
        jc.auto_round("int4", steps=500),
        functools.partial(closed, 1),
        functools.partial(closed, 2),
        [[1], 2],
        [[1, 2]],
    ]
    marks = [fingerprint(r) for r in recipes]
    assert len(set(marks)) == len(recipes)
    again = [closed(1), jc.low_rank(energy=0.5), jc.quantize("int4", bounds=jc.bounds.mse())]
    assert [fingerprint(r) for r in again] == [marks[11], marks[5], marks[1]]


@pytest.mark.ci
def test_entries_that_do_not_fit_together_are_decided_again_from_a_folder(tmp_path):
    """Layers of ranks 2, 5 and 9 have no common stack; the decision about all needs statistics."""
    thin = [normal(i, 16, r) @ normal(9 + i, r, 16) for i, r in enumerate((2, 5, 9))]
    params = {"w": jnp.stack(thin)}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    c, batches = jc.low_rank(energy=0.9, whiten=True), [normal(5, 64, 16)]
    run = lambda: jc.compress_in_order(fn, params, c, batches, resume=tmp_path, progress=False)
    first, again = run(), run()
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(first), jc.materialize(again))


KILLED = """
import sys, jax.numpy as jnp, numpy as np
import jaxopt_compress as jc
from jaxopt_compress.post_training import decided

def dying(place, name, leaf, keep=decided._keep):
    keep(place, name, leaf)
    if len(list(place.parent.glob("0*"))) == int(sys.argv[3]):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

decided._keep = dying
w = [jnp.asarray(np.random.default_rng(i).standard_normal((8, 8)), jnp.float32) for i in range(4)]
def fn(w, x):
    for each in w:
        x = jnp.tanh(x @ each)
    return x
small = jc.compress_in_order(
    fn, w, eval(sys.argv[1]), [x + 1 for x in w[:2]], resume=sys.argv[2], progress=False
)
jc.save(sys.argv[4], small)
"""

RESUMED = {
    "quantize": 'jc.quantize("int3", activations=jc.activations("int4", "calibrated"))',
    "gptq": 'jc.gptq("int3", group_size=4, symmetric=False)',
    "auto_round": 'jc.auto_round("int3", steps=20)',
    "auto_round, relaxed": 'jc.auto_round("int3", method="relaxed", steps=20)',
    "awq": 'jc.awq("int3", group_size=4)',
    "hqq": 'jc.hqq("int3", symmetric=False)',
    "smooth_quant": 'jc.smooth_quant(activations=jc.activations("int8", "calibrated"))',
    "sparse_gpt, gptq": 'jc.chain(jc.sparse_gpt(0.5, "2:4"), jc.gptq("int4"))',
    "prune, reconstruct": (
        "jc.chain(jc.prune(jc.scores.magnitude(), jc.schedules.constant(0.5)), jc.reconstruct())"
    ),
    "low_rank_correction": 'jc.low_rank_correction(jc.gptq("int3"), 2, whiten=True)',
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RESUMED)
def test_killed_processes_resume_to_the_same_bits(method, tmp_path):
    def run(folder, at, out):
        given = [
            *(sys.executable, "-c", KILLED, RESUMED[method]),
            *(tmp_path / folder, str(at), tmp_path / out),
        ]
        return subprocess.run(given, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode

    assert run("whole", 99, "want") == 0
    for at in (1, 3):
        assert run("run", at, "got") == -signal.SIGKILL
    assert run("run", 99, "got") == 0
    assert_same_bits(jc.load(tmp_path / "got"), jc.load(tmp_path / "want"))
