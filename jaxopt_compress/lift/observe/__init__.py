"""Observations of a function as it runs: uses, statistics of activations, captures."""
