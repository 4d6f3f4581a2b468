"""`choosing`: records the calls of a model's layers, and lets all candidates race on them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from kernels_core import (
    ArgumentError,
    Layer,
    Resolution,
    error_text,
    hookimpl,
    plugin_manager,
    references,
    require_type,
    set_module,
)
from kernels_core.replay import Call, ModelState, is_observed, mapped

from ..oracle.inputs import Recorded
from .cell import CONTEXTS, Context, key_of
from .choice import Choice
from .machine import MeasuredOn, libraries, machine_of
from .race import MODES, ModeName, RacedCall, race
from .regime import calls_on_busy_devices

Forward = Callable[..., Any]
Batch = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments."""


class choosing:  # noqa: N801 - a context manager that reads like a statement
    """Measure which candidate is best for each layer of the models that run in a `with` block, and each shape.

    The block records one eager call of each layer name, mode and kind of shape: dtype, last dimension, and power of
    two of the rows. At its end, all candidates for these calls are compared with the reference: outputs and, where
    autograd recorded the call, gradients. Those that are right are timed against each other and against the reference:
    those that mappings and plugins offer, those of all packs, and the compiled reference. The model is as it was
    then, and served as before: `use_choice` uses the result.

    Args:
        save: A file to write the result to, or to add it to: what it has for other calls and machines is kept.
        contexts: Those to measure: `"eager"`, `"captured"` (in CUDA graphs), `"compiled"`.
        seconds: For the timing of each candidate on each kind of call, roughly.
        progress: Whether to show a progress bar; by default on a terminal.

    Attributes:
        choice: The `Choice`, at the end of the block.

    Raises:
        ArgumentError: If there is another kind of file at `save`, or if the block called no decorated layer.

    Example:
        >>> from kernels_plugins import adopt
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
        >>> adopted = adopt(model)
        >>> with choosing(contexts=("eager",), seconds=0.01) as chosen, torch.no_grad():
        ...     y = model(torch.ones(2, 8))
        >>> cell = chosen.choice.cells_on("cpu")[0]
        >>> cell.layer, cell.mode, cell.width, cell.rows
        ('RMSNorm', 'inference', 8, '2-3')
        >>> adopted.undo()
    """

    def __init__(
        self,
        save: str | os.PathLike[str] | None = None,
        *,
        contexts: Sequence[Context] = CONTEXTS,
        seconds: float = 0.2,
        progress: bool | None = None,
    ) -> None:
        """Check the arguments; nothing happens before the block is entered."""
        require_type(save, (str, os.PathLike, NoneType), "save")
        require_type(progress, (bool, NoneType), "progress")
        check_options(contexts, seconds)
        self.contexts, self.seconds = tuple(contexts), float(seconds)
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.save = Path(save) if save is not None else None
        if self.save is not None and os.path.exists(self.save):  # also of a name that is too long
            Choice.load(self.save)  # raises before the model runs
        self.choice = Choice()
        self._recording = recording()
        self._recorder: CallRecorder | None = None

    def __enter__(self) -> choosing:
        """Record calls."""
        if self._recorder is not None:
            raise ArgumentError("This block is open already: make another one with choosing().")
        self._recording = recording()
        self._recorder = self._recording.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the candidates race, unless the block raised."""
        assert self._recorder is not None
        subjects = list(self._recorder.subjects.values())
        self._recorder = None
        self._recording.__exit__(kind, error, trace)
        if error is not None:
            return
        if not subjects:
            raise ArgumentError(
                "choosing has recorded no call: the block called no decorated layer, or only in compiled code. Adopt "
                "the model (adopt), and call it as it is, without torch.compile."
            )

        def found(cells: MeasuredOn) -> None:
            self.choice = self.choice.merged(Choice((cells,)))

        try:
            measured(subjects, self.contexts, self.seconds, progress=self.progress, found=found)
        finally:  # an interrupt, or a device that breaks, leaves what was measured before
            if self.save is not None and self.choice.machines:
                self.choice.save(self.save)


def check_options(contexts: Sequence[str], seconds: float, modes: Sequence[str] = tuple(MODES)) -> None:
    """Refuse contexts and modes that do not exist, and times that are none."""
    require_type(seconds, (int, float), "seconds")
    if not 0 < seconds < 1e6:
        raise ArgumentError(f"seconds is {seconds}: give the seconds to time each candidate for, such as 0.2.")
    for name, given, known in (("contexts", contexts, CONTEXTS), ("modes", modes, tuple(MODES))):
        require_type(given, Sequence, name)
        if isinstance(given, str) or not all(one in known for one in given) or not given:
            raise ArgumentError(f"{name} is {given!r}: give some of {', '.join(map(repr, known))}.")


def record_calls(
    model: nn.Module | Callable[..., Any],
    batches: Sequence[Batch],
    modes: Sequence[ModeName],
) -> list[RacedCall]:
    """Run a model, or a decorated function, on its references, and return the calls of its layers.

    Args:
        model: It is as before afterwards.
        batches: The arguments of each run.
        modes: Those of the runs. Inputs require grad in training where no parameter does.
    """
    module = model if isinstance(model, nn.Module) else None
    bare = module is None or not any(parameter.requires_grad for parameter in module.parameters())

    def recorded(_: str, leaf: Any) -> Any:
        return leaf.detach().requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    with contextlib.ExitStack() as stack:
        if module is not None:
            stack.enter_context(ModelState(module).kept())
        recorder = stack.enter_context(recording())
        # On references: a kernel that ends the process cannot serve now.
        stack.enter_context(references(*(() if module is None else (module,))))
        for training in sorted(mode == "training" for mode in modes):
            if module is not None:
                module.train(training)
            for batch in batches:
                args, kwargs = mapped(batch, recorded) if training and bare else batch
                try:
                    with torch.set_grad_enabled(training):
                        model(*args, **kwargs)
                except Exception as error:
                    raise ArgumentError(f"The model cannot be run with its inputs: {error_text(error)}") from error
    return list(recorder.subjects.values())


def measured(
    subjects: Sequence[RacedCall],
    contexts: Sequence[Context],
    seconds: float,
    *,
    progress: bool,
    begin: Callable[[RacedCall, str, str], str] = lambda subject, candidate, action: "",
    found: Callable[[MeasuredOn], object] = lambda cells: None,
) -> Choice:
    """Let the candidates for each call race; `begin` is called as in `race`, `found` with the cells of each call."""
    choice, versions = Choice(), libraries()
    busy = calls_on_busy_devices(subjects)
    bar = Progress(console=Console(stderr=True), transient=True) if progress else None
    with bar or contextlib.nullcontext():
        task = bar.add_task("choosing", total=len(subjects)) if bar is not None else None
        for subject in subjects:

            def begun(candidate: str, action: str, subject: RacedCall = subject) -> str:
                if bar is not None and task is not None:
                    bar.update(task, description=f"{subject.text}: {candidate}")
                return begin(subject, candidate, action)

            cells = tuple(race(subject, contexts, budget=seconds, begin=begun, busy=subject in busy))
            one = MeasuredOn(machine_of(subject.device), cells, versions)
            choice = choice.merged(Choice((one,)))
            found(one)
            if bar is not None and task is not None:
                bar.advance(task)
    return choice


@contextlib.contextmanager
def recording() -> Iterator[CallRecorder]:
    """Record the calls of all layers in a block."""
    recorder = CallRecorder()
    plugin_manager().register(recorder, f"choice-recorder-{id(recorder)}")
    try:
        yield recorder
    finally:
        plugin_manager().unregister(recorder)


class CallRecorder:
    """A plugin that keeps one call of each kind."""

    def __init__(self) -> None:
        """Start without any."""
        self.subjects: dict[object, RacedCall] = {}
        self._first: object = None
        self._pass = -1  # its number: one begins where the module that was called first is called again
        self._lock = threading.Lock()

    @hookimpl
    def kernels_wrap_forward(self, resolution: Resolution) -> Callable[[Forward], Forward] | None:
        """Record the calls of a layer, whatever serves them."""
        layer = resolution.request.layer
        if layer is None or layer.kind:
            return None
        device = resolution.request.device

        def wrap(forward: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                if not is_observed():
                    self._keep(layer, device, args, kwargs)
                return forward(*args, **kwargs)

            return recorded

        return wrap

    def _keep(self, layer: Layer, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module, given = (None, args) if layer.is_function else (args[0], args[1:])
        tensor = next((value for value in (*given, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if tensor is None or type(tensor) not in (torch.Tensor, nn.Parameter):
            return  # no shape to choose by; or a subclass, which kernels do not get
        call = Call(module, given, kwargs, layer.signature)
        mode: ModeName = "training" if torch.is_grad_enabled() and call.records else "inference"
        key = key_of(tensor)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        with self._lock:
            caller = id(module) if module is not None else layer.number
            self._first = caller if self._first is None else self._first
            self._pass += caller == self._first
            kind = (layer.name, device, mode, key)
            if kind not in self.subjects and call.obstacle is None and not _is_capturing(device):
                recorded = Recorded(layer.name, layer, _snapshot(call))
                self.subjects[kind] = RacedCall(recorded, key, device, mode, autocast)
            if kind in self.subjects:
                self.subjects[kind].passes[self._pass] += 1


def _snapshot(call: Call) -> Call:
    """Return a call on copies of its inputs, but not of parameters: those are copied for their race, one at a time."""
    parameters: dict[str, nn.Parameter] = {}

    def without(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, nn.Parameter):
            return leaf
        parameters[path] = leaf
        return None

    return call.replaced(without).snapshot().replaced(lambda path, leaf: parameters.get(path, leaf))


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what it computes has no values yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


set_module("kernels_plugins", globals())
