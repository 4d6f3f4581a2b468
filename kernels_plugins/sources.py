"""Sources of kernels that are written as text, in Python or in a configuration file."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels_core import ArgumentError, ConfigSection, LoadedLayer, LoadError, Mode, Reference, error_text, source_label

_OPTIONS = {"version", "revision", "trust_remote_code"}
_PYTHON = re.compile(r"python:([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
"""The text of an object in a Python module."""


def parse_text(text: str, options: Mapping[str, Any], where: str, layer_name: str, folder: Path) -> object:
    """Return the source that a text names; `where` is its place in a mapping, and paths are relative to `folder`."""
    if not options and text == "reference":
        return Reference
    if not options and text.startswith("pack:"):
        from .packs.source import as_pack  # only for mappings that name a pack

        return as_pack(text, where, layer_name)
    if not options and text.startswith("python:"):
        return PythonObject.parse(text, f"In the mapping of {where}: ")
    return _repository(text, options, where, folder)


@dataclass(frozen=True)
class PythonObject:
    """An object in a module on the path of Python, `"python:package.module:Name"`; imported when it is needed."""

    module: str
    name: str

    @classmethod
    def parse(cls, text: str, before: str = "") -> PythonObject:
        """Parse such a text; raise `ArgumentError`, with a text before it, if it is none."""
        if (found := _PYTHON.fullmatch(text)) is None:
            raise ArgumentError(f"{before}{text!r} names no object: write 'python:package.module:Name'.")
        return cls(*found.groups())

    def find(self) -> object:
        """Import the object; raise `LoadError` if there is none."""
        try:
            return operator.attrgetter(self.name)(importlib.import_module(self.module))
        except (Exception, SystemExit) as error:
            raise LoadError(f"it cannot be imported: {error_text(error)}") from error

    def load(self) -> LoadedLayer:
        """Import the class or function; raise `LoadError` if it is none."""
        found = self.find()
        is_layer = issubclass(found, torch.nn.Module) if isinstance(found, type) else callable(found)
        if not is_layer or isinstance(found, torch.nn.Module):
            raise LoadError(f"{found!r} is neither a class of nn.Module nor a function")
        return LoadedLayer(found, source_label(found))  # type: ignore[arg-type]  # found by `callable`

    def __repr__(self) -> str:
        return f"python:{self.module}:{self.name}"


def _repository(text: str, options: Mapping[str, Any], where: str, folder: Path) -> object:
    place, colon, layer_name = text.rpartition(":")
    if not (colon and layer_name and "/" in place.replace("\\", "/")):
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} names no layer of a repository: write 'owner/name:Layer', "
            "'owner/name@revision:Layer', '/path/to/kernel:Layer' for a folder, 'python:package.module:Name', "
            "'pack:NAME' or 'reference'."
        )
    if unknown := sorted(set(options) - _OPTIONS, key=str):
        raise ArgumentError(
            f"In the mapping of {where}: {text!r} has unknown options {', '.join(map(repr, unknown))}: there are "
            f"{', '.join(sorted(_OPTIONS))}."
        )
    from .hub.source import LayerRepository, LocalLayerRepository  # only for mappings that name the Hub in text

    repo_id, at, revision = place.partition("@")
    if place.startswith(("/", ".", "~")) or repo_id.count("/") != 1 or "\\" in place:
        try:
            return LocalLayerRepository(folder / Path(place).expanduser(), layer_name=layer_name)
        except RuntimeError as error:  # there is no such user
            raise ArgumentError(f"In the mapping of {where}: {text!r}: {error}") from error
    chosen = {name: value for name, value in options.items() if value is not None}
    if at:
        chosen["revision"] = revision
    if not chosen.keys() & {"version", "revision"}:
        chosen["version"] = 1  # as transformers has it
    return LayerRepository(repo_id, layer_name=layer_name, **chosen)


# --- In a configuration file -----------------------------------------------------------------------

_MODES = {
    **{str(mode.name).lower(): mode for mode in (Mode.FALLBACK, Mode.INFERENCE, Mode.TRAINING)},
    **{f"{str(mode.name).lower()}-compile": mode | Mode.TORCH_COMPILE for mode in (Mode.INFERENCE, Mode.TRAINING)},
}

Forms = list[tuple[ConfigSection, Any]]
"""The sources of an entry, each as a mapping in Python has it below the layer name."""


def read_entries(section: ConfigSection) -> Iterator[tuple[str, ConfigSection, Forms]]:
    """Yield each entry of a mapping, with its layer name: a source or several, for a device and a mode or for all."""
    for name, layer in section.as_table().items():
        for device, chosen in _inner(layer):
            for mode, leaf in _inner(chosen) if device is not None else [(None, chosen)]:
                if mode is not None and mode not in _MODES:
                    raise leaf.error(f"there is no such mode: write any of {', '.join(_MODES)}.")
                forms = []
                for item in leaf.as_list() if isinstance(leaf.value, list) else [leaf]:
                    form = _written(item) if mode is None else {_MODES[mode]: _written(item)}
                    forms.append((item, form if device is None else {device: form}))
                yield name, leaf, forms


def _inner(section: ConfigSection) -> list[tuple[str | None, ConfigSection]]:
    """Return the values for each device or mode; for a value that is for all of them, only that, with None."""
    is_source = not isinstance(section.value, dict) or "source" in section.value
    if section.value == {}:
        raise section.error('it names no source: write at least one, such as "reference".')
    return [(None, section)] if is_source else list(section.as_table().items())


def _written(section: ConfigSection) -> Any:
    """Return a source as it is written in Python: the table `{source = "...", version = 2}` as a pair."""
    if not isinstance(section.value, dict):
        return section.as_text()
    options = section.as_table(("source", "version", "revision", "trust_remote_code"))
    if "source" not in options:
        raise section.error('it has no source: write {source = "owner/name:Layer", version = 1}.')
    return options.pop("source").as_text(), {name: option.value for name, option in options.items()}
