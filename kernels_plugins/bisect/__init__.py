"""Which kernels change a number: found by running some layers on their kernels, and the others on their reference."""
