"""The command `kernels-core new-plugin`."""
