"""Plugin `choice`: candidates in the order that was measured, and the commands `choose` and `bench`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from kernels_core import (
    ArgumentTypeError,
    Candidate,
    LayerRequest,
    configured,
    forget,
    hookimpl,
    require_type,
    set_module,
)

if TYPE_CHECKING:
    import typer

    from .choice import Choice

_lock = threading.RLock()
_open: list[use_choice] = []


class use_choice:  # noqa: N801 - reads like a statement
    """Let measurements choose: from now on in this process, or to the end of a `with` block.

    The last one that is open applies; without any, the file that `KERNELS_CHOICE` names, or `choice` in a configuration
    file. A kernel serves the calls for which it won, and the reference those for which it did. Calls that were not
    measured are served in the default order.

    Args:
        choice: A file of `kernels-core choose` or of `choosing`, or a `Choice`.
        strict: Whether measurements hold only for the same versions of Python and of libraries with kernels, too.

    Raises:
        ArgumentError: If the file cannot be read, or is none of a choice. Nothing changes then.

    Example:
        >>> from kernels_plugins import Choice
        >>> with use_choice(Choice()):
        ...     resolve("Norm", device="cpu", mode=Mode.INFERENCE).origin
        'reference'
    """

    def __init__(self, choice: str | os.PathLike[str] | Choice, *, strict: bool = False) -> None:
        """Use it."""
        from .choice import Choice

        require_type(strict, bool, "strict")
        if not isinstance(choice, (str, os.PathLike, Choice)):
            raise ArgumentTypeError(f"use_choice takes the path of a file or a Choice, not {choice!r}.")
        name = "the choice" if isinstance(choice, Choice) else os.fspath(choice)
        self.choice = choice if isinstance(choice, Choice) else Choice.load(choice)
        self.name, self.strict = name, strict
        with _lock:
            _open.append(self)
        forget()

    def close(self) -> None:
        """Use it no more."""
        with _lock:
            if self in _open:
                _open.remove(self)
        forget()

    def __enter__(self) -> use_choice:
        """Use it until the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Use it no more."""
        self.close()


@functools.cache
def _absolute(path: str) -> str:
    """Return where a path led when it was first used: a program may change its working directory between decisions."""
    return os.path.abspath(os.path.expanduser(path))


@functools.lru_cache(maxsize=4)
def _loaded(path: str, changed: tuple[int, int]) -> Choice:
    from .choice import Choice

    return Choice.load(path)


def _in_use() -> tuple[Choice, str, bool] | None:
    """Return the choice that applies, its name, and whether it is strict."""
    with _lock:
        if _open:
            return _open[-1].choice, _open[-1].name, _open[-1].strict
    path = os.environ.get("KERNELS_CHOICE", str(configured("choice") or ""))
    if not path:
        return None
    file = _absolute(path)
    try:
        found = os.stat(file)
    except OSError:
        return _loaded(file, (0, 0)), path, False  # raises, and says why
    return _loaded(file, (found.st_mtime_ns, found.st_size)), path, False


@hookimpl
def kernels_rank_candidates(request: LayerRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate] | None:
    """Put the candidates in the order that was measured for the layer, each limited to the shapes for which it won."""
    if candidates and candidates[0].record is not None:  # of a decision file, which has its own orders
        from .limit import recorded

        return recorded(request, candidates)
    kept = (getattr(kernel, "kernels_choice", None) for kernel in request.passed_on)
    using = next(filter(None, kept), None)
    if using is None and not _open and "KERNELS_CHOICE" not in os.environ and configured("choice") is None:
        return None
    from .ranking import ranked

    using = using or _in_use()
    return None if using is None else ranked(request, candidates, *using)


@hookimpl
def kernels_settings_in_code() -> Mapping[str, str]:
    """Show the choice of the innermost `use_choice`."""
    with _lock:
        return {"choice": _open[-1].name} if _open else {}


@hookimpl
def kernels_register_commands(cli: typer.Typer) -> None:
    """Add `choose` and `bench`."""
    from .bench.command import bench_command  # only the command line needs it
    from .command import choose_command

    cli.command("choose")(choose_command)
    cli.command("bench")(bench_command)


set_module("kernels_plugins", globals())
