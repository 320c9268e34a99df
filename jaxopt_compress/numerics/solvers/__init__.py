"""Solvers for the layerwise problem: matrices near given ones in the outputs of their products."""
