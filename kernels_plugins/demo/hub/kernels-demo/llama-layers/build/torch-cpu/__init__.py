# SPDX-License-Identifier: Apache-2.0
"""Layers of Llama-style models in plain torch, for the CPU."""

from . import layers

__all__ = ["layers"]
