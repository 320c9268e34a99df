"""The law on every function of the zoo, and a reason for each index that stays."""

import pytest

import jaxopt_compress as jc
from jaxopt_compress.tree import named_leaves
from tests.models import CASES
from tests.removal import law


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_masked_equals_removed_or_there_is_a_reason(case):
    fn, params, args = case.make()
    groups = jc.find_groups(fn, params, *args)
    for path, x in named_leaves(params):
        for axis in range(x.ndim):
            assert "units of" in (why := groups.why(path, axis)) or "stay: " in why
    if groups:
        grad = not case.name.startswith("while")
        law.check(fn, params, args, law.every_third(groups), grad=grad, rtol=2e-4)
