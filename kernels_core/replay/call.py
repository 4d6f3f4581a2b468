"""A call made again: on copies, with any forward, and without a trace."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..layer import Forward
from ..nested import each_tensor, leaves, mapped, memory_of, nodes
from ..raised import error_text
from .ambient import RandomStates, has_drawn, kept_host_random_states, kept_random_states, random_states, unobserved
from .copies import attributes_of, copies_of, detached, generators_of, replica_of, same_numbers, tensors_of, with_memory
from .gradients import computed, gradients_of
from .precision import converted, only

CONSTANTS = (
    type(None),
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
"""Types of arguments that a forward cannot change."""

_ABSENT = object()  # None is a value that an attribute may have


@dataclass(frozen=True)
class Outcome:
    """The results of a run, and its changes.

    Attributes:
        outputs: The value that the forward returned, detached.
        gradients: Gradient of each input and each tensor of the module that requires grad, by name; None where no
            gradient arrives. Empty if no gradients were asked for.
        after: Inputs and buffers after the run, by name.
        mutated: Inputs and tensors of the module that the run changed in place.
        attributes: Attributes of modules, and items of lists and dicts, that the run set or deleted.
        random: Whether the run drew random numbers.
        shared: Inputs and tensors of the module whose memory the outputs share.
    """

    outputs: Any
    gradients: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    after: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mutated: Mapping[str, torch.Tensor] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    random: bool = False
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Call:
    """A call: a module or none, and the arguments.

    Attributes:
        module: The module that a forward takes first; None for a function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        signature: Of the forward as a caller writes it, to name inputs by; they are numbered without.
        random: States of the random generators at the start of the call, by device; None to take the states at the
            start of each run.

    Example:
        >>> call = Call(None, (torch.ones(2, requires_grad=True),))
        >>> outcome = call.run(lambda x: x.mul(3))
        >>> outcome.outputs, list(outcome.gradients), list(outcome.mutated)
        (tensor([3., 3.]), ['input argument 1'], [])
    """

    module: nn.Module | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    signature: inspect.Signature | None = None
    random: RandomStates | None = None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments, by name."""
        found = (leaf for name, value in self._arguments() for leaf in leaves(value, name))
        return {name: leaf for name, leaf in found if isinstance(leaf, torch.Tensor)}

    @property
    def devices(self) -> list[torch.device]:
        """The devices of all tensors of the call, in order."""
        return list(dict.fromkeys(tensor.device for tensor in self.tensors.values()))

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators among the arguments, and those that the module holds."""
        return generators_of([*self.args, *self.kwargs.values(), self.module])

    @property
    def records(self) -> bool:
        """Whether an input, or a tensor of the module, requires grad."""
        return any(tensor.requires_grad for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the call, by name: inputs, and the parameters, buffers and attributes of the module."""
        return self._named_inputs() | (tensors_of(self.module) if self.module is not None else {})

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a layer may change in place, by name: inputs and buffers."""
        buffers = self.module.named_buffers() if self.module is not None else ()
        return self._named_inputs() | {f"buffer {name}": buffer for name, buffer in buffers}

    @property
    def obstacle(self) -> str | None:
        """Why copies of this call may not run as the call itself does; None if nothing is known."""
        for name, tensor in self.tensors.items():
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                return f"{name} is a {type(tensor).__name__}"
        for path, inner in self.module.named_modules() if self.module is not None else ():
            if hasattr(type(inner), "reshard"):  # hooks of FSDP2 on the copy gather and free those of the original
                return f"FSDP manages module {path or '(itself)'} of it"
        return None

    def why_failed(self, error: Exception) -> str:
        """Describe why the reference fails on copies: it may be the fault of the copies."""
        text = error_text(error).partition("\n\n")[0]  # below an empty line, PyTorch may list all kernels
        if obstacle := self.obstacle:  # or the user would repair a reference that is right
            return f"it cannot be compared, because {obstacle}, and a run on copies of it fails: {text}"
        return f"the reference fails: {text}"

    # --- Other calls ------------------------------------------------------------------------------

    def replaced(self, function: Callable[[str, Any], Any]) -> Call:
        """Return the same call with `function(name, leaf)` in place of each leaf of the arguments."""
        args = tuple(mapped(value, function, name) for name, value in zip(self._names, self.args, strict=True))
        kwargs = {name: mapped(value, function, name) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def snapshot(self, *, state: bool = False) -> Call:
        """Return the call as it is now, on copies of its inputs and with the random states of now.

        Strides, memory that arguments share, and requires_grad are kept.

        Args:
            state: Whether to copy the tensors of the module, too.
        """
        originals = self.tensors
        with unobserved():
            copies = copies_of(originals.values() if state else self.inputs.values())
            copied = self._on(lambda t: detached(copies[id(t)]).requires_grad_(t.requires_grad), module=state)
        return replace(copied, random=random_states([*(t.device for t in originals.values()), *self.generators]))

    def converted(self, old: torch.dtype, new: torch.dtype) -> Call:
        """Return the same call with all tensors of one dtype, also of the module, in another."""
        with unobserved():
            copies = copies_of(self.tensors.values())
            return self._on(
                lambda t: detached(copies[id(t)]).to(new if t.dtype is old else t.dtype).requires_grad_(t.requires_grad)
            )

    def make(self, forward: Forward) -> Any:
        """Make the call itself, with a forward and without copies."""
        return forward(*(() if self.module is None else (self.module,)), *self.args, **self.kwargs)

    # --- Runs -------------------------------------------------------------------------------------

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
    ) -> Outcome:
        """Make the call with a forward, on copies of everything that it could change.

        Runs of one call start with the same random numbers and get the same gradients of the outputs, so that
        their results can be compared. Autocast applies as around the call. The run is hidden from hooks for saved
        tensors (such as those of activation checkpointing) and from dispatch modes, and fills no `.grad`. Hooks of
        the modules stay on the copies.

        Args:
            forward: Called with the module, if there is one, and the arguments.
            gradients: Whether to compute gradients; None to do so where autograd would record the call.
            seed: Chooses the gradients of the outputs.
            dtype: Run with all floating numbers in this dtype, without autocast: `torch.float64` for numbers to
                measure errors from. Casts to a dtype at least as fine as the inputs go to this dtype, too.
            parameters: Whether to copy parameters; without, a forward that writes to parameters changes the module.
            mutations: Whether to look for changes of tensors and attributes, which waits for the device.
            contiguous: Whether the gradients of the outputs are contiguous; the backward of a sum passes on gradients
                that are not.

        Returns:
            Outputs, gradients and changes. An exception of the forward is passed on.
        """
        with self.replayed(
            forward, gradients=gradients, dtype=dtype, parameters=parameters, changes=mutations
        ) as replay:
            return Outcome(
                mapped(replay.outputs, each_tensor(torch.Tensor.detach)),
                gradients_of(replay.outputs, replay.sources, seed, contiguous),
                replay.after(),  # before the block ends: the copies are dropped with it
                replay.mutated() if mutations else {},
                replay.attributes() if mutations else (),
                replay.drew,
                replay.shared() if mutations else frozenset(),
            )

    @contextlib.contextmanager
    def replayed(
        self,
        forward: Forward,
        *,
        gradients: bool | None = None,
        dtype: torch.dtype | None = None,
        parameters: bool = True,
        objects: bool = False,
        changes: bool = True,
    ) -> Iterator[Replay]:
        """Make the call as `run` does, and give access to its outputs as the forward returned them.

        Args:
            forward: See `run`, as for the other arguments.
            gradients: See `run`; here, whether autograd records the run.
            dtype: See `run`.
            parameters: See `run`.
            objects: Whether to copy arguments that are neither tensors nor constants, too, with `copy.deepcopy`.
            changes: Whether `Replay.attributes` will be asked for.

        Yields:
            The outputs and the copies. Random numbers are restored at the end of the block.
        """
        originals = self.tensors
        devices = {tensor.device for tensor in originals.values()}
        # `enable_grad` in inference mode records nothing.
        recording = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        wanted = (recording if gradients is None else gradients) and any(t.requires_grad for t in originals.values())
        # As around the call: some operators differ there.
        inference = gradients is None and not wanted and torch.is_inference_mode_enabled()
        records = wanted or (gradients is None and recording)  # the forward may ask for the mode of gradients
        kept = kept_random_states([*devices, *self.generators], self.random)
        with unobserved(), kept_host_random_states() as host, kept as random:
            replay = Replay(self, self._copied(originals, dtype, parameters, objects), originals, dtype, random, host)
            if wanted:
                replay.ask_for_gradients()
            inputs = (tensor for name, tensor in originals.items() if name.startswith("input "))
            one_dtype = only(dtype, inputs, {device.type for device in devices})
            with torch.inference_mode(inference), torch.set_grad_enabled(records), one_dtype:
                replay.run(forward, changes=changes)
            yield replay

    def _copied(
        self, originals: Mapping[str, torch.Tensor], dtype: torch.dtype | None, parameters: bool, objects: bool
    ) -> Call:
        live = list(self.module.parameters()) if self.module is not None and not parameters else []
        # Autograd saves no inference tensors, so these are copied in any case.
        kept = {id(parameter) for parameter in live} if not any(p.is_inference() for p in live) else set()
        copies = copies_of(
            tensor for name, tensor in originals.items() if id(tensor) not in kept or name.startswith("input ")
        )
        call = self._on(lambda tensor: converted(detached(copies.get(id(tensor), tensor)), dtype))
        shared = (torch.Tensor, torch.Generator, nn.Module, *CONSTANTS)  # generators are restored
        return (
            call.replaced(lambda _, leaf: leaf if isinstance(leaf, shared) else copy.deepcopy(leaf))
            if objects
            else call
        )

    def _on(self, make: Callable[[torch.Tensor], torch.Tensor], *, module: bool = True) -> Call:
        """Return the same call with `make(tensor)` in place of each tensor of the arguments and of the module."""
        # Not by `deepcopy`, which would copy whatever hooks hold.
        made = replica_of(self.module, make) if self.module is not None and module else self.module
        return replace(self.replaced(each_tensor(make)), module=made)

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

    def _arguments(self) -> Iterator[tuple[str, Any]]:
        yield from zip(self._names, self.args, strict=True)
        yield from self.kwargs.items()

    def _named_inputs(self) -> dict[str, torch.Tensor]:
        return {f"input {name}": tensor for name, tensor in self.inputs.items()}


class Replay:
    """A run of a call, while its copies exist: see `Call.replayed`.

    Attributes:
        outputs: The value that the forward returned.
        call: The call on copies.
        originals: Each tensor of the call that requires grad, by name, if autograd records the run.
        sources: The copy of each of these tensors.
        random: The states of the random generators at the start.
    """

    def __init__(
        self,
        original: Call,
        copied: Call | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        random: RandomStates | None = None,
        host: tuple[Any, Any] | None = None,
    ) -> None:
        """Take a call and the same call on copies; without the latter, it runs on its own arguments."""
        self.outputs: Any = None
        self.call = copied or original
        self.originals: dict[str, torch.Tensor] = {}
        self.sources: dict[str, torch.Tensor] = {}
        self.random, self._host = random or {}, host
        self._tensors, self._dtype = tensors or original.tensors, dtype
        self._objects: dict[str, object] = {}

    def ask_for_gradients(self) -> None:
        """Let autograd record the run from every copy whose original requires grad."""
        self.originals = {name: tensor for name, tensor in self._tensors.items() if tensor.requires_grad}
        copies = self.call.tensors
        inputs = {name: copies[name].detach() for name in self.originals if name.startswith("input ")}
        self.sources = {name: inputs.get(name, copies[name]).requires_grad_() for name in self.originals}
        # A leaf that requires grad cannot be written to, and an input of a layer in a model is no leaf.
        passed = {name.removeprefix("input "): computed(self.sources[name]) for name in inputs}
        self.call = self.call.replaced(lambda name, leaf: passed.get(name, leaf))

    def run(self, forward: Forward, *, changes: bool = True) -> None:
        """Run the forward."""
        self._objects = _objects(self.call) if changes else {}
        self.outputs = self.call.make(forward)

    @property
    def drew(self) -> bool:
        """Whether the run drew random numbers."""
        return has_drawn(self.random, self._host)

    def after(self) -> dict[str, torch.Tensor]:
        """Return inputs and buffers as they are now, by name."""
        return {name: tensor.detach() for name, tensor in self.call.state.items()}

    def mutated(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the run changed; compares numbers, for kernels write past autograd's counters."""
        now = {name: tensor.detach() for name, tensor in self.call.tensors.items() if name in self._tensors}
        return {
            name: tensor
            for name, tensor in now.items()
            if not same_numbers(converted(with_memory(self._tensors[name].detach()), self._dtype), tensor)
        }

    def shared(self) -> frozenset[str]:
        """Return the tensors of the call whose memory the outputs share: to change one in place changes both."""
        keys = {memory_of(leaf) for _, leaf in leaves(self.outputs) if isinstance(leaf, torch.Tensor)} - {None}
        return frozenset(name for name, tensor in self.call.tensors.items() if memory_of(tensor) in keys)

    def attributes(self) -> tuple[str, ...]:
        """Return attributes of modules, and items of lists and dicts, that the run set or deleted."""
        before, now = self._objects, _objects(self.call)
        names = before.keys() | now.keys()
        return tuple(sorted(n for n in names if before.get(n, _ABSENT) is not now.get(n, _ABSENT)))


def _objects(call: Call) -> dict[str, object]:
    """Return everything that the arguments and the attributes of the modules hold, by path."""
    values = [(f"input {name}", value) for name, value in call._arguments()]
    modules = call.module.named_modules() if call.module is not None else ()
    held: dict[str, object] = {f"module {path}": module for path, module in modules}
    for path, value in attributes_of(call.module) if call.module is not None else ():
        if isinstance(value, list | dict) or dataclasses.is_dataclass(value):
            values.append((path, value))
        else:
            held[path] = value
    return held | {where: node for path, value in values for where, node, _ in nodes(value, path)}
