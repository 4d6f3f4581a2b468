"""The parts of a module that a kernel reads past: it takes their weights, and does not call them.

Such a kernel ignores an adapter, a hook or a forward of its own that was put on a part. So the parts are looked at in
each call: the reference answers where one is not as the kernel takes it to be.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..environment import strict
from ..errors import NoKernelError
from ..layer import Forward, Layer, find_layer, source_label
from ..resolution import Candidate, Cause, Refusal, Resolution
from ..torch_internals import constant_result, has_global_hooks
from ..warning import warn_once

Path = tuple[str, ...]
_PLAIN = (torch.nn.Parameter, torch.Tensor, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def checks_parts(layer: Layer, kernel: Any) -> Forward:
    """Return the forward of a kernel class; one that looks at the parts first, if the kernel reads past any.

    A kernel declares them: `reads = {"gate_proj": nn.Linear}`, by path, with their exact class or a tuple of those. Of
    parts that it names in its code (`self.gate_proj.weight`), each parameter must be one that it reads.
    """
    forward: Forward = kernel.forward
    declared: Mapping[str, Any] = getattr(kernel, "reads", {})
    if not declared and (type(forward) is not types.FunctionType or len(forward.__code__.co_names) < 2):
        return forward  # most kernels name no two attributes, and this is a part of the price of a first call
    kinds = {tuple(path.split(".")): kind if isinstance(kind, tuple) else (kind,) for path, kind in declared.items()}
    code = forward.__code__ if type(forward) is types.FunctionType else None
    # A kernel may be written in C, or be a partial.
    found = _chains(code) if code is not None and code.co_argcount and len(code.co_names) > 1 else ()
    chains = [chain for chain in found if chain and not any(chain[: len(path)] == path for path in kinds)]
    named = {path: _names_read(found, path) for path in kinds}
    if not kinds and max(map(len, chains), default=0) < 2:
        return forward
    origin = source_label(kernel)
    reference, name, use_fallback = layer.reference, layer.name, layer.use_fallback

    @constant_result  # in compiled code, it speaks once, while that is traced
    def tell(problem: str) -> None:
        text = f"{origin} does not serve layer {name!r} here, for it reads past a part of the module: {problem}."
        if strict() or not use_fallback:
            raise NoKernelError(f"{text} Call the part in the kernel, or allow the reference.")
        warn_once(f"{text} The reference runs instead.", stacklevel=3)

    @functools.wraps(forward)
    def checked(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        problem = changed_part(self, kinds, named, chains)
        if problem is None:
            return forward(self, *args, **kwargs)
        tell(problem)
        return reference(self, *args, **kwargs)

    checked.__dict__["kernels_changed_part"] = lambda module: changed_part(module, kinds, named, chains)
    return checked


def reads_past(choice: Resolution) -> bool:
    """Whether the kernel that serves reads past parts of its module."""
    return hasattr(choice.implementation, "kernels_changed_part")


def for_module(choice: Resolution, module: torch.nn.Module) -> Resolution:
    """Return a decision; for a module with a changed part that its kernel reads past, that for the reference."""
    look = getattr(choice.implementation, "kernels_changed_part", None)
    if look is None or (problem := look(module)) is None:
        return choice
    candidate = choice.candidate or Candidate(choice.implementation)
    refusal = Refusal(f"it reads past a part of the module: {problem}", candidate, choice.plugin, cause=Cause.POLICY)
    return replace(
        choice,
        implementation=None,
        candidate=None,
        origin="reference",
        refusals=(*choice.refusals, refusal),
        checked={},
        kernel_layer=None,
        inference_only=False,
    )


def changed_part(
    module: torch.nn.Module,
    kinds: Mapping[Path, tuple[type, ...]],
    named: Mapping[Path, frozenset[str]],
    chains: list[Path],
) -> str | None:
    """Return how a part differs from the one that a kernel takes it to be; None if none does.

    Args:
        module: The module that the kernel is to serve.
        kinds: The declared parts, with their classes.
        named: What the code names of each of them; empty if it may read all.
        chains: What the code names of other parts.
    """
    for path, allowed in kinds.items():
        part, _, missing = _descend(module, path)
        if missing:
            return f"{'.'.join(path)!r} is not there"
        # A kernelized part is still of its class: a kernel reads past its forward, whichever it is.
        kind: Any = getattr(getattr(type(part), "kernels_frozen", None), "original", type(part))
        # So is one of a class that only makes it dispatch, as `adopt` does.
        if kind not in allowed and (layer := find_layer(kind)) and layer.reference is kind.__base__.forward:
            kind = kind.__base__
        if kind not in allowed:
            wanted = " or ".join(each.__qualname__ for each in allowed)
            return f"{'.'.join(path)!r} is {kind.__qualname__}, and must be {wanted}"
        for name, tensor in part._parameters.items():
            if type(tensor) not in _PLAIN:
                return f"{name!r} of {'.'.join(path)!r} is {type(tensor).__qualname__}"
            if tensor is not None and named[path] and name not in named[path]:
                return f"{'.'.join(path)!r} has a parameter {name!r}, which it does not read"
        if (problem := _intercepted(part, path)) is not None:
            return problem
    if not chains:
        return None
    read: dict[Path, set[str]] = {}
    called: set[Path] = set()
    for chain in chains:
        part, path, rest = _descend(module, chain)
        if not rest:  # called, or passed on: its forward may run
            called.add(path)
        elif path:
            read.setdefault(path, set()).add(rest)
    for path, names in read.items():
        if path in called:  # also called, so whatever was put on it runs
            continue
        part = _descend(module, path)[0]
        where = ".".join(path)
        if (problem := _intercepted(part, path)) is not None:
            return problem
        for name, tensor in part._parameters.items():
            if tensor is not None and name not in names:
                return f"{where!r} has a parameter {name!r}, which it does not read"
        for name, child in part._modules.items():
            below = (*path, name)
            if child is not None and below not in read and below not in called and _has_parameters(child):
                return f"{where!r} ({type(part).__qualname__}) has a module {name!r}, which it does not call"
    return None


def _names_read(chains: Iterable[Path], path: Path) -> frozenset[str]:
    """Return the attributes of a part that chains name; none if it, or a module around it, is passed on or kept."""
    if any(path[: len(chain)] == chain for chain in chains):
        return frozenset()
    return frozenset(chain[len(path)] for chain in chains if chain[: len(path)] == path)


def _intercepted(part: torch.nn.Module, path: Path) -> str | None:
    for name in _HOOKS:
        if getattr(part, name):
            return f"{'.'.join(path)!r} has hooks"
    if has_global_hooks():
        return f"hooks of all modules are registered, so {'.'.join(path)!r} has hooks"
    return f"{'.'.join(path)!r} has a forward of its own" if "forward" in part.__dict__ else None


def _has_parameters(module: torch.nn.Module) -> bool:
    if module._parameters:
        return True
    return any(child is not None and _has_parameters(child) for child in module._modules.values())


def _descend(module: torch.nn.Module, chain: Path) -> tuple[Any, Path, str]:
    """Follow names as long as they are modules; return the last one, its path, and the name after it."""
    for depth, name in enumerate(chain):
        child = module._modules.get(name)
        if child is None:
            return module, chain[:depth], name
        module = child
    return module, chain, ""


@functools.lru_cache(maxsize=256)  # the code of a kernel is read for each layer that it may serve
def _chains(code: types.CodeType) -> tuple[Path, ...]:
    """Return the attributes that a function reads of its first argument, as far as each expression reads on.

    An empty one is the argument itself, such as where it is passed on.
    """
    chains: list[Path] = []
    module = code.co_varnames[0]
    # These two are no steps of their own, but parts of others.
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", "CACHE")]
    for index, step in enumerate(steps):
        loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)  # from Python 3.13 on, two at once
        if "LOAD_FAST" not in step.opname or module not in loaded:
            continue
        if loaded[-1] != module:
            chains.append(())
            continue
        chain: list[str] = []
        for following in steps[index + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(following.argval)
        chains.append(tuple(chain))
    return tuple(chains)
