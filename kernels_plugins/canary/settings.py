"""The settings of a canary, from code, from `KERNELS_CANARY`, or from the configuration file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

from kernels_core import ArgumentError, ArgumentTypeError, ConfigSection, configured, setting

VARIABLE = "KERNELS_CANARY"


@dataclass(frozen=True)
class Settings:
    """The calls to compare, and the reaction to a disagreement: see `canary`."""

    first: int = 3
    every: int = 100
    action: str = "quarantine"
    outliers: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"{name} is a number of calls such as 3, not {value!r}.")
            if value < 0:
                raise ArgumentError(f"{name} is {value}: a number of calls is 0 or more.")
        if self.action not in ("warn", "quarantine", "raise"):
            raise ArgumentError(f"action is {self.action!r}: use one of warn, quarantine, raise.")
        if not isinstance(self.outliers, bool):
            raise ArgumentTypeError(f"outliers is True or False, not {self.outliers!r}.")

    def wants(self, number: int) -> bool:
        """Whether the call of that number, counted from 1, is to be compared, whatever its inputs are.

        Example:
            >>> [n for n in range(1, 12) if Settings(first=2, every=5).wants(n)]
            [1, 2, 5, 10]
        """
        return number <= self.first or (self.every > 0 and number % self.every == 0)


def parse_settings(section: ConfigSection) -> Settings | None:
    """Parse `canary` of a configuration file: a table with any of the settings, or whether a canary is open."""
    if isinstance(section.value, bool):
        return Settings() if section.value else None
    found: dict[str, Any] = {}
    for name, each in section.as_table(get_type_hints(Settings)).items():
        with each.blamed():
            Settings(**{**found, name: each.value})
        found[name] = each.value
    return Settings(**found)


def settings_of_environment() -> Settings | None:
    """Return the settings in `KERNELS_CANARY`, or in the configuration file; None if it is off.

    Raises:
        ArgumentError: If the variable cannot be understood.
    """
    if VARIABLE not in os.environ:
        return cast("Settings | None", configured("canary"))
    text = setting(VARIABLE)
    if isinstance(text, bool):
        return Settings() if text else None
    hint = f"write {VARIABLE}='first=3,every=100,action=raise', any of them, or {VARIABLE}=1."
    kinds = get_type_hints(Settings)
    kinds["outliers"] = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}.__getitem__
    found: dict[str, int | str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in kinds:
            raise ArgumentError(f"{VARIABLE}={text!r}: {part.strip()!r} is not understood: {hint}")
        try:
            found[name] = kinds[name](value)
        except (ValueError, KeyError) as error:
            kind = "a number" if isinstance(error, ValueError) else "1 or 0"
            raise ArgumentError(f"{VARIABLE}={text!r}: {name} is {value!r}, not {kind}: {hint}") from None
    try:
        return Settings(**found)  # type: ignore[arg-type]
    except ArgumentError as error:
        raise ArgumentError(f"{VARIABLE}={text!r}: {error}") from None
