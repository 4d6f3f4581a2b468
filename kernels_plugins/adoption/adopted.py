"""`adopt`: the layers of a model that nobody decorated are made to dispatch, and undone exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from kernels_core import (
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

from .classes import make_class, original_class
from .fit import Kind, has_parts, kind_of, misfit, unmeasured
from .rule import Rule, find_rules


@dataclass(frozen=True)
class AdoptedLayer:
    """A module that dispatches now.

    Attributes:
        path: Where it is in the model, without what wrappers add to that.
        layer_name: The name under which mappings and packs offer kernels.
        cls: Its class, as before.
        rule: The name of the rule that it fits.
    """

    path: str
    layer_name: str
    cls: str
    rule: str


@dataclass(frozen=True)
class RefusedLayer:
    """A module whose class a rule names, and which stays as it was.

    Attributes:
        path: Where it is in the model.
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
        modules: Sequence[nn.Module],
    ) -> None:
        """Keep the lists; `adopt` makes these."""
        self.model, self.layers, self.refused = model, tuple(layers), tuple(refused)
        self._modules = tuple(modules)

    def receipt(self, *, device: Any = None, mode: Any = None) -> Receipt:
        """Return which kernel serves each layer, and why others do not: `receipt` of the model."""
        given = {name: value for name, value in (("device", device), ("mode", mode)) if value is not None}
        return receipt(self.model, **given)

    def undo(self) -> None:
        """Give all modules their classes back, kernelized or not; once.

        Raises:
            KernelizeError: If a class of a module was changed since, as by `fully_shard`. Nothing is undone then.
        """
        for layer, module in zip(self.layers, self._modules, strict=False):
            choice = frozen_choice(module)
            cls = choice.original if choice is not None else type(module)
            if original_class(cls) is None:
                raise KernelizeError(
                    f"The class of {layer.path!r} was changed since it was adopted, to {cls.__qualname__}: undo that "
                    "first, or adopt after it (fully_shard, parametrize and the like)."
                )
        for module in self._modules:
            if frozen_choice(module) is not None:
                unkernelize(module)
            change_class(module, original_class(type(module)))  # type: ignore[arg-type]
        self._modules = ()

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
        summary = f"{len(self.layers)} adopted, {len({each.path for each in self.refused})} refused"
        return Table(("path", "layer", "rule", "class"), rows, summary=summary)

    def to_json(self) -> str:
        """Return both lists as JSON."""
        return as_json({"layers": self.layers, "refused": self.refused})


def adopt(model: nn.Module, *, rules: Sequence[Rule] | None = None) -> Adopted:
    """Make the layers of a model dispatch that nobody decorated: norms, MLPs and activations that rules recognise.

    A class whose name a rule matches is measured on a copy of one module, with random weights in float64: it is
    adopted only where it computes what the layer computes. Modules get a class of their own, so that other models of
    the same classes, state dicts, `isinstance` and pickles stay as they are. From then on, kernels that are mapped for
    the layer, or that a pack offers, serve it: [adopt a model](adopt.md).

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
    applied = find_rules(rules)
    layers: list[AdoptedLayer] = []
    refused: list[RefusedLayer] = []
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    matching: dict[type, list[Rule]] = {}
    found: dict[Kind, tuple[type[nn.Module] | None, list[tuple[Rule, str]]]] = {}
    for module, (path, *_) in module_paths(model).items():
        cls = type(module)
        if cls not in matching:
            matching[cls] = [rule for rule in applied if rule.matches(cls)]
        if not matching[cls]:
            continue
        taken = _taken(module)
        if taken is not None:
            refused.append(RefusedLayer(path, matching[cls][0].name, taken))
            continue
        try:
            kind = kind_of(module)
            if kind not in found:
                found[kind] = _made(module, matching[cls])
        except Exception as error:  # an attribute, a metaclass or __init_subclass__ of theirs, a lazy module
            refused.append(RefusedLayer(path, matching[cls][0].name, unmeasured(error)))
            continue
        made, reasons = found[kind]
        if made is None:
            refused.extend(RefusedLayer(path, rule.name, reason) for rule, reason in reasons)
            continue
        layer = find_layer(made)
        name = f"{cls.__module__}.{cls.__qualname__}"
        layers.append(AdoptedLayer(path, layer.name if layer else "", name, reasons[-1][0].name))
        changed.append((module, made))
    for module, made in changed:
        change_class(module, made)
    return Adopted(model, layers, refused, [module for module, _ in changed])


def _taken(module: nn.Module) -> str | None:
    """Return why a module is not to be adopted whatever it computes."""
    if frozen_choice(module) is not None:
        return "it is kernelized: adopt the model before that"
    if original_class(type(module)) is not None:
        return "it is adopted already"
    layer = find_layer(module)
    if layer is not None:
        return f"it is decorated, as layer {layer.name!r}"
    if "forward" in module.__dict__:
        return "another library has put a forward on it, which a kernel would not run: adopt the model before that"
    return None


def _made(module: nn.Module, rules: Sequence[Rule]) -> tuple[type[nn.Module] | None, list[tuple[Rule, str]]]:
    """Return the class for modules of a kind, with the rule that fits last; None with the reason of each rule."""
    reasons: list[tuple[Rule, str]] = []
    for rule in filter(partial(has_parts, module), rules):
        try:
            reason = misfit(module, rule)
        except Exception as error:  # the next rule may fit all the same
            reason = unmeasured(error)
        reasons.append((rule, reason or ""))
        if reason is None:
            return make_class(module, rule), reasons
    own = ", ".join(name for name, _ in module.named_children()) or "none"
    return None, reasons or [(rules[0], f"it has other parts than the layers that rules know: {own}")]


set_module("kernels_plugins", globals())
