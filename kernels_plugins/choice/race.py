"""A race: all candidates for a layer, verified and timed on one of its calls."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kernels_core import (
    Candidate,
    Mode,
    Reference,
    Resolution,
    error_text,
    find_candidates,
    plugin_manager,
    resolve,
    warn_once,
)
from kernels_core.replay import Call, each_tensor, kept_random_states, leaves

from ..numerics.invariance import Judgement
from ..numerics.judge import judged
from ..numerics.wanted import required
from ..oracle.code_digest import digest_of
from ..oracle.inputs import Recorded, with_gradients
from ..oracle.subject import stop_if_broken, tried
from ..packs.source import as_pack
from .cell import ALIAS, REFERENCE, ChoiceCell, Context, Key
from .ranking import PLUGIN, name_of
from .timing import Run, Timing, time_runs

FAULTS = ("wrong:", "failed:", "it raises", "it cannot be compared:", "it ends the process")
"""How a reason begins that is a fault of a candidate; the others are about calls that it does not take."""

Forward = Callable[..., Any]
ModeName = Literal["inference", "training"]
MODES: dict[ModeName, Mode] = {"inference": Mode.INFERENCE, "training": Mode.TRAINING}


@dataclass(frozen=True, eq=False)
class RacedCall:
    """A recorded call, and the way in which it was made.

    Attributes:
        recorded: The call.
        key: Its key.
        device: Its device.
        mode: Whether autograd recorded it.
        autocast: The dtype of the autocast around it, None without.
        passes: How often such calls were made in each pass through the model.
    """

    recorded: Recorded
    key: Key
    device: torch.device
    mode: ModeName
    autocast: torch.dtype | None = None
    passes: Counter[int] = field(default_factory=Counter)

    def autocasting(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of autocast that the call was made in."""
        off = self.autocast is None
        return contextlib.nullcontext() if off else torch.autocast(self.device.type, dtype=self.autocast)

    @property
    def place(self) -> tuple[str, str, str, Key]:
        """The place of its cells, without the context."""
        return self.recorded.layer.name, self.device.type, self.mode, self.key

    @property
    def text(self) -> str:
        """Layer, mode and shape, for messages."""
        call = self.recorded.call
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in call.inputs.values())
        return f"{self.recorded.layer.name}, {self.mode}, {shapes}"


@dataclass
class _Race:
    """One subject with its contestants, and those that are out."""

    subject: RacedCall
    begin: Callable[[str, str], str]
    forwards: dict[str, Forward] = field(default_factory=dict)
    traceable: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def enter(self, candidate: Candidate) -> None:
        """Let a candidate take part, if it serves such calls and computes what the reference computes."""
        name, recorded, mode = name_of(candidate), self.subject.recorded, MODES[self.subject.mode]
        if name in self.forwards or name in self.lost or self.is_out(name, "is compared with its reference"):
            return
        found = resolve(recorded.layer, device=self.subject.device, mode=mode, candidate=candidate)
        if found.implementation is None:
            reasons = "; ".join(refusal.reason for refusal in found.refusals) or found.note
            if candidate.plugin != PLUGIN:  # a pack that is not asked for, and has no kernel here, has lost nothing
                self.lost[name] = reasons
            return
        for known, forward in self.forwards.items():
            if found.implementation is forward:  # of a pack, that is offered, too
                self.lost[name] = f"it is {known}{ALIAS}"
                return
        try:
            with self.subject.autocasting():
                rows = tried(recorded, found, modes=(mode,), derived=False)
        except Exception as error:
            stop_if_broken(error)
            self.lost[name] = f"it cannot be compared: {error_text(error)}"
            return
        wrong = [row for row in rows if row.verdict != "ok"]
        if wrong or not rows:
            self.lost[name] = f"{wrong[0].verdict}: {wrong[0].reason}" if wrong else "it was not compared"
            return
        if lacking := self.lacking(found):
            self.lost[name] = lacking
            return
        self.forwards[name] = found.implementation
        self.digests[name] = digest_of(found.implementation) or ""
        compiled = mode | Mode.TORCH_COMPILE
        if resolve(recorded.layer, device=self.subject.device, mode=compiled, candidate=candidate).implementation:
            self.traceable.add(name)

    def lacking(self, found: Resolution) -> str:
        """Return what is required of numbers, and an implementation lacks; empty if it has all."""
        names = required(found.request)
        try:
            judgements = judged(self.subject.recorded, found, names) if names else {}
        except Exception as error:
            stop_if_broken(error)
            judgements = {names[0]: Judgement(None, error_text(error))}
        lacks = [f"{name}: {one}" for name, one in judgements.items() if not one.has]
        return f"it lacks what is required of numbers: {'; '.join(lacks)}" if lacks else ""

    def is_out(self, name: str, action: str) -> bool:
        """Announce an action with a candidate; return whether it is out by now."""
        if reason := self.begin(name, action):
            self.lost[name] = reason
        return bool(reason)

    # --- Timing -----------------------------------------------------------------------------------

    def timed(self, runs: Mapping[str, Run], budget: float, capture: bool) -> dict[str, Timing]:
        """Time runs; those that raise are out."""
        found: dict[str, Timing] = {}
        kept = {name: run for name, run in runs.items() if not self.is_out(name, "is timed")}
        with kept_random_states([self.subject.device, *self.subject.recorded.call.generators]):
            # Again before each run: where one ends the process, it was this one.
            measured = time_runs(
                kept,
                self.subject.device,
                budget=budget,
                capture=capture,
                before=lambda name: self.begin(name, "is timed"),
            )
            for name, timing in measured:
                if isinstance(timing, Exception):
                    stop_if_broken(timing)
                    text = error_text(timing).partition("\n")[0]
                    self.lost[name] = f"it raises while it is timed: {text}"
                else:
                    found[name] = timing
        return found

    def cell(
        self,
        context: Context,
        times: Mapping[str, float],
        why: Mapping[str, str] = types.MappingProxyType({}),
        busy: bool = False,
    ) -> Iterator[ChoiceCell]:
        """Yield the cell of a context, unless the reference has no time there: then there is nothing to compare.

        `why` has the reasons of those without a time that hold for this context only.
        """
        if REFERENCE not in times:
            reason = self.lost.pop(REFERENCE, "") or why.get(REFERENCE, "")  # it may do in the next context
            warn_once(f"No choice is made for {self.subject.text}, {context}: the reference is out: {reason}")
            return
        (dtype, width, bucket), subject = self.subject.key, self.subject
        place = (subject.recorded.layer.name, subject.device.type, context, subject.mode)
        lost = {name: reason for name, reason in {**why, **self.lost}.items() if name not in times}
        if REFERENCE in self.lost:  # it has a time, for the others to be compared with, and wins nothing
            lost[REFERENCE] = self.lost[REFERENCE]
        digests = {name: digest for name, digest in self.digests.items() if name in times and digest}
        yield ChoiceCell(*place, str(dtype).removeprefix("torch."), width, bucket, dict(times), lost, digests, busy)


def race(
    subject: RacedCall,
    contexts: Sequence[Context],
    *,
    budget: float,
    begin: Callable[[str, str], str] = lambda candidate, action: "",
    beside: Mapping[str, Run] = types.MappingProxyType({}),
    busy: bool = False,
) -> Iterator[ChoiceCell]:
    """Verify and time all candidates for a call; yield a cell for each context.

    Those that are offered take part, those of all packs, the compiled reference, and the reference.

    Args:
        subject: The call.
        contexts: Those to measure; `"captured"` is left out where there are no CUDA graphs.
        budget: Seconds for the timing of each candidate, roughly.
        begin: Called before something is done with a candidate; a reason leaves it out.
        beside: Other work to time in turn with the candidates, by name; the cells have its times, too.
        busy: Whether the device is busy when such calls are launched, so that launching takes no time.
    """
    layer, device = subject.recorded.layer, subject.device
    running = _Race(subject, begin)
    for candidate in _contestants(subject):
        running.enter(candidate)
    running.forwards[REFERENCE] = layer.reference
    as_reference = resolve(layer, device=device, mode=MODES[subject.mode], candidate=Candidate(Reference))
    if lacking := running.lacking(as_reference):  # its times are needed all the same: the others are compared with them
        running.lost[REFERENCE] = lacking
    try:
        make = runner_of(subject)
    except Exception as error:
        stop_if_broken(error)
        warn_once(f"No choice is made for {subject.text}: {subject.recorded.call.why_failed(error)}")
        return
    capture = device.type == "cuda" and "captured" in contexts
    if "eager" in contexts or capture:
        runs = {name: make(forward) for name, forward in running.forwards.items()}
        timings = running.timed({**runs, **beside}, budget, device.type == "cuda")
        if "eager" in contexts:
            # Where the device is busy, the CPU still has to keep ahead of it: launching is not quite free.
            times = {n: t.busy + 0.15 * t.host if busy else t.launched for n, t in timings.items()}
            yield from running.cell("eager", times, busy=busy)
        if capture:
            captured = {name: timing.captured for name, timing in timings.items() if timing.captured is not None}
            why = {name: timing.not_captured for name, timing in timings.items()}
            yield from running.cell("captured", captured, why)
    traceable = {name: running.forwards[name] for name in running.traceable}
    if "compiled" in contexts and traceable:  # else only the reference can serve, measured or not
        traceable[REFERENCE] = layer.reference
        runs = {name: make(_compiled(forward)) for name, forward in traceable.items()}
        timings = running.timed({**runs, **beside}, budget, device.type == "cuda")
        times = {name: timing.captured or timing.launched for name, timing in timings.items()}
        why = {name: "it cannot be compiled in a program" for name in running.forwards}
        yield from running.cell("compiled", times, why)


def _contestants(subject: RacedCall) -> Iterator[Candidate]:
    """Yield what is offered for a call, and the kernels of all packs."""
    layer = subject.recorded.layer
    for candidate in find_candidates(layer, device=subject.device, mode=MODES[subject.mode])[0]:
        if candidate.source is not Reference:
            yield candidate
    names = {name for answer in plugin_manager().hook.kernels_packs() for name in answer}
    for name in sorted(names):
        pack = as_pack(f"pack:{name}", f"layer {layer.name!r}", layer.name)
        yield Candidate(pack, PLUGIN, "user")


def runner_of(subject: RacedCall) -> Callable[[Forward], Run]:
    """Return a function that makes runs of a call: all on the same copies of its inputs and of the module's tensors."""
    call = subject.recorded.call.snapshot(state=True)  # a batch norm counts its calls
    call = with_gradients(call) if subject.mode == "training" else call
    with subject.autocasting():
        changed = call.run(subject.recorded.layer.reference, gradients=False).mutated
    if any(name.startswith("input ") for name in changed):  # hundreds of runs would change them on and on
        cloned = each_tensor(torch.clone)
        return lambda forward: _run(subject, call, lambda: call.replaced(cloned).make(forward))
    return lambda forward: _run(subject, call, lambda: call.make(forward))


def _run(subject: RacedCall, call: Call, make: Run) -> Run:
    """Return a function that makes the call with a forward; for training, with its backward."""
    training = subject.mode == "training"
    wanted = [tensor for tensor in call.tensors.values() if tensor.requires_grad]
    seeds: list[torch.Tensor] = []

    def run() -> object:
        with subject.autocasting(), torch.set_grad_enabled(training):
            output = make()
        if not training:
            return output
        outputs = [leaf for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if not seeds:  # once, in a run that warms up
            seeds.extend(torch.ones_like(leaf) for leaf in outputs)
        return torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)

    return run


def _compiled(forward: Forward) -> Forward:
    """Return a forward compiled for these shapes only.

    PyTorch counts variants by code object: a copy of the code leaves those of the program alone.
    """

    def inlined(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = types.FunctionType(inlined.__code__.replace(), globals(), closure=inlined.__closure__)
    compiled: Forward = torch.compile(own, fullgraph=True, dynamic=False)
    return compiled
