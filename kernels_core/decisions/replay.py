"""`FileReplay`: one decision, made again as a file has it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, DecisionError, KernelsError
from ..guards.quarantine import quarantined
from ..resolution import Candidate, Cause, LayerRequest, Reference, Refusal, Resolution
from ..settings.report import configured
from ..warning import warn_once
from .file import DecisionFile
from .frozen import FrozenKernel, FrozenLayer

VARIABLE = "KERNELS_DECISIONS"

replaying: ContextVar[FileReplay | None] = ContextVar("kernels_core.decisions", default=None)
"""The replay of the decision that this thread or task makes."""

_aside: ContextVar[bool] = ContextVar("kernels_core.decisions.aside", default=False)

_AGAIN = "Restore that kernel on this rank; or freeze the decisions anew (kernels-core freeze), and restart all ranks."


@functools.cache
def _absolute(path: str) -> Path:
    """Return the file that a path named when it was first used: the program may change its working directory."""
    return Path(os.path.abspath(os.path.expanduser(path)))


@functools.lru_cache(maxsize=4)
def _loaded(path: str, changed: tuple[int, int]) -> DecisionFile:
    return DecisionFile.from_file(path)


@dataclass
class FileReplay:
    """One decision that is being made.

    Attributes:
        path: The file, for messages.
        request: The question.
        file: The decisions; the error that kept the file from being read.
        offered: The candidates besides the reference: where there are none, the reference serves with and without file.
    """

    path: str
    request: LayerRequest
    file: DecisionFile | DecisionError
    offered: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, request: LayerRequest) -> FileReplay | None:
        """Return the replay of a request; None if no file is in use. Reads the file once for each of its versions."""
        path = os.environ.get(VARIABLE)
        path = path if path is not None else str(configured("decisions") or "")
        if not path or _aside.get():
            return None
        place = _absolute(path)
        try:
            try:
                found = place.stat()
            except (OSError, ValueError):
                DecisionFile.from_file(place)  # raises, and says why
                raise
            return cls(path, request, _loaded(str(place), (found.st_mtime_ns, found.st_size)))
        except ArgumentError as error:
            text = f"Nothing serves {request.place}, for {VARIABLE}, or the setting decisions: {error}"
            return cls(path, request, DecisionError(text, layer=request.layer_name, request=request))

    def ranked(self, request: LayerRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that the file has, in its order."""
        self.offered += [one.label for one in candidates if one.source is not Reference]
        # One kernel for all modes: the core asks about training, also where the call and the file are for inference.
        same = any(one.same_for_all_modes for one in candidates)
        found = self._find(self.request if same else request)
        if isinstance(found, DecisionError):
            return []  # `checked` says why: it knows whether this is drift, or a layer that nothing is offered for
        if not found.kernels:
            note = found.note or f"decided in {self.path}"
            return [Candidate(Reference, "", "user", note=note)] if candidates else []
        try:
            offers = [one for kernel in found.kernels for one in self._offers(kernel, candidates)]
        except KernelsError as error:  # of a source that cannot use what the file has of it
            return self.unusable(str(error))
        if offers and offers[-1].record is not None:  # the reference has won some shapes, or may serve the rest
            offers.append(Candidate(Reference, "", "user", note=f"decided in {self.path}"))
        return offers

    def unusable(self, problem: str) -> list[Candidate]:
        """Return no candidate, for the file cannot be applied to this layer."""
        text = f"{self.path} cannot be applied to {self.request.place}: {problem} {_AGAIN}"
        self.file = DecisionError(text, layer=self.request.layer_name, request=self.request)
        return []

    def checked(self, resolution: Resolution) -> Resolution:
        """Return a decision as it is, or the reference with the error of the difference from the file."""
        found = self._find(self.request)
        if isinstance(found, DecisionError):
            nothing = not self.offered and resolution.is_reference
            return resolution if nothing else self._refused(resolution, found)
        if not resolution.is_reference:
            # In the order of the file: one that was left out would leave its calls to the next, as on no other rank.
            places = [place for place, kernel in enumerate(found.kernels) if _is(kernel, resolution)]
            if places and (places[0] <= len(self.request.passed_on) or self._is_of_process()):
                return resolution
            now = FrozenKernel("", resolution.origin, resolution.content, record=None)
            missing = [f"for {refusal}" for refusal in resolution.refusals if places]
            return self._refused(resolution, self._drift(found, "; ".join([str(now), *missing])))
        if not found.kernels or self._is_excused(found):
            return resolution
        reasons = [str(refusal) for refusal in resolution.refusals]
        offers = ", ".join(dict.fromkeys(self.offered)) or "nothing"
        text = "; ".join(reasons) or f"it is not offered here: {offers} is"
        return self._refused(resolution, self._drift(found, text))

    def _find(self, request: LayerRequest) -> FrozenLayer | DecisionError:
        """Return the decision of the file; reads the mode of a request only if it makes a difference."""
        if isinstance(self.file, DecisionError):
            return self.file
        # For each of its modes: once `request.mode` is read, the decision serves that mode only.
        answers = [self._in_mode(self.file, request, mode) for mode in request.modes]
        kinds = {answer.kernels if isinstance(answer, FrozenLayer) else None for answer in answers}
        return answers[0] if len(kinds) == 1 else answers[request.modes.index(request.mode)]

    def _in_mode(self, file: DecisionFile, request: LayerRequest, mode: Any) -> FrozenLayer | DecisionError:
        try:
            return file.find(request, mode, file=self.path)
        except DecisionError as error:
            return error

    def _offers(self, kernel: FrozenKernel, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """Yield the candidates of one kernel: several may have its name, and all are loaded until one is it."""
        same = [one for one in candidates if kernel.is_source(one)]
        for one in sorted(same, key=lambda each: each.plugin != kernel.plugin):
            source: Any = one.source
            if kernel.pin is not None and hasattr(source, "pinned"):
                source = source.pinned(kernel.pin)
            note = "; ".join(filter(None, (one.note, f"decided in {self.path}")))
            yield replace(one, source=source, note=note, record=kernel.record)

    def _is_excused(self, found: FrozenLayer) -> bool:
        """Whether the reference serves for a reason of this process or this call, of which the file knows nothing."""
        request = self.request
        if len(request.passed_on) >= len(found.kernels):
            left = [label for label in self.offered if not any(each.source == label for each in found.kernels)]
            if left and found.kernels[-1].record is None:
                warn_once(
                    f"{found.kernels[-1].origin} passes on a call of layer {request.layer_name!r} ({request.place}): "
                    f"the reference serves it, and not {left[0]}, for {self.path} has no decision for such calls. "
                    "Let the kernel declare dtypes or supports, and freeze again."
                )
            return True
        return self._is_of_process()

    def _is_of_process(self) -> bool:
        """Whether tensors of a subclass, or a kernel that proved wrong here, can have kept kernels of the file out."""
        request = self.request
        return bool(request.subclasses) or any(one.layer_name == request.layer_name for one in quarantined())

    def _drift(self, found: FrozenLayer, now: str) -> DecisionError:
        expected = str(found)
        return DecisionError(
            f"Layer {found.layer!r} ({found.defined or 'not imported'}) is not served as {self.path} has it, "
            f"{self.request.place.partition(' on ')[2]} for {self.request.mode_text}. Expected: {expected}. Found: "
            f"{now}. {_AGAIN}",
            layer=found.layer,
            expected=expected,
            found=now,
            request=self.request,
        )

    def _refused(self, resolution: Resolution, error: DecisionError) -> Resolution:
        refusal = Refusal(str(error), resolution.candidate, resolution.plugin, error, Cause.POLICY)
        return Resolution(resolution.request, refusals=(*resolution.refusals, refusal), misfits=resolution.misfits)


def _is(kernel: FrozenKernel, resolution: Resolution) -> bool:
    """Whether a kernel is that of a file: by its content, or by its origin where the content is not known."""
    if kernel.content and resolution.content:
        return kernel.content == resolution.content
    return kernel.is_origin(resolution.origin)


@contextlib.contextmanager
def replaying_nothing() -> Iterator[None]:
    """Decide anew in this thread or task: the command `freeze` would otherwise write the decisions that it replays."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)
