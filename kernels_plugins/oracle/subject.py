"""One layer on one of its calls: every kernel that is offered for it, compared with its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kernels_core import (
    Candidate,
    LayerRequest,
    Mode,
    Reference,
    Resolution,
    VerificationError,
    error_text,
    find_candidates,
    frozen_choice,
    plugin_manager,
    references,
    resolve,
)
from kernels_core.replay import Call, Outcome, leaves, mapped

from ..comparison import Comparison, Tolerances, compare
from ..comparison.ranks import jointly, mesh_of, on_any, together
from .inputs import Case, Forward, Recorded, cases, with_gradients
from .report import VerifyRow


@dataclass(frozen=True)
class Plan:
    """How kernels are compared: see `verify`."""

    gradients: bool = True
    dtypes: Sequence[torch.dtype] | None = None
    tolerances: Tolerances | None = None
    # properties of numbers to find out, besides those that kernels declare
    numerics: Sequence[str] = ()
    every_size: bool = False
    compare: bool = True
    # called before a kernel is loaded, and before it runs on a case; False leaves that out
    begin: Callable[[VerifyRow], bool] = lambda row: True


def tried(
    recorded: Recorded,
    resolution: Resolution,
    *,
    tolerances: Tolerances | None = None,
    modes: Sequence[Mode] = (Mode.INFERENCE, Mode.TRAINING),
    derived: bool = True,
) -> list[VerifyRow]:
    """Try one kernel on a call, and on others like it, for inference and for training, even if it would not serve."""
    candidate = resolution.candidate or Candidate(resolution.implementation)
    decisions = {mode: replace(resolution, request=replace(resolution.request, mode=mode)) for mode in modes}
    return list(Subject(recorded, Plan(tolerances=tolerances)).tried([_Kernel(candidate, decisions)], derived=derived))


@dataclass(frozen=True)
class _Kernel:
    """A candidate, with the decision about it for each mode."""

    candidate: Candidate
    decisions: dict[Mode, Resolution]


class Subject:
    """A layer that is being verified on one of its calls."""

    def __init__(self, recorded: Recorded, plan: Plan) -> None:
        self.path, self.layer, self.call = recorded.path, recorded.layer, recorded.call
        self.modes = (Mode.INFERENCE, Mode.TRAINING) if plan.gradients else (Mode.INFERENCE,)
        self.dtypes, self.tolerances, self.begin = plan.dtypes, plan.tolerances, plan.begin
        self.compare = plan.compare
        self.left_out = False
        self.serving: list[tuple[VerifyRow, Resolution]] = []
        self.device = (self.call.devices or [torch.device("cpu")])[0]
        self.mesh = mesh_of(self.call.inputs.values())
        self.request = LayerRequest(self.layer.name, self.device, Mode.INFERENCE, self.layer)
        self.blank = VerifyRow(self.path, self.layer.name, "ok", device=str(self.device))

    def rows(self, *, derived: bool) -> Iterator[VerifyRow]:
        """Yield the rows of the layer, with or without inputs derived from the given ones."""
        condition, call = self.layer.condition, self.call
        args, kwargs = (call.args, call.kwargs) if self.layer.is_function else ((call.module,), {})
        if condition is not None and not condition(*args, **kwargs):
            yield replace(self.blank, verdict="no kernel", reason="its condition is not met, so none may serve it")
            return
        kernels = self._kernels()
        if not kernels:
            if not self.left_out:
                yield self._without_kernel()
            return
        for kernel in kernels:
            for mode, resolution in kernel.decisions.items():
                if resolution.is_reference:
                    reason = "; ".join(refusal.reason for refusal in resolution.refusals) or resolution.note
                    yield replace(self._row(kernel, mode), verdict="refused", reason=reason)
        serving = [k for k in kernels if not all(r.is_reference for r in k.decisions.values())]
        if not serving:
            yield replace(self.blank, verdict="undecided", reason="none of the kernels that are offered can be used")
            return
        for kernel in serving:
            # In training, if it serves there: properties of numbers are about gradients, too, then.
            mode, resolution = next((m, r) for m, r in reversed(kernel.decisions.items()) if not r.is_reference)
            self.serving.append((self._row(kernel, mode), resolution))
        if self.compare:
            yield from self.tried(serving, derived=derived)

    def tried(self, kernels: list[_Kernel], *, derived: bool) -> Iterator[VerifyRow]:
        """Yield how kernels do with the given inputs, and with those derived from them."""
        for call in self._calls():
            given = Case("as given", call, given=True)
            if reason := self._undecided(given):
                yield replace(self.blank, verdict="undecided", case=given.name, dtype=dtype_of(call), reason=reason)
                continue
            for case in (given, *(cases(call) if derived else ())):
                if self.dtypes is None or dtype_of(case.call) == dtype_of(
                    call
                ):  # derived cases have dtypes of their own
                    yield from self._try(case, kernels)

    def _calls(self) -> Iterator[Call]:
        """Yield the call in each dtype to compare in."""
        given = next((t.dtype for t in self.call.inputs.values() if t.is_floating_point()), None)
        if self.dtypes is None or given is None:
            yield self.call
            return
        for dtype in self.dtypes:
            yield self.call if dtype == given else self.call.converted(given, dtype)

    def _kernels(self) -> list[_Kernel]:
        """Return each candidate once, with the decisions about it."""
        found: list[_Kernel] = []
        distributed = frozenset(type(t) for t in self.call.inputs.values() if hasattr(type(t), "placements"))
        for mode in self.modes:
            for candidate in find_candidates(self.layer, device=self.device, mode=mode)[0]:
                if isinstance(candidate.source, type(Reference)):  # there is nothing to compare it with
                    continue
                kernel = next((kernel for kernel in found if kernel.candidate == candidate), None)
                if kernel is None:
                    kernel = _Kernel(candidate, {})
                    loading = replace(self.blank, kernel=candidate.label, plugin=candidate.plugin, case="loading")
                    if not self.begin(loading):
                        self.left_out = True
                        continue
                    found.append(kernel)
                if mode not in kernel.decisions:
                    kernel.decisions[mode] = resolve(
                        self.layer, device=self.device, mode=mode, candidate=candidate, subclasses=distributed
                    )
        choice = frozen_choice(self.call.module) if self.call.module is not None else None
        frozen = choice.resolution if choice is not None else None
        if frozen is not None and not frozen.is_reference:
            known = {id(r.implementation) for kernel in found for r in kernel.decisions.values()}
            if id(frozen.implementation) not in known:  # chosen from a mapping that is not open any more
                chosen = {mode: frozen for mode in self.modes if mode in frozen.request.mode}
                candidate = frozen.candidate or Candidate(frozen.implementation)
                found.append(_Kernel(candidate, chosen or {Mode.INFERENCE: frozen}))
        return found

    def _without_kernel(self) -> VerifyRow:
        """Return the row of a layer that no kernel is offered for."""
        found = (find_candidates(self.layer, device=self.device, mode=mode)[1] for mode in self.modes)
        refused = [refusal for refusals in found for refusal in refusals]
        # A plugin that failed, when it was loaded or when it was asked for kernels, might have offered one.
        faults = {str(refusal) for refusal in refused if refusal.candidate is None}
        faults |= {str(fault) for fault in plugin_manager().faults}
        if faults:
            return replace(self.blank, verdict="undecided", reason="; ".join(sorted(faults)))
        note = resolve(self.layer, device=self.device, mode=self.modes[0]).note
        reason = note or "; ".join(sorted({str(refusal) for refusal in refused})) or "none is offered"
        return replace(self.blank, verdict="no kernel", reason=reason)

    def _row(self, kernel: _Kernel, mode: Mode, case: Case | None = None) -> VerifyRow:
        resolution = kernel.decisions[mode]
        return replace(
            self.blank,
            kernel=kernel.candidate.label,
            origin="" if resolution.is_reference else resolution.origin,
            plugin=kernel.candidate.plugin,
            mode=resolution.request.mode_text if mode in resolution.request.mode else str(mode.name).lower(),
            case=case.name if case is not None else "",
            dtype=dtype_of(case.call) if case is not None else "",
        )

    # --- Cases ----------------------------------------------------------------------------------

    def _undecided(self, case: Case) -> str | None:
        """Return why the reference cannot judge, None if it can."""
        try:
            # Twice: what differs from itself judges no other.
            first, second = (self._run(case, self.layer.reference, Mode.INFERENCE) for _ in range(2))
            difference = together(self.mesh, lambda: compare(second.outputs, first.outputs))
        except Exception as error:
            stop_if_broken(error)
            return case.call.why_failed(error)
        elsewhere = on_any(not difference.ok, self.mesh)
        if difference.ok:
            return "on another rank of the mesh, the layer is not deterministic" if elsewhere else None
        return (
            "the layer is not deterministic: its reference ran twice on equal inputs, from the same random numbers, "
            f"and the second time differs from the first: {difference}"
        )

    def _try(self, case: Case, kernels: list[_Kernel]) -> Iterator[VerifyRow]:
        for mode in self.modes:
            # The reference runs only where there is something to judge.
            serving = [k for k in kernels if mode in k.decisions and not k.decisions[mode].is_reference]
            if not serving:
                continue
            try:
                expected = self._expected(case, mode)
            except Exception as error:
                stop_if_broken(error)
                reason = case.call.why_failed(error)
                row = replace(self.blank, mode=str(mode.name).lower(), case=case.name, dtype=dtype_of(case.call))
                yield replace(row, verdict="undecided" if case.given else "skipped", reason=reason)
                continue
            for kernel in serving:
                implementation: Any = kernel.decisions[mode].implementation
                row = self._row(kernel, mode, case)
                if not self.begin(row):
                    continue
                try:
                    yield from self._judge(row, case, mode, implementation, *expected)
                except Exception as error:  # such as of a subclass of tensors without an operator to compare with
                    stop_if_broken(error)
                    reason = f"its results cannot be compared with those of the reference: {_short(error)}"
                    yield replace(row, verdict="undecided", reason=reason)

    def _run(self, case: Case, forward: Forward, mode: Mode, dtype: torch.dtype | None = None) -> Outcome:
        training = mode is Mode.TRAINING
        cast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if case.autocast is not None:
            cast = torch.autocast(self.device.type, dtype=case.autocast)

        def run() -> Outcome:
            call = with_gradients(case.call) if training else case.call
            return call.run(jointly(forward, self.mesh), gradients=training, dtype=dtype, contiguous=case.contiguous)

        with references(), cast:  # the layers inside run their references, or they would be judged, too
            return together(self.mesh, run)

    def _expected(self, case: Case, mode: Mode) -> tuple[Outcome, Outcome | None]:
        """Return a run of the reference, and the same in float64 if it can be run so."""
        run = self._run(case, self.layer.reference, mode)
        try:
            exact = self._run(case, self.layer.reference, mode, torch.float64)
        except Exception as error:  # many layers only compute in their dtype
            stop_if_broken(error)
            return run, None
        if not run.random:
            return run, exact
        # In float64, other numbers may have been drawn.
        pairs = ((run.outputs, exact.outputs), (dict(run.gradients), dict(exact.gradients)))
        near = together(self.mesh, lambda: [_is_near(*pair) for pair in pairs])
        return run, None if on_any(not all(near), self.mesh) else exact

    def _judge(
        self, row: VerifyRow, case: Case, mode: Mode, kernel: Forward, expected: Outcome, exact: Outcome | None
    ) -> Iterator[VerifyRow]:
        """Compare the runs of a kernel on a case with those of the reference."""
        try:
            run = self._run(case, kernel, mode)
            again = self._run(case, kernel, mode) if case.given else None  # it may keep state between calls
        except Exception as error:
            stop_if_broken(error)
            yield replace(row, verdict="failed", reason=f"it raises {_short(error)}")
            return
        if on_any(run.outputs is NotImplemented, self.mesh):
            yield replace(row, verdict="refused", reason="it passes such calls on to the next candidate")
            return
        draws = "; the reference draws random numbers: a kernel that draws others differs" if expected.random else ""
        ideal = exact.outputs if exact is not None else None
        compared = partial(compare, tolerances=self.tolerances)
        forward = together(self.mesh, lambda: compared(run.outputs, expected.outputs, exact=ideal))
        yield _with(replace(row, subject="forward"), forward, draws)
        if again is not None:
            second = together(self.mesh, lambda: compared(again.outputs, run.outputs))
            if not second.ok:
                reason = f"a second call on equal inputs differs from the first: {second}"
                yield replace(_with(replace(row, subject="second call"), second), reason=reason)
        for name, gradient in expected.gradients.items():
            best, found = exact.gradients.get(name) if exact is not None else None, run.gradients.get(name)
            if on_any(found is None, self.mesh):  # on another rank: this one must not wait for it
                found = None
            comparison = together(self.mesh, partial(_gradient, found, gradient, best, self.tolerances))
            yield _with(replace(row, subject=f"gradient of {name}"), comparison, draws)
        if reason := together(self.mesh, lambda: _changes(run, expected, self.tolerances)):
            yield replace(row, subject="changes", verdict="wrong", reason=reason)


def _short(error: Exception) -> str:
    """Name an error; PyTorch may list every kernel of an operator below an empty line."""
    return error_text(error).partition("\n\n")[0]


def _gradient(
    found: torch.Tensor | None, expected: torch.Tensor | None, exact: torch.Tensor | None, tolerances: Tolerances | None
) -> Comparison:
    """Compare gradients; none at all is as good as zeros, if nothing else was expected."""
    if found is None:
        is_lost = expected is not None and bool(expected.count_nonzero())
        return Comparison(("no gradient, where the reference has one",) if is_lost else ())
    if expected is None:
        expected, exact = torch.zeros_like(found), None
    return compare(found, expected, exact=exact, tolerances=tolerances)


def _changes(run: Outcome, expected: Outcome, tolerances: Tolerances | None) -> str:
    """Return the changes that a kernel makes and the reference does not, or the reverse; empty if there are none."""
    found = [
        f"it changes {name}, which the reference leaves as it is" for name in run.mutated.keys() - expected.mutated
    ]
    found += [f"it does not change {name}, as the reference does" for name in expected.mutated.keys() - run.mutated]
    for name in run.mutated.keys() & expected.mutated.keys():
        difference = compare(run.mutated[name], expected.mutated[name], tolerances=tolerances)
        if not difference.ok:
            found.append(f"it changes {name} otherwise: {difference}")
    shared = run.shared - expected.shared - run.mutated.keys()  # one that is changed was named above
    found += [f"its output shares the memory of {name}, and that of the reference does not" for name in shared]
    kept = set(run.attributes) - set(expected.attributes)
    found += [f"it sets or deletes {name}, which the reference does not" for name in kept]
    return "; ".join(sorted(found))


def _with(row: VerifyRow, comparison: Comparison, remark: str = "") -> VerifyRow:
    """Put numbers and a verdict into a row."""
    errors: dict[str, Any] = {}
    if comparison.worst is not None:
        errors = {name: comparison.largest(name) for name in ("max_abs", "mean_abs", "max_rel", "max_ulps")}
        errors |= {"excess": comparison.worst.excess, "own_error": comparison.worst.own_error}
    if comparison.ok:
        return replace(row, verdict="ok", reason="", **errors)
    return replace(row, verdict="wrong", reason=f"{comparison}{remark}", **errors)


def _is_near(outputs: Any, exact: Any) -> bool:
    """Whether outputs in float64 are the same but for rounding: a layer may draw other random numbers in float64."""
    dtypes = (getattr(leaf, "dtype", None) for _, leaf in leaves(outputs))

    def rounded(_: str, leaf: Any) -> Any:
        dtype = next(dtypes, None)
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and dtype is not None else leaf

    return compare(mapped(exact, rounded), outputs, tolerances=(0.25, 1e-2)).ok


def dtype_of(call: Call) -> str:
    """Return the dtype of the first input with floating numbers; empty without one."""
    found = next((t.dtype for t in call.inputs.values() if t.is_floating_point()), None)
    return str(found).removeprefix("torch.") if found is not None else ""


def stop_if_broken(error: Exception) -> None:
    """Raise if the device is lost, so that no later result on it is valid."""
    broken = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in error_text(error)
    if broken and not isinstance(error, torch.OutOfMemoryError):
        raise VerificationError(
            f"The device failed, so no later result on it is valid: {error_text(error)}. Start a new process; with "
            "CUDA_LAUNCH_BLOCKING=1, the error comes from the kernel that failed.",
            rows=(),
        ) from error
