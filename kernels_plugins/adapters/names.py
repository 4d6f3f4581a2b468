"""Names that last: of an operator and of a kind of call, the same in every process that has the same code.

Compilers find graphs on disk by them, and exported programs find the operator. Code that differs has another name, so
neither meets what another kernel, layer or version has left.
"""

from __future__ import annotations

import ast
import enum
import hashlib
import itertools
import pickle
import pkgutil
import re
import secrets
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from kernels_core import Layer, content_of

from .ambient import Autocast, autocast_now
from .structure import Structure
from .work import Spec

_VERSION = 1
"""To count up when operators or the texts of calls change: their old names are met no more."""

_PROCESS = secrets.token_hex(4)
"""In names that must not last: of kernels and objects that have no digest."""

_TORCH = (torch.dtype, torch.layout, torch.memory_format)
_numbers = itertools.count()
_taken: set[str] = set()
_lock = threading.Lock()


def take_name(layer: Layer, kernel: object, content: str, own_backward: bool) -> str:
    """Return a name for an operator that no other one in this process has, until `free_name`.

    Args:
        layer: The layer that the kernel serves.
        kernel: The class or function of the kernel.
        content: The digest of its files; empty for a kernel that is known by its code.
        own_backward: Whether the gradients are those of the kernel.
    """
    plain = re.sub(r"\W+", "_", layer.name, flags=re.ASCII)
    code, reference = content or content_of(kernel), content_of(layer.reference)
    parts = (_VERSION, layer.name, reference, getattr(kernel, "__qualname__", ""), code, own_backward)
    known = bool(code and reference)
    name = f"{plain}_{_digest(repr(parts)) if known else f'{next(_numbers)}_{_PROCESS}'}"
    with _lock:  # a second one of the same code, such as that of a layer that was decorated again, may differ in state
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        found = next(one for one in names if one not in _taken)
        _taken.add(found)
    return found


def free_name(name: str) -> None:
    """Let another operator have the name: this one is gone."""
    with _lock:
        _taken.discard(name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:20]


# --- Calls -------------------------------------------------------------------------------------------


is_exporting: Callable[[], bool] = getattr(
    torch.compiler, "is_exporting", lambda: not torch.compiler.is_dynamo_compiling()
)
"""Whether the program that is traced may be run elsewhere. PyTorch 2.6 does not tell: there, all but compiled code."""


def call_text(structure: Structure, objects: Iterable[Any], autocast: Autocast, *, exporting: bool) -> str:
    """Return a text for a kind of call: for an export, one that `read_call` reads; else its digest.

    A digest has the code of the classes in it, for the shapes of outputs may follow from that.
    """
    enabled = tuple((kind, str(dtype)) for kind, on, dtype in autocast if on)
    described = [_described(value) for value in objects]
    if exporting and all(content is not None for _, content in described):
        text = repr((structure, tuple(place for place, _ in described), enabled))
        if _reads(text, structure):
            return text
    return f"call_{_digest(repr((_VERSION, structure, described, enabled)))}"


def read_call(text: str, layer: Layer) -> Spec:
    """Return the kind of call that a text describes: one of a program that was exported elsewhere."""
    try:
        structure, places, enabled = ast.literal_eval(text)
        objects = tuple(_found(*place) for place in places)
        dtypes = {kind: _found("torch", dtype.removeprefix("torch.")) for kind, dtype in enabled}
        autocast = tuple((kind, kind in dtypes, dtypes.get(kind, dtype)) for kind, _, dtype in autocast_now())
    except (ValueError, SyntaxError, TypeError, ImportError, AttributeError) as error:
        raise RuntimeError(
            f"Layer {layer.name!r}: this program calls an opaque kernel with values that only the process knows which "
            f"made it ({error}). Compile or export it here, or give the layer no such objects as arguments and "
            "attributes: only numbers, texts, and classes and functions that can be imported."
        ) from None
    return Spec(layer, structure, objects, autocast)


def _reads(text: str, structure: Structure) -> bool:
    try:
        return bool(ast.literal_eval(text)[0] == structure)
    except (ValueError, SyntaxError):  # such as a member of an enum as a key
        return False


def _described(value: Any) -> tuple[tuple[str, str], str | None]:
    """Return the place where a value is found by name, and a digest of its code; None where it is not found there."""
    if isinstance(value, _TORCH):
        return ("torch", str(value).removeprefix("torch.")), ""
    if isinstance(value, torch.device):
        return ("device", str(value)), ""
    if isinstance(value, enum.Enum):
        place, content = _described(type(value))
        return (place[0], f"{place[1]}.{value.name}"), content
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        place = (str(value.__module__), value.__qualname__)
        content = content_of(value)
        try:
            return place, content if _found(*place) is value else None
        except (ImportError, AttributeError, ValueError):  # local to a function
            return (place[0], f"{place[1]} {content}"), None
    try:
        state = _digest(pickle.dumps(value).hex())
    except Exception:  # whatever its class does while it is pickled
        state = f"{next(_numbers)}_{_PROCESS}"
    return (f"{type(value).__module__}.{type(value).__qualname__}", state), None


def _found(module: str, name: str) -> Any:
    return torch.device(name) if module == "device" else pkgutil.resolve_name(f"{module}:{name}")
