"""Walks over the modules of a model: their paths, and their devices."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..device import ACCELERATOR, as_torch_device
from ..errors import ArgumentError, ArgumentTypeError
from ..layer import find_layer

_WRAPPED = {"_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names under which `torch.compile`, Lightning, FSDP and checkpointing hold the module that they wrap."""


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


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the paths of each module, in order: several if it is shared.

    A wrapper (DDP, FSDP, `torch.compile`, checkpointing, Lightning) has the path of the module that it wraps, so that
    receipts and reports name the layers of a wrapped model as those of the model.

    Raises:
        ArgumentTypeError: If the model is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU())
        >>> module_paths(torch.compile(model)).get(model[0])
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"module_paths takes an nn.Module, not {model!r}.")
    found: dict[nn.Module, dict[str, None]] = {}

    def visit(module: nn.Module, path: str, around: tuple[nn.Module, ...]) -> None:
        found.setdefault(module, {})[path] = None
        for name, child in module._modules.items():
            if child is not None and child not in around:  # modules may refer to a module around them
                inner = path if _is_wrapped(module, name) else f"{path}.{name}" if path else name
                visit(child, inner, (*around, child))

    visit(model, "", (model,))
    return {module: list(places) for module, places in found.items()}


def _is_wrapped(module: nn.Module, name: str) -> bool:
    """Whether a module is the wrapper of a child: by the child's name, or if `module` is the only child, as in DDP."""
    alone = name == "module" and len(module._modules) == 1
    return name in _WRAPPED or (alone and find_layer(module) is None)  # two layers would have one path


def own_device(module: nn.Module) -> torch.device | None:
    """Return the device of the module's first own parameter or buffer; that of its calls, where accelerate moves it."""
    own = module.__dict__
    if ("_hf_hook" in own or "_diffusers_hook" in own) and (device := _execution_device(module)) is not None:
        return device
    return tensor_device(module)


def tensor_device(module: nn.Module) -> torch.device | None:
    """Return the device of the module's first own parameter or buffer."""
    for tensors in (module._parameters, module._buffers):  # no chain of iterators: it runs once per module of a model
        for tensor in tensors.values():
            if tensor is not None:
                return tensor.device
    return None


def _execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which a hook of accelerate or diffusers moves a module for its calls; None without one."""
    hook: Any = module.__dict__.get("_hf_hook")
    registry = module.__dict__.get("_diffusers_hook")  # it offloads groups of modules
    groups = [getattr(each, "group", None) for each in getattr(registry, "hooks", {}).values()]
    for each in (hook, *getattr(hook, "hooks", ()), *groups):  # it may be a chain of hooks
        device = getattr(each, "execution_device", getattr(each, "onload_device", None))
        if isinstance(device, str | int | torch.device):
            return as_torch_device(f"{ACCELERATOR or 'cuda'}:{device}" if isinstance(device, int) else device)
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer of a module, or of one inside it."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return _execution_device(module) or next((tensor.device for tensor in tensors), None)


def required_device(model: nn.Module, asking: str) -> torch.device:
    """Return the device of a model; without any tensor, raise and name the function to call with a device."""
    device = device_of(model)
    if device is None:
        raise ArgumentError(
            f"The device of the model is unknown, for it has no parameters: name one with {asking}(..., device='cuda')."
        )
    return device


def locate(model: nn.Module, inferred: torch.device) -> dict[int, torch.device]:
    """Return a device for each module, by id: that of its first tensor, or else that of the module around it.

    Tensors on the CPU or on none, inside of a module that is moved for its calls, are where they wait for that.
    """
    where: dict[int, torch.device] = {}
    stack: list[tuple[nn.Module, torch.device, torch.device | None]] = [(model, inferred, None)]
    while stack:
        module, around, moved_to = stack.pop()
        if id(module) not in where:
            own = _execution_device(module)
            moved_to = own or moved_to
            here = own or next(filter(None, map(own_device, walk(module))), around)
            if moved_to is not None and here.type in ("cpu", "meta"):
                here = moved_to
            where[id(module)] = here
            stack.extend((child, here, moved_to) for child in module._modules.values() if child is not None)
    return where


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, so that compiled code notices it, too.

    Args:
        module: The module.
        cls: A class that differs in its methods only: nothing else about the module changes.

    Raises:
        ArgumentTypeError: If it is no module, or cannot be of that class.

    Example:
        >>> module, class_of_one_layer = nn.Identity(), type("Identity", (nn.Identity,), {})
        >>> change_class(module, class_of_one_layer)
        >>> type(module) is class_of_one_layer
        True
    """
    if not isinstance(module, nn.Module) or not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArgumentTypeError(f"change_class takes a module and a class of modules, not {module!r} and {cls!r}.")
    try:
        put_class(module, cls)
    except (TypeError, AttributeError) as error:
        raise ArgumentTypeError(
            f"A {type(module).__qualname__} cannot be of class {cls.__qualname__}: {error}"
        ) from error


def put_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module, unchecked: ten thousand in a row."""
    object.__setattr__(module, "__class__", cls)  # nn.Module's own takes a microsecond
    # From 2.8 to 2.12, Dynamo checks the guards on a module, also that of its class, only if its dict has changed.
    module.__dict__["kernels_changed"] = True
    del module.__dict__["kernels_changed"]
