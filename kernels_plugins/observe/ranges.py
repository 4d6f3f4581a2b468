"""Calls as ranges in profiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

from kernels_core import Resolution, hookimpl

Forward = Callable[..., Any]


class ProfileRanges:
    """A plugin that puts a range around every eager call of a decorated layer: `SiluAndMul [acme.FastSiluAndMul]`.

    It is named by the layer and by what runs, which may be `reference`. `torch.profiler` shows it, and on NVIDIA
    GPUs so do tools that read NVTX, such as Nsight Systems.

    Example:
        >>> plugin_manager().register(ProfileRanges(), "ranges")
        'ranges'
        >>> plugin = plugin_manager().unregister("ranges")
    """

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward]:
        """Put a range around a forward."""
        name = f"{resolution.request.layer_name} [{resolution.origin}]"
        wrap = _with_nvtx if resolution.request.device.type == "cuda" and torch.version.cuda else _without_nvtx
        return functools.partial(wrap, name)


def _without_nvtx(name: str, forward: Forward) -> Forward:
    @functools.wraps(forward)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a kernelized model, compiled: there are no calls to name
            return forward(*args, **kwargs)
        with record_function(name):
            return forward(*args, **kwargs)

    return ranged


def _with_nvtx(name: str, forward: Forward) -> Forward:
    nvtx: Any = torch.cuda.nvtx

    @functools.wraps(forward)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with record_function(name), nvtx.range(name.replace("{", "{{").replace("}", "}}")):  # it formats what it gets
            return forward(*args, **kwargs)

    return ranged
