"""The state around a call besides its arguments: random generators, modes, and hooks of autograd."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..torch_internals import has_saved_tensors_hooks, is_watched, no_dispatch_modes

RandomSource = torch.device | torch.Generator
"""A device, for its generator; or a generator that a model has made for itself."""

RandomStates = Mapping[RandomSource, torch.Tensor]
"""The state of each random generator."""


def random_states(sources: Iterable[RandomSource]) -> RandomStates:
    """Return the states of the generator of the CPU, of those of some devices, and of other generators.

    While a CUDA graph is captured, only that of the CPU: the others cannot be read then.

    Example:
        >>> before = random_states([torch.device("cpu")])
        >>> x = torch.rand(1)
        >>> same_random_states(before, random_states(before))
        False
    """
    states: dict[RandomSource, torch.Tensor] = {torch.device("cpu"): torch.get_rng_state()}
    for device in dict.fromkeys(sources) if not is_capturing() else ():  # each once, in order
        if isinstance(device, torch.Generator):
            states[device] = device.get_state()
        elif device.type not in ("cpu", "meta"):  # the state of the CPU is there, and meta has no generator
            module = torch.get_device_module(device.type)
            # MPS has one device, and its functions take none.
            states[device] = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return states


def set_random_states(states: RandomStates) -> None:
    """Set generators to states that `random_states` returned."""
    for device, state in states.items():
        if isinstance(device, torch.Generator):
            device.set_state(state)
        elif device.type == "cpu":
            torch.set_rng_state(state)
        else:
            module = torch.get_device_module(device.type)
            module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def same_random_states(states: RandomStates, others: RandomStates) -> bool:
    """Return whether no random number was drawn between two calls of `random_states`."""
    return all(torch.equal(state, others[device]) for device, state in states.items() if device in others)


@contextlib.contextmanager
def kept_random_states(sources: Iterable[RandomSource], start: RandomStates | None = None) -> Iterator[RandomStates]:
    """Restore the random generators afterwards.

    Args:
        sources: The devices whose generators are restored, besides the CPU, and other generators.
        start: The states to begin with; None for those of now.

    Yields:
        The states at the start of the block.
    """
    before = random_states(sources)
    try:
        if start is not None:
            set_random_states(start)
        yield before if start is None else start
    finally:
        set_random_states(before)


def host_random_states() -> tuple[Any, Any]:
    """Return the states of the generators of Python's `random` and, where it is imported, of NumPy.

    Example:
        >>> before = host_random_states()
        >>> number = random.random()
        >>> set_host_random_states(before)
        >>> number == random.random()
        True
    """
    numpy = numpy_random()
    return random.getstate(), numpy.get_state(legacy=False) if numpy else None


def set_host_random_states(states: tuple[Any, Any]) -> None:
    """Set the generators of Python and NumPy to states that `host_random_states` returned."""
    numpy = numpy_random()
    random.setstate(states[0])
    if numpy and states[1] is not None:
        numpy.set_state(states[1])


def has_drawn(states: RandomStates, host: tuple[Any, Any] | None) -> bool:
    """Whether random numbers were drawn since `random_states` and, unless None, `host_random_states` were called."""
    if not same_random_states(random_states(states), states):
        return True
    if host is None:
        return False
    python, numpy = host_random_states()
    is_new = host[1] is None  # NumPy was imported since
    return python != host[0] or not (is_new or pickle.dumps(numpy) == pickle.dumps(host[1]))  # `==` is by element


@contextlib.contextmanager
def kept_host_random_states() -> Iterator[tuple[Any, Any]]:
    """Restore the generators of Python and NumPy afterwards; yield their states at the start of the block."""
    before = host_random_states()
    try:
        yield before
    finally:
        set_host_random_states(before)


def numpy_random() -> Any:
    """Return `numpy.random`, which NumPy 2 imports at its first use; None where NumPy is not imported.

    Example:
        >>> import numpy
        >>> numpy_random() is numpy.random
        True
    """
    return importlib.import_module("numpy.random") if "numpy" in sys.modules else None


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Run a block without gradients, hidden from dispatch modes, inference mode, and hooks for saved tensors."""
    cached = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_dispatch_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # `inference_mode(False)` has switched gradients on
        if has_saved_tensors_hooks():  # autograd calls the innermost pair only, and this one does nothing
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        torch.set_autocast_cache_enabled(False)  # the cache would keep casts of parameters that are copies
        stack.callback(torch.set_autocast_cache_enabled, cached)
        yield


def is_observed() -> bool:
    """Return whether a tracer, transform, dispatch mode or CUDA graph records this call: nothing else may run in it."""
    return torch.compiler.is_compiling() or is_watched() or is_capturing()


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured, in which no number of a tensor can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
