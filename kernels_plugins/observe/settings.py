"""Which observers `KERNELS_OBSERVE` switches on."""

from __future__ import annotations

import os

from kernels_core import ArgumentError, setting

VARIABLE = "KERNELS_OBSERVE"
NAMES = ("log", "ranges", "prometheus")


def observed() -> tuple[str, ...]:
    """Return the names that `KERNELS_OBSERVE` says, each once; none if it is not set, or off.

    Raises:
        ArgumentError: If it says a name that there is not.

    Example:
        >>> observed()
        ()
    """
    if setting(VARIABLE) is False:
        return ()
    text = os.environ[VARIABLE].strip()
    said = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in dict.fromkeys(said) if word not in NAMES]
    if unknown:
        raise ArgumentError(
            f"{VARIABLE}={text!r}: there is no {', '.join(map(repr, unknown))}. Write any of {', '.join(NAMES)}, with "
            "commas between them, or unset it."
        )
    return tuple(name for name in NAMES if name in said)
