"""Kernel and reference side by side, in a live model, for a few of its calls."""
