"""A call that can be made again, with any forward, and leaves no trace."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kernels_core.torch_internals import has_saved_tensors_hooks, is_watched, no_dispatch_modes

from .tree import leaves, mapped, tensors

Forward = Callable[..., Any]

_ALIGNMENT = 256
"""Copies start at as round an address as their originals: kernels take another path for others."""


@dataclass(frozen=True)
class Run:
    """What a call did.

    Attributes:
        outputs: What it returned, detached.
        gradients: Gradient of each input and parameter that requires grad, by name; None for one that
            got none. Empty if no gradients were asked for.
        after: Inputs and buffers as they are afterwards, by name.
        mutated: Those, and parameters, that have changed.
        attributes: Other attributes of the module that were set or deleted.
        random: Whether random numbers were drawn.
    """

    outputs: Any
    gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    after: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mutated: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    random: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A call: what was called with what.

    Attributes:
        module: The module that a forward takes first; None for a function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        signature: Of the forward as a caller sees it, to name inputs by; they are numbered without.
        random: States of the random generators at the start of the call, by device; None for those at
            the start of a run.

    Example:
        >>> call = Call(None, (torch.ones(2, requires_grad=True),))
        >>> run = call.run(lambda x: x.mul(3))
        >>> run.outputs, list(run.gradients), list(run.mutated)
        (tensor([3., 3.]), ['input argument 1'], [])
    """

    module: nn.Module | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    signature: inspect.Signature | None = None
    random: Mapping[torch.device, torch.Tensor] | None = None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments, by name."""
        return {name: leaf for name, leaf in self._leaves() if isinstance(leaf, torch.Tensor)}

    @property
    def devices(self) -> list[torch.device]:
        """The devices of all tensors of the call, in order."""
        found = [tensor.device for tensor in self.inputs.values()]
        if self.module is not None:
            found += [tensor.device for tensor in (*self.module.parameters(), *self.module.buffers())]
        return list(dict.fromkeys(found))

    @property
    def records(self) -> bool:
        """Whether an input or a parameter requires grad."""
        inputs = any(tensor.requires_grad for tensor in self.inputs.values())
        return inputs or (self.module is not None and any(p.requires_grad for p in self.module.parameters()))

    def snapshot(self, *, state: bool = False) -> Call:
        """Return the call as it is now, whatever happens to its tensors afterwards.

        Strides, aliases between arguments, and requires_grad are kept. The states of the random generators
        are those of now.

        Args:
            state: Whether to copy parameters and buffers of the module, too.
        """
        with _aside():
            copies = _copies(self.inputs.values())
            copied = self.replaced(
                lambda _, leaf: (
                    copies[id(leaf)].requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
                )
            )
            module = self.module
            if module is not None and state:
                module = _replica(module, lambda tensor, _: tensor.detach().clone())
        return replace(copied, module=module, random=_random_states(self.devices))

    def converted(self, old: torch.dtype, new: torch.dtype) -> Call:
        """Return the same call with all tensors of one dtype, also of the module, in another."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(new) if tensor.dtype is old else tensor.detach().clone()

        with _aside():
            module = _replica(self.module, lambda tensor, _: convert(tensor)) if self.module is not None else None
            call = self.replaced(
                lambda _, leaf: (
                    convert(leaf).requires_grad_(leaf.requires_grad)
                    if isinstance(leaf, torch.Tensor) and leaf.dtype is old
                    else leaf
                )
            )
        return replace(call, module=module)

    def replaced(self, function: Callable[[str, Any], Any]) -> Call:
        """Return the same call with `function(name, leaf)` in place of each leaf of the arguments."""
        args = tuple(mapped(value, function, name) for name, value in zip(self._names, self.args, strict=True))
        kwargs = {name: mapped(value, function, name) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def run(
        self,
        forward: Forward,
        *,
        gradients: bool | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        parameters: bool = True,
        mutations: bool = True,
        contiguous: bool = True,
    ) -> Run:
        """Make the call with a forward, on copies of everything that it could change.

        Runs of one call start with the same random numbers and get the same gradients of the outputs, so that
        their results can be compared. Autocast counts as around the call. Nothing of it is seen by hooks for
        saved tensors, such as those of activation checkpointing, by dispatch modes, or in `.grad`.

        Args:
            forward: Is called with the module, if there is one, and the arguments.
            gradients: Whether to compute gradients; None to do so where autograd would record the call.
            seed: Chooses the gradients of the outputs.
            dtype: Run with all floating numbers in this dtype, without autocast: `torch.float64` for
                numbers to measure errors from. What the forward casts to more than it was given is kept in it, too.
            parameters: Whether to copy parameters; without, a forward that writes into them does so.
            mutations: Whether to look for what the run has changed, which waits for the device.
            contiguous: Whether the gradients of the outputs are contiguous; a sum passes on such that are not.

        Returns:
            Outputs, gradients and changes. What the forward raises is raised.
        """
        recording = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        wanted = self.records and (recording if gradients is None else gradients)
        inference = gradients is None and not wanted and torch.is_inference_mode_enabled()
        records = wanted or (gradients is None and recording)
        with _aside(), _kept_random(self.random, self.devices) as started:
            copies = _copies(self.inputs.values())
            given = {name: _converted(copies[id(tensor)], dtype) for name, tensor in self.inputs.items()}
            module = None
            if self.module is not None:
                copy_parameters = parameters or any(p.is_inference() for p in self.module.parameters())
                module = _replica(self.module, functools.partial(_state, copy_parameters=copy_parameters, dtype=dtype))
            fresh = _attributes(module)
            sources: dict[str, torch.Tensor] = {}
            if wanted:
                for name, tensor in self.inputs.items():
                    if tensor.requires_grad:
                        sources[f"input {name}"] = given[name] = given[name].detach().requires_grad_()
                if module is not None:
                    sources |= {f"parameter {name}": p for name, p in module.named_parameters() if p.requires_grad}
            with torch.inference_mode(inference), torch.set_grad_enabled(records), self._only(dtype):
                # An input is no leaf: one that requires grad could not be written to.
                passed = {name: _alias(tensor) if tensor.requires_grad else tensor for name, tensor in given.items()}
                call = self.replaced(lambda name, leaf: passed.get(name, leaf))
                outputs = forward(*(() if module is None else (module,)), *call.args, **call.kwargs)
            found = _gradients(outputs, sources, seed, contiguous) if wanted else {}
            random = not _equal_states(_random_states(self.devices), started)
            left = {f"input {name}": tensor.detach() for name, tensor in passed.items()}
            if module is not None:
                left |= {f"buffer {name}": buffer.detach() for name, buffer in module.named_buffers()}
            mutated = dict(self._mutations(left, module, dtype)) if mutations else {}
            detached = mapped(outputs, lambda _, leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)
        after = _attributes(module)
        attributes = sorted(n for n in fresh.keys() | after.keys() if fresh.get(n, after) is not after.get(n, fresh))
        return Run(detached, found, left, mutated, tuple(attributes), random)

    @contextlib.contextmanager
    def _only(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Compute in one dtype, if one is given: without autocast, and with casts to others going to it.

        But for casts to less than what the inputs have: these are meant to lose something.
        """
        if dtype is None:
            yield
            return
        given = [t.dtype for t in self.inputs.values() if t.dtype in _REAL]
        least = max((torch.finfo(d).eps for d in given), default=1.0)
        with contextlib.ExitStack() as stack:
            for kind in {device.type for device in self.devices} | {"cpu"}:
                if kind != "meta":
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_OneDtype(dtype, {d for d in _REAL if torch.finfo(d).eps <= least}))
            yield

    def _mutations(
        self, left: Mapping[str, torch.Tensor], module: nn.Module | None, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a run has changed, compared by value: kernels write past autograd's counters."""
        after = dict(left)
        if module is not None:
            after |= {f"parameter {name}": parameter.detach() for name, parameter in module.named_parameters()}
        for name, before in self.state().items():
            if name in after and not same_numbers(_converted(before.detach(), dtype), after[name]):
                yield name, after[name]

    def state(self, *, parameters: bool = True) -> dict[str, torch.Tensor]:
        """Return everything that a run may change in place, by name: inputs, buffers, parameters."""
        state = {f"input {name}": tensor for name, tensor in self.inputs.items()}
        if self.module is not None:
            state |= {f"buffer {name}": buffer for name, buffer in self.module.named_buffers()}
            if parameters:
                state |= {f"parameter {name}": parameter for name, parameter in self.module.named_parameters()}
        return state

    @property
    def _names(self) -> list[str]:
        """A name for each positional argument."""
        names: list[str] = []
        for parameter in self.signature.parameters.values() if self.signature is not None else ():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}[{number}]" for number in range(len(self.args) - len(names))]
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
        names += [f"argument {number + 1}" for number in range(len(names), len(self.args))]
        return names[: len(self.args)]

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        for name, value in (*zip(self._names, self.args, strict=True), *self.kwargs.items()):
            yield from leaves(value, name)


# --- Copies ---------------------------------------------------------------------------------------


def _copies(originals: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Copy tensors, by id: those that share memory share it in their copies, with the same strides."""
    copies: dict[int, torch.Tensor] = {}
    spans: dict[object, list[tuple[int, int, torch.Tensor]]] = {}
    for tensor in originals:
        if id(tensor) in copies:
            continue
        copies[id(tensor)] = tensor  # its place in the order
        if not _is_plain(tensor):
            copies[id(tensor)] = tensor.detach().clone()
            continue
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * tensor.itemsize
        end = start + (int(reach) + 1) * tensor.itemsize
        spans.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append((start, end, tensor))
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        while group:
            together = [group.pop(0)]
            end = together[0][1]
            while group and group[0][0] < end:
                together.append(group.pop(0))
                end = max(end, together[-1][1])
            copies.update(_copied_span(together, end))
    return copies


def _copied_span(span: list[tuple[int, int, torch.Tensor]], end: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Copy a stretch of memory, and yield the tensors that lie in the copy as the originals do in theirs."""
    start, _, first = span[0]
    start -= start % _ALIGNMENT
    memory = torch.empty(0, dtype=torch.uint8, device=first.device)
    memory = memory.set_(first.untyped_storage(), start, (end - start,), (1,)).clone()
    for at, _, tensor in span:
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset = (at - start) // tensor.itemsize
        yield id(tensor), empty.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view of memory and nothing else."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type not in ("meta", "xla")
        and tensor.numel() > 0
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def _replica(module: nn.Module, make: Callable[[torch.Tensor, bool], torch.Tensor]) -> nn.Module:
    """Copy a module with everything in it, but with `make(tensor, is_parameter)` in place of its tensors.

    What it keeps in lists and dicts is copied, too; other objects are shared.
    """
    made: dict[int, Any] = {}

    def tensor(original: torch.Tensor | None, is_parameter: bool) -> torch.Tensor | None:
        if original is None:
            return None
        if id(original) not in made:
            copied = make(original, is_parameter)
            made[id(original)] = nn.Parameter(copied, original.requires_grad) if is_parameter else copied
        return cast(torch.Tensor, made[id(original)])

    def other(_: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return tensor(leaf, isinstance(leaf, nn.Parameter))
        return made.get(id(leaf), leaf) if isinstance(leaf, nn.Module) else leaf

    originals = list(module.modules())
    for original in originals:
        kind = type(original)
        made[id(original)] = kind.__new__(kind)
    for original in originals:
        state = dict(original.__dict__)
        state["_parameters"] = {name: tensor(p, True) for name, p in original._parameters.items()}
        state["_buffers"] = {name: tensor(b, False) for name, b in original._buffers.items()}
        state["_modules"] = {name: made.get(id(child), child) for name, child in original._modules.items()}
        for name, value in original.__dict__.items():
            if name not in ("_parameters", "_buffers", "_modules") and "_hooks" not in name:
                state[name] = mapped(value, other) if isinstance(value, list | dict | torch.Tensor) else value
        made[id(original)].__dict__.update(state)
    return cast(nn.Module, made[id(module)])


def _state(tensor: torch.Tensor, is_parameter: bool, *, copy_parameters: bool, dtype: torch.dtype | None) -> Any:
    """Return what stands for a parameter or buffer in a run."""
    copied = tensor.detach().clone() if copy_parameters or not is_parameter else tensor.detach()
    return _converted(copied, dtype)


def _attributes(module: nn.Module | None) -> dict[str, object]:
    """Return the attributes of a module and those in it that are neither tensors nor modules, by path."""
    return {
        f"{path}.{name}" if path else name: value
        for path, inner in (module.named_modules() if module is not None else ())
        for name, value in inner.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def same_numbers(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Return whether two tensors hold the same, NaN counting as equal to NaN."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    with torch.no_grad():
        return bool(torch.equal(before, now) or ((before == now) | ((before != before) & (now != now))).all())


@contextlib.contextmanager
def preserved(module: nn.Module, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Leave buffers, attributes and random numbers as they were, whatever is done with a module inside."""
    where = {tensor.device for tensor in (*module.parameters(), *module.buffers())} | set(devices)
    kept = {}
    for inner in module.modules():
        state = dict(inner.__dict__)
        held = [(value, value.copy()) for value in state.values() if isinstance(value, list | dict)]
        kept[inner] = (state, held)
    with _aside():
        buffers = {id(buffer): (buffer, buffer.detach().clone()) for buffer in module.buffers()}
    with _kept_random(None, list(where)):
        try:
            yield
        finally:
            for inner, (state, held) in kept.items():
                for value, content in held:
                    if isinstance(value, list):
                        value[:] = content
                    else:
                        value.clear()
                        value.update(content)
                inner.__dict__.clear()
                inner.__dict__.update(state)
            with _aside():
                for buffer, before in buffers.values():
                    if not same_numbers(before, buffer.detach()):
                        buffer.detach().copy_(before)


# --- Gradients ------------------------------------------------------------------------------------


class _Alias(torch.autograd.Function):
    """The same numbers, as something that was computed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data  # no view: those of leaves cannot be written to

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, cast(Any, _Alias).apply(tensor))


def _gradients(
    outputs: Any, sources: Mapping[str, torch.Tensor], seed: int, contiguous: bool
) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the sources, for fixed gradients of the outputs."""
    reached: list[torch.Tensor] = []
    pushed: list[torch.Tensor] = []
    for number, (_, output) in enumerate(tensors(outputs)):
        if output.requires_grad:
            reached.append(output)
            pushed.append(_output_gradient(output, seed + 1009 * number, contiguous))
    if not reached or not sources:
        return dict.fromkeys(sources)
    with torch.inference_mode(False):
        found = torch.autograd.grad(reached, list(sources.values()), pushed, allow_unused=True)
    return {name: g.detach() if g is not None else None for name, g in zip(sources, found, strict=True)}


def _output_gradient(output: torch.Tensor, seed: int, contiguous: bool) -> torch.Tensor:
    """Make numbers that are the same in every dtype: bfloat16 holds all of them."""
    generator = torch.Generator(output.device).manual_seed(seed)
    shape = (*output.shape, 2) if output.is_complex() else tuple(output.shape)
    numbers = torch.randn(shape, generator=generator, device=output.device, dtype=torch.float32)
    numbers = numbers.to(torch.bfloat16).float()
    gradient = (torch.view_as_complex(numbers) if output.is_complex() else numbers).to(output.dtype)
    if contiguous or gradient.dim() == 0:
        return gradient
    return torch.stack([gradient, torch.full_like(gradient, torch.nan)], -1)[..., 0]


# --- Around a run ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Keep what is done inside from everybody that looks at calls."""
    cached = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_dispatch_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if has_saved_tensors_hooks():  # the innermost ones apply, and these do nothing
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        torch.set_autocast_cache_enabled(False)  # it would keep casts of parameters that are gone
        stack.callback(torch.set_autocast_cache_enabled, cached)
        yield


def is_elsewhere() -> bool:
    """Whether somebody traces, transforms or captures what runs now, so that nothing else may run in it."""
    if torch.compiler.is_compiling() or is_watched():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _random_states(devices: Iterable[torch.device]) -> dict[torch.device, torch.Tensor]:
    """Return the states of the generators of the CPU and of some devices."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device.type)
            states[device] = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[torch.device, torch.Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            module = torch.get_device_module(device.type)
            module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _equal_states(states: Mapping[torch.device, torch.Tensor], others: Mapping[torch.device, torch.Tensor]) -> bool:
    return all(torch.equal(state, others[device]) for device, state in states.items() if device in others)


@contextlib.contextmanager
def _kept_random(
    start: Mapping[torch.device, torch.Tensor] | None, devices: list[torch.device]
) -> Iterator[Mapping[torch.device, torch.Tensor]]:
    """Draw random numbers inside as from a start, which is yielded, and outside as if none had been drawn."""
    before = _random_states(devices)
    try:
        if start is not None:
            _set_random_states(start)
        yield before if start is None else start
    finally:
        _set_random_states(before)


# --- In another dtype -----------------------------------------------------------------------------

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS: dict[object, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def _converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in another dtype, if it has real or complex numbers."""
    if dtype is None:
        return tensor
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.dtype in _REAL else tensor


class _OneDtype(TorchFunctionMode):
    """Puts one dtype in place of others, where they are named in calls."""

    def __init__(self, dtype: torch.dtype, others: set[torch.dtype]) -> None:
        super().__init__()
        self.dtype, self.others = dtype, others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].to(self._named(_CASTS[func]))
        named = {name: self._named(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._named, args), **named)

    def _named(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in self.others else value
