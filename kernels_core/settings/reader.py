"""Settings of this process: read when they are first needed, and checked as a whole before any of them applies."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..raised import error_text
from .file import find_settings
from .section import ConfigSection

Parse = Callable[[ConfigSection], object]


def _path(section: ConfigSection) -> Path:
    """Return a path; one that is not absolute is below the folder of the file."""
    return section.path.parent / os.path.expanduser(section.as_text())


def _globs(section: ConfigSection) -> tuple[str, ...]:
    for item in section.as_list():
        if "://" in item.as_text():
            raise item.error("kernels have names, not addresses: write 'owner/name*' for those of a repository.")
    return section.as_texts()


_CORE: dict[str, Parse] = {
    "deny": _globs,
    "require-plugins": ConfigSection.as_texts,
    "plugins": ConfigSection.as_texts,
    "choice": _path,
    "decisions": _path,
}
"""The settings that the core checks; `environment.py` reads the first three."""

OWNERS = {
    **dict.fromkeys(_CORE, ""),
    **{"mapping": "mapping", "packs": "adopt", "adoption": "adopt"},
    **dict.fromkeys(("trusted", "signatures", "signers", "trusted-root"), "hub"),
    **{"canary": "canary", "numerics": "numerics", "observers": "observe"},
}
"""The plugin that checks a setting. Other plugins have a table of their own: so a setting whose plugin is blocked is
known from one that is misspelled, and no plugin can take the setting of another."""


@dataclass
class Settings:
    """The settings of the file, and its problems: with any, none of the settings applies."""

    root: ConfigSection | None = None
    core: dict[str, ConfigSection] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    problems: list[ConfigurationError] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """The settings whose plugin is not loaded, and that plugin."""


@dataclass
class _Known:
    """The settings as they were read, and as the plugins of a manager have checked them.

    `forget_settings` makes another one: a thread that reads meanwhile fills this one, which no other thread looks at.
    Two threads may both read the file. That is harmless, where a lock would not be: checks may import modules.
    """

    read: Settings | None = None
    checked: Settings | None = None
    by: object = None
    nothing: bool = False
    """Whether there is no file, as nearly always: decisions look at this, and call nothing."""


known = _Known()
_checking: ContextVar[bool] = ContextVar("kernels_core.settings", default=False)
"""Whether this thread or task checks the settings: a plugin may ask for one meanwhile."""


def forget_settings() -> None:
    """Read the file again when a setting is next needed; another one, if the working directory has changed."""
    global known
    known = _Known()


def _read(into: _Known) -> Settings:
    """Return the settings as the file has them, with those of the core that are right by themselves."""
    if (settings := into.read) is None:
        settings = Settings()
        try:
            settings.root = find_settings()
            table = settings.root.as_table() if settings.root is not None else {}
        except ConfigurationError as error:
            settings, table = Settings(problems=[error]), {}
        for key in _CORE.keys() & table.keys():
            with contextlib.suppress(ConfigurationError):  # `checked` reports it
                _CORE[key](table[key])
                settings.core[key] = table[key]
        into.read = settings
        into.nothing = settings.root is None and not settings.problems
    return settings


def words_of(key: str) -> tuple[tuple[str, ...], str]:
    """Return the words of a setting of the core, and the place where it stands; nothing if it is not set."""
    section = _read(known).core.get(key)
    return (section.as_texts(), section.place) if section is not None else ((), "")


def checked(manager: Any) -> Settings:
    """Return the settings, checked by the plugins of a manager."""
    into = known
    settings = _read(into)
    if settings.root is None:
        return settings
    by = (manager, manager.generation)
    if into.checked is not None and into.by == by:
        return into.checked
    if _checking.get():
        return Settings()
    token = _checking.set(True)
    try:
        made = Settings(settings.root, settings.core)
        made.problems = list(_problems(made, manager))
    finally:
        _checking.reset(token)
    if made.problems:
        made.values = {}
    into.checked, into.by = made, by
    return made


def _problems(settings: Settings, manager: Any) -> Iterator[ConfigurationError]:
    """Check each setting: yield those that cannot be used, and keep the values of the others."""
    assert settings.root is not None
    parsers: dict[str, tuple[str, Parse]] = {key: ("", parse) for key, parse in _CORE.items()}
    try:
        table = settings.root.as_table()
        theirs = table.pop("plugin").as_table() if "plugin" in table else {}
        for plugin, section in theirs.items():
            table.update({f"plugin.{plugin}.{key}": value for key, value in section.as_table().items()})
    except ConfigurationError as error:
        yield error
        return
    if table.keys() - _CORE.keys():
        offers: list[tuple[str, Mapping[str, Parse]]] = manager.hook.kernels_configuration()
        for plugin, offered in offers:
            for key, parse in offered.items():
                own = key if OWNERS.get(key) == plugin else f"plugin.{plugin}.{key}"
                parsers.setdefault(own, (plugin, parse))
    for name, section in table.items():
        owner = name.split(".")[1] if name.startswith("plugin.") else OWNERS.get(name)
        if name in parsers:
            plugin, parse = parsers[name]
            try:
                with section.blamed():
                    settings.values[name] = parse(section)
            except ConfigurationError as error:
                yield error
            except Exception as error:  # of a plugin: the setting may be at fault, or the plugin
                yield section.error(f"plugin {plugin!r} cannot read it: {error_text(error)}.")
        elif owner is not None and (name in OWNERS or not manager.allows(owner)):
            settings.left_out[name] = owner
        else:
            known = [*OWNERS, *parsers]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(dict.fromkeys(known))}."
            if owner is not None:
                hint = f"is the plugin {owner!r} installed, and has it such a setting? Correct or delete it."
            yield section.error(f"there is no such setting: {hint}")
