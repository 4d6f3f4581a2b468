"""Copies and pickles of kernelized modules: a copy is kernelized, a pickle is not."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..warning import warn_once


@contextlib.contextmanager
def _as_original(module: nn.Module) -> Iterator[None]:
    """Show a module as one of its original class."""
    cls = type(module)
    object.__setattr__(module, "__class__", cls.kernels_frozen.original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)


@dataclass(frozen=True)
class _Kind:
    """The class of a kernelized module, and whether its kernel is suspended: a copy gets these, a pickle does not."""

    cls: Any
    suspended: bool

    def given_to(self, copied: nn.Module) -> nn.Module:
        object.__setattr__(copied, "__class__", self.cls)
        if self.suspended:
            copied.__dict__["forward"] = types.MethodType(self.cls.kernels_frozen.original.forward, copied)
        return copied

    def __deepcopy__(self, memo: object) -> _Kind:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


def copied(self: nn.Module) -> nn.Module:
    """Copy a kernelized module, which shares its tensors: the copy is kernelized, too."""
    with _as_original(self):
        clone = copy.copy(self)
    return _Kind(type(self), cast(Any, type(self)).kernels_frozen.is_suspended(self)).given_to(clone)


def reduced(self: nn.Module, protocol: Any) -> Any:
    """Copy as a module of this class; pickle as one of the original class: choices do not travel."""
    frozen = cast(Any, type(self)).kernels_frozen
    with _as_original(self):
        answer = self.__reduce_ex__(protocol)
    if isinstance(answer, str):
        return answer
    make, arguments, *rest = answer
    if rest and isinstance(rest[0], dict) and frozen.is_suspended(self):
        rest[0] = {key: value for key, value in rest[0].items() if key != "forward"}
    kept = _Kind(type(self), frozen.is_suspended(self))
    return (_restored, (make, arguments, frozen.run.token, f"{frozen.mode} on {frozen.device}", kept), *rest)


def _restored(
    make: Callable[..., nn.Module], arguments: tuple[Any, ...], token: str, kernelized: str, kept: _Kind | None = None
) -> nn.Module:
    """Make a copy; or an unpickled module, and warn once per kernelized model that it has to be kernelized again."""
    if kept is not None:
        return kept.given_to(make(*arguments))
    warn_once(
        f"This model was saved while kernelized for {kernelized}. Choices are not saved: each call decides by "
        "itself, by the mappings that are active here. To freeze again: kernelize(model, mode=...).",
        ("restored", token),
    )
    return make(*arguments)
