"""Where the code comes from that serves a layer: kernel, package, and the operators of PyTorch that others replace."""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from ..torch_internals import operator_registrations, python_operators
from .receipt_row import ReceiptRow


def provenance_of(row: ReceiptRow) -> dict[str, Any]:
    """Return what the loader of a kernel knows, else what the Python package says that the code is in.

    With `overrides`: the operators of PyTorch that Python code replaces on the device of the row, by name, and where.
    PyTorch does not tell which call took such an override: it may decline some, and pass them to its own operator.

    Args:
        row: The row; reads the metadata of installed packages.
    """
    found = dict(row.provenance) or package_of(row.implementation)
    overrides = {} if row.is_bypassed else replaced_operators(row.device.partition(":")[0])
    return {**found, "overrides": overrides} if overrides else found


def replaced_operators(device: str) -> dict[str, str]:
    """Return the operators of PyTorch that Python code replaces on a type of device, and the place of that code."""
    found = {}
    for entry in sorted(python_operators):
        name, _, key = entry.removeprefix("aten/").rpartition("/")
        if entry.startswith("aten/") and key.lower() in (device, f"autograd{device}"):
            place = re.search(rf"^{key}: registered at (.*?) ::", operator_registrations(f"aten::{name}"), re.MULTILINE)
            found[name] = ", ".join((*_languages(name), place[1] if place else "unknown"))
    return found


def _languages(operator: str) -> list[str]:
    """Return the languages in which PyTorch itself brings a replacement, such as Triton, which are not switched off."""
    try:
        native: Any = importlib.import_module("torch.backends.python_native")  # older versions of PyTorch have none
    except ImportError:
        return []
    return [
        language
        for language in native.all_dsls
        if operator in native.get_dsl_operations(language) and not native.is_dsl_disabled(language)
    ]


def package_of(implementation: str) -> dict[str, str]:
    """Return name, version, publisher and license of the installed package that a function is in; empty if in none."""
    return _described(implementation.partition(".")[0])


@functools.cache
def _packages() -> dict[str, list[str]]:
    import importlib_metadata  # reads the lists of files of all packages: a third of a second

    return dict(importlib_metadata.packages_distributions())


@functools.cache
def _described(module: str) -> dict[str, str]:
    import importlib_metadata

    name = next(iter(_packages().get(module, ())), None)
    if name is None:
        return {}
    metadata = importlib_metadata.metadata(name)

    def first(*keys: str) -> str:
        return next((text for key in keys if (text := str(metadata.get(key) or "").strip())), "")

    license_line = first("License-Expression", "License").partition("\n")[0]  # some have its whole text there
    author = first("Author", "Maintainer", "Author-email", "Maintainer-email")
    return {
        "name": module,
        "version": first("Version"),
        "package": name,
        "publisher": author,
        "license": license_line,
    }
