"""Where public names come from: the package that exports them, not the file that defines them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ForwardRef

from .errors import require_type

__version__ = "0.1.0"


def set_module(package: str, namespace: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Make classes and functions say that they come from the package that exports them.

    Reprs, tracebacks and pickles then name the import path that is promised, and pickles survive a move of the
    defining file. Names that are missing, come from another package, or are an alias of another name stay as they are.
    `inspect.getsource` no longer finds the source of such a class; it does that of its methods, and of functions.

    Args:
        package: The package, which has each of the names as an attribute.
        namespace: Where the names are found now: `globals()` of the package, or `vars()` of a defining module.
        names: The public names; by default `__all__` of the package, of which the namespace may have any.

    Example:
        >>> Mode.__module__, resolve.__module__
        ('kernels_core', 'kernels_core')
    """
    require_type(namespace, Mapping, "namespace")
    names = importlib.import_module(package).__all__ if names is None else names
    require_type(names, Iterable, "names")
    for name in names:
        require_type(name, str, "A public name")
        value = namespace.get(name)
        defined_in = str(getattr(value, "__module__", ""))
        if not defined_in.startswith(f"{package}.") or getattr(value, "__qualname__", "") != name:
            continue
        for cls in getattr(value, "__mro__", ()):  # functions have none, and find names in their own globals
            if cls.__module__.startswith(f"{package}."):
                _bind_annotations(cls)
        value.__module__ = package


def _bind_annotations(cls: type) -> None:
    """Bind annotations that are text to the module that defines their names.

    `typing.get_type_hints` would otherwise look these names up in the package, as would libraries that read the types
    of dataclass fields.
    """
    hints = {
        name: ForwardRef(hint, is_argument=False, module=cls.__module__, is_class=True)
        for name, hint in inspect.get_annotations(cls).items()
        if isinstance(hint, str)
    }
    if hints:
        cls.__annotations__ |= hints
    for name, field in getattr(cls, "__dataclass_fields__", {}).items():
        field.type = hints.get(name, field.type)
