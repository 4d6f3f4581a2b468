"""The script `kernels-core`, and its answers to the Tab key."""
