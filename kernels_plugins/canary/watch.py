"""One call of a kernel, compared with its reference while it runs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from kernels_core import CanaryError, Layer, Resolution, WarnOnce, error_text, held_back, module_paths, quarantine
from kernels_core.replay import Call, Outcome, is_observed, mapped, same_numbers

from ..comparison import alike, compare
from ..comparison.ranks import jointly, mesh_of, on_any, together
from ..comparison.structure import own_part
from .outliers import Outliers
from .reader import part_of
from .settings import Settings

Forward = Callable[..., Any]

_comparing: ContextVar[bool] = ContextVar("kernels_plugins_canary_comparing", default=False)
"""Whether this thread compares: layers inside of a layer that is compared are not compared by themselves."""

_lock = threading.Lock()
_calls: dict[tuple[int, str, str], tuple[Iterator[int], Outliers]] = {}
_warn_once = WarnOnce()


def start_over() -> None:
    """Count calls from 1 again, and issue warnings again."""
    with _lock:
        _calls.clear()
    _warn_once.forget()


def watched(resolution: Resolution, forward: Forward, settings: Settings) -> Forward:
    """Return a forward that runs the kernel, and the reference beside it on the calls that the settings choose."""
    layer = resolution.request.layer
    if layer is None:
        return forward
    key = (layer.number, resolution.origin, str(resolution.request.device))
    with _lock:
        # Kept over decisions: a change of mappings starts no new count.
        numbers, outliers = _calls.setdefault(key, (itertools.count(1), Outliers()))
    watch = _Watch(resolution, layer, forward, settings, key)

    @functools.wraps(forward)
    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)  # atomic, without the lock: this is the warm path of each kernel
        wanted = settings.wants(number)
        if not (wanted or settings.outliers) or _comparing.get() or is_observed():
            return forward(*args, **kwargs)
        why = outliers.find((*args, *kwargs.values()), wanted) if settings.outliers else ""
        return watch.compared(number, why, args, kwargs) if wanted or why else forward(*args, **kwargs)

    return watched_forward


@dataclass(eq=False)
class _Watch:
    """Compares the calls of one kernel, for one layer and device."""

    resolution: Resolution
    layer: Layer
    forward: Forward
    settings: Settings
    key: tuple[int, str, str]

    def compared(self, number: int, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and compare it: an outlier as a whole, for the number that makes it one may be in any row."""
        module, inputs = (None, args) if self.layer.is_function else (args[0], args[1:])
        live = Call(module, inputs, kwargs, self.layer.signature)
        if why and not self.settings.wants(number) and live.obstacle is not None:
            return self.forward(*args, **kwargs)  # the reference may start a collective, and no other rank compares
        mesh = mesh_of(live.inputs.values())
        token, said = _comparing.set(True), list[tuple[str, str]]()
        try:
            state = module is not None and next(module.buffers(), None) is not None
            before = together(mesh, lambda: live.snapshot(state=state))
            with held_back() as saved:
                try:
                    output = self.forward(*args, **kwargs)
                except Exception:
                    on_any(True, mesh)  # the other ranks wait for this one
                    raise
            # On another rank: there is nothing to compare there, and its dispatcher judges the error.
            raises = on_any(False, mesh)
            if output is NotImplemented:  # another kernel serves this call
                return output
            part = _part(0 if why or number <= self.settings.first else number)
            problem = None if raises else _agreed(self._problem(live, before, output, part, mesh, said), mesh)
            # A kernel that has changed an input leaves nothing to run on.
            rerun = problem is not None and not on_any(not self._is_as_before(live, before), mesh)
        finally:
            _comparing.reset(token)
        for kind, message in said:  # not before: a warning may be an error, and the other ranks would wait
            self._say(kind, message)
        where = f"{self._where(number, live)}{why and f', compared because {why}'}" if problem is not None else ""
        if problem is not None and self._replaces(f"{where}: {problem}") and rerun:
            return self.layer.reference(*args, **kwargs)
        saved.hand_over()  # not before: a run that is dropped must not be counted by a checkpoint
        return output

    # --- Comparing ------------------------------------------------------------------------------

    def _problem(
        self, live: Call, before: Call, output: Any, part: Part, mesh: Any, said: list[tuple[str, str]]
    ) -> str | None:
        """Return the difference between kernel and reference as text, None if there is none."""
        try:
            return self._difference(live, before, output, part, mesh, said)
        except Exception as error:  # outputs that cannot be compared are no fault of the kernel
            failure = error_text(error)
            said.append(("outputs", f"its outputs cannot be compared with those of its reference: {failure}"))
            return None

    def _difference(
        self, live: Call, before: Call, output: Any, part: Part, mesh: Any, said: list[tuple[str, str]]
    ) -> str | None:
        expected, again, problem = together(mesh, lambda: self._runs(before, mesh, said))
        if on_any(expected is None or problem is not None, mesh) or expected is None:
            return problem
        wanted = [name for name, gradient in expected.gradients.items() if gradient is not None]
        if on_any(again is None, mesh):
            wanted = []

        def gradients(run: Outcome) -> dict[str, Any]:
            return {name: part(run.gradients[name]) for name in wanted}

        def outputs_of(run: Outcome) -> Any:
            return part(run.outputs)

        def is_alike() -> bool:
            pairs = [(part(output), part(expected.outputs))]
            if wanted and again is not None:
                pairs.append((gradients(again), gradients(expected)))
            return alike(pairs, [(state[name], left) for name, left in expected.after.items() if name in state])

        state = live.state
        if not on_any(not together(mesh, is_alike), mesh):
            return None
        if problem := _agreed(self._differs("", lambda: part(output), expected, outputs_of, before, mesh), mesh):
            return problem
        if problem := _agreed(together(mesh, lambda: self._changed(state, before, expected)), mesh):
            return problem
        if not wanted or again is None:
            return None
        return self._differs("gradient of ", lambda: gradients(again), expected, gradients, before, mesh)

    def _runs(
        self, before: Call, mesh: Any, said: list[tuple[str, str]]
    ) -> tuple[Outcome | None, Outcome | None, str | None]:
        """Return the run of the reference, a second one of the kernel for its gradients, and a problem of the latter.

        A run is None where it fails and the kernel is not at fault.
        """
        try:
            expected = before.run(jointly(self.layer.reference, mesh), parameters=False, mutations=False)
        except Exception as error:
            said.append(("reference", f"there is nothing to compare with: {before.why_failed(error)}"))
            return None, None, None
        wanted = [name for name, gradient in expected.gradients.items() if gradient is not None]
        if not wanted:
            return expected, None, None
        kernel: Any = jointly(cast(Any, self.resolution.implementation), mesh)
        try:
            again = before.run(kernel, parameters=False, mutations=False)
        except torch.OutOfMemoryError as error:  # a second run beside the first is no duty of the kernel
            said.append(("memory", f"there is no memory to compare its gradients: {error}"))
            return None, None, None
        except Exception as error:
            if before.obstacle is None:
                return expected, None, f"its second run, for its gradients, raises {error_text(error)}"
            said.append(("copies", f"its gradients are not compared: {before.why_failed(error)}"))  # maybe their fault
            return expected, None, None
        if missing := [name for name in wanted if again.gradients.get(name) is None]:
            return expected, again, f"no gradient reaches {', '.join(missing)}, as it does from the reference"
        return expected, again, None

    def _differs(
        self,
        prefix: str,
        actual: Callable[[], Any],
        expected: Outcome,
        of: Callable[[Outcome], Any],
        before: Call,
        mesh: Any,
    ) -> str | None:
        """Compare outputs or gradients; a suspicion is checked with a reference in float64."""
        comparison = together(mesh, lambda: compare(actual(), of(expected), quick=True))
        if on_any(not comparison.ok and not comparison.mismatches, mesh):
            exact = None
            with contextlib.suppress(Exception):  # a reference that does not run in float64 is no better judge
                exact = together(
                    mesh,
                    lambda: of(before.run(jointly(self.layer.reference, mesh), dtype=torch.float64, mutations=False)),
                )
            comparison = together(mesh, lambda: compare(actual(), of(expected), exact=exact))
        return None if comparison.ok else f"{prefix}{comparison}"

    def _changed(self, state: Mapping[str, torch.Tensor], before: Call, expected: Outcome) -> str | None:
        """Compare the arguments and buffers that were changed in place."""
        for name, was in before.state.items():
            now, wanted = state.get(name), expected.after.get(name)
            if now is None or wanted is None:
                continue
            was, now, wanted = (own_part(tensor.detach(), wanted) for tensor in (was, now, wanted))
            if same_numbers(wanted, now):
                continue
            comparison = compare(now, wanted, quick=True)
            if not comparison.ok:
                changes = not same_numbers(was, wanted)
                how = "left as it was, or changed otherwise" if changes else "changed in place"
                return f"{name} was {how}, which the reference does not do: {comparison}"
        return None

    # --- Acting ---------------------------------------------------------------------------------

    def _is_as_before(self, live: Call, before: Call) -> bool:
        try:
            return all(compare(live.inputs[name], was, quick=True).ok for name, was in before.inputs.items())
        except Exception:  # inputs that cannot be compared may be changed
            return False

    def _replaces(self, message: str) -> bool:
        """React to a disagreement as the settings say; return whether the reference may answer the call."""
        if self.settings.action == "raise":
            raise CanaryError(message)
        if self.settings.action == "warn":
            self._say("disagrees", message)
            return False
        implementation: Any = self.resolution.implementation
        quarantine(
            self.layer,
            implementation,
            kernel=self.resolution.origin,
            device=self.resolution.request.device,
            reason=f"a canary found that it disagrees with the reference: {message}",
        )
        self._say("disagrees", f"{message}. It is in quarantine from now on")
        return self.layer.use_fallback

    def _say(self, kind: str, message: str) -> None:
        """Warn once of each kind for each kernel, layer and device: a failing reference hides no later disagreement."""
        _warn_once(f"Canary: {self.resolution.origin}: {message}", (*self.key, kind))

    def _where(self, number: int, live: Call) -> str:
        """Name layer, path, device, dtypes and shapes of a call."""
        path = _path(live.module) if live.module is not None else ""
        shapes = ", ".join(
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
            for name, tensor in live.inputs.items()
        )
        at = f" at {path!r}" if path else ""
        return f"layer {self.layer.name!r}{at} on {self.resolution.request.device}, call {number} ({shapes})"


def _agreed(problem: str | None, mesh: Any) -> str | None:
    """Return a problem, or that another rank of a mesh has one: a kernel serves distributed tensors on all or on none.

    All ranks compare the same calls, for these are chosen by number: so each comes here.
    """
    found = on_any(problem is not None, mesh)
    return problem or ("another rank finds that it disagrees, on its shard" if found else None)


Part = Callable[[Any], Any]

_LARGE = 2**20
"""Numbers in a tensor of which a part is enough, on calls after the first ones."""


def _part(number: int) -> Part:
    """Return a function that takes about a million numbers of each large tensor: other rows on each call, all for 0."""

    def rows(_: str, leaf: Any) -> Any:
        return part_of(leaf.detach(), number, _LARGE) if isinstance(leaf, torch.Tensor) else leaf

    return lambda value: mapped(value, rows) if number else value


def _path(module: nn.Module) -> str:
    """Return the path of a module in the outermost module that is being called, from the stack; empty if none."""
    callers = (frame.f_locals.get("self") for frame, _ in traceback.walk_stack(sys._getframe()))
    *_, outermost = (module, *(caller for caller in callers if isinstance(caller, nn.Module)))
    return module_paths(outermost).get(module, [""])[0]
