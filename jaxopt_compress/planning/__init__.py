"""Recipes and reports."""

from jaxopt_compress.planning.recipe import Rule, assign, read_recipe, read_rules
from jaxopt_compress.planning.report import Report, leaf_report, report

__all__ = ["Report", "Rule", "assign", "leaf_report", "read_recipe", "read_rules", "report"]
