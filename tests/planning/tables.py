"""A network whose layers matter unequally, and random tables of sensitivities."""

import jax
import jax.numpy as jnp

import jaxopt_compress as jc
from jaxopt_compress.planning.costs import Running
from jaxopt_compress.planning.sensitivity_table import Cell, Sensitivities

FORMATS = {name: jc.quantize(name) for name in ("int2", "int4", "int8")}


def network(seed=0):
    """Three layers whose importance differs by orders of magnitude; the last is not used."""
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = jax.random.normal
    params = {
        "loud": normal(keys[0], (32, 32)) / 4,
        "quiet": normal(keys[1], (32, 32)) / 400,
        "unused": normal(keys[2], (32, 32)),
        "bias": jnp.zeros(32),
    }
    x = [normal(k, (128, 32)) for k in jax.random.split(keys[3], 3)]
    model = lambda p, x: (
        jnp.tanh(x @ p["loud"]) + x @ p["quiet"] + p["bias"] + 0 * p["unused"].sum()
    )
    batches = [(b, model(params, b) + 0.1 * normal(keys[4], (128, 32))) for b in x]

    def loss(params, x, y):
        return jnp.mean((model(params, x) - y) ** 2)

    return loss, params, batches


def random_table(rng, rows=4, names=("a", "b", "c")):
    cells = {}
    for i in range(rows):
        own = {"dense": Cell(1000, 0.0, 0.0, Running(500, 1000))}
        for name in names:
            size, flops, moved = (int(n) for n in rng.integers(50, (900, 500, 900)))
            own[name] = Cell(size, 0.0, float(rng.exponential()), Running(flops, moved))
        cells[f"r{i}"] = own
    candidates = dict.fromkeys(names, jc.quantize("int8"))
    rows = {row: [row] for row in cells}
    return Sensitivities(cells, rows, candidates, 1.0, 100, Running(200, 50))
