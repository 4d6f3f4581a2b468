"""Properties of numbers: deterministic, batch-invariant, equal when recomputed; found out, and required."""
