"""`adopt`: the layers of an undecorated model are made to dispatch, and undone exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType, TracebackType
from typing import Any, Generic, Protocol, cast

from torch import nn

from kernels_core import (
    ArgumentTypeError,
    KernelizeError,
    Receipt,
    Table,
    TableRow,
    Tabular,
    as_json,
    change_class,
    find_layer,
    frozen_choice,
    module_paths,
    receipt,
    require_type,
    set_module,
    unkernelize,
)

from .classes import dispatching, make_class, original_class
from .fit import UNMEASURED, Kind, has_parts, kind_of, kind_of_parent, may_fuse, misfit, misfit_of_parent, unmeasured
from .functions import caller_of, calling
from .parents import computed, parent_forward
from .rule import Rule, find_rules


@dataclass(frozen=True)
class AdoptedLayer:
    """A module that dispatches now, or a function that it calls.

    Attributes:
        path: Where it is in the model, without what wrappers add to that; for a function, the path of the module that
            calls it, a colon, and its name.
        layer_name: The name under which mappings and packs offer kernels.
        cls: Its class, as before; for a function, its module and name.
        rule: The name of the rule that it fits.
    """

    path: str
    layer_name: str
    cls: str
    rule: str


@dataclass(frozen=True)
class RefusedLayer:
    """A module whose class a rule names, or a function that it calls, which stays as it was.

    Attributes:
        path: Where it is in the model, as that of an adopted one.
        rule: The name of the rule.
        reason: Why it does not fit.
    """

    path: str
    rule: str
    reason: str


class Adopted(Tabular):
    """The layers of a model that were adopted, and those that were refused; a context manager that undoes it.

    Attributes:
        model: The model.
        layers: Those that dispatch now.
        refused: Those that a rule names, and that stay as they were.

    Example:
        >>> with adopt(torch.nn.Sequential(torch.nn.RMSNorm(4))) as adopted:
        ...     adopted.layers[0].path, adopted.layers[0].layer_name
        ('0', 'RMSNorm')
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AdoptedLayer],
        refused: Sequence[RefusedLayer],
        modules: Mapping[str, nn.Module],
    ) -> None:
        """Keep the lists; `adopt` makes these."""
        self.model, self.layers, self.refused = model, tuple(layers), tuple(refused)
        self._modules = modules

    def receipt(self, *, device: Any = None, mode: Any = None) -> Receipt:
        """Return which kernel serves each layer, and why others do not: `receipt` of the model."""
        given = {name: value for name, value in (("device", device), ("mode", mode)) if value is not None}
        return receipt(self.model, **given)

    def undo(self) -> None:
        """Give all modules their classes back, kernelized or not; once.

        Raises:
            KernelizeError: If a class of a module was changed since, as by `fully_shard`. Nothing is undone then.
        """
        for path, module in self._modules.items():
            choice = frozen_choice(module)
            cls = choice.original if choice is not None else type(module)
            if original_class(cls) is None:
                raise KernelizeError(
                    f"The class of {path!r} was changed since it was adopted, to {cls.__qualname__}: undo that "
                    "first, or adopt after it (fully_shard, parametrize and the like)."
                )
        for module in self._modules.values():
            if frozen_choice(module) is not None:
                unkernelize(module)
            adopted = type(module)
            change_class(module, cast("type[nn.Module]", original_class(adopted)))
            for name, value in list(module.__dict__.items()):  # libraries put hooks around the forward that they find
                if isinstance(value, MethodType) and value.__func__ is adopted.forward:
                    if name == "forward":  # put back by one that has taken its hook off
                        del module.__dict__[name]
                    else:
                        module.__dict__[name] = MethodType(type(module).forward, module)
        self._modules = {}

    def __enter__(self) -> Adopted:
        """Keep the layers adopted in the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo."""
        self.undo()

    def as_table(self) -> Table:
        """Return both lists, equal modules together."""
        together: dict[tuple[str, ...], list[str]] = {}
        for layer in self.layers:
            together.setdefault((layer.layer_name, layer.rule, layer.cls), []).append(layer.path)
        for each in self.refused:
            together.setdefault(("", each.rule, f"refused: {each.reason}"), []).append(each.path)
        rows = [
            TableRow(
                (f"{paths[0]} and {len(paths) - 1} more" if paths[1:] else paths[0], *cells), "" if cells[0] else "dim"
            )
            for cells, paths in together.items()
        ]
        refused = len({each.path for each in self.refused})
        summary = f"{len(self.layers)} adopted, {refused} refused{', which run as before' if refused else ''}"
        return Table(("path", "layer", "rule", "class"), rows, summary=summary)

    def to_json(self) -> str:
        """Return both lists as JSON."""
        return as_json(self.lists())

    def lists(self) -> dict[str, Any]:
        """Return both lists by their names."""
        return {"layers": self.layers, "refused": self.refused}


def adopt(model: nn.Module, *, rules: Sequence[Rule] | None = None) -> Adopted:
    """Make the layers of an undecorated model dispatch: norms, MLPs, activations, rotary embeddings.

    A class whose name a rule matches is measured on a copy of one module, with random weights in float64: it is
    adopted only where it computes what the layer computes. So is a function that modules find in the globals of their
    file. Modules get a class of their own, so that other models of the same classes, state dicts, `isinstance` and
    pickles stay as they are. From then on, kernels that are mapped for the layer, or that a pack offers, serve it:
    [adopt a model](adopt.md).

    Args:
        model: Any model; its modules are changed in place.
        rules: The rules to apply, in order; by default those of all plugins, the shipped ones last.

    Returns:
        The layers that were adopted, and those that were refused with their reasons. It undoes the adoption.

    Raises:
        ArgumentTypeError: If the model is no module, or one of the rules is no `Rule`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
        >>> adopted = adopt(model)
        >>> adopted.layers[0].path, adopted.layers[0].layer_name
        ('1', 'RMSNorm')
        >>> adopted.undo()
        >>> type(model[1]) is torch.nn.RMSNorm
        True
    """
    require_type(model, nn.Module, "A model")
    found_rules = find_rules(rules)
    applied, fusing = ([rule for rule in found_rules if (rule.fuses is not None) is fuses] for fuses in (False, True))
    layers: list[AdoptedLayer] = []
    refused: list[RefusedLayer] = []
    changed: dict[str, tuple[nn.Module, type[nn.Module], str]] = {}
    matching: dict[type, list[Rule]] = {}
    found: dict[Kind, _Found] = {}
    functions: _Functions = {}
    for module, (path, *_) in module_paths(model).items():
        cls = type(module)
        if cls not in matching:
            # By class: patterns are compared once for each.
            matching[cls] = [rule for rule in applied if rule.matches(cls)]
        if not matching[cls]:
            continue
        taken = _taken(module)
        if taken is not None:
            refused.append(RefusedLayer(path, matching[cls][0].name, taken))
            continue
        try:
            # Functions are measured for themselves: a hundred layers of one class, each with its number, share one.
            kind = (cls,) if all(rule.function for rule in matching[cls]) else kind_of(module)
            if kind not in found:
                found[kind] = _Found.of(module, matching[cls], functions)
        except Exception as error:  # an attribute, a metaclass or __init_subclass__ of theirs, a lazy module
            refused.append(RefusedLayer(path, matching[cls][0].name, unmeasured(error)))
            continue
        layers.extend(replace(layer, path=path + layer.path) for layer in found[kind].adopted)
        refused.extend(replace(layer, path=path + layer.path) for layer in found[kind].refused)
        if (made := found[kind].cls) is not None:
            changed[path] = module, made, matching[cls][0].name
    parts = {module: made for module, made, _ in changed.values()}
    parents: dict[object, _Found] = {}
    for module, (path, *_) in module_paths(model).items() if fusing else ():
        try:  # after their parts, whose classes they have to know
            named = [rule for rule in fusing if rule.matches(type(module))]
            may = [rule for rule in named if may_fuse(module, rule, parts)]
            if not may or module in parts:
                if rules is not None and named and not may:  # names of the shipped rules match blocks of all kinds
                    wanted = ", ".join(named[0].parts)
                    reason = f"its parts are not those that the rule names: {wanted}, adopted as it names them"
                    refused.append(RefusedLayer(path, named[0].name, reason))
                continue
            if (taken := _taken(module)) is not None:
                refused.append(RefusedLayer(path, may[0].name, taken))
                continue
            kind = kind_of_parent(module, may, parts)
            if kind not in parents:
                parents[kind] = _Found.of_parent(module, may, parts)
        except Exception as error:
            refused.append(RefusedLayer(path, may[0].name, unmeasured(error)))
            continue
        layers.extend(replace(layer, path=path + layer.path) for layer in parents[kind].adopted)
        refused.extend(replace(layer, path=path + layer.path) for layer in parents[kind].refused)
        if (made := parents[kind].cls) is not None:
            changed[path] = module, made, may[0].name
    done: dict[str, nn.Module] = {}
    try:
        for path, (module, new, rule) in changed.items():
            try:
                change_class(module, new)
                done[path] = module
            except ArgumentTypeError as error:  # its class does not allow that
                refused.append(RefusedLayer(path, rule, str(error)))
                layers = [layer for layer in layers if layer.path.partition(":")[0] != path]
    except BaseException:  # an interrupt: no model is half adopted
        for module in done.values():
            change_class(module, cast("type[nn.Module]", original_class(type(module))))
        raise
    return Adopted(model, layers, refused, done)


def _taken(module: nn.Module) -> str | None:
    """Return why a module is not to be adopted whatever it computes."""
    if frozen_choice(module) is not None:
        return "it is kernelized: adopt the model before that"
    if original_class(type(module)) is not None:
        return "it is adopted already"
    layer = find_layer(module)
    if layer is not None:
        return f"it is decorated, as layer {layer.name!r}"
    if any("__init_subclass__" in vars(each) for each in type(module).__mro__ if not _is_known(each)):
        return "its class learns of classes that derive from it (__init_subclass__), as that of an adopted module does"
    if "forward" in module.__dict__:
        return "another library has put a forward on it, which a kernel would not run: adopt the model before that"
    return None


def _is_known(cls: type) -> bool:
    """Whether the `__init_subclass__` of a class, if any, changes the new class only."""
    return cls in (object, Generic, Protocol) or cls.__module__ in _OF_TRANSFORMERS


_OF_TRANSFORMERS = ("transformers.modeling_utils", "transformers.modeling_layers")

_Reasons = list[tuple[Rule, str]]
_Functions = dict[tuple[int, str], tuple[Rule | None, Callable[..., Any], _Reasons]]
"""For a function and its name in rules: the rule that fits, the dispatching function, and why other rules do not."""


@dataclass
class _Found:
    """The class for modules of a kind, if any, and their layers; paths are those after the path of a module."""

    cls: type[nn.Module] | None
    adopted: list[AdoptedLayer]
    refused: list[RefusedLayer]

    @classmethod
    def of(cls, module: nn.Module, rules: Sequence[Rule], known: _Functions) -> _Found:
        """Measure a module, and the functions that it calls, unless those are known."""
        found, original = cls(None, [], []), type(module)
        forward: Any = inspect.getattr_static(original, "forward")
        functions = []
        for name in dict.fromkeys(rule.function for rule in rules if rule.function):
            function = cast(FunctionType, caller_of(forward, name)).__globals__[name]
            if (id(function), name) not in known:
                known[id(function), name] = _dispatched(function, [rule for rule in rules if rule.function == name])
            fits, made, reasons = known[id(function), name]
            if fits is not None:
                try:
                    forward = calling(forward, name, made)
                except ValueError as error:
                    reasons, fits = [(fits, str(error))], None
            if found.noted(f":{name}", function, fits, reasons):
                functions.append(made)
        own = [rule for rule in rules if not rule.function]
        fits, reasons = _first_fit(module, list(filter(partial(has_parts, module), own)))
        if own and fits is None and not reasons:
            parts = ", ".join(name for name, _ in module.named_children()) or "no parts"
            wanted = " or ".join(dict.fromkeys(", ".join(rule.parts) for rule in own))
            reasons = [(own[0], f"it has {parts}, and rules know layers of {wanted}")]
        if found.noted("", original, fits, reasons) or functions:
            found.cls = make_class(module, fits, forward, functions)
        return found

    @classmethod
    def of_parent(cls, module: nn.Module, rules: Sequence[Rule], parts: Mapping[nn.Module, type[nn.Module]]) -> _Found:
        """Measure a module whose parts may be fused."""
        found, original = cls(None, [], []), type(module)
        fits, reasons = _first_fit(module, rules, partial(misfit_of_parent, adopted=parts))
        if fits is not None:
            function = cast("Callable[..., Any]", fits.fuses)
            try:
                forward = parent_forward(inspect.getattr_static(original, "forward"), fits, dispatching(function, fits))
                found.cls = make_class(module, None, forward, [dispatching(function, fits)], computed(fits))
            except ValueError as error:
                reasons, fits = [(fits, str(error))], None
        # One reason: rules for other parents of the same parts could not be measured, and say less.
        reasons.sort(key=lambda each: each[1].startswith(UNMEASURED))
        found.noted(f":{function.__name__}" if fits else "", original, fits, reasons[:1])
        return found

    def noted(self, path: str, subject: Any, fits: Rule | None, reasons: _Reasons) -> bool:
        """List a layer, or why it is refused; return whether it is adopted."""
        if fits is not None:
            name = f"{subject.__module__}.{subject.__qualname__}"
            self.adopted.append(AdoptedLayer(path, fits.layer_name, name, fits.name))
            return True
        self.refused.extend(RefusedLayer(path, rule.name, reason) for rule, reason in reasons)
        return False


def _dispatched(function: Any, rules: Sequence[Rule]) -> tuple[Rule | None, Callable[..., Any], _Reasons]:
    """Return the rule that fits a function, the dispatching function, and why other rules do not fit."""
    if not isinstance(function, FunctionType):
        return None, function, [(rules[0], f"it is a {type(function).__qualname__}, not a function")]
    if (layer := find_layer(function)) is not None:
        return None, function, [(rules[0], f"it is decorated, as layer {layer.name!r}")]
    fits, reasons = _first_fit(function, rules)
    return fits, dispatching(function, fits) if fits is not None else function, reasons


def _first_fit(
    subject: Any, rules: Sequence[Rule], misfit: Callable[[Any, Rule], str | None] = misfit
) -> tuple[Rule | None, _Reasons]:
    """Return the first rule that fits a module or a function, if any, and why those before it do not."""
    reasons: _Reasons = []
    for rule in rules:
        try:
            reason = misfit(subject, rule)
        except Exception as error:  # the next rule may fit all the same
            reason = unmeasured(error)
        if reason is None:
            return rule, reasons
        reasons.append((rule, reason))
    return None, [each for each in reasons if not each[1].startswith(UNMEASURED)] or reasons


set_module("kernels_plugins", globals())
