"""What goes with what, by hand, and products of axes against a search over all sets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_compress.rewriting.coupling.coupling import Coupling, NotRemovable
from jaxopt_compress.rewriting.coupling.graph import Graph


def closed(coupling, atoms):
    gone = coupling.close(set(coupling.component[list(atoms)].tolist()))
    return set(np.flatnonzero(gone[coupling.component]).tolist())


def test_tied_indices_go_together():
    graph = Graph()
    a, b, c = graph.axes((3, 3, 2))
    graph.tie(a, b[::-1])
    coupling = Coupling(graph)
    assert closed(coupling, [a[0]]) == {a[0], b[2]}
    assert closed(coupling, [c[1]]) == {c[1]}
    with pytest.raises(ValueError, match="lengths 3 and 2"):
        graph.tie(a, c)


def test_what_is_tied_to_something_protected_stays():
    graph = Graph()
    a, b, c = graph.axes((3, 3, 1))
    graph.tie(a, b)
    graph.protect((b[:1],), "it is needed")
    coupling = Coupling(graph, [a, b, c])
    assert coupling.why(coupling.component[a]) == ["it is needed"]
    assert coupling.why(coupling.component[c]) == ["it is the only index of an axis"]
    with pytest.raises(NotRemovable, match="it is needed"):
        closed(coupling, [a[0], a[1]])


def test_a_pair_goes_with_its_first_factor_that_may():
    graph = Graph()
    whole = graph.axis(6)
    rows, columns = graph.split(whole, (2, 3))
    assert graph.split(whole, (2, 3))[0] is rows
    assert closed(Coupling(graph), [whole[4]]) == {rows[1], *whole[3:]}
    graph.protect((rows,), "rows stay")
    assert closed(Coupling(graph), [whole[4]]) == {columns[1], whole[1], whole[4]}
    graph.protect((columns,), "columns stay")
    with pytest.raises(NotRemovable):
        closed(Coupling(graph), [whole[4]])


def test_a_factor_of_length_one_is_none():
    graph = Graph()
    whole = graph.axis(3)
    one, rows = graph.split(whole, (1, 3))
    assert len(one) == 1 and closed(Coupling(graph), [rows[2]]) == {rows[2], whole[2]}
    with pytest.raises(ValueError, match="3 indices are no product"):
        graph.product(whole, (rows, rows))


def consistent(gone, shape, graph):
    """Whether pairs go if and only if one of their two does, by the definition."""
    flags = np.isin(np.arange(graph.size), list(gone))
    for whole, factors in graph.products:
        cells = np.zeros(shape, bool)
        for k, f in enumerate(factors):
            cells |= flags[f].reshape([-1 if i == k else 1 for i in range(len(shape))])
        if (cells.reshape(-1) != flags[whole]).any():
            return False
    return all((flags[a] == flags[b]).all() for a, b in graph.ties)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.permutations(range(2)), st.booleans())
def test_closures_are_consistent_and_minimal(seed, order, shared):
    """Two products of one shape, with factors in common, or with pairs in common."""
    graph, shape = Graph(), (2, 2)
    rows, columns = graph.axes(shape)
    first = graph.join((rows, columns))
    second = graph.join((rows if shared else graph.axis(2), graph.axis(2)))
    graph.tie(first[:2], second[order])
    coupling = Coupling(graph)
    found = closed(coupling, [seed % graph.size])
    assert consistent(found, shape, graph)
    smaller = (
        set(s) for n in range(1, len(found)) for s in itertools.combinations(sorted(found), n)
    )
    # A pair may go with either factor, so that only sets with the whole of a factor compare.
    if seed % graph.size in (*rows, *columns):
        assert not any(seed % graph.size in s and consistent(s, shape, graph) for s in smaller)
