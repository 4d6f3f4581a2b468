"""A kernel as a custom operator: one for each decorated layer and kernel.

Its schema is `(Tensor[] tensors, SymInt[] ints, float[] floats, str call) -> Tensor[]`. The lists hold what a call
consists of, the tensors of the module among it; `call` names the rest (`structure`). What it returns is shaped as what
the reference returns, and always contiguous, since nobody can know the strides that a kernel will choose.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from kernels_core import KernelsWarning, Layer, Mode, NoKernelError, Quarantined, quarantine, quarantined, strict
from kernels_core.torch_internals import (
    constant_result,
    destroy_library,
    disabled_when_called,
    dispatch_mode_count,
    fake_copies,
    forget_operators,
)

from .ambient import (
    Autocast,
    autocast_now,
    drew,
    is_capturing,
    is_transformed,
    random_states,
    set_random_states,
    under,
)
from .structure import (
    Builder,
    Call,
    Parts,
    Structure,
    Unfit,
    find_problem,
    find_unmade,
    learn_names,
    object_key,
    result_code,
    take_call,
)
from .trial import Watch, apart, check_alike, check_run, check_state, copies_of, fresh, on_references

Forward = Callable[..., Any]

_NAMESPACE = "kernels_opaque"
_PROCESS = secrets.token_hex(4)
"""In every name: what compilers keep on disk must not be taken for that of another kernel."""

_numbers = itertools.count()
_SCHEMA = "(Tensor[] tensors, SymInt[] ints, float[] floats, str call) -> Tensor[]"
_BACKWARD = "(Tensor[] grads, Tensor[] tensors, SymInt[] ints, float[] floats, str call, bool[] needs) -> Tensor[]"


@dataclass(frozen=True)
class Spec:
    """What calls of one structure have in common.

    Attributes:
        structure: See `structure.take_call`.
        objects: What is no tensor, number or constant.
        autocast: How autocast was set where the call was traced.
    """

    structure: Structure
    objects: tuple[Any, ...]
    autocast: Autocast

    def call(self, tensors: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[float]) -> Call:
        """Put a call together."""
        return Builder(tensors, ints, floats, self.objects).call(self.structure)


class Results:
    """Functions that put results together, as attributes: Dynamo reads those, and guards them."""


@dataclass(eq=False)
class Work:
    """What an operator does.

    Attributes:
        layer: The decorated layer.
        kernel: The kernel's forward.
        origin: Where the kernel came from.
        own_backward: Whether gradients are the kernel's own, or those of the reference.
    """

    layer: Layer
    kernel: Forward
    origin: str
    own_backward: bool

    def reference(self, call: Call) -> Any:
        """Run the reference, all the way down."""
        with on_references():
            return call.run(self.layer.reference)

    def fall_back(self, why: str) -> None:
        """Do nothing if the reference may serve in place of the kernel.

        Raises:
            NoKernelError: If it may not.
        """
        if strict() or not self.layer.use_fallback:
            rule = "KERNELS_STRICT is on" if strict() else "the layer was decorated with use_fallback=False"
            raise NoKernelError(
                f"Layer {self.layer.name!r}: {self.origin} {why}, and {rule}. Register a kernel that fits, or allow "
                "the reference."
            )


class Operator:
    """A kernel as a custom operator."""

    def __init__(self, work: Work) -> None:
        """Register the operator; it is taken back when nothing uses it any more."""
        self.work = work
        self.results = Results()
        self.implementation: Forward | None = None
        self._specs: dict[str, Spec] = {}
        self._names: dict[object, str] = {}
        self._tried: set[object] = set()
        self._derived: set[object] = set()
        self._out: dict[Mode, Quarantined] = {}
        self._told: set[str] = set()
        self._last = threading.local()
        self._lock = threading.Lock()
        plain = re.sub(r"\W+", "_", work.layer.name, flags=re.ASCII)
        self.name = f"{plain}_{next(_numbers)}_{_PROCESS}"
        learn_names(work.kernel, work.layer.reference)
        self.target = self._register()

    def _register(self) -> Callable[..., list[torch.Tensor]]:
        """Register forward and backward, which refer to this object weakly, or it would never go."""
        me = weakref.ref(self)

        def alive() -> Operator:
            operator = me()
            if operator is None:
                raise RuntimeError("The kernel behind this operator is gone: keep its layer and its mapping.")
            return operator

        library: Any = cast(Any, torch.library).Library(_NAMESPACE, "FRAGMENT")
        tags = (torch.Tag.pt2_compliant_tag,)
        backward = f"{self.name}_backward"
        library.define(self.name + _SCHEMA, tags=tags)
        library.define(backward + _BACKWARD, tags=tags)
        for name, real, fake in (
            (self.name, lambda *a: alive()._forward(*a), lambda *a: alive()._shape(*a)),
            (backward, lambda *a: alive()._backward(*a), lambda *a: _shape_of_gradients(*a)),
        ):
            library.impl(name, disabled_when_called(real), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=library)
        namespace = getattr(torch.ops, _NAMESPACE)
        gradients = getattr(namespace, backward).default

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors, ints, floats, call = inputs
            ctx.save_for_backward(*tensors)
            ctx.rest = (ints, floats, call, [tensor.requires_grad for tensor in tensors])

        def derive(ctx: Any, grads: list[torch.Tensor]) -> Any:
            ints, floats, call, needs = ctx.rest
            found = iter(gradients(grads, list(ctx.saved_tensors), ints, floats, call, needs))
            return [next(found) if need else None for need in needs], None if ints else [], None if floats else [], None

        def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            return None

        def derive_nothing(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                "The backward of an opaque kernel cannot be differentiated again in compiled code: call the layer "
                "outside of torch.compile for that."
            )

        register = torch.library.register_autograd
        register(f"{_NAMESPACE}::{self.name}", derive, setup_context=save, lib=library)
        register(f"{_NAMESPACE}::{backward}", derive_nothing, setup_context=save_nothing, lib=library)
        # PyTorch keeps what it has seen of an operator so far: what graphs get is another object, which holds the
        # kernel as long as one of them does, and is held by nobody else.
        forget_operators(namespace, self.name)
        target = getattr(namespace, self.name).default
        target.kernels_operator = self
        forget_operators(namespace, self.name, backward)
        weakref.finalize(self, _withdraw, library, namespace, self.name, backward).atexit = False
        return cast(Callable[..., list[torch.Tensor]], target)

    # --- While traced ----------------------------------------------------------------------------

    def prepare(self, structure: Structure, *objects: Any) -> str:
        """Return the name of a structure, or an empty one where a call of it cannot be an operator."""
        if is_transformed():  # which knows no operator, but what the reference is made of
            return ""
        problem = find_problem(structure, objects) or find_unmade(objects)
        if problem is not None:
            self.refuse(problem)
            return ""
        autocast = autocast_now()
        key = (structure, tuple(object_key(value) for value in objects), autocast)
        with self._lock:
            name = self._names.get(key)
            if name is None:
                name = self._names[key] = f"call{len(self._names)}"
                self._specs[name] = Spec(structure, objects, autocast)
            return name

    def outcome(self, call: str) -> str:
        """Return the attribute of `results` that puts together what a call has returned; empty if nothing can."""
        last = getattr(self._last, "outcome", None)
        return last[1] if last is not None and last[0] == call else ""

    def _keep_outcome(self, call: str, structure: Structure, parts: Parts) -> None:
        """Remember what a call has returned in this thread, until `outcome` asks.

        Raises:
            Unfit: If code cannot put that together.
        """
        self._last.outcome = (call, "")
        names: dict[str, Any] = {}
        self._last.outcome = (call, self._result(result_code(structure, parts, names), names))

    def _shape(
        self, tensors: list[torch.Tensor], ints: list[int], floats: list[float], name: str
    ) -> list[torch.Tensor]:
        """Return what outputs look like: the reference tells, run with tensors that have no data."""
        self._last.outcome = (name, "")
        try:
            structure, parts = self._expected(tensors, ints, floats, name)
            self._keep_outcome(name, structure, parts)
        except Unfit as problem:
            self.refuse(str(problem))
            return []
        return [torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device) for tensor in parts.tensors]

    def _expected(
        self, tensors: Sequence[torch.Tensor], ints: Sequence[int], floats: Sequence[float], name: str
    ) -> tuple[Structure, Parts]:
        """Run the reference under fake tensors.

        Raises:
            Unfit: If that is not possible, or does more than to compute.
        """
        spec = self._specs[name]
        plain = [tensor.detach() for tensor in tensors]
        watch = Watch(plain)
        call = spec.call(plain, ints, floats)
        try:
            with torch.no_grad(), under(spec.autocast), _forgetting_symbols(tensors), watch:
                output = self.work.reference(call)
        except Exception as error:  # whatever keeps it from being run without data is the reason
            if isinstance(error, (MemoryError, RecursionError)):
                raise
            raise Unfit(
                f"the reference cannot be run without data: {type(error).__name__}: {_first_line(error)}"
            ) from None
        if watch.written:
            raise Unfit(f"the reference changes {call.names[min(watch.written)]} in place")
        if watch.draws:
            raise Unfit("the reference draws random numbers, and would draw others for the gradients")
        check_state(call)
        structure, parts = apart(output)
        if any(_depends_on_data(tensor) for tensor in parts.tensors):
            raise Unfit("the shape of what it returns depends on the data")
        return structure, parts

    def _result(self, code: str, names: dict[str, Any]) -> str:
        key = (code, tuple(id(value) for value in names.values()))
        with self._lock:
            name = self._names.get(key)
            if name is None:
                name = self._names[key] = f"result{len(self._names)}"
                scope = dict(names)
                exec(f"def result(t):\n    return {code}\n", scope)
                setattr(self.results, name, scope.pop("result"))
            return name

    def refuse(self, reason: str) -> None:
        """Say once why a call cannot be an operator.

        Raises:
            NoKernelError: If the reference must not serve instead.
        """
        self.work.fall_back(f"cannot be opaque: {reason}")
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"Layer {self.work.layer.name!r}: {self.work.origin} cannot be opaque: {reason}. In this call the "
                "reference is compiled instead.",
                KernelsWarning,
                stacklevel=3,
            )

    # --- With data -------------------------------------------------------------------------------

    def _forward(
        self, tensors: list[torch.Tensor], ints: list[int], floats: list[float], name: str
    ) -> list[torch.Tensor]:
        spec = self._specs[name]
        with torch.no_grad(), under(spec.autocast):
            key = (name, tuple((tensor.dtype, tensor.device) for tensor in tensors))
            if self._is_out(Mode.TORCH_COMPILE):  # what is compiled may go on calling, until its guards are asked
                structure, parts = apart(self.work.reference(spec.call(copies_of(tensors), ints, floats)))
            elif key in self._tried or is_capturing(tensors):
                plain = [tensor.detach() for tensor in tensors]
                structure, parts = apart(spec.call(plain, ints, floats).run(self.work.kernel))
            else:
                structure, parts = self._try(spec, tensors, ints, floats, name)
                self._tried.add(key)
            try:
                self._keep_outcome(name, structure, parts)
            except Unfit as problem:
                self.refuse(str(problem))
            return fresh(parts.tensors)

    def _try(
        self, spec: Spec, tensors: list[torch.Tensor], ints: list[int], floats: list[float], name: str
    ) -> tuple[Structure, Parts]:
        """Run the kernel on copies; where it does what it must not, the reference answers, and it is out."""
        copies = copies_of(tensors)
        call = spec.call(copies, ints, floats)
        before = random_states(tensors)
        structure, parts = apart(call.run(self.work.kernel))
        try:
            check_run(call, copies, tensors, parts.tensors)
            if drew(before, random_states(tensors)):
                raise Unfit("it draws random numbers, and an operator may be run once for two calls, or again")
            with fake_copies(tensors) as fakes:
                expected = self._expected(fakes, ints, floats, name)
            check_alike((structure, parts), expected)
        except Unfit as problem:
            set_random_states(before)
            self._quarantine(str(problem), Mode.TORCH_COMPILE)
            return apart(self.work.reference(spec.call(copies_of(tensors), ints, floats)))
        return structure, parts

    def _quarantine(self, reason: str, mode: Mode) -> None:
        assert self.implementation is not None
        self._out[mode] = quarantine(
            self.work.layer,
            self.implementation,
            kernel=self.work.origin,
            reason=f"as an operator, {reason}. Use it without opaque, or repair it",
            mode=mode,
        )

    def _is_out(self, mode: Mode) -> bool:
        """Whether the kernel was found out, and not released since; then, it is looked at again."""
        entry = self._out.get(mode)
        if entry is not None and entry not in quarantined():
            self._out.pop(mode, None)
            self._tried.clear()
            self._derived.clear()
            entry = None
        return entry is not None

    def _backward(
        self,
        grads: list[torch.Tensor],
        tensors: list[torch.Tensor],
        ints: list[int],
        floats: list[float],
        name: str,
        needs: list[bool],
    ) -> list[torch.Tensor]:
        """Run the forward again, recorded, and derive that."""
        spec = self._specs[name]
        with torch.inference_mode(False), torch.enable_grad(), under(spec.autocast):
            leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            call = spec.call(leaves, ints, floats)
            by_kernel = self.work.own_backward and not any(map(self._is_out, (Mode.TORCH_COMPILE, Mode.TRAINING)))
            _, parts = apart(call.run(self.work.kernel) if by_kernel else self.work.reference(call))
            found = gradients_of(parts.tensors, wanted, grads)
            key = (name, tuple(needs))
            if by_kernel and key not in self._derived and any(gradient is None for gradient in found):
                found = self._complete(found, spec.call(leaves, ints, floats), wanted, grads)
                self._derived.add(key)
            return [
                torch.zeros_like(leaf, memory_format=torch.contiguous_format)
                if gradient is None
                else gradient.detach().to(leaf.dtype).contiguous()
                for leaf, gradient in zip(wanted, found, strict=True)
            ]

    def _complete(
        self,
        found: Sequence[torch.Tensor | None],
        call: Call,
        wanted: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor | None]:
        """Return the reference's gradients, if it has some that the kernel has not; the kernel is out then."""
        _, parts = apart(self.work.reference(call))
        right = gradients_of(parts.tensors, wanted, grads)
        lost = sum(mine is None and other is not None for mine, other in zip(found, right, strict=True))
        if not lost:
            return found
        self._quarantine(
            f"it loses {lost} of {len(wanted)} gradients, and does not declare has_backward = False", Mode.TRAINING
        )
        return right


def gradients_of(
    outputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    *,
    again: bool = False,
) -> Sequence[torch.Tensor | None]:
    """Derive outputs with respect to what is wanted."""
    pairs = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad and grad is not None
    ]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad(
        [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True, create_graph=again
    )


def _shape_of_gradients(
    grads: list[torch.Tensor],
    tensors: list[torch.Tensor],
    ints: list[int],
    floats: list[float],
    name: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    return [
        torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        for tensor, need in zip(tensors, needs, strict=True)
        if need
    ]


def _forgetting_symbols(fakes: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[object]:
    """Let a reference make sizes that depend on data: it is refused for that, so nobody will look for them."""
    for fake in fakes:
        environment = getattr(getattr(fake, "fake_mode", None), "shape_env", None)
        if environment is not None:
            return cast("contextlib.AbstractContextManager[object]", environment.ignore_fresh_unbacked_symbols())
    return contextlib.nullcontext()


def _depends_on_data(tensor: torch.Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(tensor))


def _withdraw(library: Any, namespace: Any, *names: str) -> None:
    destroy_library(library)
    forget_operators(namespace, *names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# --- The forward that serves -----------------------------------------------------------------------


def make_forward(operator: Operator, eager: Forward, inline: Forward | None) -> Forward:
    """Return a forward that is the operator where it is traced.

    Args:
        operator: The operator.
        eager: What runs where nothing is traced.
        inline: What is traced itself where gradients are disabled; None for the operator.
    """
    target, results, reference = operator.target, operator.results, operator.work.layer.reference
    is_compiling, is_watched = torch.compiler.is_compiling, dispatch_mode_count

    @constant_result
    def prepare(structure: Structure, *objects: Any) -> str:
        return operator.prepare(structure, *objects)

    @constant_result
    def outcome(call: str) -> str:
        return operator.outcome(call)

    def traced(module: nn.Module | None, args: Any, kwargs: Any) -> Any:
        parts = Parts()
        structure = take_call(module, args, kwargs, parts)
        call = prepare(structure, *parts.objects)
        if call:
            outputs = target(parts.tensors, parts.ints, parts.floats, call)
            result = outcome(call)
            if result:
                return getattr(results, result)(outputs)
        return reference(*args, **kwargs) if module is None else reference(module, *args, **kwargs)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (is_compiling() or is_watched()):
            return eager(self, *args, **kwargs)
        if inline is not None and not torch.is_grad_enabled():
            return inline(self, *args, **kwargs)
        return traced(self, args, kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        if not (is_compiling() or is_watched()):
            return eager(*args, **kwargs)
        if inline is not None and not torch.is_grad_enabled():
            return inline(*args, **kwargs)
        return traced(None, args, kwargs)

    forward: Any = own_code(function if operator.work.layer.is_function else method)
    operator.implementation = forward
    return cast(Forward, forward)


def own_code(function: Any) -> Any:
    """Give a function code of its own: by that, Dynamo tells functions apart."""
    assert isinstance(function, types.FunctionType)
    function.__code__ = function.__code__.replace()
    return function
