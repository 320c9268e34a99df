"""Recipes, reports, and which method for which parameter under a budget."""

from jaxopt_compress.planning.allocate import Allocation, allocate, bytes
from jaxopt_compress.planning.budgets import Traffic, traffic
from jaxopt_compress.planning.chips import Chip
from jaxopt_compress.planning.plan import Plan, plan
from jaxopt_compress.planning.recipe import Rule, assign, read_recipe, read_rules
from jaxopt_compress.planning.report import Report, leaf_report, report
from jaxopt_compress.planning.sensitivities import sensitivities
from jaxopt_compress.planning.sensitivity_table import Sensitivities

__all__ = [
    "Allocation",
    "Chip",
    "Plan",
    "Report",
    "Rule",
    "Sensitivities",
    "Traffic",
    "allocate",
    "assign",
    "bytes",
    "leaf_report",
    "plan",
    "read_recipe",
    "read_rules",
    "report",
    "sensitivities",
    "traffic",
]
