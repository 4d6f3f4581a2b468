"""The command `kernels-core benchmark`."""
