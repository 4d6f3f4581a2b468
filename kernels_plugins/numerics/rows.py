"""A call with other numbers of rows: fewer, more, elsewhere, among others, in other dtypes and strides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kernels_core import references
from kernels_core.replay import Call

from ..comparison import compare
from .bits import tensors_of
from .numbers import are_telling, telling, with_own_numbers

Forward = Callable[..., Any]
MOST = 4096
"""The largest number of rows that is tried."""

_INDICES = (torch.int64, torch.int32)
_ELEMENTS = {"cpu": 2**22}  # of all inputs with rows; on other devices, half a gigabyte in float32
_SECONDS = 1.0

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda t: t,
    "rows with gaps": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
}
"""Ways in which rows lie in memory, by name; a kernel that ignores strides reads NaN."""


EMPTY = "it is empty: without rows, there are no bits to compare"
NO_ROWS = "none of its inputs has rows: a tensor of two or more dimensions, or of indices"
SILENT = "its reference returns nothing but equal numbers, infinities or NaN for random rows, which shows nothing"
SPREAD = "its tensors are spread over ranks (DTensor), each of which would judge for itself"
ABOUT_THE_CALL = (EMPTY, NO_ROWS, SILENT, SPREAD)
"""Reasons why nothing can be known from a call, which say nothing of other calls."""


class NotTaken(Exception):  # noqa: N818 - no error: an answer
    """A kernel takes a call, and passes on one like it, whose rows another implementation computes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A call whose first dimension is that of rows, which do not depend on one another.

    Attributes:
        call: The call with all its rows: first those that were given, then others like them.
        names: The inputs with rows, and the dimension of these.
        outputs: The paths of the tensors in the output that have rows, in their first dimension.
        count: The number of rows.
        layout: A key of `LAYOUTS`.
        trained: The inputs with rows that require grad in the given call, or all floating ones where none does.
        reference: The layer's own forward.
        given: The sizes of the dimensions of rows in the given call, where rows are several of them.
        lead: The sizes in which rows are arranged, with -1 for one of them; empty where they lie along the first one.
    """

    call: Call
    names: Mapping[str, int]
    outputs: tuple[str, ...]
    count: int
    layout: str = ""
    trained: tuple[str, ...] = ()
    reference: Forward = field(default=lambda *args: None)
    given: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()

    @property
    def unit(self) -> int:
        """The number of rows must be a multiple of this one."""
        return abs(math.prod(self.lead))

    @property
    def width(self) -> int:
        """The number of elements in a row of the first input that has rows."""
        name = next(iter(self.names))
        return self.call.inputs[name].numel() // self.count

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating input, or of the first floating tensor of the module."""
        tensors = (*self.call.inputs.values(), *self.call.tensors.values())
        return next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)

    def of(self, indices: torch.Tensor | slice, fill: float | None = None, kept: torch.Tensor | None = None) -> Call:
        """Return the call with some of the rows, in the order of indices; `fill` replaces those that are not kept."""

        def change(name: str, leaf: Any) -> Any:
            if name not in self.names or not isinstance(leaf, torch.Tensor):
                return leaf
            dim = self.names[name]
            taken = leaf.detach().movedim(dim, 0)[indices].movedim(0, dim).contiguous()
            if fill is not None and kept is not None and taken.is_floating_point():
                taken = taken.clone()
                most = torch.finfo(taken.dtype).max  # of this input, and not of the one that the number is for
                taken.movedim(dim, 0)[~kept] = min(max(fill, -most), most) if math.isfinite(fill) else fill
            if self.lead:
                taken = taken.reshape(*self.lead, *taken.shape[len(self.lead) :])
            taken = LAYOUTS[self.layout](taken) if taken.is_floating_point() else taken
            return taken.requires_grad_(name in self.trained)

        with torch.no_grad(), torch.inference_mode(False):
            return self.call.replaced(change)

    def run(self, forward: Forward, call: Call) -> dict[str, torch.Tensor] | None:
        """Return the outputs of a forward that have rows, by path; None if it does not take the call."""
        with references():  # the layers inside run their references, or they would be judged, too
            run = call.run(forward, gradients=False, mutations=False, parameters=False)
        if run.outputs is NotImplemented:
            return None
        found = tensors_of(run.outputs)
        return {path: found[path] for path in self.outputs}

    def backwards(self, forward: Forward) -> Callable[..., dict[str, torch.Tensor]] | None:
        """Return a function that runs rows forward and backward, each from its own gradient of the outputs.

        It takes the same arguments as `of`, after the rows, and returns gradients of inputs, rows first. None if no
        input gets any.
        """
        pushed: dict[str, torch.Tensor] = {}

        def run(rows: Rows, part: Any, fill: float | None, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
            call = rows.of(part, fill, kept)
            with references(), call.replayed(forward, gradients=True, changes=False) as replay:
                if replay.outputs is NotImplemented:
                    raise NotTaken
                found = tensors_of(replay.outputs)
                outputs = {path: found[path] for path in rows.outputs if found[path].requires_grad}
                for path in outputs if not pushed else ():  # the first run is of all rows
                    generator = torch.Generator("cpu").manual_seed(len(pushed))
                    numbers = torch.randn(found[path].shape, generator=generator, dtype=torch.float32, device="cpu")
                    pushed[path] = numbers.to(found[path].device, found[path].dtype)
                if not outputs:
                    return {}
                sources = [replay.sources[f"input {name}"] for name in rows.trained]
                gradients = [pushed[path][part].reshape(tensor.shape) for path, tensor in outputs.items()]
                arrived = torch.autograd.grad(list(outputs.values()), sources, gradients, allow_unused=True)
            both = zip(rows.trained, arrived, strict=True)
            shapes = {name: rows.call.inputs[name].movedim(rows.names[name], 0).shape[1:] for name in rows.trained}
            return {
                name: (grad if rows.lead else grad.movedim(rows.names[name], 0)).reshape(-1, *shapes[name])
                for name, grad in both
                if grad is not None
            }

        return run if self.trained and run(self, slice(None), None, None) else None

    def mixes(self, count: int) -> bool:
        """Whether the reference computes other numbers for rows in this arrangement, or does not take it."""
        part = slice(count // self.unit * self.unit or self.unit)
        try:
            found, expected = (each.run(self.reference, each.of(part)) for each in (self, replace(self, lead=())))
        except Exception:
            return True
        if found is None or expected is None or any(found[p].numel() != t.numel() for p, t in expected.items()):
            return True
        return not compare({path: found[path].reshape(t.shape) for path, t in expected.items()}, expected).ok

    def in_dtype(self, dtype: torch.dtype) -> Rows:
        """Return the same with everything in another dtype, also the module."""
        return self if dtype is self.dtype else replace(self, call=self.call.converted(self.dtype, dtype))

    def described(self, count: int) -> str:
        """Describe the inputs with a number of rows: `x 3x64 float32`."""
        texts = []
        for name, tensor in self.call.inputs.items():
            shape = list(tensor.shape)
            if name in self.names:
                shape[self.names[name]] = count
                shape[: len(self.lead)] = [count // self.unit if size == -1 else size for size in self.lead]
                dtype = str(tensor.dtype).removeprefix("torch.")
                texts.append(f"{name} {'x'.join(map(str, shape))} {dtype}")
        return ", ".join(texts) + (f" ({self.layout})" if self.layout else "")


@dataclass(frozen=True)
class _Plan:
    names: Mapping[str, int]
    given: int
    before: tuple[int, ...] = ()
    """The dimensions of rows, all of which are made the first one."""

    @property
    def flat(self) -> bool:
        return bool(self.before)


def rows_of(call: Call, reference: Forward) -> Rows | str:
    """Find the rows of a call, by running its reference on fewer of them; or the reason why there are none.

    Rows are all dimensions but the last one of the first floating input, where the reference treats them so;
    else its first dimension, and those of the inputs that have the same size there. Where no floating input has rows,
    they are those of the first one of integers, such as indices into a table.
    """
    inputs = call.inputs
    if any(hasattr(type(tensor), "placements") for tensor in call.tensors.values()):
        return SPREAD
    mains = [n for n, t in inputs.items() if t.is_floating_point() and t.dim() > 1][:1]
    mains += [n for n, t in inputs.items() if t.dtype in _INDICES and t.numel() and t.dim()][:1]
    if not all(inputs[name].numel() for name in mains[:1]):
        return EMPTY
    if not mains:
        return EMPTY if any(not t.numel() for t in inputs.values()) else NO_ROWS
    try:
        call = telling(call)  # on copies: parameters are not copied again for each run
        with references():
            whole = call.run(reference, gradients=False)
    except Exception as error:
        return call.why_failed(error)
    if whole.random:
        return "it draws random numbers, which are others for each number of rows"
    why = "none of its outputs has as many rows as its inputs"
    best: Rows | None = None  # of those with equally many outputs the first, for it is the likeliest
    for main, plan in ((name, plan) for name in mains for plan in _plans(call, name)):
        if best is not None and main != mains[0]:
            break
        tried = _flattened(call, plan) if plan.flat else call
        try:
            found, close = _tried(tried, plan, reference, whole.outputs)
        except Exception:  # not along these dimensions
            continue
        if close and found is not None and (best is None or len(found.outputs) > len(best.outputs)):
            best = found
        elif found is not None and not close:
            why = (
                "its reference computes other numbers for a row where there are fewer rows: they depend on one another"
            )
    if best is None:
        return why
    floating = [name for name in best.names if call.inputs[name].is_floating_point()]
    trained = tuple(name for name in floating if call.inputs[name].requires_grad) or tuple(floating)
    try:
        count = _fitting(best, reference)
        best = replace(best, call=_grown(best, count), count=count, trained=trained)
        some = best.run(reference, best.of(slice(64)))
    except Exception as error:
        return call.why_failed(error)
    return best if some is not None and any(map(are_telling, some.values())) else SILENT


def _plans(call: Call, main: str) -> list[_Plan]:
    """Return the ways in which inputs may have rows, the likeliest first."""
    inputs = call.inputs
    first = inputs[main]
    before, count = first.shape[:-1], first.shape[0]
    plans = []
    if not first.is_floating_point() and first.dim() > 1:  # each index is a row
        alike = {n: 0 for n, t in inputs.items() if t.shape == first.shape and not t.is_floating_point()}
        plans.append(_Plan(alike, first.numel(), first.shape))
    elif first.dim() > 2:
        alike = {n: 0 for n, t in inputs.items() if before in (t.shape[:-1], t.shape)}
        plans.append(_Plan(alike, before.numel(), before))
    last = {
        n: t.dim() - first.dim() for n, t in inputs.items() if t.dim() >= first.dim() and t.shape[-first.dim()] == count
    }
    whole = {n: 0 for n, t in inputs.items() if t.dim() == 1 and not t.is_floating_point() and t.shape[0] == count}
    leading = {n: 0 for n, t in inputs.items() if t.dim() > 1 and t.shape[0] == count}
    for names in ({**last, **whole}, {**leading, **whole}, {main: 0}):
        if all(names != plan.names or plan.flat for plan in plans):
            plans.append(_Plan(names, given=count))
    return plans


def _flattened(call: Call, plan: _Plan) -> Call:
    """Return a call with all dimensions of rows in the first one; the others are kept, with one item."""

    def change(name: str, leaf: Any) -> Any:
        if name not in plan.names:
            return leaf
        ones = [1] * (leaf.dim() - 2)
        last = 1 if leaf.numel() == plan.given else leaf.shape[-1]  # such as labels, one for each row
        return leaf.detach().reshape(-1, *ones, last)

    return call.replaced(change)


def _tried(call: Call, plan: _Plan, reference: Forward, whole: Any) -> tuple[Rows | None, bool]:
    """Return a few rows of a call, None if its outputs have none; and whether one is about the same among fewer."""
    given = Rows(call, plan.names, (), plan.given, reference=reference, given=plan.before)
    rows = replace(given, call=_grown(given, 3), count=3) if plan.given < 3 else given
    shapes = []
    for count in (2, 3):  # an output that happens to have two of something has not three then
        with references():
            part = rows.of(slice(count)).run(reference, gradients=False, mutations=False, parameters=False)
        shapes.append({path: t.shape for path, t in tensors_of(part.outputs).items() if t.dim()})
    paths = tuple(path for path, shape in shapes[0].items() if shape[0] == 2 and shapes[1][path][0] == 3)
    if not paths:
        return None, False
    rows = replace(rows, outputs=paths)
    few, more = (rows.run(reference, rows.of(slice(count))) for count in (2, 3))
    assert few is not None and more is not None
    expected = {path: tensor[:2] for path, tensor in more.items()}
    same = all(few[path].shape == tensor.shape for path, tensor in expected.items())
    close = same and compare(few, expected).ok
    if close and plan.flat:  # a layer that mixes rows of one sequence computes others when each is a sequence
        flat = rows.run(reference, replace(given, outputs=paths).of(slice(None)))
        wanted = {path: tensor for path, tensor in tensors_of(whole).items() if path in paths}
        close = flat is not None and all(flat[p].numel() == t.numel() for p, t in wanted.items())
        close = (
            close and flat is not None and compare({p: flat[p].reshape(t.shape) for p, t in wanted.items()}, wanted).ok
        )
    return rows, close


def _fitting(rows: Rows, reference: Forward) -> int:
    """Return how many rows to try: 4,096, or what memory and time allow."""
    sizes = [t.numel() // t.shape[rows.names[n]] for n, t in rows.call.inputs.items() if n in rows.names]
    device = next(iter(rows.call.inputs.values())).device.type
    most = min(MOST, max(_ELEMENTS.get(device, 2**27) // max(sum(sizes), 1), rows.count))
    some = min(64, rows.count)
    call = rows.of(slice(some))
    taken = float("inf")
    for _ in range(4):  # the first one may compile, and another process may take the time of one
        start = time.perf_counter()
        rows.run(reference, call)
        taken = min(taken, time.perf_counter() - start)
    return max(min(most, int(_SECONDS / max(taken, 1e-9) * some)), min(rows.count, 64))


def _grown(rows: Rows, count: int) -> Call:
    """Return the call with so many rows: those that there are, then others like them."""

    def change(name: str, leaf: Any) -> Any:
        if name not in rows.names or not isinstance(leaf, torch.Tensor):
            return leaf
        dim, leaf = rows.names[name], leaf.detach()
        have = leaf.shape[dim]
        if have >= count:
            return with_own_numbers(leaf.narrow(dim, 0, count).clone(), dim)
        grown = torch.cat([leaf] * -(-count // have), dim).narrow(dim, 0, count).contiguous()
        if grown.is_floating_point():  # each row needs numbers of its own: most rows show nothing
            generator = torch.Generator(grown.device).manual_seed(0)
            factor = torch.rand(grown.shape, generator=generator, device=grown.device).add_(0.5).to(grown.dtype)
            factor.narrow(dim, 0, have).fill_(1)
            grown = grown * factor
        return with_own_numbers(grown, dim)

    with torch.no_grad(), torch.inference_mode(False):
        return rows.call.replaced(change)
