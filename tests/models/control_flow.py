"""Plain functions whose weights go through loops and branches."""

import jax.numpy as jnp
from jax import lax

from .case import Case, dot
from .plain import plain


def _block(h, up, down):
    return h + jnp.tanh(h @ up) @ down


def _scan_stack(params, x):
    return lax.scan(lambda h, w: (_block(h, w["up"], w["down"]), h.mean()), x, params)


def _scan_nested(params, x):
    def group(h, stack):
        return lax.scan(lambda h, w: (_block(h, *w), None), h, stack)

    return lax.scan(group, x, params)[0]


def _scan_constant(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["input"] + h @ params["hidden"].T)
        return h, h @ params["output"]

    return lax.scan(step, jnp.zeros((xs.shape[1], 24)), xs)


def _scan_carry(params, x):
    def step(carry, _):
        ws, h = carry
        return (ws, _block(h, *ws)), None

    return lax.scan(step, (params, x), length=5)[0][1]


def _while(params, x, steps):
    def body(carry):
        i, h = carry
        return i + 1, _block(h, params["up"], params["down"])

    return lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))[1]


def _fori_index(params, x):
    return lax.fori_loop(0, 3, lambda i, h: _block(h, params["up"][i], params["down"][i]), x)


def _fori_constant(params, x):
    return lax.fori_loop(0, 4, lambda i, h: _block(h, params["up"], params["down"]), x)


def _cond(params, x, flag):
    def left(h):
        return jnp.tanh(h @ params["left"])

    def right(h):
        return h @ params["right_in"] @ params["right_out"]

    return lax.cond(flag, left, right, x), lax.cond(~flag, left, right, x)


def _switch(params, x, choices):
    branches = [
        lambda h: h @ params[0],
        lambda h: jnp.tanh(h) @ params[1].T,
        lambda h: h @ params[2][0],
    ]
    return lax.map(lambda choice: lax.switch(choice, branches, x), choices)


def _static_index(params, x):
    for i in range(3):
        x = _block(x, params["up"][i], params["down"][i])
    return x


def _dynamic_index(params, x, first, second):
    for i in (first, second):
        x = _block(x, params["up"][i], params["down"][i])
    return x


_WIDTHS = {"up": (16, 24), "down": (24, 16)}
_STACK = {name: (3, *shape) for name, shape in _WIDTHS.items()}
_STACK_USES = {name: [dot(stack=(-3,))] for name in _STACK}

CASES: list[Case] = [
    plain("scan_stack", _scan_stack, _STACK, (5, 16), _STACK_USES),
    plain(
        "scan_nested",
        _scan_nested,
        [(2, 3, 16, 24), (2, 3, 24, 16)],
        (5, 16),
        {"0": [dot(stack=(-4, -3))], "1": [dot(stack=(-4, -3))]},
    ),
    plain(
        "scan_constant",
        _scan_constant,
        {"input": (16, 24), "hidden": (24, 24), "output": (24, 8)},
        (6, 5, 16),
        {"input": [dot(count=6)], "hidden": [dot((-1,), (-2,), count=6)], "output": [dot(count=6)]},
    ),
    plain(
        "scan_carry",
        _scan_carry,
        ((16, 24), (24, 16)),
        (3, 16),
        {"0": [dot(count=5)], "1": [dot(count=5)]},
    ),
    plain(
        "while_loop",
        _while,
        _WIDTHS,
        (5, 16),
        {name: [dot(count=None)] for name in _WIDTHS},
        reverse=False,
        extra=(3,),
    ),
    plain("fori_loop_index", _fori_index, _STACK, (5, 16), _STACK_USES),
    plain(
        "fori_loop_constant",
        _fori_constant,
        _WIDTHS,
        (5, 16),
        {name: [dot(count=4)] for name in _WIDTHS},
    ),
    plain(
        "cond",
        _cond,
        {"left": (16, 24), "right_in": (16, 8), "right_out": (8, 24)},
        (5, 16),
        {name: [dot(count=None)] for name in ("left", "right_in", "right_out")},
        extra=(True,),
    ),
    plain(
        "switch",
        _switch,
        [(16, 24), (24, 16), (1, 16, 24)],
        (5, 16),
        {
            "0": [dot(count=None)],
            "1": [dot((-1,), (-2,), count=None)],
            "2": [dot(stack=(-3,), count=None)],
        },
        extra=([2, 0, 1],),
    ),
    plain("static_index", _static_index, _STACK, (5, 16), _STACK_USES),
    plain(
        "dynamic_index",
        _dynamic_index,
        {"up": (2, 16, 24), "down": (2, 24, 16)},
        (5, 16),
        _STACK_USES,
        extra=(1, 0),
    ),
]
