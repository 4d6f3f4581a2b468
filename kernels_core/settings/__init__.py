"""Settings from `kernels.toml` or `pyproject.toml`: found, read, checked as a whole, and handed to their owners."""
