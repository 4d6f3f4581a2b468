"""Whole models: walk them, freeze their choices, count their calls, and report the kernel that serves each layer."""
