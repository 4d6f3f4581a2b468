"""Walks over the modules of a model: their paths, their devices, and the decorated functions that they call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ..errors import ArgumentError
from ..layer import Layer


def walk(model: nn.Module) -> list[nn.Module]:
    """Return each module once, in order; many times as fast as `modules()`, which also makes names."""
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            children = module._modules
            if children:
                stack.extend(reversed(children.values()))
    return list(found.values())


def paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the paths of each module, in order: several if it is shared."""
    found: dict[nn.Module, list[str]] = {}

    def visit(module: nn.Module, path: str, around: tuple[nn.Module, ...]) -> None:
        found.setdefault(module, []).append(path)
        for name, child in module._modules.items():
            if child is not None and child not in around:  # modules may refer to a module around them
                visit(child, f"{path}.{name}" if path else name, (*around, child))

    visit(model, "", (model,))
    return found


def own_device(module: nn.Module) -> torch.device | None:
    """Return the device of the module's first own parameter or buffer."""
    for tensors in (module._parameters, module._buffers):  # no chain of iterators: it runs once per module of a model
        for tensor in tensors.values():
            if tensor is not None:
                return tensor.device
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer of a module, or of one inside it."""
    return next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)


def required_device(model: nn.Module, asking: str) -> torch.device:
    """Return the device of a model; without any tensor, raise and name the function to call with a device."""
    device = device_of(model)
    if device is None:
        raise ArgumentError(
            f"The device of the model is unknown, for it has no parameters: name one with {asking}(..., device='cuda')."
        )
    return device


def locate(model: nn.Module, inferred: torch.device) -> dict[int, torch.device]:
    """Return a device for each module, by id: that of its first tensor, or else that of the module around it."""
    where: dict[int, torch.device] = {}
    stack = [(model, inferred)]
    while stack:
        module, around = stack.pop()
        if id(module) not in where:
            here = next(filter(None, map(own_device, walk(module))), around)
            where[id(module)] = here
            stack.extend((child, here) for child in module._modules.values() if child is not None)
    return where


def functions_of(cls: type[nn.Module]) -> Sequence[Layer]:
    """Return the layers of the decorated functions that a class declares with `use_kernelized_func`.

    Example:
        >>> functions_of(torch.nn.Linear)
        ()
    """
    return cast(Sequence[Layer], getattr(cls, "kernels_functions", ()))
