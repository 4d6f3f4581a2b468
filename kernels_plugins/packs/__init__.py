"""Packs: small plugins that offer the kernels of one library for the layers of adopted models."""
