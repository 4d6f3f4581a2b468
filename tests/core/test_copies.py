"""Copies of decorated and kernelized things: by copy, by pickle, by value, and through wrappers of others."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from kernels_core import Mode, frozen_choice, kernelize, unkernelize, use_kernel_forward_from_hub
from kernels_plugins.mapping import use_kernel_mapping

X = torch.ones(2, 4)


@use_kernel_forward_from_hub("CopiesShift")
class Shift(nn.Linear):
    """A layer that can be pickled, with parameters."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Shifted(nn.Module):
    """Visibly another function."""

    weight: torch.Tensor
    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + 100


class Passing(nn.Module):
    """A wrapper that passes on all attributes that it lacks, as those of FSDP, DeepSpeed and diffusers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * 2


class Plain:
    """The same, for a wrapper that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or (name.startswith("__") and name != "__deepcopy__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, x: torch.Tensor) -> Any:
        return self.inner(x) * 2


class Copying(Shift):
    """A decorated layer that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        twin.__dict__["was_copied"] = True
        return twin


def kernelized(module: Any) -> Any:
    """Kernelize for inference, with a kernel whose result differs."""
    with use_kernel_mapping({"CopiesShift": {"cpu": Shifted}}):
        return kernelize(module, mode=Mode.INFERENCE)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Passing, Plain, torch.compile], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_of_a_wrapper_is_a_wrapper(wrap: Callable[[Any], Any], clone: Callable[[Any], Any]) -> None:
    """Copying a wrapper that passes attributes on to a kernelized layer returns a wrapper around a copy."""
    wrapper = wrap(kernelized(Shift()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle: choices are not saved
        twin = clone(wrapper)
    assert type(twin) is type(wrapper)
    if wrap is not torch.compile:  # a second is too much for a compilation
        added = 100 if clone in (copy.copy, copy.deepcopy) else 0
        right = wrapper(X) - (100 - added) * (1 if wrap is checkpoint_wrapper else 2)
        torch.testing.assert_close(twin(X), right)


def test_copies_keep_their_class_and_what_suspends_them() -> None:
    """Deep and shallow copies of a kernelized layer are kernelized, suspended where it is, and run on themselves."""
    layer = kernelized(Shift())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.train()
    twin: Any
    for twin in (copy.deepcopy(layer), copy.copy(layer), copy.deepcopy(nn.Sequential(layer))[0]):
        assert type(twin) is type(layer) and twin.forward.__self__ is twin
        assert torch.equal(twin.eval()(X), layer(X) + 100)
    pair = copy.deepcopy([layer, layer])
    assert pair[0] is pair[1]


def test_a_layer_that_copies_itself_still_does() -> None:
    """A `__deepcopy__` of the layer's own class is used, and the copy is kernelized."""
    layer = kernelized(Copying())
    twin = copy.deepcopy(layer)
    assert twin.was_copied and frozen_choice(twin) is frozen_choice(layer)
    assert torch.equal(twin(X), layer(X))


@pytest.mark.parametrize("undo", [False, True])
def test_parametrizations_come_and_go_after_kernelize(undo: bool) -> None:
    """A kernelized layer's parametrizations are removed one by one, and added, in or out of `kernelize`."""
    layer = Shift()
    right = layer(X).detach()
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    kernelized(layer)
    assert parametrize.type_before_parametrizations(layer) is Shift
    assert torch.allclose(copy.deepcopy(layer)(X), right + 100, atol=1e-5)
    parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(layer(X), right + 100)
    if undo:
        unkernelize(layer)
        torch.testing.assert_close(layer(X), right)
        kernelized(layer)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    torch.testing.assert_close(unkernelize(layer)(X), right)
    kernelized(layer)
    parametrize.remove_parametrizations(layer, "weight")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is Shift and isinstance(layer.weight, nn.Parameter) and isinstance(layer.bias, nn.Parameter)
    torch.testing.assert_close(layer(X), right)
