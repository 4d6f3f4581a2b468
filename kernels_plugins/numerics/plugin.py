"""Plugin `numerics`: kernels serve only with the properties of numbers that are required.

While nothing is required and nothing was found out, no file is read and no forward is wrapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from kernels_core import (
    NUMERICS,
    ArgumentError,
    ConfigSection,
    LayerRequest,
    Numeric,
    Resolution,
    Scope,
    WantedNumerics,
    configured,
    forget,
    hookimpl,
    plugin_manager,
    set_module,
    warn_once,
)

from .wanted import found_out, registered, wanted

_lock = threading.Lock()


class numerics(Scope):  # noqa: N801 - a context manager that reads like a statement
    """Let only kernels serve whose numbers have some properties, which are found out bit by bit.

    A kernel is judged at its first eager call of each kind (dtype, dimensions and last size of each tensor, whether
    the module trains), on copies. One that lacks a property is refused, with the smallest input that was found to show
    it, and the next candidate is judged; so is the reference, where it serves: one that lacks it, too, is a warning,
    and an error in strict mode. Compiled calls are served by kernels that are known to have the properties. Applies to
    the thread or asyncio task that enters it.

    Args:
        *names: `"deterministic"`, `"batch_invariant"`, `"recompute_equal"`: see `NUMERICS`.

    Raises:
        ArgumentError: For an unknown name, or none.
        ArgumentTypeError: For a name that is no text.

    Example:
        >>> @use_kernel_forward_from_hub("Double")
        ... def double(x):
        ...     return x + x
        >>> def kernel(x):
        ...     return 2 * x if len(x) > 64 else x + x + 1e-7
        >>> with use_kernel_mapping({"Double": {"cpu": kernel}}), numerics("batch_invariant"):
        ...     y = double(torch.ones(2, 8))
        ...     resolve(double, device="cpu", mode=Mode.INFERENCE).origin
        'reference'
    """

    def __init__(self, *names: Numeric) -> None:
        """Check the names; nothing changes before the block is entered."""
        super().__init__(WantedNumerics(_checked(names, "numerics")))


def register_numerics(*names: Numeric) -> None:
    """Require properties of all kernels of this process, from now on, as `numerics` does in a block.

    Args:
        *names: As for `numerics`; without any, nothing is required any more, but by blocks and the configuration file.

    Raises:
        ArgumentError: For an unknown name. Nothing changes then.
        ArgumentTypeError: For a name that is no text.

    Example:
        >>> register_numerics("deterministic", "batch_invariant")
        >>> register_numerics()
    """
    found = _checked(names, "register_numerics") if names else ()
    with _lock:
        registered[:] = found
    forget()


def _checked(names: Sequence[str], where: str) -> tuple[Numeric, ...]:
    from .properties import check_names

    if not names:
        raise ArgumentError(f"{where} names no property: there are {', '.join(NUMERICS)}.")
    found = check_names(names, where)
    if "numerics" not in plugin_manager().plugins():
        warn_once("The plugin numerics is blocked by KERNELS_PLUGINS or a configuration file: it refuses no kernel.")
    return found


# --- Hooks -----------------------------------------------------------------------------------------


@hookimpl
def kernels_configuration() -> Mapping[str, Callable[[ConfigSection], object]]:
    """Own `numerics` in the configuration file."""
    return {"numerics": lambda section: _checked(section.as_texts(), "numerics")}


@hookimpl
def kernels_settings_in_code() -> Mapping[str, str]:
    """Show the properties of `register_numerics`."""
    return {"numerics": ", ".join(registered)} if registered else {}


@hookimpl(tryfirst=True)
def kernels_resolve_forward(request: LayerRequest) -> Resolution | None:
    """Register the hooks that judge kernels where the first property is required or was found out, and ask again."""
    if not (request.scopes or registered or found_out or configured("numerics") is not None):
        return None  # at the price of no further call
    from . import judging

    manager = plugin_manager()
    if judging.NAME in manager.plugins() or not (wanted(request, also_found=True) or found_out):
        return None
    manager.register(judging, judging.NAME)
    answer: Resolution | None = manager.hook.kernels_resolve_forward(request=request)
    return answer


set_module("kernels_plugins", globals())
