"""What was found out about implementations: in memory, and in a file for each, as the reports of probes are kept."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernels_core import NUMERICS, Candidate, Layer, __version__
from kernels_core.replay import Call, leaves

from ..files import write_file
from ..oracle import probe_cache
from ..oracle.code_digest import attributes_read
from .invariance import BACKWARD, PASSED_ON, Judgement, joined
from .rows import ABOUT_THE_CALL
from .wanted import found_out

_FORMAT = f"4 {__version__}"  # another version may look closer
_SMALL = range(-4, 5)
_lock = threading.Lock()
_found: dict[str, dict[str, dict[str, Judgement]]] = {}


def kind_of(call: Call, implementation: Callable[..., Any]) -> str:
    """Return the kind of a call, for which a finding holds: dtype, number of dimensions and last size of each tensor.

    Also whether it is empty, flags, texts and small numbers among the arguments, and whether the module trains; and the
    numbers and texts in attributes of the module that the implementation reads.
    """
    texts = [_described(name, tensor) for name, tensor in call.inputs.items()]
    texts += map(repr, words_of((*call.args, *call.kwargs.items())))
    module = call.module
    if module is not None:
        texts += ["training"] * module.training
        texts += [f"{n} {'x'.join(map(str, p.shape))} {p.dtype}" for n, p in module.named_parameters()]
        texts += [f"{name}={value!r}" for name, value in attributes_read(implementation, module).items()]
    dtype = next((t.dtype for t in call.tensors.values() if t.is_floating_point()), None)
    device = next((t.device.type for t in call.tensors.values()), "cpu")
    if device != "meta" and torch.is_autocast_enabled(device):
        texts.append(f"autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}")
    return ", ".join([str(dtype).removeprefix("torch."), *texts])


def words_of(values: Iterable[Any]) -> list[tuple[int, str, Any]]:
    """Return flags, texts, dtypes and small numbers among arguments, by which kernels choose a way, with their places.

    A dimension is such a number, or a rate of 0. Others may be new each time, as a position or a step.
    """
    found = ((place, path, leaf) for place, value in enumerate(values) for path, leaf in leaves(value))
    return [
        each
        for each in found
        if isinstance(each[2], (str, torch.dtype)) or (isinstance(each[2], (int, float)) and each[2] in _SMALL)
    ]


def _described(name: str, tensor: torch.Tensor) -> str:
    odd = "" if tensor.numel() else " empty"
    odd += f" {type(tensor).__name__}" if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else ""
    return f"{name} {tensor.dim()}-D {'x'.join(map(str, tensor.shape[-1:]))} {tensor.dtype}{odd}"


def key_of(layer: Layer, implementation: Callable[..., Any], device: torch.device) -> str:
    """Return the key of an implementation: its code, that of the reference, PyTorch, and the kind of device."""
    return f"{probe_cache.key_of(layer, implementation, device)}-numerics"


def findings(key: str, kind: str, candidate: Candidate | None) -> dict[str, Judgement]:
    """Return the findings about an implementation for one kind of call, as a candidate offers it."""
    return _within(candidate, {**known(key).get(kind, {}), **known(_key_within(key, candidate)).get(kind, {})})


def _key_within(key: str, candidate: Candidate | None) -> str:
    """Return the key of the findings that hold only within the limit of a candidate.

    A measured choice keeps a kernel to some rows: without it, or with another one, the same code takes others.
    """
    limit = candidate.limit if candidate is not None else None
    return key if limit is None else f"here-{hash(limit)}-{key}"


def _within(candidate: Candidate | None, found: dict[str, Judgement]) -> dict[str, Judgement]:
    """Return findings about a kernel; of one that is kept to some calls, nothing can be known about its other rows."""
    if candidate is not None and candidate.record is not None:
        found.setdefault("batch_invariant", Judgement(None, PASSED_ON))
        if found["batch_invariant"].has:
            found["batch_invariant"] = Judgement(None, PASSED_ON)
    return found


def known(key: str) -> dict[str, dict[str, Judgement]]:
    """Return the findings about an implementation, by kind of call and name; the file is read once."""
    with _lock:
        if key not in _found:
            found_out[:] = [True]  # in place: the hooks have this list, and decisions ask whether it is empty
            _found[key] = _read(_path(key)) if not key.startswith("here-") else {}
        return _found[key]


def keep(key: str, kind: str, findings: Mapping[str, Judgement], candidate: Candidate | None = None) -> None:
    """Keep findings for one kind of call, also for other processes where that is possible."""
    within = _key_within(key, candidate)
    if within != key:
        limited = {name: one for name, one in findings.items() if one.why == PASSED_ON}
        keep(within, kind, limited)
        findings = {name: one for name, one in findings.items() if name not in limited}
    kinds = known(key)
    with _lock:
        kinds[kind] = {**kinds.get(kind, {}), **findings}
        # What could not be found out is tried again by the next process: memory may have been short in this one.
        data = {
            one: {n: [f.has, f.why, f.every] for n, f in names.items() if f.has is not None}
            for one, names in kinds.items()
        }
    if not key.startswith("here-"):
        with contextlib.suppress(OSError):  # a cache may be read-only
            write_file(_path(key), json.dumps({"format": _FORMAT, "findings": data}, indent=2))


def verdicts(key: str, candidate: Candidate | None = None, *, training: bool) -> dict[str, Judgement]:
    """Return a finding for each property: one kind of call that shows a fault is enough.

    A call from which nothing can be known, such as an empty one, says nothing of others.
    """
    found: dict[str, Judgement] = {}
    kinds = [findings for one in {key, _key_within(key, candidate)} for findings in known(one).values()]
    for name in (*NUMERICS, BACKWARD):
        all_kinds = [
            findings[name] for findings in kinds if name in findings and findings[name].why not in ABOUT_THE_CALL
        ]
        if all_kinds:
            found[name] = min(all_kinds, key=lambda f: (False, None, True).index(f.has))
    return joined(_within(candidate, found), training=training)


def _path(key: str) -> Path:
    return probe_cache.folder() / f"{key}.json"


def _read(path: Path) -> dict[str, dict[str, Judgement]]:
    """Read findings; a file that cannot be read or parsed is ignored, and will be written anew."""
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        data = json.loads(path.read_text())
        if data["format"] == _FORMAT:
            return {
                str(kind): {
                    str(name): Judgement(has, str(why), every=every) for name, (has, why, every) in findings.items()
                }
                for kind, findings in data["findings"].items()
            }
    return {}
