"""The pack `triton`: kernels of ours, for norms, gated MLPs, rotary embeddings and the loss of language models."""
