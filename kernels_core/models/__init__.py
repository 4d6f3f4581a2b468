"""Whole models: walk them, freeze their choices, count their calls, and report what serves each layer."""
