"""Where reports of probes are kept: in memory, and in a file for each kernel, version of PyTorch, and device."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels_core import Layer, device_capability

from ..files import write_file
from .code_digest import digest_of, is_filled, unwrapped
from .probe import Probe, ProbeReport

FORMAT = 1
_HERE = "here-"
"""Prefix of keys that are valid in this process only."""

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
    here = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()  # it may be about another machine
    name = torch.cuda.get_device_name(device) if here else device.type
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
    cells = getattr(unwrapped(function), "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells if is_filled(cell)]
    return not any(isinstance(value, dict | list | set | torch.Tensor | functools.partial) for value in values)


def _number(function: Callable[..., Any]) -> int:
    """Return the number of a function in this process, which no other one gets, also not after its end."""
    inner = unwrapped(function)
    with _lock:
        try:
            return _numbers.setdefault(inner, next(_count))
        except TypeError:  # it takes no weak reference, or has no hash: it is kept, so that its id stays its own
            return -_kept.setdefault(id(inner), (inner, id(inner)))[1]


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
