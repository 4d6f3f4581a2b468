# SPDX-License-Identifier: Apache-2.0
"""Layers of Llama-style models as Triton kernels, for NVIDIA GPUs."""

from . import layers

__all__ = ["layers"]
