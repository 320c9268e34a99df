"""What `uses` finds, against answers written by hand."""

import math
import warnings

import jax
import jax.numpy as jnp
import pytest

import jaxopt_compress as jc
from tests.lift.compressed import made
from tests.models import CASES, Expected


def _plain(found):
    """Uses as they are written in the zoo."""
    kinds = (
        Expected(u.op, u.contracting, u.output, u.stack, u.batch, u.gathered, u.count)
        for u in found
    )
    return sorted(kinds, key=str)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_answer_by_hand(case):
    found = made(case.name)[3]
    for path, expected in case.uses.items():
        assert _plain(found[path]) == sorted(expected, key=str), path


# Two operations per weight entry and row of the activation, times the runs of a loop.
FLOPS = {
    "matmul": {"0": 2 * 10 * 16 * 24, "1": 2 * 10 * 24 * 12},
    "einsum_experts": {"w": 2 * 3 * 5 * 16 * 24},
    "split": {"qkv": 2 * 10 * 16 * 24},
    "take": {"table": 0},
    # 5 by 4 positions: (10 + 1 - 3) // 2 + 1 and (12 + 3 - 2) // 3 + 1.
    "conv_strided": {"w": 2 * 2 * 5 * 5 * (3 * 2 * 8 * 24)},
    # Each output channel meets the 8 inputs of its group.
    "conv_grouped": {"w": 2 * 2 * 6 * 5 * (24 * 8 * 3 * 2)},
    "scan_stack": {"up": 2 * 3 * 5 * 16 * 24, "down": 2 * 3 * 5 * 24 * 16},
    "scan_constant": {"hidden": 2 * 6 * 5 * 24 * 24},
    "while_loop": {"up": None},
    "cond": {"left": None},
    "vmap_models": {"first": 2 * 3 * 5 * 24 * 32},
    "ragged_dot": {"w": 2 * 10 * 16 * 24},
}


@pytest.mark.parametrize("name", FLOPS)
def test_operations_by_hand(name):
    found = made(name)[3]
    assert {path: found[path][0].flops for path in FLOPS[name]} == FLOPS[name]


def test_arrays_may_be_types():
    fn, params, args, found = made("linen_scanned_transformer")
    shapes = lambda tree: jax.eval_shape(lambda tree: tree, tree)
    assert jc.uses(fn, shapes(params), *shapes(args)) == found


def test_static_arguments_reach_the_function():
    def fn(params, x, name, *, transposed):
        w = params[name]
        return x @ (w.T if transposed else w)

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    found = jc.uses(fn, params, jnp.ones((2, 4)), "b", transposed=True)
    assert found["a"] == []
    assert [u.contracting for u in found["b"]] == [(-1,)]


def test_compressed_parameters_are_followed_too():
    fn, params, args, found = made("matmul")
    small = jc.compress(params, jc.quantize("int8"))
    assert jc.uses(fn, small, *args) == found


def test_source_is_the_line_of_the_function():
    fn = lambda params, x: x @ params["w"]
    (use,) = jc.uses(fn, {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)))["w"]
    assert "uses_test.py" in use.source


def test_only_floating_leaves_of_rank_two_are_followed():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "ids": jnp.zeros((2, 2), int)}
    fn = lambda p, x: x @ p["w"] + p["b"] + p["ids"].sum()
    assert list(jc.uses(fn, params, jnp.ones((2, 4)))) == ["w"]


def test_a_product_of_two_parameters_is_a_use_of_both():
    fn = lambda p, x: x @ (p["a"] @ p["b"])
    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((3, 5))}
    found = jc.uses(fn, params, jnp.ones((2, 8)))
    assert [u.contracting for u in found["a"]] == [(-1,)]
    assert [u.contracting for u in found["b"]] == [(-2,)]
    assert math.prod(params["a"].shape) * 5 * 2 == found["a"][0].flops


def test_matrices_that_are_not_followed_are_named():
    """One entry of joined stacks; a position that is added and a token that is joined are none."""
    ones = jnp.ones
    params = {"a": ones((4, 8, 8)), "b": ones((4, 8, 8)), "c": ones((8, 8))}
    params |= {"position": ones((5, 8)), "token": ones((1, 8))}

    def fn(p, x, i):
        x = jnp.concatenate([p["token"], x])[:5] + p["position"]
        return x @ p["c"] @ jnp.concatenate([p["a"], p["b"]])[i]

    with pytest.warns(jc.UnfollowedWarning, match=r"lost 'a' at .*uses_test.py.*; 'b' at") as seen:
        found = jc.uses(fn, params, ones((5, 8)), jnp.int32(3))
    assert found["a"] == found["b"] == [] and found["c"]
    assert not any(path in str(seen[0].message) for path in ("'c'", "position", "token"))


def test_what_is_followed_is_not_named():
    with warnings.catch_warnings():
        warnings.simplefilter("error", jc.UnfollowedWarning)
        jc.uses(lambda p, x: x + p["bias"], {"bias": jnp.ones((2, 8))}, jnp.ones((2, 8)))
