"""Modes of calls, and the registered modes that may serve each of them."""

from __future__ import annotations

from enum import Flag, auto

from .errors import ArgumentError, require_type


class Mode(Flag):
    """The mode of a call, or the calls that a source in a mapping is registered for.

    A call is `TRAINING` when autograd records it, `INFERENCE` when it does not, combined with
    `TORCH_COMPILE` while it is traced. `FALLBACK` occurs in mappings only: the source that serves
    any call for which no better one is registered.

    Example:
        >>> Mode.TRAINING | Mode.TORCH_COMPILE in Mode.TRAINING | Mode.TORCH_COMPILE
        True
        >>> Mode.TRAINING | Mode.INFERENCE
        Traceback (most recent call last):
        ...
        kernels_core.ArgumentError: Mode.INFERENCE and Mode.TRAINING exclude each other: ...
    """

    FALLBACK = auto()
    TRAINING = auto()
    INFERENCE = auto()
    TORCH_COMPILE = auto()

    def __or__(self, other: Mode) -> Mode:
        """Combine two modes; raises `ArgumentError` for impossible combinations."""
        if not isinstance(other, Mode):
            return NotImplemented
        union = super().__or__(other)
        if Mode.INFERENCE in union and Mode.TRAINING in union:
            raise ArgumentError("Mode.INFERENCE and Mode.TRAINING exclude each other: register one source for each.")
        if Mode.FALLBACK in union and union != Mode.FALLBACK:
            raise ArgumentError("Mode.FALLBACK cannot be combined with another mode: it already serves every call.")
        return union


EAGER_MODES = (Mode.INFERENCE, Mode.TRAINING)
"""The modes that an eager call can have."""

TRACED_MODES = (Mode.INFERENCE | Mode.TORCH_COMPILE, Mode.TRAINING | Mode.TORCH_COMPILE)
"""The modes that a call can have while it is traced."""

_TRACED_INFERENCE, _TRACED_TRAINING = TRACED_MODES

STAND_INS: dict[Mode, tuple[Mode, ...]] = {
    # A kernel for training has a forward, too; one for inference may have no backward.
    Mode.INFERENCE: (Mode.INFERENCE, _TRACED_INFERENCE, Mode.TRAINING, _TRACED_TRAINING, Mode.FALLBACK),
    Mode.TRAINING: (Mode.TRAINING, _TRACED_TRAINING, Mode.FALLBACK),
    _TRACED_INFERENCE: (_TRACED_INFERENCE, _TRACED_TRAINING, Mode.FALLBACK),
    _TRACED_TRAINING: (_TRACED_TRAINING, Mode.FALLBACK),
}
"""For each mode of a call, the registered modes that may serve it, best first."""


def check_call_mode(mode: Mode) -> Mode:
    """Return `mode` if a call can have it: training or inference, traced or not."""
    if not isinstance(mode, Mode) or mode not in STAND_INS:  # the type first: others may have no hash
        raise ArgumentError(
            f"{mode if isinstance(mode, Mode) else repr(mode)} is not the mode of a call: use Mode.INFERENCE or "
            "Mode.TRAINING, with or without Mode.TORCH_COMPILE."
        )
    return mode


def check_registered_mode(mode: Mode) -> Mode:
    """Return `mode` if a mapping may register a source for it.

    Raises:
        ArgumentError: For `TORCH_COMPILE` without training or inference.
        ArgumentTypeError: If it is no mode.
    """
    require_type(mode, Mode, "A registered mode")
    if mode != Mode.FALLBACK and mode not in STAND_INS:
        raise ArgumentError(
            f"{mode} cannot be registered on its own: combine it with training or inference, "
            "for instance Mode.INFERENCE | Mode.TORCH_COMPILE."
        )
    return mode
