"""The demo: a small model, and kernels for it on a Hub of its own."""
