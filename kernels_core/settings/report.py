"""`configured`, which reads a setting; and `configuration`, which shows all of them with the place of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import require_type
from ..guards.quarantine import quarantined
from ..plugins import plugin_manager
from ..table import Table, TableRow, Tabular, as_json, visible
from . import reader
from .section import ConfigSection

_VARIABLES = {
    "plugins": "KERNELS_PLUGINS",
    "require-plugins": "KERNELS_REQUIRE_PLUGINS",
    "deny": "KERNELS_DENY",
    "choice": "KERNELS_CHOICE",
    "decisions": "KERNELS_DECISIONS",
    "canary": "KERNELS_CANARY",
    "observers": "KERNELS_OBSERVE",
    "signatures": "KERNELS_SIGNATURES",
}
"""The variable that wins over a setting."""

_FILES = ("choice", "decisions", "trusted-root")
"""Settings that name a file."""

_MORE = ("DISABLE_KERNEL_MAPPING", "LOCAL_KERNELS")
"""Variables that are listed besides those that begin with `KERNELS_`."""


def configured(key: str) -> Any:
    """Return a setting of the configuration file, as its plugin has checked it.

    Reads the file at the first call and after `forget()`; all other calls cost a look into a dictionary. A variable or
    an argument that wins over the setting is for the caller to look at.

    Args:
        key: Such as `"choice"`; a plugin named `acme` has `"plugin.acme.KEY"`.

    Returns:
        The value: of `choice`, a `Path`, of those of plugins, what these make of it. None if it is not set, or nothing
        of the file applies, or its plugin is not loaded.

    Example:
        >>> configured("choice") is None
        True
    """
    if reader.known.nothing:
        return None
    require_type(key, str, "key")
    return plugin_manager().settings().values.get(key)


@dataclass(frozen=True)
class SettingRow:
    """A setting that applies.

    Attributes:
        name: Its key, such as `mapping.RMSNorm.cuda`; or the name of a variable.
        value: Its value, or the reason why it does not apply.
        source: `/path/to/kernels.toml:3`, `environment`, `code`, or `default`.
    """

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Configuration(Tabular):
    """The settings of this process, and the problems of its configuration file; `configuration()` returns it.

    Attributes:
        file: The file; None if there is none.
        settings: The settings that apply; none of the file where it has problems.
        problems: The problems of the file, each with its line.
        missing: Files that settings name and that are not there; all other settings apply.
    """

    file: str | None
    settings: tuple[SettingRow, ...]
    problems: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def as_table(self) -> Table:
        """Return the table that shows it: the path stands above, and places in it are lines."""
        rows = [TableRow((row.name, row.value, row.source.replace(f"{self.file}:", "line "))) for row in self.settings]
        heading = ["Nothing of the file applies, and no kernel serves:"] if self.problems else []
        problems = "\n".join([*heading, *self.problems, *self.missing])
        return Table(("setting", "value", "from"), rows, self.file or "No file", problems)

    def to_json(self) -> str:
        """Return it as JSON."""
        return as_json(vars(self))


def configuration() -> Configuration:
    """Return every setting of this process, its value, and the place where it is set.

    Returns:
        The settings, as a table that can be printed; `problems` has those of the configuration file.

    Example:
        >>> print(configuration())
        No file
        setting          value    from
        adoption         not set  default
        ...
    """
    settings = plugin_manager().settings()
    applies = settings.root is not None and not settings.problems
    table = settings.root.as_table() if settings.root is not None and applies else {}
    in_code = _in_code()
    rows: list[SettingRow] = []
    for name in sorted({*reader.OWNERS, *table, *in_code}):
        if _VARIABLES.get(name, "") in os.environ:
            over = f", over line {table[name].line}" if name in table else ""
            rows.append(SettingRow(name, os.environ[_VARIABLES[name]], f"environment{over}"))
        elif name in table:
            for leaf in _leaves(table[name]):
                plugin = next((settings.left_out[key] for key in settings.left_out if leaf.is_in(key)), None)
                value = _shown(leaf.value) if plugin is None else f"not used: plugin {plugin!r} is not loaded"
                rows.append(SettingRow(leaf.name, value, leaf.place))
        elif name not in in_code:
            rows.append(SettingRow(name, "not set", "default"))
        if name in in_code:
            rows.append(SettingRow(name, in_code[name], "code"))
    rows += [
        SettingRow(name, value, "environment")
        for name, value in sorted(os.environ.items())
        if name in _MORE or (name.startswith("KERNELS_") and name not in _VARIABLES.values())
    ]
    path = settings.root.path if settings.root is not None else None
    file = settings.problems[0].file if settings.problems else path
    clean = [replace(row, value=visible(row.value)) for row in rows]  # people paste its JSON into issues: no passwords
    missing = (
        f"{row.source}: {row.name} is {row.value}: there is no such file."
        for row in clean
        if row.name in _FILES and row.source != "default" and not _is_file(row, path)
    )
    problems = tuple(map(str, settings.problems))
    return Configuration(str(file) if file is not None else None, tuple(clean), problems, tuple(missing))


def _in_code() -> dict[str, str]:
    """Return the settings that code has made, by their names in the file."""
    globs = ", ".join(entry.kernel for entry in quarantined() if not entry.layer)
    found = {"deny": globs} if globs else {}
    for plugin, made in plugin_manager().hook.kernels_settings_in_code():
        for key, value in made.items():
            own = reader.OWNERS.get(key) == plugin or (plugin, key) == ("choice", "choice")
            found[key if own else f"plugin.{plugin}.{key}"] = str(value)
    return found


def _is_file(row: SettingRow, file: Path | None) -> bool:
    """Whether a path is that of a file, or empty, which is no path; a path in a file is below its folder."""
    if not row.value or row.value.startswith("not used:"):
        return True
    path = Path(os.path.expanduser(row.value))
    return (path if row.source.startswith("environment") or file is None else file.parent / path).is_file()


def _leaves(section: ConfigSection) -> Iterator[ConfigSection]:
    """Yield the values of a table and of the tables in it, but for the tables that are one value."""
    if isinstance(section.value, dict) and section.value and "source" not in section.value:
        for inner in section.as_table().values():
            yield from _leaves(inner)
    else:
        yield section


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
