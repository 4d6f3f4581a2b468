"""The command `kernels-core doctor`."""
