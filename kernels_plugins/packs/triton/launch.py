"""`Launcher`: a Triton kernel with little work on the host; `operator`: what PyTorch differentiates and traces.

The files of kernels here import only each other, PyTorch and Triton: the demo publishes copies of them.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton
from torch.nn import Parameter

# A loader gives each revision of a published copy a name of its own, so that two of them share a process.
NAMESPACE = re.sub(r"\W", "_", __package__ or __name__)

_TENSORS = frozenset((Tensor, Parameter))
_MANY = 1024

_VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


class Launcher:
    """A Triton kernel, launched with less work on the host.

    Triton looks at every argument of each launch to find its machine code, which takes longer than a small kernel runs.
    The code depends on types, devices, the alignment of tensors and on numbers: it is kept under these.

    Args:
        kernel: Its parameters are, in this order: pointers; numbers that it does not specialize
            (`do_not_specialize`), such as counts of rows; numbers that it does, such as strides; constants.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._ready: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        """For launches on aligned tensors: what `_launched` returns."""

    def __call__(
        self,
        programs: int,
        warps: int,
        tensors: tuple[Tensor, ...],
        free: tuple[float, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Launch it on the GPU that holds the tensors; under a tracer, record it."""
        if type(tensors[0]) not in _TENSORS:  # a compiler, or a subclass that records operators
            wrap_triton(self._kernel)[(programs,)](*tensors, *free, *numbers, *constants, num_warps=warps)
            return
        addresses = []
        bits = 0
        for tensor in tensors:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
        devices = [tensor.get_device() for tensor in tensors]
        key = (warps, numbers, constants, *devices, *[tensor.dtype for tensor in tensors])
        ready = self._ready.get(key)
        if ready is not None and bits % 16 == 0 and _is_plain(devices[0]):
            launch, stream, fixed = ready
            try:
                launch(programs, 1, 1, stream(devices[0]), *fixed, *addresses, *free, *numbers, *constants)
                return
            except OverflowError:  # a number that is not specialized is too large for the code made for smaller ones
                pass
        self._launch(key, bits, programs, warps, tensors, (*free, *numbers, *constants))

    def _launch(
        self, key: Any, bits: int, programs: int, warps: int, tensors: tuple[Tensor, ...], others: tuple[Any, ...]
    ) -> None:
        """Launch it as Triton does, and keep the machine code."""
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors):  # addresses of another device would be taken for its own
            places = ", ".join(str(tensor.device) for tensor in tensors)
            raise ValueError(f"a kernel takes tensors of one device, not of {places}: move them to one")
        if device.type != "cuda":  # Triton's interpreter, on the CPU
            self._kernel[(programs,)](*tensors, *others, num_warps=warps)
            return
        with torch.cuda.device(device):
            compiled = self._kernel[(programs,)](*tensors, *others, num_warps=warps)
        if bits % 16 == 0 and (ready := _launched(compiled)) is not None:
            if len(self._ready) >= _MANY:  # of a model that meets ever new sizes
                self._ready.clear()
            self._ready[key] = ready


def _launched(compiled: Any) -> tuple[Any, ...] | None:
    """Return the function that launches machine code, that of the stream, and the arguments before the kernel's own.

    None for a Triton in which these have not been looked up: then, it launches each time in its own way.
    """
    if _VERSION != (3, 6) or compiled is None:
        return None
    run = compiled.run
    if type(run).__name__ != "CudaLauncher" or run.global_scratch_size or run.profile_scratch_size:
        return None
    flags = (run.launch_cooperative_grid, run.launch_pdl, None, None)
    fixed = (compiled.function, *flags, compiled.packed_metadata, None, None, None)
    return run.launch, triton.runtime.driver.active.get_current_stream, fixed


def _is_plain(device: int) -> bool:
    """Whether a GPU is the current one, and no profiler has asked Triton to be called at each launch."""
    if _HOOKS is None or _HOOKS.launch_enter_hook is not _ENTER or _ENTER.calls or _HOOKS.launch_exit_hook.calls:
        return False
    return _is_only_device() or torch.cuda.current_device() == device


_is_only_device = functools.cache(lambda: torch.cuda.device_count() == 1)
_HOOKS = triton.knobs.runtime if _VERSION == (3, 6) else None
_ENTER = _HOOKS and _HOOKS.launch_enter_hook


def operator(
    name: str,
    compute: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make an operator of a function that launches kernels.

    Compilers and tensor subclasses get an operator of `torch.library`, into which the compiler can look. Plain calls
    get an `autograd.Function`, or no autograd at all where no gradient is needed: that costs less than a small kernel.

    Args:
        name: The name of the operator, in the namespace of this package.
        compute: An annotated function of tensors, followed by numbers, which returns new tensors.
        setup_context: Saves for the backward, as in `torch.library.register_autograd`.
        differentiate: Maps the context and the gradients of the outputs to those of the inputs.
    """
    traced: Any = triton_op(f"{NAMESPACE}::{name}", compute, mutates_args=())
    tensors = sum(each.annotation is Tensor for each in inspect.signature(compute).parameters.values())
    apply: Callable[..., Any] | None = None
    if setup_context is not None and differentiate is not None:
        traced.register_autograd(differentiate, setup_context=setup_context)
        apply = _function(compute, setup_context, differentiate).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(*args)
        recorded = False
        for tensor in args[:tensors]:
            if type(tensor) not in _TENSORS:
                return traced(*args)
            if tensor.requires_grad:
                recorded = True
        if recorded and apply is not None and torch.is_grad_enabled():
            return apply(*args)
        return compute(*args)

    return call


def _function(
    compute: Callable[..., Any], setup_context: Callable[..., None], differentiate: Callable[..., Any]
) -> type[torch.autograd.Function]:
    once = once_differentiable(differentiate)

    class TritonFunction(torch.autograd.Function):
        # The older form with one method: with a `setup_context`, PyTorch inspects the signature at each call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = compute(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # Only a backward that is recorded can be differentiated again, which `once` refuses at a price.
            return once(ctx, *grads) if torch.is_grad_enabled() else differentiate(ctx, *grads)

    return TritonFunction


# --- Shapes ----------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a tensor as rows of unit stride, their number, columns and stride; copies only where it must."""
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // columns if columns else 0, columns, columns
    rows = x if x.dim() == 2 else x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.shape[0], columns, rows.stride(0)


def new_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor of the shape of another, contiguous."""
    if dtype is x.dtype and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cached(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the results of a function of sizes; symbolic sizes, of a compiler, have no hash and no need."""
    fast = functools.lru_cache(_MANY)(plan)

    def find(*sizes: Any) -> Any:
        try:
            return fast(*sizes)
        except TypeError:
            return plan(*sizes)

    return find


def power_of_two(size: int, limit: int) -> int:
    """Return the smallest power of two that is at least `size`, or `limit` if that is smaller."""
    if type(size) is int:
        return min(limit, 1 << (size - 1).bit_length())
    power = 1  # comparing a symbolic size, unlike counting its bits, keeps compiled code valid for a range of sizes
    while power < size and power < limit:
        power *= 2
    return power


@functools.cache
def resources(device: int) -> tuple[int, int]:
    """Return the number of a GPU's multiprocessors, and the bytes of shared memory that a block may take."""
    if device < 0:  # Triton's interpreter, on the CPU
        return 4, 48 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
