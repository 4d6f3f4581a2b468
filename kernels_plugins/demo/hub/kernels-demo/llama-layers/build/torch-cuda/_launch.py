# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: how they become differentiable operators, and the shapes they are launched with."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import triton_op

# The loader gives every revision of this package its own name, so two of them share a process without clashing.
NAMESPACE = re.sub(r"\W", "_", __package__ or __name__)

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, bool, int, float))


def eager(*args: Any) -> bool:
    """Whether nothing observes the call (compiler, export, dispatch mode, subclass), so kernels launch directly."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and _PLAIN.issuperset(map(type, args))
    )


def operator(
    name: str,
    compute: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes `compute`, which launches Triton kernels, a differentiable operator with two equal ways in.

    Compilers, export and dispatch modes see a `torch.library` operator, whose kernels they can inline. Plain
    eager calls skip the dispatcher for a bare `autograd.Function`, or no autograd at all when nothing needs a
    gradient, since for small inputs that bookkeeping costs more than the kernel itself.

    Args:
        name: The operator's name inside this package's namespace.
        compute: Annotated function of tensors and numbers, returning new tensors.
        setup_context: Saves for the backward, as in `torch.library.register_autograd`.
        backward: Maps the context and the output gradients to the input gradients.
    """
    traced = triton_op(f"{NAMESPACE}::{name}", compute, mutates_args=())
    direct = compute
    if backward is not None and setup_context is not None:
        traced.register_autograd(backward, setup_context=setup_context)

        class Differentiable(torch.autograd.Function):
            # The older single-method form: with a `setup_context` method torch inspects the signature each call.
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = compute(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor) -> Any:
                return backward(ctx, *grads)

        def direct(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                return Differentiable.apply(*args)
            return compute(*args)

    def call(*args: Any) -> Any:
        return direct(*args) if eager(*args) else traced(*args)

    return call


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its rows with unit column stride: a view where the strides allow one."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def power_of_two(size: int, limit: int) -> int:
    """The smallest power of two that is at least `size`, or `limit` if that is smaller."""
    if type(size) is int:
        return min(limit, 1 << (size - 1).bit_length())
    # A symbolic size: comparing, unlike bit tricks, lets the compiled code keep serving a range of sizes.
    power = 1
    while power < size and power < limit:
        power *= 2
    return power


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`; Triton's own is slow to call from the host."""
    return -(-size // block)


class Launcher:
    """A Triton kernel, launched as `kernel[grid](...)` with less work on the host.

    Triton finds the machine code for a call by looking at every argument anew, which takes longer than a small
    kernel runs. What it finds depends on the device, the types of the arguments, the alignment of the
    tensors and the numbers: machine code is kept under these.

    Args:
        kernel: Takes pointers (named so), then numbers, then constants; called with the constants as keywords in
            their order.
    """

    # Before 3.3, machine code is called without the constants.
    _supported = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 3)

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._pointers = sum(name.endswith("_ptr") for name in kernel.arg_names)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *args: Any, num_warps: int, **constants: Any) -> None:
        tensors, numbers = args[: self._pointers], args[self._pointers :]
        types = (*map(type, numbers), *[x.dtype for x in tensors])  # 1 equals 1.0, and is another type to Triton
        key = (tensors[0].device.index, num_warps, types, numbers, *constants.values())
        aligned = not any([x.data_ptr() % 16 for x in tensors])
        compiled = self._compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid[0], 1, 1](*args, *constants.values())
            return
        compiled = self._kernel[grid](*args, num_warps=num_warps, **constants)
        if self._supported and aligned:
            if len(self._compiled) >= 1024:  # of a model that meets ever new sizes
                self._compiled.clear()
            self._compiled[key] = compiled


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor, direct: bool) -> contextlib.AbstractContextManager[None]:
    """Sends direct launches to the GPU that holds `x`; costs next to nothing when that is the current one."""
    # A tracer launches nothing, may run without a GPU, and guards the device in the code that it makes.
    return _HERE if not direct or x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


@functools.cache
def resources(device: torch.device) -> tuple[int, int]:
    """The GPU's number of multiprocessors, and the bytes of shared memory that one block may take."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
