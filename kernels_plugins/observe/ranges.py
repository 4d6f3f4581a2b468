"""Calls as ranges in profiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

from kernels_core import Resolution, hookimpl

Forward = Callable[..., Any]


class ProfileRanges:
    """A plugin that puts a range around every eager call of a decorated layer: `SiluAndMul [acme.FastSiluAndMul]`.

    Its name has the layer and the origin of the kernel that runs, or `reference`. `torch.profiler` shows it, and on
    NVIDIA GPUs so do tools that read NVTX, such as Nsight Systems.

    Example:
        >>> plugin_manager().register(ProfileRanges(), "ranges")
        'ranges'
        >>> plugin = plugin_manager().unregister("ranges")
    """

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward]:
        """Put a range around a forward."""
        name = f"{resolution.request.layer_name} [{resolution.origin}]"
        nvtx: Callable[[], AbstractContextManager[object]] = nullcontext
        if resolution.request.device.type == "cuda" and torch.version.cuda:
            literal = name.replace("{", "{{").replace("}", "}}")  # nvtx.range formats its argument
            nvtx = functools.partial(torch.cuda.nvtx.range, literal)

        def decorate(forward: Forward) -> Forward:
            @functools.wraps(forward)
            def ranged(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():  # a kernelized model, compiled: the trace has no calls to name
                    return forward(*args, **kwargs)
                with record_function(name), nvtx():
                    return forward(*args, **kwargs)

            return ranged

        return decorate
