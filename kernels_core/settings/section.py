"""`ConfigSection`: a value of the configuration file that knows its line, read as the type that a setting has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, KernelsError
from .lines import find_line

_KINDS = {dict: "a table", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True, eq=False)
class ConfigSection:
    """A value of the configuration file, with its place.

    Attributes:
        path: The file.
        keys: The way to the value, without `tool.kernels-core`.
        value: The value as TOML has it: texts, numbers, lists, dictionaries.

    Example:
        >>> def parse(section):
        ...     return {name: level.as_number() for name, level in section.as_table().items()}
        >>> parse(ConfigSection(Path("kernels.toml"), ("levels",), {"fast": 3}))
        {'fast': 3}
    """

    path: Path
    keys: tuple[str | int, ...]
    value: Any
    text: str = field(default="", repr=False)
    """The whole file."""
    above: tuple[str, ...] = field(default=(), repr=False)
    """The tables around the settings: `tool` and `kernels-core` in `pyproject.toml`."""

    @functools.cached_property
    def line(self) -> int:
        """The line, counted from 1."""
        return find_line(self.text, (*self.above, *self.keys), self.value)

    @property
    def place(self) -> str:
        """The file and the line, such as `/home/me/kernels.toml:3`."""
        return f"{self.path}:{self.line}"

    @property
    def name(self) -> str:
        """The way to the value as text, such as `packs.RMSNorm[2]`."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys)[1:]

    def is_in(self, name: str) -> bool:
        """Whether this is a setting of that name, or inside of it."""
        return f"{self.name}.".startswith((f"{name}.", f"{name}["))

    def error(self, problem: str) -> ConfigurationError:
        """Return the error of this value, with file and line."""
        subject = f"{self.name}: " if self.keys else ""
        return ConfigurationError(f"{self.place}: {subject}{problem}", file=str(self.path), line=self.line)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Raise errors of ours from inside of the block with file and line."""
        try:
            yield
        except ConfigurationError:
            raise
        except KernelsError as error:
            raise self.error(str(error)) from error

    def as_table(self, allowed: Collection[str] | None = None) -> dict[str, ConfigSection]:
        """Return the values of a table.

        Args:
            allowed: The keys that it may have; None for any.

        Raises:
            ConfigurationError: If it is no table, or has another key.
        """
        table = {key: self._inner(key, value) for key, value in self._as(dict).items()}
        if allowed is not None:
            for key in (key for key in table if key not in allowed):
                raise table[key].error(f"there is no such setting: write any of {', '.join(sorted(allowed))}.")
        return table

    def as_list(self) -> list[ConfigSection]:
        """Return the items of a list; raise `ConfigurationError` if it is none."""
        return [self._inner(index, item) for index, item in enumerate(self._as(list))]

    def as_text(self) -> str:
        """Return a text that is not empty and has no control characters; raise `ConfigurationError` if it is none."""
        text: str = self._as(str)
        if not text.strip() or not text.isprintable():
            raise self.error(f"{text!r} is empty or has control characters: write a word or a name.")
        return text.strip()

    def as_texts(self) -> tuple[str, ...]:
        """Return the texts of a list; raise `ConfigurationError` if it is none, or has something else."""
        return tuple(item.as_text() for item in self.as_list())

    def as_number(self) -> int:
        """Return a whole number; raise `ConfigurationError` if it is none."""
        return int(self._as(int))

    def _as(self, kind: type) -> Any:
        if type(self.value) is not kind:  # True is an int, too
            shown = repr(self.value) if len(repr(self.value)) <= 100 else _KINDS.get(type(self.value), "that")
            raise self.error(f"write {_KINDS[kind]}, not {shown}.")
        return self.value

    def _inner(self, key: str | int, value: Any) -> ConfigSection:
        return ConfigSection(self.path, (*self.keys, key), value, self.text, self.above)
