"""A kernel as a custom operator: one for each decorated layer and kernel.

Its result is shaped as that of the reference, and always contiguous: the strides that a kernel will choose are unknown
while code is compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch

from kernels_core import Mode, Quarantined, WarnOnce, quarantine, quarantined, references
from kernels_core.replay import Call, Replay, is_capturing
from kernels_core.torch_internals import constant_result, dispatch_mode_count, fake_copies, is_recorded

from .ambient import autocast_now, is_transformed, under
from .names import call_text, is_exporting, read_call
from .registration import outputs_like, register
from .structure import (
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
from .trial import OperatorWatch, check_alike, check_attributes, check_replay, fresh
from .work import Forward, Gradients, Spec, Taken, Work, apart, gradients_of

Tensors = list[torch.Tensor]


class Results:
    """Functions that put results together, as attributes: Dynamo reads those, and guards them."""


class Operator:
    """A kernel as a custom operator."""

    def __init__(self, work: Work, name: str) -> None:
        """Register the operator under a name of `take_name`; it is taken back when nothing uses it any more."""
        self.work, self.name = work, name
        self.results = Results()
        self.implementation: Forward | None = None
        self._specs: dict[str, Spec] = {}
        self._names: dict[object, str] = {}
        self._tried: set[object] = set()
        self._derived: set[object] = set()
        self._out: dict[Mode, Quarantined] = {}
        self._warn = WarnOnce()
        self._last = threading.local()
        self._lock = threading.Lock()
        learn_names(work.kernel, work.layer.reference)
        self.target = register(self)

    # --- While traced ----------------------------------------------------------------------------

    def prepare(self, structure: Structure, *objects: Any) -> str:
        """Return the name of a structure, or an empty one where a call of it cannot be an operator."""
        if is_transformed():  # it knows the operators of the reference, not this one
            return ""
        if problem := find_problem(structure, objects) or find_unmade(objects):
            self.refuse(problem)
            return ""
        autocast = autocast_now()
        exporting = is_exporting()  # then the same call has another name: one that another process reads
        key = (structure, tuple(object_key(value) for value in objects), autocast, exporting)
        with self._lock:
            name = self._names.get(key)
            if name is None:
                name = text = call_text(structure, objects, autocast, exporting=exporting)
                while name in self._specs:  # of another object with an equal state: each call gets its own
                    name = f"{text}#{len(self._specs)}"
                self._names[key] = name
                self._specs[name] = Spec(self.work.layer, structure, objects, autocast)
            return name

    def _spec(self, name: str) -> Spec:
        spec = self._specs.get(name)
        if spec is None:
            spec = self._specs[name] = read_call(name, self.work.layer)
        return spec

    def outcome(self, call: str) -> str:
        """Return the attribute of `results` that puts the result of a call together; empty if none can."""
        last, name = getattr(self._last, "outcome", ("", ""))
        return name if last == call else ""

    def _keep_outcome(self, call: str, structure: Structure, parts: Parts) -> None:
        """Remember the form of the result of a call in this thread, until `outcome` asks; may raise `Unfit`."""
        names: dict[str, Any] = {}
        code = result_code(structure, parts, names)
        key = (code, *map(id, names.values()))
        with self._lock:
            name = self._names.get(key)
            if name is None:
                name = self._names[key] = f"result{len(self._names)}"
                scope = dict(names)
                exec(f"def result(t):\n    return {code}\n", scope)
                setattr(self.results, name, scope.pop("result"))
        self._last.outcome = (call, name)

    def shape(self, tensors: Tensors, ints: list[int], floats: list[float], name: str) -> Tensors:
        """Return outputs without data: those of the reference, run with tensors that have none."""
        try:
            structure, parts = self._expected(tensors, ints, floats, name)
            self._keep_outcome(name, structure, parts)
        except Unfit as problem:
            self.refuse(str(problem))
            return []
        return outputs_like(parts.tensors)

    def _expected(self, tensors: Tensors, ints: list[int], floats: list[float], name: str) -> Taken:
        """Run the reference under fake tensors; `Unfit` if that is not possible, or does more than to compute."""
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # a slow import

        spec = self._spec(name)
        plain = [tensor.detach() for tensor in tensors]  # fake ones, whose history is that of the traced code
        call = spec.call(plain, ints, floats)
        named = {id(tensor): path for path, tensor in call.tensors.items()}
        watch, replay = OperatorWatch(plain), Replay(call)
        try:
            with torch.no_grad(), under(spec.autocast), references(), _forgetting_symbols(tensors), watch:
                replay.run(self.work.layer.reference)
        except Exception as error:  # whatever keeps it from being run without data is the reason
            if isinstance(error, (MemoryError, RecursionError)):
                raise
            line = str(error).strip().partition("\n")[0]
            raise Unfit(f"the reference cannot be run without data: {type(error).__name__}: {line}") from None
        if watch.written:
            raise Unfit(f"the reference changes {named[id(plain[min(watch.written)])]} in place")
        if watch.draws:
            raise Unfit("the reference draws random numbers, and would draw others for the gradients")
        check_attributes(replay)
        structure, parts = apart(replay.outputs)
        if any(map(free_unbacked_symbols, parts.tensors)):
            raise Unfit("the shape of its result depends on the data")
        return structure, parts

    def refuse(self, reason: str) -> None:
        """Warn once why a call cannot be an operator; `NoKernelError` if the reference must not serve instead."""
        self._last.outcome = ("", "")  # whatever `outcome` is asked for next, the reference answers
        self.work.fall_back(f"cannot be opaque: {reason}")
        self._warn(
            f"Layer {self.work.layer.name!r}: {self.work.origin} cannot be opaque: {reason}. In this call the "
            "reference is compiled instead."
        )

    # --- With data -------------------------------------------------------------------------------

    def forward(self, tensors: Tensors, ints: list[int], floats: list[float], name: str) -> Tensors:
        """Run the kernel, the first time on copies."""
        spec = self._spec(name)
        with torch.no_grad(), under(spec.autocast):
            call = spec.call([tensor.detach() for tensor in tensors], ints, floats)
            key = (name, tuple((tensor.dtype, tensor.device) for tensor in tensors))
            if self._is_out(Mode.TORCH_COMPILE):  # compiled code may go on calling, until its guards are asked
                structure, parts, _ = self.work.reference_on_copies(call)
            elif key in self._tried or is_capturing():  # no number can be read in a capture, so nothing compared
                structure, parts = self._run(call)
            else:
                structure, parts = self._try(call, tensors, ints, floats, name, key)
            try:
                self._keep_outcome(name, structure, parts)
            except Unfit as problem:
                self.refuse(str(problem))
            return fresh(parts.tensors)  # PyTorch forbids outputs that share memory

    def _run(self, call: Call) -> Taken:
        """Run the kernel, or the reference where it passes the call on: an operator has no next candidate."""
        output = call.make(self.work.kernel)
        return apart(output) if output is not NotImplemented else self._passed_on(call)

    def _passed_on(self, call: Call) -> Taken:
        self.work.fall_back("passes on a call of compiled code")
        self._warn(
            f"Layer {self.work.layer.name!r}: {self.work.origin} passes on a call of compiled code, where it is one "
            "operator, and the reference runs in its place. Let it declare dtypes or supports(...): these are asked "
            "when code is traced, and the next candidate is compiled instead."
        )
        return self.work.reference(call)

    def _try(self, call: Call, tensors: Tensors, ints: list[int], floats: list[float], name: str, key: object) -> Taken:
        """Run the kernel on copies; if an operator must not do as it does, it is out, and the reference answers."""
        try:
            with call.replayed(self.work.kernel) as replay:
                if replay.outputs is NotImplemented:
                    return self._passed_on(call)
                structure, parts = apart(replay.outputs)
                check_replay(replay, parts.tensors)
                if replay.drew:
                    raise Unfit("it draws random numbers, and an operator may be run once for two calls, or again")
            with fake_copies(tensors) as fakes:
                expected = self._expected(fakes, ints, floats, name)
            check_alike((structure, parts), expected)
        except Unfit as problem:
            self._quarantine(str(problem), Mode.TORCH_COMPILE)
            structure, parts, _ = self.work.reference_on_copies(call)
        self._tried.add(key)  # also after a failure: it is in quarantine then
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
        """Whether the kernel is in quarantine; if it was released since, it is tried again."""
        if mode in self._out and self._out[mode] not in quarantined():
            self._out.pop(mode, None)
            self._tried.clear()
            self._derived.clear()
        return mode in self._out

    def backward(
        self, grads: Tensors, tensors: Tensors, ints: list[int], floats: list[float], name: str, needs: list[bool]
    ) -> Tensors:
        """Run the forward again, recorded, and derive that."""
        spec = self._spec(name)
        with torch.inference_mode(False), torch.enable_grad(), under(spec.autocast):
            # Saved ones have the history of the whole model.
            leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            call = spec.call(leaves, ints, floats)
            # Else the backward of a kernel at fault would run.
            by_kernel = self.work.own_backward and not any(map(self._is_out, (Mode.TORCH_COMPILE, Mode.TRAINING)))
            _, parts = self._run(call) if by_kernel else self.work.reference(call)
            found = gradients_of(parts.tensors, wanted, grads)
            key = (name, tuple(needs))
            # Once: a reference may have none, either.
            if by_kernel and key not in self._derived and any(gradient is None for gradient in found):
                found = self._complete(found, spec.call(leaves, ints, floats), wanted, grads)
                self._derived.add(key)
            return [
                torch.zeros_like(leaf, memory_format=torch.contiguous_format)
                if gradient is None
                else gradient.detach().to(leaf.dtype).contiguous()
                for leaf, gradient in zip(wanted, found, strict=True)
            ]

    def _complete(self, found: Gradients, call: Call, wanted: Tensors, grads: Tensors) -> Gradients:
        """Return the reference's gradients, if it has some that the kernel has not; the kernel is out then."""
        _, parts = self.work.reference(call)
        right = gradients_of(parts.tensors, wanted, grads)
        lost = sum(mine is None and other is not None for mine, other in zip(found, right, strict=True))
        if not lost:
            return found
        self._quarantine(
            f"it loses {lost} of {len(wanted)} gradients, and does not declare has_backward = False", Mode.TRAINING
        )
        return right


def _forgetting_symbols(fakes: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[object]:
    """Let a reference make sizes that depend on data: it is refused for that, so Dynamo need not look for them."""
    for fake in fakes:
        environment = getattr(getattr(fake, "fake_mode", None), "shape_env", None)
        if environment is not None:
            return cast("contextlib.AbstractContextManager[object]", environment.ignore_fresh_unbacked_symbols())
    return contextlib.nullcontext()


# --- The forward that serves -----------------------------------------------------------------------


def make_forward(operator: Operator, eager: Forward, inline: Forward | None) -> Forward:
    """Return a forward that is `eager` where nothing is traced, `inline` where gradients are off, else the operator."""
    target, results, layer = operator.target, operator.results, operator.work.layer
    is_function, reference = layer.is_function, layer.reference
    is_compiling, is_watched = torch.compiler.is_compiling, dispatch_mode_count

    @constant_result
    def prepare(structure: Structure, *objects: Any) -> str:
        return operator.prepare(structure, *objects)

    @constant_result
    def outcome(call: str) -> str:
        return operator.outcome(call)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (is_compiling() or is_watched()):  # `torch.jit.trace` and `symbolic_trace` have no use for the operator
            return (reference if is_recorded() else eager)(*args, **kwargs)
        if inline is not None and not torch.is_grad_enabled():
            return inline(*args, **kwargs)
        if torch.onnx.is_in_onnx_export():  # has no use for it either, and traces by `torch.export`
            return reference(*args, **kwargs)
        parts = Parts()
        structure = take_call(is_function, args, kwargs, parts)
        call = prepare(structure, *parts.objects)
        if call:
            outputs = target(parts.tensors, parts.ints, parts.floats, call)
            result = outcome(call)
            if result:
                return getattr(results, result)(outputs)
        return reference(*args, **kwargs)

    forward.__code__ = forward.__code__.replace()  # code of its own: Dynamo knows functions by it
    operator.implementation = forward
    return forward
