# SPDX-License-Identifier: Apache-2.0
"""The layer, as a mapping names it."""

from torch import Tensor, nn

from . import silu_and_mul

__all__ = ["SiluAndMul"]


class SiluAndMul(nn.Module):
    """SiLU of the first half of the last dimension, times the second half."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns `silu(a) * b` for `x = [a, b]`."""
        return silu_and_mul(x)
