"""`ShapeLimit`: keeps a kernel to the calls for which it is the best of the candidates that are left."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from kernels_core import ArgumentError, Candidate, LayerRequest, LoadedLayer, LoadError, warn_once

from ..numerics.wanted import required, trying
from ..oracle.code_digest import digest_of
from .cell import REFERENCE, Key, key_of, sizes_of
from .choice import Choice

Forward = Callable[..., Any]
Using = tuple[Choice, str, bool]
"""A choice, its name, and whether it is strict."""

is_capturing = torch.cuda.is_current_stream_capturing
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on

# Written for the parameters of a kernel: to pass `*args` on would cost half as much as the question.
_TEXT = """\
def limited{signature}:
    try:
        _choice_serve = _choice_known[{tensor}.dtype][{tensor}.shape]
    except (KeyError, AttributeError):
        _choice_serve = _choice_find(({arguments},), {{}})
    return _choice_serve({arguments})
"""

_KNOWN = 4096
"""Exact shapes that are remembered for a kernel and dtype: a program with more has dynamic ones, and starts over."""


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return NotImplemented


def _by_capture(eager: Forward, captured: Forward) -> Forward:
    """Return a forward that asks whether a CUDA graph is being captured."""
    return lambda *args, **kwargs: (captured if is_capturing() else eager)(*args, **kwargs)


@dataclass(frozen=True)
class Orders:
    """The order of all candidates for each kind of call.

    Attributes:
        layer: The layer name, for messages.
        eager: Pairs of a key and the candidates, best first.
        captured: The same for calls in a CUDA graph; empty to take those of eager calls.
        default: The order for calls that were not measured.
        file: Where the choice comes from, for messages.
    """

    layer: str
    eager: tuple[tuple[Key, tuple[str, ...]], ...]
    captured: tuple[tuple[Key, tuple[str, ...]], ...]
    default: tuple[str, ...]
    file: str

    @classmethod
    def read(cls, layer: str, record: Any, file: str) -> Orders:
        """Make them of such JSON; raise `ArgumentError` if it is malformed."""
        try:
            eager, captured = (
                tuple(
                    ((getattr(torch, dtype), width, bucket), (*order,)) for dtype, width, bucket, order in record[key]
                )
                for key in ("eager", "captured")
            )
            return cls(layer, eager, captured, (*record["default"],), file)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"{file} has a malformed choice for layer {layer!r}: {error!r}") from error

    @property
    def record(self) -> dict[str, Any]:
        """The orders as JSON, for decision files."""
        eager, captured = (
            [[str(dtype).removeprefix("torch."), width, bucket, [*order]] for (dtype, width, bucket), order in found]
            for found in (self.eager, self.captured)
        )
        return {"eager": eager, "captured": captured, "default": [*self.default]}

    @property
    def all(self) -> list[tuple[str, ...]]:
        """The orders of all kinds of calls."""
        return [self.default, *(order for _, order in (*self.eager, *self.captured))]

    def order(self, key: Key, captured: bool = False) -> tuple[tuple[str, ...], bool]:
        """Return the candidates for a kind of call, best first, and whether it was measured.

        A number of rows between two that were measured, and that have the same winner, is served by that.
        """
        known = dict((captured and self.captured) or self.eager)
        if key in known:
            return known[key], True
        dtype, width, bucket = key
        buckets = sorted(rows for other, size, rows in known if (other, size) == (dtype, width))
        below, above = [b for b in buckets if b < bucket], [b for b in buckets if b > bucket]
        if below and above:
            first, second = known[dtype, width, below[-1]], known[dtype, width, above[0]]
            if first[0] == second[0]:
                return first, True
        return self.default, False


@dataclass(frozen=True)
class ShapeLimit:
    """The limit of a candidate, as in `Candidate.limit`.

    Attributes:
        name: The candidate.
        rivals: The candidates that are tried after it: it takes the calls for which it is better than these.
        orders: What was measured; None if it serves all calls.
        digest: That of its code when it was measured; empty if it is not known.
        is_function: Whether the layer is a function, and has no module as its first argument.
        is_traced: Whether calls are being compiled: their shapes may be symbols, which have no place in a table.
        using: The choice, its name, and whether it is strict: it decides about the calls that the kernel passes on,
            also where `kernelize` has kept the kernel, and the choice is not in use any more.
    """

    name: str
    rivals: tuple[str, ...]
    orders: Orders | None
    digest: str
    is_function: bool
    is_traced: bool
    using: Using = field(compare=False)

    def __call__(self, loaded: LoadedLayer, forward: Forward) -> Forward:
        """Return a forward that passes on the other calls.

        Raises:
            LoadError: If the code of the kernel is not what was measured.
        """
        if self.digest and digest_of(forward) not in (None, self.digest):
            raise LoadError("its code has changed since it was measured: measure again (kernels-core choose)")
        orders = self.orders
        if orders is None or all(map(self._leads, orders.all)):
            return forward  # it serves all calls that come to it: none has to ask for its shape
        if self.is_traced:
            limited = self._traced(forward, orders)
            vars(limited)["kernels_choice"] = self.using
        else:
            limited = self._eager(forward, orders)
        return limited

    def join(self, forward: Forward, following: Forward) -> Forward | None:
        """Return a forward that calls another one, which takes the same arguments, in place of passing calls on."""
        return None if self.orders is None or self.is_traced else self._eager(forward, self.orders, following)

    def takes(self, key: Key, captured: bool = False) -> bool:
        """Return whether it serves calls of a kind."""
        assert self.orders is not None
        return self._leads(self.orders.order(key, captured)[0])

    def _leads(self, order: tuple[str, ...]) -> bool:
        """Return whether it comes before the candidates that are tried after it."""
        place = order.index(self.name) if self.name in order else len(order)
        return all(place < order.index(name) for name in self.rivals if name in order)

    def _eager(self, forward: Forward, orders: Orders, following: Forward = _pass_on) -> Forward:
        known: dict[torch.dtype, dict[torch.Size, Forward]] = {}  # as pairs, a key would take 40 ns more
        first = int(not self.is_function)
        # Of a kernel that is joined, too: a shape leads to its winner at once, not through those before.
        find_following = vars(following).get("kernels_choice_of", lambda args, kwargs: following)

        def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
            """Return the function for a call whose shape is new, or whose first argument is no tensor."""
            tensor: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if tensor is None:  # as where nothing was measured
                return forward if self._leads(orders.default) else find_following(args, kwargs)
            key = key_of(tensor)
            if not trying.get():
                self._say_if_missed(key)  # first: where warnings are errors, it raises each time
            eager, captured = (
                forward if self.takes(key, captured=captured) else find_following(args, kwargs)
                for captured in (False, True)
            )
            serve = eager if eager is captured else _by_capture(eager, captured)
            # Not from a trial: the first call of such a shape by the program has yet to be warned of.
            if len(args) > first and args[first] is tensor and not trying.get():
                shapes = known.setdefault(tensor.dtype, {})
                if len(shapes) >= _KNOWN:
                    shapes.clear()
                shapes[tensor.shape] = serve
            return serve

        parameters = list(inspect.signature(forward).parameters.values())
        limited: Forward
        if len(parameters) <= first or any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in parameters):

            def limited(*args: Any, **kwargs: Any) -> Any:
                return find(args, kwargs)(*args, **kwargs)

        else:
            arguments = ", ".join(each.name for each in parameters)
            bare = [each.replace(annotation=each.empty, default=each.empty) for each in parameters]
            text = _TEXT.format(signature=inspect.Signature(bare), tensor=parameters[first].name, arguments=arguments)
            names: dict[str, Any] = {"_choice_known": known, "_choice_find": find}
            exec(compile(text, f"<calls that {self.name} takes>", "exec"), names)
            limited = names.pop("limited")
            cast(Any, limited).__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty)
        vars(limited).update(kernels_choice_of=find, kernels_choice=self.using)
        return limited

    def _say_if_missed(self, key: Key) -> None:
        assert self.orders is not None
        if not self.orders.order(key)[1]:
            dtype, width, bucket = key
            rows = f"{1 << bucket >> 1} or more rows of {width} {str(dtype).removeprefix('torch.')}"
            warn_once(
                f"Layer {self.orders.layer!r} is called with {rows}, which {self.orders.file} has no measurement for: "
                "the default order of candidates serves such calls. Measure them, too: kernels-core choose.",
            )

    def _traced(self, forward: Forward, orders: Orders) -> Forward:
        """Return the same for traced calls: comparisons of sizes, which become guards, one a range.

        An exported program serves all sizes that its user names, and a guard would forbid some: as where nothing was
        measured.
        """
        kinds = {(dtype, width) for (dtype, width, _), _ in orders.eager}
        ranges = {  # a number of rows has at most 63 bits
            kind: tuple(_ranges([bucket for bucket in range(64) if self.takes((*kind, bucket))])) for kind in kinds
        }
        default = self._leads(orders.default)

        def limited(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    *sizes, width = sizes_of(value)
                    spans = ranges.get((value.dtype, width))
                    if spans is None or is_exporting():
                        break
                    rows = functools.reduce(operator.mul, sizes, 1)  # `math.prod` would be left in the graph
                    return forward(*args, **kwargs) if any(a <= rows < b for a, b in spans) else NotImplemented
            return forward(*args, **kwargs) if default else NotImplemented

        return limited


@dataclass(frozen=True)
class _Unusable:
    """The limit of a candidate whose orders cannot be applied.

    A hook that raises would be reported as a plugin at fault, and the decision file as one without this plugin.
    """

    reason: str

    def __call__(self, loaded: LoadedLayer, forward: Forward) -> Forward:
        raise LoadError(self.reason)


def recorded(request: LayerRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with limits as a decision file has them.

    Where the orders cannot be applied, all of them are refused, with the reason.

    Args:
        request: The request that they are candidates for.
        candidates: The candidates, each with the orders that `Orders.record` has.
    """
    function = request.layer is not None and request.layer.is_function
    measured = [one for one in candidates if one.record is not None]
    names = [one.label for one in measured]
    found = []
    try:
        read = [Orders.read(request.layer_name, one.record, "the decision file") for one in measured]
        if "batch_invariant" in required(request) and any(len({order[0] for order in each.all}) > 1 for each in read):
            raise ArgumentError(
                "the decision file has different kernels for few and for many rows, and batch_invariant is required: "
                "freeze where it is required"
            )
    except ArgumentError as error:
        return [replace(one, limit=_Unusable(str(error))) for one in candidates if one.record is not None]
    for place, (one, orders) in enumerate(zip(measured, read, strict=True)):
        rivals, using = (*names[place + 1 :], REFERENCE), (Choice(), orders.file, False)
        limit = ShapeLimit(names[place], rivals, orders, "", function, request.is_traced, using)
        found.append(replace(one, limit=limit))
    return [*found, *(one for one in candidates if one.record is None)]  # the reference


def _ranges(buckets: list[int]) -> list[tuple[int, int]]:
    """Return numbers of rows, from and up to, that lie in some powers of two."""
    found: list[tuple[int, int]] = []
    for bucket in buckets:
        low, high = (1 << bucket) >> 1, 1 << bucket
        if found and found[-1][1] == low:
            found[-1] = found[-1][0], high
        else:
            found.append((low, high))
    return found
