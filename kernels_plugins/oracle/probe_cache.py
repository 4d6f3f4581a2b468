"""Where reports of probes are kept: in memory, and in a file for each kernel, version of PyTorch, and device."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import os
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels_core import Layer, device_capability, source_label

from ..files import write_file
from .probe import Probe, ProbeReport

FORMAT = 1
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40,64})/")
_HERE = "here-"
"""Prefix of keys that are valid in this process only."""

_SIMPLE = (str, bytes, int, float, bool, type(None), torch.dtype)

_lock = threading.Lock()
_count = itertools.count()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_kept: dict[int, tuple[Any, int]] = {}
_known: dict[str, ProbeReport | None] = {}


def find(key: str) -> ProbeReport | None:
    """Return the report under a key, None if there is none; a file is looked for once."""
    with _lock:
        if key not in _known:
            _known[key] = _read(folder() / f"{key}.json") if not key.startswith(_HERE) else None
        return _known[key]


def keep(key: str, report: ProbeReport) -> None:
    """Remember a report, also for other processes where that is possible."""
    with _lock:
        _known[key] = report
    if key.startswith(_HERE):
        return
    with contextlib.suppress(OSError):  # a cache may be read-only: it is probed again then
        write_file(folder() / f"{key}.json", json.dumps({"format": FORMAT, **asdict(report)}, indent=2))


def key_of(layer: Layer, implementation: Callable[..., Any], device: torch.device) -> str:
    """Return the key of a kernel: its code, that of the reference, the version of PyTorch, and the kind of device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    digests = [digest_of(implementation), digest_of(layer.reference)]
    parts = [*digests, torch.__version__, name, device_capability(device)]
    key = hashlib.sha256(json.dumps([FORMAT, *map(str, parts)]).encode()).hexdigest()
    if None not in digests and all(map(_is_told, (implementation, layer.reference))):
        return key
    # Code of which no file is known, and code around a dict or another object, is told apart by its identity: two
    # kernels must not share a report.
    return f"{_HERE}{_number(implementation)}-{_number(layer.reference)}-{key}"


def _is_told(function: Callable[..., Any]) -> bool:
    """Whether a digest tells a function apart from others of the same code, around other values."""
    inner: Any = inspect.unwrap(function)
    cells = getattr(getattr(inner, "__func__", inner), "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells if _is_filled(cell)]
    return not any(isinstance(value, dict | list | set | torch.Tensor | functools.partial) for value in values)


def _number(function: Callable[..., Any]) -> int:
    """Return the number of a function in this process, which no other one gets, also not after its end."""
    inner: Any = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    with _lock:
        try:
            return _numbers.setdefault(inner, next(_count))
        except TypeError:  # it takes no weak reference, or has no hash: it is kept, so that its id stays its own
            return -_kept.setdefault(id(inner), (inner, id(inner)))[1]


def digest_of(function: Callable[..., Any]) -> str | None:
    """Return a digest of a function: its file, code, defaults and closure; None if there is no file.

    A file from the Hub has its commit in its path, which identifies all files beside it, too.
    """
    inner: Any = inspect.unwrap(function)  # wrappers of plugins are no part of the kernel
    inner = getattr(inner, "__func__", inner)
    code = getattr(inner, "__code__", None)
    if code is None:
        return None
    digest = hashlib.sha256(source_label(inner).encode())
    if commit := _COMMIT.search(code.co_filename.replace(os.sep, "/")):
        digest.update(commit[1].encode())
    try:
        digest.update(Path(code.co_filename).read_bytes())
    except OSError:  # written at a prompt, or generated
        return None
    values = [*(inner.__defaults__ or ()), *(inner.__kwdefaults__ or {}).values()]
    values += [cell.cell_contents for cell in inner.__closure__ or () if _is_filled(cell)]
    digest.update(repr([_text(code), *map(_text, values)]).encode())
    return digest.hexdigest()


def _text(value: object) -> str:
    """Return a text for a value that is the same in every process."""
    if inspect.iscode(value):
        return f"{value.co_code.hex()} {value.co_names} {[_text(const) for const in value.co_consts]}"
    if isinstance(value, tuple):  # a mutable value may differ at every call
        return str([_text(item) for item in value])
    code = getattr(value, "__code__", None)
    return _text(code) if code is not None else repr(value) if isinstance(value, _SIMPLE) else source_label(type(value))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def folder() -> Path:
    """Return the folder of the files: beside the cache of the Hub's client, if a variable names one."""
    chosen = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(chosen or Path.home() / ".cache")) / "kernels-core" / "probes"


def _read(path: Path) -> ProbeReport | None:
    """Read a report; one that cannot be read or parsed is ignored, and will be written anew."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        data = json.loads(path.read_text())
        if data.pop("format") == FORMAT:
            probes = {str(name): Probe(**value) for name, value in data.pop("probes").items()}
            return ProbeReport(**data, probes=probes)
    return None
