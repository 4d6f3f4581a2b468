"""The environment variables that the core obeys, read when they are needed; the configuration file where unset."""

from __future__ import annotations

import os

from .errors import ArgumentError, require_type
from .settings.reader import words_of

_SWITCH = {
    "": False,
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def setting(name: str) -> bool | str:
    """Return whether an environment variable is on or off, or its text where that is neither.

    `1`, `true`, `yes` and `on` are on; `0`, `false`, `no`, `off`, empty and unset are off; in any case.

    Args:
        name: The variable.

    Example:
        >>> setting("ACME_TUNING")
        False
    """
    if not isinstance(name, str):
        require_type(name, str, "The name of a variable")
    try:
        text = os.environ.get(name, "").strip()
    except ValueError as error:  # the system cannot write it
        raise ArgumentError(f"{name!r} is no name of a variable: {error}.") from error
    return _SWITCH.get(text.lower(), text)  # read each time: tests and users change it while a program runs


def switch(name: str) -> bool:
    """Return whether an environment variable is on, by the words that `setting` knows.

    Args:
        name: The variable.

    Raises:
        ArgumentError: If its text is neither on nor off.

    Example:
        >>> switch("ACME_TUNING")
        False
    """
    value = setting(name)
    if isinstance(value, str):
        raise ArgumentError(
            f"{name}={value!r} is neither on nor off: set it to 1, true or yes, to 0, false or no, or unset it."
        )
    return value


def strict() -> bool:
    """Return whether `KERNELS_STRICT` asks for an error where a warning would do.

    Raises:
        ArgumentError: If its text is neither on nor off.

    Example:
        >>> strict()
        False
    """
    return switch("KERNELS_STRICT")


def mapping_disabled() -> bool:
    """Return whether `DISABLE_KERNEL_MAPPING` asks for the reference everywhere."""
    return switch("DISABLE_KERNEL_MAPPING")


def plugin_choice() -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the plugins that `KERNELS_PLUGINS`, or the setting `plugins`, allows (None: all), and those it blocks.

    `KERNELS_PLUGINS=a,b` allows only a and b; `KERNELS_PLUGINS=-c` blocks c.
    """
    chosen, _ = words("KERNELS_PLUGINS", "plugins")
    blocked = frozenset(word[1:].strip() for word in chosen if word.startswith("-"))
    allowed = frozenset(word for word in chosen if not word.startswith("-"))
    return allowed or None, blocked


def words(variable: str, key: str) -> tuple[tuple[str, ...], str]:
    """Return the words of a variable, or of a setting in the configuration file if it is not set, and which it is."""
    if (text := os.environ.get(variable)) is None:
        return words_of(key)
    return tuple(word.strip() for word in text.split(",") if word.strip()), variable
