"""Plugin `canary`: `with canary():`, or `KERNELS_CANARY`, puts a watch around every kernel that serves.

While neither is used, nothing is put around anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kernels_core import ConfigSection, Resolution, ScopeError, forget, hookimpl, set_module

if TYPE_CHECKING:
    from .settings import Settings

Forward = Callable[..., Any]

_lock = threading.Lock()


class canary:  # noqa: N801 - a context manager that reads like a statement
    """Compare kernels with their references, in the live model, for a few of their calls and for outliers.

    On the calls that are chosen, the reference runs on copies of the arguments beside the kernel, forward and,
    where autograd records, backward. Random numbers, buffers and arguments are left as they would be without.
    Applies to the whole process while it is open, also for code that runs in other threads; compiled code
    is not watched.

    Args:
        first: The first calls of each kernel, layer and device that are compared.
        every: After that, one call in so many; 0 for none.
        action: The reaction to a disagreement: `"warn"` (once for each kernel, layer and device), `"quarantine"`
            (that, the kernel is out from then on, and the call gets the reference's answer where that is safe), or
            `"raise"`.

    Raises:
        ArgumentError: For a negative number, or an unknown action.
        ArgumentTypeError: For anything of the wrong type.

    Example:
        >>> with canary(first=1, every=0, action="raise"):
        ...     y = torch.nn.Identity()(torch.ones(1))
    """

    def __init__(self, first: int = 3, every: int = 100, action: str = "quarantine", *, outliers: bool = True) -> None:
        """Check the settings; nothing changes before the block is entered."""
        from .settings import Settings

        self.settings = Settings(first, every, action, outliers)

    def __enter__(self) -> canary:
        """Compare from the next call on; the innermost canary applies."""
        from .watch import start_over

        with _lock:
            _open.append(self)
        start_over()
        forget()
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            if self not in _open:
                raise ScopeError("This canary is not open: leave it once for each time that it is entered.")
            _open.reverse()
            _open.remove(self)
            _open.reverse()
        forget()


_open: list[canary] = []


def active_settings() -> Settings | None:
    """Return the settings that apply now: those of the innermost canary, of `KERNELS_CANARY`, or of the file."""
    from .settings import settings_of_environment

    with _lock:
        if _open:
            return _open[-1].settings
    return settings_of_environment()


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `canary` in the configuration file."""
    from .settings import parse_settings

    return {"canary": parse_settings}


@hookimpl
def kernels_settings_in_code() -> Mapping[str, str]:
    """Show the settings of the innermost block."""
    with _lock:
        shown = vars(_open[-1].settings) if _open else {}
    return {"canary": ", ".join(f"{name}={value}" for name, value in shown.items())} if shown else {}


@hookimpl
def kernels_wrap_forward(resolution: Resolution) -> Callable[[Forward], Forward] | None:
    """Compare the calls of kernels, while a canary is open."""
    settings = active_settings() if not resolution.is_reference else None
    if settings is None:
        return None
    from .watch import watched  # what compares is imported where it is used

    return lambda forward: watched(resolution, forward, settings)


set_module("kernels_plugins", globals())
