"""`Rule`: how a layer is recognised in undecorated classes."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any

from torch import Tensor, nn

from kernels_core import (
    ArgumentError,
    ArgumentTypeError,
    ConfigSection,
    KernelsError,
    Mode,
    PluginError,
    configured,
    plugin_manager,
    require_type,
    set_module,
)

from ..sources import PythonObject
from .functions import caller_of

Binding = str | tuple[str | None, ...] | Callable[[Any], object]
"""The attribute of a class that stands for a canonical one: its name, several to try, or a function of the module.

With None among several, the canonical attribute is None where the class has none of those before."""


def _none(module: object) -> None:
    return None


_reader = functools.cache(operator.attrgetter)  # equal names give one function


class UnfitError(Exception):
    """A module does not fit a rule; the text is the reason, for the user."""


@dataclass(frozen=True, eq=False)
class Rule:
    """Recognises a layer in the classes of a model, by what they compute.

    A class whose name matches is measured, once for each kind of module: a copy with random weights in float64 has to
    compute what `oracle` computes. So a rule may match too many classes, and `Gemma3RMSNorm` is told from
    `LlamaRMSNorm` without naming either.

    Attributes:
        name: Names the rule in lists and reasons.
        layer_name: The name under which mappings and packs offer kernels for the layer.
        classes: Patterns of class names with their modules, such as `"*.*RMSNorm"`.
        oracle: Computes the layer in plain PyTorch, from a module with the canonical attributes and the arguments:
            a tensor, or a tuple of tensors.
        inputs: Makes the arguments of one call for a module, float64 tensors on the CPU; or a list of those of several.
        binds: For each attribute that the oracle and the kernels read, the attribute of the class that stands for it;
            or several, of which None, as the last one, lets it be None where a class has none of the others.
        parts: For each child module that kernels read past, its path and exact class, or classes; in a rule that
            fuses, also the layer name as which it is adopted itself.
        function: The name of a function that the forward of these classes finds in the globals of its file, where
            that is the layer. `oracle` then takes the arguments of the function only, and `inputs` gets the function.
        fuses: A function that computes several parts of a module at once, where that is the layer: the reference for
            kernels. The forward of a module that fits becomes `oracle(module, function, own, ...)`, which calls the
            dispatching function in place of these parts, or `own`, the forward of the class. It gets arguments that it
            does not name as keywords, and `inputs` returns tuples whose last item is a dict of these.
        stubs: Makes, of a module, the modules that stand for its parts while it is measured, by name: for parts that
            are only called, so that their weights do not matter. Both forwards must call them alike.
        mode: The only mode of calls in which the oracle of a rule that fuses calls the function; None for any.

    Raises:
        ArgumentError: If a rule for a function has `binds` or `parts`, which are those of a module; or fuses, too; or
            a pattern can match no class.
        ArgumentTypeError: For anything of the wrong type.

    Example:
        >>> double = Rule(
        ...     "double", "Double", ("*.Twice",),
        ...     oracle=lambda self, x: 2 * x,
        ...     inputs=lambda module: (torch.randn(4, dtype=torch.float64),),
        ... )
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + x
        >>> adopt(torch.nn.Sequential(Twice()), rules=[double]).layers[0].layer_name
        'Double'
    """

    name: str
    layer_name: str
    classes: tuple[str, ...]
    oracle: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[Any], tuple[Any, ...] | list[tuple[Any, ...]]]
    binds: Mapping[str, Binding] = field(default_factory=dict)
    parts: Mapping[str, str | type[nn.Module] | tuple[type[nn.Module], ...]] = field(default_factory=dict)
    function: str = ""
    fuses: Callable[..., Any] | None = None
    stubs: Callable[[Any], Mapping[str, nn.Module]] = field(default=lambda module: {})
    mode: Mode | None = None

    def __post_init__(self) -> None:
        """Check the types."""
        for name in ("name", "layer_name", "function"):
            require_type(getattr(self, name), str, f"{name} of a Rule")
        if not self.layer_name:
            raise ArgumentError("layer_name of a Rule is empty: mappings need a name to offer kernels under.")
        if not isinstance(self.classes, (tuple, list)) or not all(isinstance(each, str) for each in self.classes):
            raise ArgumentTypeError(f"classes of a Rule is a tuple of patterns, not {self.classes!r}.")
        if never := [each for each in self.classes if not set(each) & set("*?[.")]:
            raise ArgumentError(
                f"classes of a Rule are patterns of module and class: {never[0]!r} matches none. Write '*.{never[0]}'."
            )
        for name in ("oracle", "inputs", "stubs", *(["fuses"] if self.fuses is not None else [])):
            if not callable(getattr(self, name)):
                raise ArgumentTypeError(f"{name} of a Rule is a function, not {getattr(self, name)!r}.")
        for name in ("binds", "parts"):
            require_type(getattr(self, name), Mapping, f"{name} of a Rule")
            if self.function and getattr(self, name):
                raise ArgumentError(f"Rule {self.name!r} is for a function, which has no {name}: leave that out.")
        if self.fuses is not None and (self.function or self.binds):
            raise ArgumentError(f"Rule {self.name!r} fuses parts: its function and binds are those of other rules.")
        require_type(self.mode, (Mode, NoneType), "mode of a Rule")
        for path, kind in self.parts.items():
            kinds = kind if isinstance(kind, tuple) else (kind,)
            known = (type, str) if self.fuses is not None else type
            if not isinstance(path, str) or not all(isinstance(each, known) for each in kinds):
                raise ArgumentTypeError(f"parts of a Rule maps paths to classes, not {path!r} to {kind!r}.")
        for canonical, binding in self.binds.items():
            if not isinstance(canonical, str) or not canonical.isidentifier() or hasattr(nn.Module, canonical):
                raise ArgumentTypeError(f"binds of a Rule names attributes that a module has not, not {canonical!r}.")
            if not callable(binding):
                require_type(binding, (str, tuple), f"binds[{canonical!r}] of a Rule")

    def matches(self, cls: type[nn.Module]) -> bool:
        """Whether the name of a class, or of one that it derives from, fits, and it calls the function, if any."""
        return any(
            fnmatchcase(f"{each.__module__}.{each.__qualname__}", pattern)
            for each in cls.__mro__
            for pattern in self.classes
        ) and (not self.function or caller_of(inspect.getattr_static(cls, "forward"), self.function) is not None)

    def bound(self, module: nn.Module, canonical: str) -> Callable[[Any], object] | None:
        """Return a function that reads a canonical attribute off modules like this one; None if it has the attribute.

        Raises:
            UnfitError: If the module has no attribute that stands for it.
        """
        binding = self.binds[canonical]
        if callable(binding):
            try:
                value = binding(module)
            except AttributeError as error:
                raise UnfitError(str(error)) from error
            if not hasattr(module, canonical):
                return binding
            own = getattr(module, canonical)
            # Not `==` for all: to compare tensors gives a tensor.
            if own is value or (isinstance(own, int | float) and own == value):
                return None
            raise UnfitError(f"its own {canonical} is not what the rule reads for it: bind another name")
        names = (binding,) if isinstance(binding, str) else binding
        for name in names:
            if name is None:
                return _none
            if hasattr(module, name):
                return None if name == canonical else _reader(name)
        raise UnfitError(f"it has no attribute {' or '.join(map(str, names))}, which kernels for the layer read")


def parse_rules(section: ConfigSection) -> list[tuple[ConfigSection, PythonObject]]:
    """Parse `adoption` of a configuration file: the objects that are rules or lists of them, not imported yet."""
    items = section.as_list() if isinstance(section.value, list) else [section]
    found = []
    for item in items:
        with item.blamed():
            found.append((item, PythonObject.parse(item.as_text())))
    return found


def _configured_rules() -> Iterator[Rule]:
    """Import the rules that the configuration file names; report those that are none."""
    for place, named in configured("adoption") or ():
        try:
            found = named.find()
            for rule in found if isinstance(found, list | tuple) else [found]:
                require_type(rule, Rule, repr(named))
                yield rule
        except KernelsError as error:
            fault = PluginError(str(place.error(f"{named}: {error}")), plugin="adopt")
            fault.__cause__ = error
            plugin_manager().report(fault)


def find_rules(rules: Sequence[Rule] | None) -> list[Rule]:
    """Return the rules to apply: those given, or those of the configuration file, then those of all plugins.

    Raises:
        ArgumentTypeError: If one that was given is no rule.
    """
    if rules is not None:
        if isinstance(rules, str) or not isinstance(rules, Sequence):
            given = repr(rules) if isinstance(rules, str) else f"a {type(rules).__name__}"
            raise ArgumentTypeError(f"rules is a list of Rule, not {given}: put rules in a list.")
        for rule in rules:
            require_type(rule, Rule, "An item of rules")
        return list(rules)
    found = list(_configured_rules())
    manager = plugin_manager()
    for plugin, offered in manager.hook.kernels_adoption_rules():
        for rule in offered:
            if isinstance(rule, Rule):
                found.append(rule)
            else:
                problem = f"Plugin {plugin!r}: kernels_adoption_rules returned {rule!r}, which is no Rule."
                manager.report(PluginError(problem, plugin=plugin))
    return found


set_module("kernels_plugins", globals())
