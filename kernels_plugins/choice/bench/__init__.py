"""Benchmarks of layers: all candidates, at several sizes, against the reference and a copy."""
