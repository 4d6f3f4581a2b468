"""Eager calls of a kernel whose gradients are those of the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from kernels_core import Mode, quarantine
from kernels_core.replay import RandomStates, is_capturing, kept_random_states, random_states

from .ambient import autocast_now, is_transformed, under
from .structure import Parts, Structure, Unfit, find_problem, object_key, rebuild, take_call
from .trial import check_alike, check_replay
from .work import Forward, Spec, Work, apart, gradients_of


@dataclass(eq=False)
class RecordedCall:
    """One recorded call, for forward and backward: the spec, its parts, and the random states at the start."""

    spec: Spec
    parts: Parts
    states: RandomStates
    structure: Structure = None
    result: Parts = field(default_factory=Parts)


class Recompute:
    """Runs a kernel, and the reference for its gradients."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.implementation: Forward | None = None
        self._tried: dict[object, bool] = {}

    def forward(self) -> Forward:
        """Return the forward for eager calls."""
        kernel, is_grad_enabled = self.work.kernel, torch.is_grad_enabled

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (is_grad_enabled() or is_transformed()):
                return kernel(*args, **kwargs)
            return self._call(args, kwargs)

        return forward

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_transformed():  # torch.func differentiates the operators of the call
            return self.work.layer.reference(*args, **kwargs)
        parts = Parts()
        structure = take_call(self.work.layer.is_function, args, kwargs, parts)
        if not any(tensor.requires_grad for tensor in parts.tensors):
            return self.work.kernel(*args, **kwargs)
        spec = Spec(self.work.layer, structure, tuple(parts.objects), autocast_now())
        try:
            draws = self._draws(spec, parts)
            if draws is None:
                return NotImplemented
        except Unfit as problem:
            self._refuse(str(problem))
            return self.work.layer.reference(*args, **kwargs)
        if draws and is_capturing():
            self.work.fall_back("draws random numbers, which cannot be drawn again where a CUDA graph is captured")
            return self.work.layer.reference(*args, **kwargs)
        # Whether numbers are drawn may depend on others, so only a capture, which allows no look, believes the trial.
        states = random_states(tensor.device for tensor in parts.tensors) if not is_capturing() else {}
        recorded = RecordedCall(spec, parts, states)
        # Autograd keeps no inference tensors, so those are copied.
        kept = [tensor.clone() if tensor.is_inference() else tensor for tensor in parts.tensors]
        # Tensors one by one: autograd looks into no list.
        tensors = cast(Any, _Recompute).apply(self.work, recorded, args, kwargs, *kept)
        result = recorded.result
        return rebuild([recorded.structure], tensors, result.ints, result.floats, result.objects)[0]

    def _draws(self, spec: Spec, parts: Parts) -> bool | None:
        """Whether random numbers are drawn; runs kernel and reference on copies, once per kind of call.

        None if the kernel passes the call on.
        `Unfit` if the kernel cannot have other gradients than its own.
        """
        objects = tuple(object_key(value, type) for value in spec.objects)
        key = (spec.structure, objects, tuple((tensor.dtype, tensor.device) for tensor in parts.tensors))
        known = self._tried.get(key)
        if problem := find_problem(spec.structure if known is None else (), spec.objects):
            raise Unfit(problem)
        if known is not None or is_capturing():
            return bool(known)  # in a capture, no number can be read: warm up before
        call = spec.call(parts.tensors, parts.ints, parts.floats)
        with torch.no_grad():
            with call.replayed(self.work.kernel) as replay:
                if replay.outputs is NotImplemented:
                    return None
                ours = apart(replay.outputs)
                check_replay(replay, ours[1].tensors)
                draws = replay.drew
            if problem := find_problem([ours[0]], ours[1].objects):
                raise Unfit(f"its result: {problem}")
            structure, theirs, drew = self.work.reference_on_copies(call)
        check_alike(ours, (structure, theirs))
        self._tried[key] = draws or drew  # of either: both begin with the same state
        return self._tried[key]

    def _refuse(self, reason: str) -> None:
        assert self.implementation is not None
        quarantine(
            self.work.layer,
            self.implementation,
            kernel=self.work.origin,
            reason=f"it cannot have the backward of the reference: {reason}. Leave it to inference",
            mode=Mode.TRAINING,
        )
        self.work.fall_back(f"cannot have the backward of the reference: {reason}")


class _Recompute(torch.autograd.Function):
    """The kernel forward, and the reference again backward."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, recorded: RecordedCall, args: Any, kwargs: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # None for an output that nothing depends on, not zeros
        ctx.save_for_backward(*tensors)
        ctx.work, ctx.recorded = work, recorded
        with under(recorded.spec.autocast):  # without its cache: casts made here are not recorded
            recorded.structure, recorded.result = apart(work.kernel(*args, **kwargs))
        outputs = tuple(recorded.result.tensors)
        recorded.result.tensors = []  # the outputs hold this call, which must not hold them
        recorded.parts.tensors = []  # autograd has saved them, and may have packed them
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        spec, parts = ctx.recorded.spec, ctx.recorded.parts
        again, states = torch.is_grad_enabled(), ctx.recorded.states
        # The reference draws the numbers that the kernel drew; the generators are restored after that.
        random: Any = kept_random_states(states, states) if states else contextlib.nullcontext()
        needs: Sequence[bool] = ctx.needs_input_grad[4:]
        with torch.enable_grad(), under(spec.autocast), random:
            # Each place has a tensor of its own, or one that is given twice would get both gradients in each.
            leaves = [
                tensor.detach() if not need else tensor.view_as(tensor) if again else tensor.detach().requires_grad_()
                for tensor, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
            _, result = ctx.work.reference(spec.call(leaves, parts.ints, parts.floats))
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found = iter(gradients_of(result.tensors, wanted, grads, again=again))
        return None, None, None, None, *(next(found) if need else None for need in needs)
