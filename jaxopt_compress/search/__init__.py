"""Budgets and bounds on quality searched: choose, compress, perhaps train, and measure again."""

from jaxopt_compress.search.auto import Auto, auto
from jaxopt_compress.search.frontier import Frontier, frontier

__all__ = ["Auto", "Frontier", "auto", "frontier"]
