"""Multiply-accumulates: which operators ran, how often they multiply, and where their operands came from."""
