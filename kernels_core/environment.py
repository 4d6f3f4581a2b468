"""The environment variables that the core obeys, read when they are needed."""

from __future__ import annotations

import os

from .errors import ArgumentError

_SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def switch(name: str) -> bool:
    """Return whether the environment variable `name` is switched on; unset or empty is off.

    Raises:
        ArgumentError: If the value is neither yes nor no.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        return False
    try:
        return _SWITCH[value.lower()]
    except KeyError:
        raise ArgumentError(
            f"{name}={value!r} is neither on nor off: set it to 1, true or yes, to 0, false or no, or unset it."
        ) from None


def strict() -> bool:
    """Return whether `KERNELS_STRICT` asks for an error where a warning would do.

    Raises:
        ArgumentError: If its value is neither yes nor no.

    Example:
        >>> strict()
        False
    """
    return switch("KERNELS_STRICT")


def mapping_disabled() -> bool:
    """Whether `DISABLE_KERNEL_MAPPING` asks for the reference everywhere."""
    return switch("DISABLE_KERNEL_MAPPING")


def plugin_choice() -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the plugins that `KERNELS_PLUGINS` allows (None: all) and those that it blocks.

    `KERNELS_PLUGINS=a,b` allows only a and b; `KERNELS_PLUGINS=-c` blocks c.
    """
    words = [word.strip() for word in os.environ.get("KERNELS_PLUGINS", "").split(",") if word.strip()]
    blocked = frozenset(word[1:].strip() for word in words if word.startswith("-"))
    allowed = frozenset(word for word in words if not word.startswith("-"))
    return allowed or None, blocked
