"""Guards around kernels: quarantine, the breaker for kernels that raise, and the check that gradients are kept."""
