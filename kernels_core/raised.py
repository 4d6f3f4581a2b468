"""Exceptions of foreign code: their text, and keeping one without everything that its frames keep alive."""

from __future__ import annotations

import types

from .errors import require_type
from .text import cleaned

_LONGEST = 2_000
"""Characters of a message that are kept: some have the whole text of a generated kernel in them."""

_DEEPEST = 100
"""Frames of a traceback that are kept, the innermost ones: an endless recursion has a thousand."""


def error_text(error: BaseException) -> str:
    """Return the type and the message of an exception, cut where it is long; its `__str__` may raise.

    Args:
        error: An exception of code that is not our own.

    Example:
        >>> error_text(KeyError("weight"))
        "KeyError: 'weight'"
        >>> len(error_text(ValueError("x" * 5_000_000))) < 2100
        True
    """
    require_type(error, BaseException, "error")
    return f"{cleaned(type(error).__name__, _LONGEST)}: {message_of(error)}".rstrip(": ")


def message_of(error: BaseException) -> str:
    """Return the message of an exception, cut where it is long; a remark where its `__str__` raises."""
    try:
        return cleaned(str(error), _LONGEST)
    except Exception as fault:
        return f"its message is not known, for its __str__ raises {type(fault).__name__}"


def detached(error: BaseException, *, copied: bool = False) -> BaseException:
    """Return an exception to keep: its tracebacks, and those of its causes, show the same lines, and hold nothing.

    A traceback holds its frames, and each frame those that called it: as long as the exception is kept, so would be the
    arguments of all calls that were running when it was raised.

    Args:
        error: The exception, which is changed.
        copied: Whether to change a copy instead, for an exception that somebody still handles.
    """
    change = object.__setattr__  # exceptions may be frozen dataclasses
    first = kept = _copy(error) if copied else error
    seen = {id(error)}
    while True:
        change(kept, "__traceback__", _without_locals(error.__traceback__))
        following = error.__cause__ or error.__context__  # as Python prints them
        if following is None or id(following) in seen:
            return first
        seen.add(id(following))
        if copied:
            copy = _copy(following)
            change(kept, "__cause__" if error.__cause__ is not None else "__context__", copy)
            kept, error = copy, following
        else:
            kept = error = following


def _copy(error: BaseException) -> BaseException:
    """Return an exception with the same type, arguments and attributes, without calling its constructor."""
    try:
        copy = type(error).__new__(type(error), *error.args)  # the constructor may want other arguments
        copy.__dict__.update(error.__dict__)
        object.__setattr__(copy, "args", error.args)
    except Exception:  # of a type with a `__new__` of its own
        return RuntimeError(error_text(error))
    return copy


def _without_locals(trace: types.TracebackType | None) -> types.TracebackType | None:
    places = []
    while trace is not None:
        places.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    made = None
    for code, line in reversed(places[-_DEEPEST:]):
        named = _waiting.__code__.replace(co_filename=code.co_filename, co_name=code.co_name)
        # The frame of a generator that has not started has no local variables, and was called by no other.
        frame = types.FunctionType(named, {})().gi_frame
        made = types.TracebackType(made, frame, -1, line)
    return made


def _waiting():  # type: ignore[no-untyped-def]
    yield
