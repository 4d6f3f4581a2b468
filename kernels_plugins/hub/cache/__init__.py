"""The command `kernels-core cache`."""
