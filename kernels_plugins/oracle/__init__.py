"""The reference as the oracle: what a kernel answers is held to what the layer's own forward answers."""
