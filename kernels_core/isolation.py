"""Plugins in isolation: hook implementations are checked when registered, and their faults stop at the hook."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

from packaging.version import InvalidVersion, Version

from . import hookspecs
from .errors import LoadError, PluginError, PluginLoadError
from .exports import __version__
from .hookspecs import PROJECT
from .raised import error_text
from .resolution import TIERS, Candidate, Exclusive, Refusal, Resolution

FAULTS = (Exception, SystemExit)
"""The exceptions of a plugin that stop at its hook; an interrupt of the user passes."""

Report = Callable[[PluginError], None]

_VETO = ("kernels_authorize", "kernels_check_layer")
_HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if name.startswith("kernels_")
}


@dataclass(frozen=True)
class PluginMapping:
    """A mapping that a plugin package offers, with its rank."""

    plugin: str
    priority: int
    mapping: Mapping[str, Any]


def raised_in(hook: str, plugin: str, error: BaseException) -> PluginError:
    """Return the error for an exception that a hook of a plugin raised: this one, if it is one of ours for plugins."""
    if isinstance(error, PluginError):
        return error
    text = error_text(error).rstrip(".: ")
    fault = PluginError(f"Plugin {plugin!r} raised in {hook}: {text}.", plugin=plugin)
    fault.__cause__ = error
    return fault


def isolated(hook: str, name: str, plugin: object, function: Callable[..., Any], report: Report) -> Callable[..., Any]:
    """Wrap one hook implementation so that its exceptions and wrong answers are reported in the plugin's name."""
    if getattr(function, f"{PROJECT}_impl").get("wrapper"):
        return _isolated_wrapper(hook, name, function, report)
    priority = getattr(plugin, "kernels_priority", 0)

    # pluggy reads the names of the arguments, and the mark of `hookimpl`, from the wrapped function.
    @wraps(function)
    def guarded(*args: Any) -> Any:
        try:
            answer = function(*args)
            return None if answer is None else _accepted(hook, name, priority, answer)
        except FAULTS as raised:
            if hook == "kernels_load_layer" and not isinstance(raised, PluginError):  # the reason why it cannot load
                with contextlib.suppress(AttributeError, TypeError):  # of a class that takes no attributes
                    raised.kernels_plugin = name  # type: ignore[union-attr]
                if isinstance(raised, SystemExit):
                    raise LoadError(f"it would end the process: SystemExit: {raised}") from raised
                raise
            error = raised_in(hook, name, raised)
        if hook in _VETO:
            return str(error)  # a policy that fails refuses
        report(error)
        return [Refusal(str(error), plugin=name, error=error)] if hook == "kernels_find_candidates" else None

    return guarded


def _isolated_wrapper(hook: str, name: str, function: Callable[..., Any], report: Report) -> Callable[..., Any]:
    """Wrap a wrapper: where it raises by itself, the answer that it wraps is used."""

    def failed(raised: BaseException, answer: Any) -> Any:
        fault = raised_in(hook, name, raised)
        if hook in _VETO:  # a policy that fails refuses
            return [*answer, str(fault)]
        report(fault)
        return answer

    @wraps(function)
    def guarded(*args: Any) -> Any:
        generator = function(*args)
        try:
            next(generator)
        except FAULTS as raised:
            return failed(raised, (yield))  # pluggy requires one yield of each wrapper
        inner: BaseException | None = None
        answer: Any = None
        try:
            answer = yield
        except BaseException as raised:
            inner = raised
        try:
            # As pluggy does it with the wrapper itself.
            generator.send(answer) if inner is None else generator.throw(inner)
            raise RuntimeError("a wrapper yields once, this one did twice")
        except StopIteration as stop:
            if inner is None or isinstance(inner, FAULTS):  # others, such as an interrupt, are not a wrapper's to stop
                fault = _wrapped_fault(hook, name, stop.value)
                return stop.value if fault is None else failed(fault, answer)
        except BaseException as raised:
            if raised is inner or not isinstance(raised, FAULTS):
                raise
            if inner is None:
                return failed(raised, answer)
            report(raised_in(hook, name, raised))
        raise inner  # after the handler, which would make `raised` the context of this error

    return guarded


# --- Answers ---------------------------------------------------------------------------------------


def _is_offer(item: object) -> bool:
    if isinstance(item, Refusal):
        return item.candidate is not None
    if isinstance(item, Exclusive):
        return item.tier in TIERS
    return isinstance(item, Candidate) and item.tier in TIERS and type(item.priority) is int


_REASON = ("None or a reason (a string)", lambda answer: isinstance(answer, str) and bool(answer.strip()))
_ANSWERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kernels_resolve_forward": ("a Resolution or None", lambda answer: isinstance(answer, Resolution)),
    "kernels_find_candidates": (
        "a sequence of Candidate (and of Refusal and Exclusive) or None",
        lambda answer: isinstance(answer, Sequence) and all(map(_is_offer, answer)),
    ),
    "kernels_rank_candidates": (
        "a sequence of Candidate or None",
        lambda answer: isinstance(answer, Sequence) and all(isinstance(i, Candidate) and _is_offer(i) for i in answer),
    ),
    **dict.fromkeys(_VETO, _REASON),
    "kernels_wrap_forward": ("a decorator or None", callable),
    **dict.fromkeys(
        ("kernels_mapping", "kernels_packs", "kernels_configuration", "kernels_settings_in_code"),
        ("a mapping or None", lambda answer: isinstance(answer, Mapping)),
    ),
    "kernels_adoption_rules": ("a sequence of rules or None", lambda answer: isinstance(answer, Sequence)),
}


_NAMED = ("kernels_wrap_forward", "kernels_adoption_rules", "kernels_configuration", "kernels_settings_in_code")
"""Hooks of which the caller gets each answer with the name of its plugin."""


def _accepted(hook: str, name: str, priority: int, answer: Any) -> Any:
    """Check the type of an answer, and put the plugin's name on it."""
    if hook in _ANSWERS:
        expected, fits = _ANSWERS[hook]
        if not fits(answer):
            raise PluginError(f"Plugin {name!r}: {hook} returned {answer!r}, not {expected}.", plugin=name)
    if hook in ("kernels_find_candidates", "kernels_rank_candidates"):
        return [_signed(offer, name) for offer in answer]
    if hook == "kernels_mapping":
        return PluginMapping(name, priority, answer)
    return (name, answer) if hook in _NAMED else answer


def _signed(offer: Candidate | Refusal | Exclusive, name: str) -> Candidate | Refusal | Exclusive:
    """Put the name of a plugin on an offer."""
    if isinstance(offer, Refusal) and offer.candidate is not None:
        candidate = replace(offer.candidate, plugin=offer.candidate.plugin or name)
        return replace(offer, candidate=candidate, plugin=offer.plugin or candidate.plugin)
    return offer if offer.plugin else replace(offer, plugin=name)


def _wrapped_fault(hook: str, name: str, answer: Any) -> PluginError | None:
    """Return the error for a wrong answer of a wrapper, which is the answer of the whole call."""
    expected = {"kernels_resolve_forward": Resolution}.get(hook, list)
    if (
        hook == "kernels_load_layer"
        or (answer is None and hook == "kernels_rank_candidates")
        or isinstance(answer, expected)
    ):
        return None
    return PluginError(
        f"Plugin {name!r}: its wrapper of {hook} returned {answer!r}, not a {expected.__name__}: "
        "return the answer that yield gave, or another of its kind.",
        plugin=name,
    )


# --- Registration ----------------------------------------------------------------------------------


def checked_hooks(plugin: object, name: str) -> dict[str, Callable[..., Any]]:
    """Return the hook implementations of a plugin; raise where one would silently never be called."""
    for problem in _problems(plugin):
        raise PluginLoadError(f"Plugin {name!r}{problem}", plugin=name)
    return {attribute: getattr(plugin, attribute) for attribute in dir(plugin) if attribute in _HOOKS}


def _problems(plugin: object) -> Iterator[str]:
    oldest = getattr(plugin, "kernels_core_version", __version__)  # first: a later core has hooks that this one lacks
    try:
        if Version(oldest) > Version(__version__):
            yield f" has kernels_core_version = {oldest!r}, and this is kernels-core {__version__}: upgrade that."
    except (InvalidVersion, TypeError):
        yield f": kernels_core_version is {oldest!r}, not a version such as {__version__!r}."
    for attribute in dir(plugin):
        function: Any = None
        with contextlib.suppress(Exception):  # a property that raises is no hook
            function = getattr(plugin, attribute)
        options = getattr(function, f"{PROJECT}_impl", None)
        if not isinstance(options, dict):
            if attribute in _HOOKS:
                yield f" has a function {attribute} that is not marked: put @hookimpl on it."
        elif attribute not in _HOOKS:
            close = difflib.get_close_matches(attribute, _HOOKS, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_HOOKS)}."
            yield f" implements an unknown hook {attribute}: {hint}"
        elif options.get("hookwrapper"):
            yield f": {attribute} is an old hookwrapper: use wrapper=True."
        elif options.get("wrapper") and not inspect.isgeneratorfunction(function):
            yield f": {attribute} is a wrapper without a yield."
        else:
            signature, known = inspect.signature(function), _HOOKS[attribute]
            for name, parameter in signature.parameters.items():
                if name not in known or parameter.default is not parameter.empty:
                    problem = "which the hook does not have"
                    if name in known:
                        problem = "with a default, which pluggy would never fill"
                    takes = f"{attribute}{signature} takes {name!r}, {problem}"
                    yield f": {takes}. It may take any of ({', '.join(known)})."
    if not _HOOKS.keys() & set(dir(plugin)):
        yield f" ({plugin!r}) implements no hook: mark at least one function with @hookimpl."
    priority = getattr(plugin, "kernels_priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int):  # True is an int, and no rank
        yield f": kernels_priority is {priority!r}, not an integer."
