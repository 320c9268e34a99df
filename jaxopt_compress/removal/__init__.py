"""Structural removal: units of coupled indices that a function is rewritten without."""

from jaxopt_compress.removal.find import find_groups
from jaxopt_compress.removal.group import Group
from jaxopt_compress.removal.groups import Groups
from jaxopt_compress.removal.plan import Plan
from jaxopt_compress.removal.rewrite import Removed
from jaxopt_compress.removal.slice_stream import Sliced, slice_stream
from jaxopt_compress.removal.units import Member
from jaxopt_compress.rewriting.coupling.coupling import NotRemovable
from jaxopt_compress.tree.budgets import Flops, flops

__all__ = [
    "Flops",
    "Group",
    "Groups",
    "Member",
    "NotRemovable",
    "Plan",
    "Removed",
    "Sliced",
    "find_groups",
    "flops",
    "slice_stream",
]
