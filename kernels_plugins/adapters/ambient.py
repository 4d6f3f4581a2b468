"""What a call depends on besides its arguments: autocast, and the states of random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from kernels_core.torch_internals import current_transform, in_forward_ad

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""For each type of device that counts: whether autocast is on, and its dtype."""


def _device_types() -> tuple[str, ...]:
    """Return the types of devices whose autocast counts here."""
    found = ["cpu"]
    if torch.version.cuda or torch.version.hip:
        found.append("cuda")
    elif getattr(torch.version, "xpu", None):
        found.append("xpu")
    elif torch.backends.mps.is_built():
        found.append("mps")
    return tuple(found)


_DEVICE_TYPES = _device_types()


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
            # A cache would outlive this run of the layer, and hold on to casts of stand-ins.
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def is_transformed() -> bool:
    """Whether calls are transformed by `torch.func`, or derived forward: autograd does not show that on tensors."""
    return current_transform() is not None or in_forward_ad()


def is_capturing(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a CUDA graph is being captured: nobody may look at data then."""
    return any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing()


RandomStates = tuple[tuple[torch.device | None, torch.Tensor], ...]
"""The state of each random generator; None stands for that of the CPU."""


def random_states(tensors: Iterable[torch.Tensor]) -> RandomStates:
    """Return the states of the generators that a call with these tensors could draw from."""
    devices = dict.fromkeys(tensor.device for tensor in tensors if tensor.device.type == "cuda")
    return ((None, torch.get_rng_state()), *((device, torch.cuda.get_rng_state(device)) for device in devices))


def set_random_states(states: RandomStates) -> None:
    """Put generators back to where they were."""
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def drew(before: RandomStates, after: RandomStates) -> bool:
    """Whether random numbers were drawn in between."""
    return any(not torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


@contextlib.contextmanager
def random(states: RandomStates) -> Iterator[None]:
    """Draw the same random numbers again, and go on after that as if nothing had been drawn."""
    if not states:
        yield
        return
    devices: list[Any] = [device for device, _ in states if device is not None]
    with torch.random.fork_rng(devices):
        set_random_states(states)
        yield
