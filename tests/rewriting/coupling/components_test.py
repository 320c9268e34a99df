"""Connected components against a search by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_compress.rewriting.coupling.components import connected_components


def searched(size, edges):
    """Components by breadth-first search, numbered by their first nodes."""
    near = {i: set() for i in range(size)}
    for a, b in edges:
        near[a].add(b)
        near[b].add(a)
    found = [-1] * size
    for start in range(size):
        queue = [start] if found[start] < 0 else []
        number = max(found) + 1
        while queue:
            node = queue.pop()
            if found[node] < 0:
                found[node] = number
                queue += near[node]
    return found


@given(st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=20))
))  # fmt: skip
def test_components(case):
    size, edges = case
    left, right = (np.array([e[i] for e in edges], int) for i in (0, 1))
    assert connected_components(size, left, right).tolist() == searched(size, edges)


def test_a_long_chain_in_any_order():
    order = np.random.default_rng(0).permutation(10_000)
    found = connected_components(10_001, order, order + 1)
    assert not found.any()
