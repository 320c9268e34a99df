"""Recipes, reports, and which method for which parameter under a budget."""

from jaxopt_compress.planning.allocate import Allocation, allocate, bytes
from jaxopt_compress.planning.recipe import Rule, assign, read_recipe, read_rules
from jaxopt_compress.planning.report import Report, leaf_report, report
from jaxopt_compress.planning.sensitivities import Sensitivities, sensitivities

__all__ = [
    "Allocation",
    "Report",
    "Rule",
    "Sensitivities",
    "allocate",
    "assign",
    "bytes",
    "leaf_report",
    "read_recipe",
    "read_rules",
    "report",
    "sensitivities",
]
