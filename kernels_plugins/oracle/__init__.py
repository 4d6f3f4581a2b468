"""The reference as the oracle: outputs and gradients of kernels, compared with those of the layer's own forward."""
