"""Sources that make a kernel fit: `opaque` and `reference_backward`."""
