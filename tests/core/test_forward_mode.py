"""Forward-mode differentiation counts as recording, whatever the gradient mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from kernels_plugins import use_kernel_mapping

Make = Callable[..., Any]


@pytest.mark.parametrize("grad", [False, True])
def test_no_grad_does_not_hide_a_tangent(make_layer: Make, make_kernel: Make, grad: bool) -> None:
    """A kernel without backward does not serve a dual tensor, under no_grad either: the tangent arrives."""
    layer = make_layer()()
    with (
        use_kernel_mapping({"Add": {"cpu": make_kernel(10, has_backward=False)}}),
        torch.set_grad_enabled(grad),
        forward_ad.dual_level(),
        pytest.warns(UserWarning, match="has_backward"),
    ):
        dual = forward_ad.make_dual(torch.zeros(1), torch.ones(1))
        result, tangent = forward_ad.unpack_dual(layer(dual))
    assert result.item() == 1 and tangent is not None and tangent.item() == 1
