"""The state around a call: autocast, which its gradients need again, and transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kernels_core.torch_internals import in_forward_ad, in_transform

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""For each type of device in use: whether autocast is on, and its dtype."""


_DEVICE_TYPES = [
    "cpu",
    *(["cuda"] if torch.version.cuda or torch.version.hip else []),
    *(["xpu"] if getattr(torch.version, "xpu", None) else []),
    *(["mps"] if torch.backends.mps.is_built() else []),
]
"""The types of devices that this PyTorch is built for."""


def autocast_now() -> Autocast:
    """Return how autocast is set here."""
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES)


@contextlib.contextmanager
def under(autocast: Autocast) -> Iterator[None]:
    """Set autocast as it was."""
    if not any(enabled for _, enabled, _ in autocast) and not any(map(torch.is_autocast_enabled, _DEVICE_TYPES)):
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype in autocast:
            # A cache would outlive this run of the layer, and hold on to casts of the rebuilt module.
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation transforms this call: tensors do not show that."""
    return in_transform() or in_forward_ad()
